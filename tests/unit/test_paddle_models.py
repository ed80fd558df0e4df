"""Each form of a model that PaddleNLP wrote reads as the model it was made from, for various sizes and ranks."""

import json
import pickle
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bloomlm.checkpoint.paddle.importer import exported_config, find_model, open_model
from bloomlm.checkpoint.paddle.layout import model_cuts
from bloomlm.checkpoint.paddle.model import PADDLE_DTYPES
from bloomlm.checkpoint.safetensors_file import read_header
from bloomlm.checkpoint.tensor_reader import check_entries
from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from tests.paddle_files import CONFIG, State, cut, make_model, paddle_state, variable_names, write

MODEL = make_model()
STATE = paddle_state(MODEL)
EMBEDDING = "bloom.word_embeddings.weight"


def assert_reads_model(directory: Path, config: BloomConfig = CONFIG, model: BloomForCausalLM = MODEL) -> None:
    """Whole tensors and slices along every dimension, bit for bit."""
    assert find_model(directory)
    reader = open_model(directory, config)
    expected = model.state_dict()
    check_entries({name: tuple(tensor.shape) for name, tensor in expected.items()}, reader.entries)
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
        for dim, size in enumerate(tensor.shape):
            start, stop = size // 4, size - size // 3
            bounds = [(0, length) for length in tensor.shape]
            bounds[dim] = (start, stop)
            assert torch.equal(reader.read_box(name, tuple(bounds)), tensor.narrow(dim, start, stop - start)), name


def write_ranks(directory: Path, file_name: str, degree: int, state: State = STATE) -> None:
    for tp_rank in range(degree):
        write(directory / file_name.format(tp_rank), cut(state, degree, tp_rank))


def test_model_cuts_are_the_models_parameters() -> None:
    cuts = model_cuts(CONFIG)
    assert {name: cut.shape for name, cut in cuts.items()} == {n: tuple(p.shape) for n, p in MODEL.named_parameters()}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_single_file(tmp_path: Path, protocol: int) -> None:
    head = {"lm_head.decoder_weight": STATE[EMBEDDING], "StructuredToParameterName@@": variable_names(CONFIG)}
    write(tmp_path / "model_state.pdparams", STATE | head, protocol)
    assert_reads_model(tmp_path)


def test_base_model_without_prefix(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", {name.removeprefix("bloom."): array for name, array in STATE.items()})
    assert_reads_model(tmp_path)


def test_misshapen_head_of_merged_files_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "model_state.pdparams", STATE | {"lm_head.decoder_weight": STATE[EMBEDDING][:33] + 1})
    assert_reads_model(tmp_path)


def test_shards_with_index(tmp_path: Path) -> None:
    write_indexed(tmp_path, "model_state.pdparams", "model_state-{}.pdparams", write)
    assert_reads_model(tmp_path)
    (tmp_path / "model_state-1.pdparams").unlink()
    with pytest.raises(CheckpointError, match=r"missing: model_state-1\.pdparams"):
        find_model(tmp_path)


