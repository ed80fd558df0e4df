"""Whole runs, from flags to files, on many ranks compared with one."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.errors import BloomlmError
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.training.step import Trainer
from bloomlm.vocabulary.new_tokens import write_new_tokens
from tests.distributed.pool import RankPool

TWO_BY_TWO = {"tensor_parallel_degree": 2, "sharding_parallel_degree": 2}
LORA = {"lora": True, "r": 2, "target_modules": ("query_key_value", "dense", "dense_4h_to_h")}


def flags(output_dir: Path, data: Path, **changes: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "model_name_or_path": "builtin:tiny",
        "train_file": str(data / "train.jsonl"),
        "eval_file": str(data / "dev.jsonl"),
        "output_dir": str(output_dir),
        "max_steps": 4,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "evaluation_strategy": "steps",
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-4,
        "src_length": 24,
        "tgt_length": 16,
        "disable_tqdm": True,
        "report_to": "none",
        "device": "cpu",
        **changes,
    }
    return TrainingConfig(**values)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    shutil.copytree(resolve_source("builtin:tiny").directory, directory / "model")
    write_new_tokens(directory / "model", range(40, 47))  # some of these tokens occur in the examples
    for name, count in (("train", 22), ("dev", 7)):
        rows = [{"src": f"{number} and {number + 3} make", "tgt": f"{2 * number + 3}"} for number in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(config: TrainingConfig) -> tuple[dict[str, Any] | None, str]:
    """Metrics of the evaluation, or the message of an error."""
    try:
        return finetune(config).eval_metrics, ""
    except BloomlmError as error:
        return None, str(error)


def losses(output_dir: Path) -> dict[int, list[float]]:
    """Step -> those of loss, gradient norm and evaluation loss that were logged."""
    found: dict[int, list[float]] = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], []).extend(
            entry[name] for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy") if name in entry
        )
    return found


def assert_same_losses(found: dict[int, list[float]], expected: dict[int, list[float]]) -> None:
    assert found.keys() == expected.keys()
    for step, numbers in expected.items():
        assert found[step] == pytest.approx(numbers, rel=2e-4), step


@pytest.mark.parametrize(
    "kind",
    [
        {},
        LORA,
        LORA | {"use_dora": True, "use_rslora": True},
        LORA | {"train_new_tokens": True},
        {"prefix_tuning": True, "num_prefix_tokens": 3, "prefix_projection": True},
    ],
)
@pytest.mark.parametrize(("world_size", "degrees"), [(2, {"tensor_parallel_degree": 2}), (4, TWO_BY_TWO)])
def test_a_run_on_ranks_is_that_of_one(
    ranks: RankPool, tmp_path: Path, data: Path, kind: dict[str, Any], world_size: int, degrees: dict[str, int]
) -> None:
    dp = world_size // 2
    if "train_new_tokens" in kind:
        kind = {**kind, "model_name_or_path": str(data / "model")}
    finetune(flags(tmp_path / "one", data, per_device_train_batch_size=4, **kind))
    more = {"per_device_train_batch_size": 4 // dp, **kind, **degrees}
    if "lora" in kind:
        more["merge_weights"] = True
    results = ranks.run(world_size, run, flags(tmp_path / "ranks", data, **more), joins=False)
    assert all(message == "" for _, message in results)
    assert len({metrics["eval_loss"] for metrics, _ in results}) == 1
    assert_same_losses(losses(tmp_path / "ranks"), losses(tmp_path / "one"))
    files = {path.name for path in (tmp_path / "one").iterdir()} | ({"merged"} if "lora" in kind else set())
    assert {path.name for path in (tmp_path / "ranks").iterdir()} == files
    if not kind:
        one, other = (load_model(tmp_path / name) for name in ("one", "ranks"))
        for name, parameter in one.named_parameters():
            torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", [{}, LORA])
def test_resuming_on_other_ranks(ranks: RankPool, tmp_path: Path, data: Path, kind: dict[str, Any]) -> None:
    whole = flags(tmp_path / "whole", data, per_device_train_batch_size=2, **kind, **TWO_BY_TWO)
    ranks.run(4, run, whole, joins=False)
    expected = losses(tmp_path / "whole")
    # half of the steps first, then the rest on two ranks and on one
    for world_size, degrees in ((4, TWO_BY_TWO), (2, {"sharding": "stage3"}), (1, {})):
        output_dir = tmp_path / f"resumed-{world_size}"
        output_dir.mkdir()
        (output_dir / "checkpoint-2").symlink_to(tmp_path / "whole" / "checkpoint-2")
        (output_dir / "metrics.jsonl").write_text((tmp_path / "whole" / "metrics.jsonl").read_text())
        dp = max(1, world_size // degrees.get("tensor_parallel_degree", 1))
        config = flags(output_dir, data, per_device_train_batch_size=4 // dp, **kind, **degrees)
        if world_size == 1:
            finetune(config)
        else:
            assert all(message == "" for _, message in ranks.run(world_size, run, config, joins=False))
        found = losses(output_dir)
        if world_size == 4:
            assert found == expected
        assert_same_losses(found, expected)


def run_until_sigterm(config: TrainingConfig) -> tuple[bool, int]:
    """Only the last rank gets SIGTERM, during its second step."""
    if torch.distributed.is_initialized():
        raise AssertionError("joined already")
    import os

    real = Trainer.run_step

    def run_step(trainer: Trainer) -> Any:
        result = real(trainer)
        if trainer.step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Trainer.run_step = run_step  # type: ignore[method-assign]
    try:
        result = finetune(config)
    finally:
        Trainer.run_step = real  # type: ignore[method-assign]
    return result.interrupted, result.step


def test_sigterm_on_one_rank_stops_and_saves_all(ranks: RankPool, tmp_path: Path, data: Path) -> None:
    config = flags(tmp_path / "run", data, save_steps=100, tensor_parallel_degree=2)
    results = ranks.run(2, run_until_sigterm, config, joins=False)
    assert results == [(True, 2)] * 2
    assert (tmp_path / "run" / "checkpoint-2" / "checkpoint_manifest.json").is_file()


@pytest.mark.parametrize("degrees", [{"sharding": "stage3"}, {"tensor_parallel_degree": 2}, {}])
def test_generating_during_a_run(ranks: RankPool, tmp_path: Path, data: Path, degrees: dict[str, Any]) -> None:
    more = {"do_generation": True, "generate_num": 3}
    finetune(flags(tmp_path / "one", data, per_device_train_batch_size=4, **more))
    dp = 1 if "tensor_parallel_degree" in degrees else 2
    config = flags(tmp_path / "ranks", data, per_device_train_batch_size=4 // dp, **more, **degrees)
    results = ranks.run(2, run, config, joins=False)
    assert all(message == "" for _, message in results)
    assert_same_losses(losses(tmp_path / "ranks"), losses(tmp_path / "one"))
    name = "infer_result.json"
    assert (tmp_path / "ranks" / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor_parallel_degree": 4}, "cannot be divided into groups of 4"),
        ({"sharding": "stage2", "tensor_parallel_degree": 2}, "here is one"),
    ],
)
def test_impossible_degrees(ranks: RankPool, tmp_path: Path, data: Path, degrees: Any, message: str) -> None:
    for _, error in ranks.run(2, run, flags(tmp_path / "run", data, **degrees), joins=False):
        assert message in error
    assert not (tmp_path / "run").exists()
