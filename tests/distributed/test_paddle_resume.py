"""Ranks go on from PaddleNLP's checkpoints as one process does, whatever ranks wrote them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bloomlm.checkpoint.paddle.importer import read_run
from bloomlm.data.loader import BatchLoader
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.results import History
from bloomlm.training.resume import ResumePoint, restore_resume_point
from bloomlm.training.step import StepConfig, Trainer
from tests.distributed.models import Case, assert_close, some_examples, values
from tests.distributed.pool import RankPool
from tests.distributed.test_training import assert_equal_results, whole_weights
from tests.paddle_files import make_model
from tests.unit.test_paddle_finetune import (
    CONFIG,
    LORA,
    PREFIX,
    STEP,
    flags,
    losses,
    write_full,
    write_lora,
    write_material,
    write_prefix,
)

SETUPS = {"tp 2": Degrees(tp=2), "fsdp 2": Degrees(dp_shard=2), "tp 2 x fsdp 2": Degrees(tp=2, dp_shard=2)}
WRITERS = {"full": write_full, "lora": write_lora, "prefix": write_prefix}


def go_on(checkpoint: Path, degrees: Degrees) -> tuple[list[dict[str, Any]], dict[str, Tensor], dict[str, Tensor]]:
    """Two steps: results, and the weights before and after them."""
    mesh = ALONE if degrees.world_size == 1 else Mesh.over_all_ranks(degrees, "cpu")
    state = read_run(checkpoint, CONFIG)
    model = make_model(CONFIG)
    cut_model(model, mesh)
    if state.adapter is not None:
        state.adapter.install(model)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    batches = BatchLoader(
        some_examples(), 4 // degrees.dp, shuffle=True, seed=1, dp_degree=degrees.dp, dp_rank=mesh.dp_rank
    )
    trainer = Trainer(
        model,
        batches,
        optimizer=AdamWConfig(epsilon=Case().epsilon),
        schedule=ScheduleConfig(learning_rate=0.02).over(10),
        precision=Precision(),
        config=StepConfig(),
        mesh=mesh,
    )
    resume_point = ResumePoint(checkpoint=checkpoint, imported=state, recorded_adapter=state.adapter)
    restore_resume_point(trainer, History(max_steps=10, num_train_epochs=1), resume_point)
    before = whole_weights(trainer)
    results = [values(trainer.run_step()) for _ in range(2)]
    return results, before, whole_weights(trainer)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("kind", WRITERS)
def test_ranks_go_on_as_one_does(ranks: RankPool, tmp_path: Path, kind: str, setup: str) -> None:
    WRITERS[kind](tmp_path, 3)
    results, before, after = go_on(tmp_path, Degrees())
    assert results[0]["step"] == STEP + 1
    for found, found_before, found_after in ranks.run(SETUPS[setup].world_size, go_on, tmp_path, SETUPS[setup]):
        assert_close(found_before, before, 0.0)
        assert_equal_results(found, results)
        assert_close(found_after, after, 1e-4)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("degrees", [{"tensor_parallel_degree": 2}, {"sharding": "stage3"}])
def test_the_command_goes_on_too(ranks: RankPool, tmp_path: Path, kind: str, degrees: dict[str, Any]) -> None:
    material = write_material(tmp_path)
    options: dict[str, Any] = {"full": {}, "lora": LORA, "prefix": PREFIX}[kind] | {"adam_epsilon": 1e-4}
    checkpoint, one, many = (tmp_path / name for name in ("checkpoint-3", "one", "many"))
    WRITERS[kind](checkpoint, 3)
    finetune(flags(material, checkpoint, one, per_device_train_batch_size=4, **options))
    more = {"per_device_train_batch_size": 4 if "tensor_parallel_degree" in degrees else 2, **options, **degrees}
    config = flags(material, checkpoint, many, **more)
    ranks.run(2, run, config, joins=False)
    assert losses(many) == pytest.approx(losses(one), rel=2e-4)
    path = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    expected, found = load_file(one / path), load_file(many / path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=5e-5)
    # on one process from the ranks' own checkpoint
    for step in (5, 6):
        shutil.rmtree(many / f"checkpoint-{step}")
    finetune(flags(material, checkpoint, many, per_device_train_batch_size=4, **options))
    assert losses(many) == pytest.approx(losses(one), rel=2e-4)


def run(config: TrainingConfig) -> None:
    finetune(config)