def write_indexed(directory: Path, name: str, shard_name: str, write_shard: Any) -> None:
    names = list(STATE)
    weight_map = {}
    for shard in range(3):
        part = {n: np.ascontiguousarray(STATE[n]) for n in names[shard::3]}
        write_shard(directory / shard_name.format(shard), part)
        weight_map |= dict.fromkeys(part, shard_name.format(shard))
    (directory / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_safetensors(path: Path, state: State, metadata: Mapping[str, str] | None = None) -> None:
    contiguous = {name: np.ascontiguousarray(array) for name, array in state.items()}
    save_file(contiguous, path, metadata={"format": "np"} if metadata is None else dict(metadata))


def test_safetensors_single_and_sharded(tmp_path: Path) -> None:
    for directory in (tmp_path / "single", tmp_path / "sharded", tmp_path / "no-metadata"):
        directory.mkdir()
    write_safetensors(tmp_path / "single" / "model.safetensors", STATE)
    write_safetensors(tmp_path / "no-metadata" / "model.safetensors", STATE, {})
    write_indexed(tmp_path / "sharded", "model.safetensors", "model-{}.safetensors", write_safetensors)
    for directory in tmp_path.iterdir():
        assert_reads_model(directory)


def test_safetensors_of_uint16_are_bfloat16(tmp_path: Path) -> None:
    half = make_model().bfloat16()
    state = {
        name: (tensor.t() if STATE[name.replace("transformer.", "bloom.")].shape != tuple(tensor.shape) else tensor)
        for name, tensor in half.state_dict().items()
    }
    square = [name for name in state if name.endswith("self_attention.dense.weight")]
    state |= {name: state[name].t() for name in square}
    bits = {n.replace("transformer.", "bloom."): t.contiguous().view(torch.uint16).numpy() for n, t in state.items()}
    write_safetensors(tmp_path / "model.safetensors", bits)
    assert_reads_model(tmp_path, model=half)


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, STATE)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])

    def rewrite(change: Any) -> None:
        text = json.dumps(change).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + struct.unpack("<Q", data[:8])[0] :])

    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="its header says"):
        read_header(path, PADDLE_DTYPES)
    rewrite(header | {EMBEDDING: header[EMBEDDING] | {"shape": [5, 5]}})
    with pytest.raises(CheckpointError, match=r"'shape': \[5, 5\]"):
        read_header(path, PADDLE_DTYPES)
    rewrite(header | {EMBEDDING: header[EMBEDDING] | {"dtype": "F4"}})
    with pytest.raises(CheckpointError, match="a dtype of F64"):
        read_header(path, PADDLE_DTYPES)


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "file_name",
    [
        "model_state.tp{:02d}.pdparams",
        "splits_mp_{0:02d}_sharding_00/model_state_mp_{0:02d}.pdparams",
        "auto_dist{}.pdparams",
    ],
)
def test_tensor_parallel_ranks(tmp_path: Path, file_name: str, degree: int) -> None:
    head = {"lm_head.decoder_weight": STATE[EMBEDDING]}
    write_ranks(tmp_path, file_name, degree, STATE | head)
    if file_name.startswith("splits"):
        write_ranks(tmp_path, file_name.replace("sharding_00", "sharding_01"), degree)
    assert_reads_model(tmp_path)


def halved(state: State, dtype: torch.dtype) -> State:
    """The arrays in half precision; bfloat16 as bits in uint16, because numpy has no such type."""
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in state.items()}
    bits = torch.uint16 if dtype is torch.bfloat16 else dtype
    return {name: tensor.view(bits).numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_head", "degree", "file_name"),
    [
        (12, 1, "model_state.pdparams"),
        (12, 3, "model_state.tp{:02d}.pdparams"),
        (24, 8, "auto_dist{}.pdparams"),
        (5, 5, "splits_mp_{0:02d}_sharding_00/model_state_mp_{0:02d}.pdparams"),
    ],
)
def test_half_precision_and_other_head_counts(
    tmp_path: Path, n_head: int, degree: int, file_name: str, dtype: torch.dtype
) -> None:
    config = BloomConfig(vocab_size=120, hidden_size=4 * n_head, n_layer=3, n_head=n_head)
    model = make_model(config).to(dtype)
    state = halved(paddle_state(make_model(config)), dtype)
    head = {"lm_head.decoder_weight": state[EMBEDDING]}
    write_ranks(tmp_path, file_name, degree, state | head)
    assert_reads_model(tmp_path, config, model)


@pytest.mark.parametrize(("degree", "n_layer"), [(1, 1), (2, 5), (8, 70)])
def test_auto_dist_with_variable_names(tmp_path: Path, degree: int, n_layer: int) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=n_layer, n_head=8)
    model = make_model(config)
    start = {"embedding": 1, "layer_norm": 10, "linear": 98}  # numbers whose text order is not theirs
    names = variable_names(config, start)
    state = {names[name]: array for name, array in paddle_state(model).items()}
    back = {variable: name for name, variable in names.items()}
    for tp_rank in range(degree):
        part = cut({back[variable]: array for variable, array in state.items()}, degree, tp_rank)
        write(tmp_path / f"auto_dist{tp_rank}.pdparams", dict(sorted((names[n], a) for n, a in part.items())))
    assert_reads_model(tmp_path, config, model)


def test_variable_names_of_another_model_are_refused(tmp_path: Path) -> None:
    names = variable_names(CONFIG)
    state = {names[name]: array for name, array in STATE.items()}
    del state["linear_3.w_0"], state["linear_3.b_0"]
    write(tmp_path / "auto_dist0.pdparams", state)
    with pytest.raises(CheckpointError, match="a BLOOM of L blocks has"):
        open_model(tmp_path, CONFIG)


