"""The safe unpickler: it reads what paddle.save writes, refuses everything else, and runs nothing."""

import builtins
import codecs
import os
import pickle
import pickletools
import shutil
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bloomlm.checkpoint.paddle import unpickler
from bloomlm.checkpoint.paddle.state import read_paddle_state, split_tensors
from bloomlm.checkpoint.paddle.unpickler import load_paddle_pickle
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError
from tests.paddle_files import write

PROTOCOLS = (2, 3, 4)


class Calls:
    """Pickles as a call of a global."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def load_bytes(tmp_path: Path, data: bytes) -> Any:
    path = tmp_path / "x.pdparams"
    path.write_bytes(data)
    return load_paddle_pickle(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "u1", "i2", "i4", "i8", "?"])
def test_reads_arrays_of_every_type(tmp_path: Path, protocol: int, dtype: str) -> None:
    array = (np.random.default_rng(0).standard_normal((3, 5, 2)) * 50).astype(dtype)
    content = {"a": array, "f": np.asfortranarray(array), "scalar": np.array(array[0, 0, 0])}
    if protocol == 4:  # below, Python pickles no bytes as a call of bytes, which no tensor of BLOOM's needs
        content["none"] = array[:0]
    loaded = load_paddle_pickle(write(tmp_path / "x.pdparams", content, protocol))
    assert list(loaded) == list(content)
    for name, expected in content.items():
        assert loaded[name].shape == expected.shape
        np.testing.assert_array_equal(loaded[name].read().numpy(), expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_slices_equal_numpys(tmp_path: Path, protocol: int, order: str) -> None:
    array = np.asarray(np.random.default_rng(0).standard_normal((4, 5, 6)), dtype=np.float32, order=order)
    lazy = load_paddle_pickle(write(tmp_path / "x.pdparams", [array], protocol))[0]
    for dim, size in enumerate(array.shape):
        for start, stop in ((0, size), (1, size - 1), (2, 2)):
            expected = np.take(array, range(start, stop), axis=dim)
            np.testing.assert_array_equal(lazy.read_slice(dim, start, stop).numpy(), expected)


def test_text_is_decoded_in_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(256, dtype=np.uint8).view(np.float32).reshape(8, 8)  # every byte, so characters of 1 and 2 bytes
    lazy = load_paddle_pickle(write(tmp_path / "x.pdparams", [array], protocol=2))[0]
    for size in (1, 2, 7, 383):
        monkeypatch.setattr("bloomlm.checkpoint.paddle.lazy.TEXT_BLOCK_BYTES", size)
        assert lazy.read().numpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_uint16_is_bfloat16(tmp_path: Path, protocol: int) -> None:
    values = torch.tensor([1.0, -2.5, 3e38, float("nan"), 1e-40]).bfloat16()
    bits = values.view(torch.int16).numpy().view(np.uint16)
    tensor = load_paddle_pickle(write(tmp_path / "x.pdparams", {"a": bits}, protocol))["a"].read()
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.view(torch.int16), values.view(torch.int16))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reads_plain_values_and_allowed_globals(tmp_path: Path, protocol: int) -> None:
    array = np.ones(2, np.float32)
    content = OrderedDict(
        none=None,
        flags=[True, False],
        numbers=(0, 255, 65535, -1, 2**31, -(2**70), 0.1),
        nested={"weight": Calls(tuple, ("linear_0.w_0", array))},
        shared=[array, array],
    )
    loaded = load_paddle_pickle(write(tmp_path / "x.pdparams", content, protocol))
    assert list(loaded) == list(content)
    for name in ("none", "flags", "numbers"):
        assert loaded[name] == content[name]
    name, value = loaded["nested"]["weight"]
    assert name == "linear_0.w_0" and value.read().tolist() == [1, 1]
    assert loaded["shared"][0] is loaded["shared"][1]


def test_names_beyond_ascii_and_long_texts(tmp_path: Path) -> None:
    array = np.arange(40_000, dtype=np.int32)  # its text in protocol 2 is longer than any name may be
    content = {"größe": array, "数": "值"}
    loaded = load_paddle_pickle(write(tmp_path / "x.pdparams", content, 2))
    assert list(loaded) == list(content) and loaded["数"] == "值"
    np.testing.assert_array_equal(loaded["größe"].read().numpy(), array)


def test_opening_reads_no_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pdparams", {"a": np.zeros(1000, np.float32), "b": np.ones(4, np.float32)})
    loaded = load_paddle_pickle(path)
    changed = path.read_bytes().replace(np.ones(4, np.float32).tobytes(), np.full(4, 7, np.float32).tobytes())
    with path.open("r+b") as file:  # the same file, other bytes
        file.write(changed)
    assert loaded["b"].read().tolist() == [7, 7, 7, 7]
    assert isinstance(loaded["a"], LazyTensor)


def test_a_slice_reads_its_bytes_only(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = write(tmp_path / "x.pdparams", [array])
    lazy = load_paddle_pickle(path)[0]
    offset = path.read_bytes().index(array.tobytes())
    with path.open("r+b") as file:  # cut off within the last row
        file.truncate(offset + 11 * 4)
    assert lazy.read_slice(0, 0, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert lazy.read_slice(1, 1, 3).tolist() == [[1, 2], [5, 6], [9, 10]]
    with pytest.raises(CheckpointError, match="ended at byte"):
        lazy.read()


HOSTILE = [
    (os.system, ("touch {mark}",), "system"),
    (eval, ("__import__('pathlib').Path(r'{mark}').touch()",), "eval"),
    (exec, ("open(r'{mark}', 'w')",), "exec"),
    (builtins.__import__, ("os",), "__import__"),
    (getattr, ("", "join"), "getattr"),
    (shutil.rmtree, ("{mark}",), "shutil.rmtree"),
    (np.load, ("x",), "load"),
    (codecs.decode, (b"", "latin1"), "decode"),
    (Fraction, (1, 2), "fractions.Fraction"),
    (bytes, (), "bytes"),
    (np.float64, (0.5,), "numpy.float64"),
]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(("function", "arguments", "name"), HOSTILE, ids=[name for *_, name in HOSTILE])
def test_other_globals_are_refused_by_name(
    tmp_path: Path, protocol: int, function: Any, arguments: tuple[Any, ...], name: str
) -> None:
    mark = tmp_path / "it-ran"
    told = tuple(a.format(mark=mark) if isinstance(a, str) else a for a in arguments)
    hidden = {"a": np.ones(2, np.float32), "b": [Calls(function, *told)]} if protocol > 1 else Calls(function, *told)
    if protocol == 5:
        hidden = Calls(function, *told)
    path = write(tmp_path / "x.pdparams", hidden, protocol)
    with pytest.raises(CheckpointError, match=f"{name}, which a state dict does not need") as raised:
        load_paddle_pickle(path)
    assert str(path) in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x02(cos\nsystem\nX\x02\x00\x00\x00lso.", "os.system"),
        (b"\x80\x04K\x01K\x02\x93.", "1.2, which a state dict does not need"),
        (b"\x80\x02P1\n.", "PERSID"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "called in a way"),
        (b"\x80\x02cnumpy\nndarray\n.", "Global stands where a value is expected"),
        (b"\x80\x04\x8c\x02osb.", "empty stack"),
        (b"\x80\x02}}b.", "does not fit a dict"),
        (b"\x80\x02}]\x85R.", "a dict is called"),
        (b"\x80\x02h\x05.", "never remembered"),
        (b"\x80\x02(.", "empty stack"),
        (b"\x80\x02t.", "mark that is not there"),
        (b"\x80\x02]]}s.", "not a dict"),
        (b"\x80\x02}]Ns.", "a dict has a key of type list"),
        (b"\x80\x02NNa.", "not a list"),
        (b"\x80\x02NN.", "values left over"),
        (b"\x80\x03C\x01x.", "Span stands where a value is expected"),
        (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "not UTF-8"),
        (b"\xff", "not a pickle opcode"),
        (b"", "cut short"),
        (b"\x80", "cut short"),
        (b"\x80\x04\x95\x10", "cut short"),
        (b"\x80\x02X\xff\xff\xff\xff.", "cut short"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\xffx", "cut short"),
        (b"\x80\x02cnumpy", "cut short"),
    ],
)
def test_damaged_pickles_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_bytes(tmp_path, data)


@pytest.mark.parametrize("protocol", [0, 1, 5])
def test_other_protocols_are_refused(tmp_path: Path, protocol: int) -> None:
    with pytest.raises(CheckpointError, match=f"protocol {protocol if protocol == 5 else 0} where paddle.save writes"):
        load_bytes(tmp_path, pickle.dumps({"epoch": 1}, protocol))
    with pytest.raises(CheckpointError, match="no such pickle protocol"):
        load_bytes(tmp_path, b"\x80\x63N.")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_cut_of_a_file_is_refused(tmp_path: Path, protocol: int) -> None:
    content = {"a": np.arange(6, dtype=np.float32), "b": (1, 2.0, "x"), "c": Calls(tuple, ("n", np.ones(1)))}
    data = pickle.dumps(content, protocol)
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            load_bytes(tmp_path, data[:length])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_changed_bytes_never_do_worse_than_an_error(tmp_path: Path, protocol: int) -> None:
    data = bytearray(pickle.dumps({"a": np.arange(6, dtype=np.float32), "b": [1, "x"]}, protocol))
    for place in range(len(data)):
        for value in (0x28, 0x52, 0xFF):
            changed = bytes(data[:place]) + bytes([value]) + bytes(data[place + 1 :])
            try:
                loaded = load_bytes(tmp_path, changed)
                if isinstance(loaded, dict) and isinstance(loaded.get("a"), LazyTensor):
                    loaded["a"].read()
            except CheckpointError:
                pass


def array_pickle(shape: bytes, data: bytes = b"C\x08" + bytes(8), code: bytes = b"f4", order: bytes = b"<") -> bytes:
    """A pickle of one array, its parts given as opcodes."""
    dtype = b"cnumpy\ndtype\nX\x02\0\0\0" + code + b"\x89\x88\x87R(K\x03X\x01\0\0\0" + order
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    start = b"\x80\x03cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R"
    return start + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (array_pickle(b"K\x03\x85"), r"shape \[3\] .* needs 12 bytes and has 8"),
        (array_pickle(b"K\x01\x85"), r"needs 4 bytes and has 8"),
        (array_pickle(b"J\xff\xff\xff\xff\x85"), r"an array of shape \[-1\]"),
        (array_pickle(b"\x88\x85"), r"an array of shape \[True\]"),
        (array_pickle(b"\x8a\x05\0\0\0\0\x01\x8a\x05\0\0\0\0\x01\x86"), "needs 73786976294838206464 bytes"),
        (array_pickle(b"\x8a\x09\0\0\0\0\0\0\0\0\x01\x85"), "an array of shape"),
        (array_pickle(b"(" + 33 * b"K\x01" + b"t"), "an array of shape"),
        (array_pickle(b"K\x02\x85", code=b"O8"), "numpy type 'O8'"),
        (array_pickle(b"K\x02\x85", order=b">"), "byte order '>'"),
        (array_pickle(b"K\x02\x85", data=b"N"), "does not fit a NdArray"),
    ],
)
def test_absurd_arrays_are_refused(tmp_path: Path, pickled: bytes, message: str) -> None:
    assert load_bytes(tmp_path, array_pickle(b"K\x02\x85")).read().tolist() == [0, 0]
    with pytest.raises(CheckpointError, match=message):
        load_bytes(tmp_path, pickled)


def test_an_array_without_a_state_is_refused(tmp_path: Path) -> None:
    cut = array_pickle(b"K\x02\x85").partition(b"(K\x01")[0]
    with pytest.raises(CheckpointError, match="NdArray stands where a value is expected"):
        load_bytes(tmp_path, cut + b".")


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="more than 1000 opcodes"):
        patch.setattr(unpickler, "MAX_OPCODES", 1000)
        load_bytes(tmp_path, b"\x80\x02" + b"]" * 1001 + b".")
    with pytest.raises(CheckpointError, match="nested deeper"):
        load_bytes(tmp_path, b"\x80\x02" + b"N" + b"\x85" * 100_000 + b".")
    inside_itself: dict[str, Any] = {}
    inside_itself["me"] = inside_itself
    with pytest.raises(CheckpointError, match="inside themselves"):
        load_paddle_pickle(write(tmp_path / "x.pdparams", inside_itself))
    with pytest.raises(CheckpointError, match="tuple is called in a way"):
        load_paddle_pickle(write(tmp_path / "x.pdparams", Calls(tuple, [0] * 1000)))


def test_doubling_lists_take_no_memory(tmp_path: Path) -> None:
    laughs: list[Any] = ["ha"] * 100
    for _ in range(6):
        laughs = [laughs] * 100  # 10 ** 14 leaves
    loaded = load_paddle_pickle(write(tmp_path / "x.pdparams", laughs))
    assert loaded[0][0][0] is loaded[1][2][3]


def test_every_opcode_is_read_or_refused(tmp_path: Path) -> None:
    for opcode in pickletools.opcodes:
        with pytest.raises(CheckpointError):
            load_bytes(tmp_path, b"\x80\x02" + opcode.code.encode("latin-1"))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_paddle_pickle(tmp_path / "x.pdparams")


def big_tensor(pieces: list[np.ndarray], shape: Any) -> dict[str, Any]:
    names = [f"w@@.{i}" for i in range(len(pieces))]
    info = {"w": {"OriginShape": shape, "slices": names}}
    return {"b": np.ones(1, np.float32), **dict(zip(names, pieces, strict=True)), "UnpackBigParamInfor@@": info}


@pytest.mark.parametrize("protocol", (2, 3))
def test_pieces_of_big_tensors_are_joined(tmp_path: Path, protocol: int) -> None:
    array = np.arange(42, dtype=np.float32).reshape(6, 7)
    pieces = [array.flatten()[i : i + 16] for i in range(0, 42, 16)]
    state = read_paddle_state(write(tmp_path / "x.pdparams", big_tensor(pieces, array.shape), protocol))
    assert sorted(state.tensors) == ["b", "w"] and not state.values
    np.testing.assert_array_equal(state.tensors["w"].read().numpy(), array)
    np.testing.assert_array_equal(state.tensors["w"].read_slice(0, 2, 5).numpy(), array[2:5])
    np.testing.assert_array_equal(state.tensors["w"].read_slice(1, 3, 5).numpy(), array[:, 3:5])


def test_wrong_pieces_are_refused(tmp_path: Path) -> None:
    pieces = [np.zeros(4, np.float32), np.zeros(3, np.float32)]
    with pytest.raises(CheckpointError, match="its pieces hold 7"):
        read_paddle_state(write(tmp_path / "x.pdparams", big_tensor(pieces, (2, 4)), 2))
    content = big_tensor(pieces, (7,))
    del content["w@@.1"]
    with pytest.raises(CheckpointError, match="pieces of w are missing"):
        read_paddle_state(write(tmp_path / "x.pdparams", content, 2))


def test_state_sorts_tensors_names_and_values(tmp_path: Path) -> None:
    array = np.arange(3, dtype=np.float32)
    content = {
        "plain": array,
        "pair": Calls(tuple, ("linear_0.b_0", array + 1)),
        "LR_Scheduler": {"last_epoch": 3},
        "master_weights": {"linear_0.w_0": Calls(tuple, ("linear_0.w_0_fp32_master_0", array + 2))},
        "StructuredToParameterName@@": {"plain": "linear_0.w_0"},
    }
    state = read_paddle_state(write(tmp_path / "x.pdparams", content))
    assert {name: tensor.read().tolist() for name, tensor in state.tensors.items()} == {
        "plain": [0, 1, 2],
        "pair": [1, 2, 3],
    }
    assert state.variable_names == {"plain": "linear_0.w_0", "pair": "linear_0.b_0"}
    assert state.values["LR_Scheduler"] == {"last_epoch": 3}
    assert split_tensors(state.values["master_weights"])[0]["linear_0.w_0"].read().tolist() == [2, 3, 4]


def test_anything_but_a_state_dict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a list"):
        read_paddle_state(write(tmp_path / "x.pdparams", [1]))
