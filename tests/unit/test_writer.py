"""Model directories and what makes them appear whole or not at all."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bloomlm.checkpoint.writer import parse_size, write_model
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.files import atomic
from bloomlm.files.atomic import atomic_directory, atomic_write
from tests.tiny_checkpoint import TINY, random_model, write_random_model

EMBEDDING_BYTES = TINY.vocab_size * TINY.hidden_size * 4


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file_holds_every_parameter_as_safetensors_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_random_model(tmp_path, dtype=dtype)
    found = load_file(tmp_path / "model.safetensors")
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in found)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 3)


def test_shards_hold_at_most_their_size_and_the_index_says_where(tmp_path: Path) -> None:
    model = write_random_model(tmp_path, max_shard_size_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in expected.values())
    for shard in shards:
        tensors = load_file(tmp_path / shard)
        assert sum(t.nbytes for t in tensors.values()) <= 40_000
        for name, tensor in tensors.items():
            assert index["weight_map"][name] == shard
            assert torch.equal(tensor, expected.pop(name))
    assert not expected


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    write_random_model(tmp_path, max_shard_size_bytes=1)
    files = [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]
    assert len(files) == len(list(random_model().parameters()))


def test_files_do_not_depend_on_the_order_or_origin_of_tensors(tmp_path: Path) -> None:
    model = random_model()
    for name, tensors in (("a", list(model.named_parameters())), ("b", reversed(list(model.named_parameters())))):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, TINY, tensors, max_shard_size_bytes=40_000)
    assert names_in(tmp_path / "a") == names_in(tmp_path / "b")
    for file in names_in(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_tensors_are_taken_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = [0, 0]  # now, most

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            alive[0] -= 1

    def lazily():
        for name, parameter in random_model().named_parameters():
            tensor = parameter.detach().clone().as_subclass(Counted)
            alive[0] += 1
            alive[1] = max(alive)
            yield name, tensor
            del tensor

    write_model(tmp_path, TINY, lazily(), max_shard_size_bytes=40_000, dtype=torch.float16)
    assert alive[1] <= 3  # the one being written, the generator's, and a converted view of it


def test_strided_tensors_and_conversion(tmp_path: Path) -> None:
    model = random_model()
    strided = [(n, p.detach().t().contiguous().t() if p.dim() == 2 else p) for n, p in model.named_parameters()]
    write_model(tmp_path, TINY, strided, dtype=torch.bfloat16)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[n], p.to(torch.bfloat16)) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("transformer.ln_f.bias"), "1 parameters were not given.*ln_f.bias"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra cannot be written: BLOOM has no parameter"),
        (lambda tensors: tensors.update({"transformer.ln_f.bias": torch.zeros(3)}), r"found shape \[3\].*says \[32\]"),
        (
            lambda tensors: tensors.update({"transformer.ln_f.bias": torch.zeros(32).half()}),
            "it is torch.float16, the first tensor torch.float32",
        ),
        (lambda tensors: tensors.clear(), "there are no tensors"),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, change, message: str) -> None:
    tensors = {name: p.detach() for name, p in random_model().named_parameters()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        write_model(tmp_path, TINY, tensors.items())


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5GiB", 1610612736), ("12", 12), (" 3 kb ", 3000)],
)
def test_parse_size(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0", "0.1"])
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_directory_is_replaced_as_a_whole(tmp_path: Path, monkeypatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    final = tmp_path / "deep" / "model"
    with atomic_directory(final) as directory:
        (directory / "old").write_text("1")
        assert not final.exists()
    with atomic_directory(final) as directory:
        (directory / "new").write_text("2")
        assert names_in(final) == ["old"]
    assert names_in(final) == ["new"]
    assert names_in(final.parent) == ["model"]
    assert final.stat().st_mode & 0o777 == final.parent.stat().st_mode & 0o777  # not a temporary's 0700


def test_exchange_is_what_this_machine_uses(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        directory.mkdir()
        (directory / directory.name).touch()
    if not atomic._exchange(one, other):
        pytest.skip("this system or file system cannot exchange two names")
    assert (names_in(one), names_in(other)) == (["other"], ["one"])


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with atomic_directory(final) as directory:
        (directory / "old").touch()
    with (
        pytest.raises(CheckpointError, match=r"No space left.*what was there before is untouched"),
        atomic_directory(final) as directory,
    ):
        (directory / "half").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), atomic_directory(final) as directory:
        raise KeyboardInterrupt
    assert names_in(final) == ["old"]
    assert names_in(tmp_path) == ["model"]


def test_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch) -> None:
    final = tmp_path / "model"
    with atomic_directory(final) as directory:
        (directory / "old").touch()
    rename = Path.rename

    def fail_from_temporary(self: Path, target: Path) -> Path:
        if self.name.endswith(atomic.TEMPORARY_SUFFIX):
            raise OSError(errno.EIO, "cannot")
        return rename(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_from_temporary)
    with pytest.raises(CheckpointError, match="cannot"), atomic_directory(final):
        pass
    assert names_in(final) == ["old"]


KILLED = """
import os, signal, sys
from pathlib import Path
from bloomlm.files import atomic
final = Path(sys.argv[1])
if sys.argv[2] == "between renames":
    atomic._exchange = lambda one, other: False
    Path.rename, rename = lambda a, b: (rename(a, b), os.kill(os.getpid(), signal.SIGKILL)), Path.rename