TP_FILE = "model_state.tp{:02d}.pdparams"


def test_missing_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path, TP_FILE, 3)
    (tmp_path / TP_FILE.format(1)).rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"of ranks \[1\] are missing"):
        open_model(tmp_path, CONFIG)
    (tmp_path / "away").rename(tmp_path / TP_FILE.format(1))
    (tmp_path / TP_FILE.format(2)).unlink()
    with pytest.raises(CheckpointError, match=r"each holds 22 of 66 rows of the vocabulary, so there were 3"):
        open_model(tmp_path, CONFIG)
    told = BloomConfig.from_dict(CONFIG.to_dict() | {"tensor_parallel_degree": 3})
    with pytest.raises(CheckpointError, match=r"of 3 tensor-parallel ranks the files of ranks \[2\] are missing"):
        open_model(tmp_path, told)
    write_ranks(tmp_path, TP_FILE, 3)
    told = BloomConfig.from_dict(CONFIG.to_dict() | {"tensor_parallel_degree": 2})
    with pytest.raises(CheckpointError, match=r"says tensor_parallel_degree 2, and there are files of ranks \[2\] too"):
        open_model(tmp_path, told)


def test_absurd_numbers_of_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path, TP_FILE, 2)
    told = BloomConfig.from_dict(CONFIG.to_dict() | {"tensor_parallel_degree": 10**30})
    with pytest.raises(CheckpointError, match=r"the files of ranks \[2, 3, 4, 5, 6, 7, 8, 9\] are missing"):
        open_model(tmp_path, told)
    (tmp_path / TP_FILE.format(1)).rename(tmp_path / TP_FILE.format(10**15))
    with pytest.raises(CheckpointError, match=r"the files of ranks \[1, 2, 3, 4, 5, 6, 7, 8\] are missing"):
        open_model(tmp_path, CONFIG)


def test_ranks_that_disagree(tmp_path: Path) -> None:
    write_ranks(tmp_path, TP_FILE, 2)
    norm = "bloom.h.1.input_layernorm.weight"
    part = cut(STATE, 2, 1)
    write(tmp_path / TP_FILE.format(1), part | {norm: part[norm] + np.float32(0.25)})
    reader = open_model(tmp_path, CONFIG)
    reader.read("transformer.h.0.input_layernorm.weight")
    with pytest.raises(
        CheckpointError, match=r"same transformer\.h\.1\.input_layernorm\.weight.*differs by up to 0.25"
    ):
        reader.read("transformer.h.1.input_layernorm.weight")
    write(tmp_path / TP_FILE.format(1), part | {"bloom.h.0.mlp.dense_h_to_4h.bias": STATE[norm]})
    with pytest.raises(CheckpointError, match=r"dense_h_to_4h\.bias has shape \[24\]; expected \[48\]"):
        open_model(tmp_path, CONFIG)
    write(tmp_path / TP_FILE.format(1), {name: array.astype(np.float16) for name, array in part.items()})
    with pytest.raises(CheckpointError, match=r"is torch\.float32 in .*tp00.* and torch\.float16 in"):
        open_model(tmp_path, CONFIG)
    del part[norm]
    write(tmp_path / TP_FILE.format(1), part)
    with pytest.raises(CheckpointError, match=r"tp01\.pdparams lacks transformer\.h\.1\.input_layernorm\.weight"):
        open_model(tmp_path, CONFIG)


def test_vocabulary_that_ranks_cannot_divide(tmp_path: Path) -> None:
    write_ranks(tmp_path, TP_FILE, 2)
    config = BloomConfig(vocab_size=67, hidden_size=24, n_layer=2, n_head=6)
    with pytest.raises(CheckpointError, match="a vocabulary of 67 and 6 heads cannot be divided among 2"):
        open_model(tmp_path, config)
    config = BloomConfig(vocab_size=66, hidden_size=24, n_layer=2, n_head=3)
    with pytest.raises(CheckpointError, match="3 heads cannot be divided among 2"):
        open_model(tmp_path, config)


