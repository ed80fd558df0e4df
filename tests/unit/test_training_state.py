"""checkpoint-N directories: what comes back, what counts as complete, what a full disk leaves."""

import errno
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bloomlm.checkpoint import training_state
from bloomlm.checkpoint.training_state import (
    MANIFEST_FILE,
    checkpoint_directory,
    checkpoint_step,
    complete_checkpoints,
    find_damage,
    load_training_state,
    newest_checkpoint,
    prune_checkpoints,
    save_training_state,
)
from bloomlm.errors import CheckpointError, ConfigError


def some_tensors(scale: float = 1.0) -> dict[str, Tensor]:
    return {
        "optimizer/h.0.weight/exp_avg": torch.arange(6.0).view(2, 3) * scale,
        "optimizer/h.0.weight/step": torch.tensor(7.0) * scale,
        "learned/h.0.weight": torch.tensor([0.1, -3.0]).bfloat16() * scale,
        "random_state": torch.get_rng_state(),
    }


def save(output_dir: Path, step: int) -> Path:
    with checkpoint_directory(output_dir, step) as directory:
        (directory / "adapter").mkdir()
        (directory / "adapter" / "weights.bin").write_bytes(b"w" * 100)
        save_training_state(directory, some_tensors(step), {"step": step, "data": {"epoch": 1}})
    return output_dir / f"checkpoint-{step}"


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_what_was_saved_comes_back_in_place(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    into = {name: torch.zeros_like(t) for name, t in some_tensors().items()}
    storage = into["optimizer/h.0.weight/exp_avg"].data_ptr()
    assert load_training_state(checkpoint, into) == {"step": 3, "data": {"epoch": 1}}
    for name, expected in some_tensors(3).items():
        assert into[name].dtype is expected.dtype and torch.equal(into[name], expected), name
    assert into["optimizer/h.0.weight/exp_avg"].data_ptr() == storage
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"h\.1\.weight"):
        load_training_state(checkpoint, {"optimizer/h.1.weight/step": torch.zeros(())})
    with pytest.raises(CheckpointError, match=r"\[2, 3\].*\[3, 3\]"):
        load_training_state(checkpoint, {"optimizer/h.0.weight/exp_avg": torch.zeros(3, 3)})
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(CheckpointError, match="holds no training state"):
        load_training_state(tmp_path / "checkpoint-9", {})


def test_newest_is_by_number(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent") is None
    assert newest_checkpoint(tmp_path) is None
    for step in (10, 9, 100):
        save(tmp_path, step)
    (tmp_path / "checkpoint-200.old").mkdir()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert [checkpoint_step(c) for c in complete_checkpoints(tmp_path)] == [9, 10, 100]
    with pytest.raises(ConfigError, match="checkpoint-STEP"):
        checkpoint_step(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "bad manifest"])
def test_a_damaged_newest_falls_back_with_a_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    assert find_damage(newest) is None
    weights, manifest = newest / "adapter" / "weights.bin", newest / MANIFEST_FILE
    if damage == "truncated":
        os.truncate(weights, 40)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert "checkpoint-2 is skipped" in caplog.text
    if damage == "truncated":
        assert "adapter/weights.bin has 40 bytes, expected 100" in caplog.text


def test_saving_again_replaces(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 2)
    os.truncate(checkpoint / "adapter" / "weights.bin", 40)
    assert save(tmp_path, 2) == newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (1, None, [5]),
        (2, None, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (1, 2, [2, 5]),
        (2, 2, [2, 5]),
        (3, 2, [2, 4, 5]),
        (2, 5, [4, 5]),
    ],
)
def test_pruning_keeps_the_newest_and_the_best(limit: int, best: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, limit, None if best is None else tmp_path / f"checkpoint-{best}")
    assert names(tmp_path) == [f"checkpoint-{step}" for step in kept]


def test_a_damaged_checkpoint_does_not_count_as_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoint-3" / MANIFEST_FILE).unlink()
    prune_checkpoints(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    with pytest.raises(ConfigError, match="save_total_limit is 0"):
        prune_checkpoints(tmp_path, 0)


@contextmanager
def files_at_most(num_bytes: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk, with EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_bytes", [50, 4000])
def test_a_full_disk_leaves_the_last_good_checkpoint(num_bytes: int, tmp_path: Path) -> None:
    """The room ends in the caller's file (100 bytes) or in the tensors (8 kB)."""
    save(tmp_path, 1)
    with files_at_most(num_bytes), pytest.raises(CheckpointError, match=r"checkpoint-2.*File too large"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-1"]
    into = {name: torch.zeros_like(t) for name, t in some_tensors().items()}
    load_training_state(tmp_path / "checkpoint-1", into)
    assert torch.equal(into["learned/h.0.weight"], some_tensors(1)["learned/h.0.weight"])


def test_no_space_when_syncing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-1" and names(tmp_path) == ["checkpoint-1"]


def test_an_unwritable_place_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/checkpoint-2 cannot be written"):
        save(tmp_path / "file", 2)
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path, 2)


def test_killed_while_removing_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoints(tmp_path, 1)
    monkeypatch.undo()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-2"]
    save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