with atomic.atomic_directory(final) as directory:
    (directory / "new").touch()
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "between renames"])
def test_killed_writer_leaves_the_old_directory_and_the_next_one_cleans_up(tmp_path: Path, moment: str) -> None:
    final = tmp_path / "checkpoint-1"
    with atomic_directory(final) as directory:
        (directory / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(final), moment], timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert len(names_in(tmp_path)) == 2  # what it was writing is left over
    if moment == "writing":
        assert names_in(final) == ["old"]
    with pytest.raises(RuntimeError), atomic_directory(final):
        raise RuntimeError
    assert names_in(final) == ["old"]
    with atomic_directory(tmp_path / "checkpoint-2"):
        assert names_in(tmp_path) == sorted(["checkpoint-1", *(n for n in names_in(tmp_path) if "checkpoint-2" in n)])
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_half_written_files_of_killed_writers_are_cleaned_away(tmp_path: Path) -> None:
    (tmp_path / f".state.json.0123{atomic.TEMPORARY_SUFFIX}").write_text("ha")
    atomic_write(tmp_path / "state.json", "all")
    assert names_in(tmp_path) == ["state.json"]


def test_a_living_writers_directory_is_not_cleaned_away(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as first:
        (first / "data").touch()
        with atomic_directory(tmp_path / "b"):
            pass
        assert (first / "data").exists()
    assert names_in(tmp_path) == ["a", "b"]


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"), atomic_directory(tmp_path / "file" / "model"):
        pass
    with pytest.raises(CheckpointError, match="is a file; expected a directory"), atomic_directory(tmp_path / "file"):
        pass


def test_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "sub" / "state.json"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_text() == "new"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        atomic_write(path, "newer")
    assert path.read_text() == "new"
    assert names_in(path.parent) == ["state.json"]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Between creation and flock another process may take it for one that a killed writer left behind."""
    flock, removed = fcntl.flock, []

    def lock_late(descriptor: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX and not removed:
            removed.extend(tmp_path.glob(".*.bloomlm-tmp"))
            removed[0].unlink() if kind == "file" else removed[0].rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr("bloomlm.files.atomic.fcntl.flock", lock_late)
    if kind == "file":
        atomic_write(tmp_path / "written", "content")
        assert (tmp_path / "written").read_text() == "content"
    else:
        with atomic_directory(tmp_path / "written") as directory:
            (directory / "file").write_text("content")
        assert (tmp_path / "written" / "file").read_text() == "content"
    assert removed and names_in(tmp_path) == ["written"]


def test_a_living_writers_file_is_not_cleaned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock lasts until the file has its final name."""
    replace = Path.replace

    def clean_first(self: Path, target: Path) -> Path:
        atomic._clean(tmp_path)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", clean_first)
    atomic_write(tmp_path / "written", "content")
    assert (tmp_path / "written").read_text() == "content"


def test_a_file_system_that_became_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    for name in ("touch", "unlink", "replace", "write_bytes"):
        monkeypatch.setattr(Path, name, read_only)
    with pytest.raises(CheckpointError, match=r"written cannot be written.*Read-only file system"):
        atomic_write(tmp_path / "written", "content")