def test_a_directory_of_several_forms_warns_which_one_is_read(tmp_path: Path) -> None:
    write_ranks(tmp_path, TP_FILE, 2, {name: array + 1 for name, array in STATE.items()})
    write(tmp_path / "model_state.pdparams", STATE)
    with pytest.warns(UserWarning, match=r"model_state\.pdparams is read, and model_state\.tp\*\.pdparams is not"):
        assert_reads_model(tmp_path)


def test_hugging_face_files_take_priority(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG, MODEL.named_parameters())
    assert not find_model(tmp_path)
    write(tmp_path / "model_state.pdparams", STATE)
    with pytest.warns(UserWarning, match=r"those are read, and model_state\.pdparams is not"):
        assert not find_model(tmp_path)


def test_directory_without_model(tmp_path: Path) -> None:
    assert not find_model(tmp_path)
    with pytest.raises(CheckpointError, match="no model in any of PaddleNLP's forms"):
        open_model(tmp_path, CONFIG)


def test_tensor_in_two_shards_or_with_two_names(tmp_path: Path) -> None:
    write(tmp_path / "a.pdparams", STATE)
    write(tmp_path / "b.pdparams", {"bloom.ln_f.weight": STATE["bloom.ln_f.weight"]})
    index = {"weight_map": {"x": "a.pdparams", "y": "b.pdparams"}}
    (tmp_path / "model_state.pdparams.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"ln_f\.weight is in two of its files"):
        open_model(tmp_path, CONFIG)
    write(tmp_path / "model_state.pdparams", STATE | {"ln_f.weight": STATE["bloom.ln_f.weight"]})
    with pytest.raises(CheckpointError, match=r"holds transformer\.ln_f\.weight twice"):
        open_model(tmp_path, CONFIG)


PADDLE_TYPES = {"float32": 5, "float16": 4, "uint16": 22, "int64": 3}


def serialised(array: np.ndarray, packed: bool = False, levels: int = 0) -> bytes:
    """A tensor as Paddle's SerializeToStream writes it."""

    def varint(value: int) -> bytes:
        out = b""
        while value >= 0x80:
            out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
        return out + bytes([value])

    sizes = [varint(size) for size in array.shape]
    dims = b"\x12" + varint(len(b"".join(sizes))) + b"".join(sizes) if packed else b"".join(b"\x10" + s for s in sizes)
    description = b"\x08" + varint(PADDLE_TYPES[str(array.dtype)]) + dims
    lod = struct.pack("<Q", levels) + (struct.pack("<Q", 16) + bytes(16)) * levels
    start = struct.pack("<I", 0) + lod + struct.pack("<Ii", 0, len(description)) + description
    return start + np.ascontiguousarray(array).tobytes()


def write_program(directory: Path, state: State, info: Mapping[str, Mapping[str, Any]], **options: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = {str(values["structured_name"]): variable for variable, values in info.items()}
    stored = sorted((names[name], array) for name, array in state.items())
    (directory / "bloom.pdiparams").write_bytes(b"".join(serialised(array, **options) for _, array in stored))
    write(directory / "bloom.pdiparams.info", dict(info), 2)


def program_info(prefix: str = "") -> dict[str, dict[str, Any]]:
    names = variable_names(CONFIG, {"linear": 7})
    return {names[name]: {"structured_name": prefix + name, "stop_gradient": False} for name in STATE}


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"levels": 2}], ids=["plain", "packed dimensions", "levels of detail"]
)
def test_exported_program(tmp_path: Path, options: dict[str, Any]) -> None:
    write_program(tmp_path, STATE, program_info(), **options)
    assert_reads_model(tmp_path)


def test_exported_program_names_the_embedding_after_the_head(tmp_path: Path) -> None:
    info = {
        v: n | {"structured_name": n["structured_name"].replace(EMBEDDING, "lm_head.decoder_weight")}
        for v, n in program_info().items()
    }
    state = {name.replace(EMBEDDING, "lm_head.decoder_weight"): array for name, array in STATE.items()}
    write_program(tmp_path, state, info)
    assert_reads_model(tmp_path)


def test_exported_program_of_a_merged_lora(tmp_path: Path) -> None:
    info = program_info("model.")
    state = {f"model.{name}": array for name, array in STATE.items()}
    unused = {"lo_ra_linear_0.w_1": {"structured_name": "model.bloom.h.0.self_attention.query_key_value.lora_A"}}
    write_program(tmp_path, state, info | unused)
    assert_reads_model(tmp_path)
    lora = {unused["lo_ra_linear_0.w_1"]["structured_name"]: STATE["bloom.ln_f.weight"]}
    write_program(tmp_path, state | lora, info | unused)
    with pytest.raises(CheckpointError, match="holds the tensors of a LoRA that was not merged"):
        open_model(tmp_path, CONFIG)


def test_damaged_exports_are_refused(tmp_path: Path) -> None:
    write_program(tmp_path, STATE, program_info())
    path, info = tmp_path / "bloom.pdiparams", tmp_path / "bloom.pdiparams.info"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(CheckpointError, match="cut short"):
        open_model(tmp_path, CONFIG)
    path.write_bytes(b"\x07" + data[1:])
    with pytest.raises(CheckpointError, match="no tensor begins"):
        open_model(tmp_path, CONFIG)
    path.write_bytes(data + serialised(STATE["bloom.ln_f.weight"]))
    with pytest.raises(CheckpointError, match=r"holds 30 tensors and bloom\.pdiparams\.info names 29"):
        open_model(tmp_path, CONFIG)
    shutil.move(info, tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"info is missing: it names the tensors"):
        open_model(tmp_path, CONFIG)


def test_config_of_an_export(tmp_path: Path) -> None:
    write_program(tmp_path, STATE, program_info())
    with pytest.raises(ConfigError, match=r"hidden_size 24, n_layer 2.*number of heads is unknown"):
        exported_config(tmp_path)
    published = {"bloom.word_embeddings.weight": np.zeros((10, 1536), np.float16)}
    published |= {f"bloom.h.{i}.input_layernorm.weight": np.zeros(1536, np.float16) for i in range(24)}
    info = {f"v{i}": {"structured_name": name} for i, name in enumerate(published)}
    write_program(tmp_path, published, info)
    config = exported_config(tmp_path)
    assert (config.vocab_size, config.hidden_size, config.n_layer, config.n_head) == (10, 1536, 24, 16)


def test_opening_the_largest_bloom_reads_little(tmp_path: Path) -> None:
    """70 blocks on 8 ranks, as sparse files: opening and one slice must not read them."""
    config = BloomConfig(vocab_size=250_880, hidden_size=14_336, n_layer=70, n_head=112)
    names = variable_names(config)
    published = model_cuts(config)
    for tp_rank in range(8):
        places = []
        for name, variable in names.items():
            cut_of = published[name.replace("bloom.", "transformer.", 1)]
            shape = cut_of.piece_shape(8)
            places.append((variable, shape[::-1] if name.split(".")[-2].startswith(("query", "dense")) else shape))
        write_sparse(tmp_path / f"auto_dist{tp_rank}.pdparams", places)
    reader = open_model(tmp_path, config)
    entry = reader.entries["transformer.h.69.mlp.dense_4h_to_h.weight"]
    assert entry.shape == (14_336, 57_344) and entry.dtype == torch.bfloat16
    part = reader.read_box("transformer.h.69.self_attention.query_key_value.bias", ((43_000, 43_008),))
    assert part.tolist() == [0] * 8


def write_sparse(path: Path, places: list[tuple[str, tuple[int, ...]]]) -> None:
    """A state dict of bfloat16 zeros that take no room on the disk."""
    with path.open("wb") as file:
        file.write(b"\x80\x04}(")
        for name, shape in places:
            template = pickle.dumps(np.zeros((1,) * len(shape), np.uint16), 4)
            start = template[2 + 9 :]  # after PROTO and FRAME
            before, data, after = start.partition(b"C\x02\x00\x00")
            assert data
            sizes = b"".join(b"J" + struct.pack("<i", size) for size in shape)
            old = b"K\x01\x85" if len(shape) == 1 else b"K\x01K\x01\x86"
            assert before.count(old) == 1
            before = before.replace(old, sizes + (b"\x85" if len(shape) == 1 else b"\x86"))
            file.write(b"X" + struct.pack("<I", len(name)) + name.encode() + before)
            num_bytes = 2 * int(np.prod(shape))
            file.write(b"\x8e" + struct.pack("<Q", num_bytes))
            file.seek(num_bytes, 1)
            file.write(after[:-1])
        file.write(b"u.")
