"""Preference objectives on many ranks compared with one: losses, rewards, evaluation, reference and weights."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import FullTuning
from bloomlm.adapters.lora import LoraConfig
from bloomlm.data.answer_batch import ComparedExample
from bloomlm.data.loader import BatchLoader
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from bloomlm.training.objectives.dpo import Dpo
from bloomlm.training.objectives.kto import Kto
from bloomlm.training.objectives.orpo import Orpo
from bloomlm.training.objectives.preference import PreferenceObjective
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.reference import reference_scores
from bloomlm.training.step import StepConfig, Trainer
from tests.compared_answers import compared_answers, with_references
from tests.distributed.models import CONFIG, Case, assert_close, tiny_model, values
from tests.distributed.pool import RankPool
from tests.distributed.test_training import whole_weights

SETUPS = {
    "tp 2": Degrees(tp=2),
    "dp 2": Degrees(dp_replicate=2),
    "fsdp 2": Degrees(dp_shard=2),
    "tp 2 x fsdp 2": Degrees(tp=2, dp_shard=2),
}
OBJECTIVES: dict[str, PreferenceObjective] = {"dpo": Dpo(beta=0.3), "orpo": Orpo(beta=0.4), "kto": Kto(beta=0.3)}
CASES = {"full": Case(adapter=FullTuning()), "lora": Case(adapter=LoraConfig(r=3))}
LENGTHS = [(3, 9, 4), (5, 2, 6), (1, 4, 4), (6, 12, 1), (2, 2, 3)]
"""Five pairs: with two ranks, the second one has a smaller batch, and in the last step none at all."""


class Answers(list[ComparedExample]):
    """What reference_scores and a loader need."""

    @property
    def lengths(self) -> list[int]:
        return [len(answer.tokens) + len(answer.other.tokens) - 1 for answer in self]


def run(objective: PreferenceObjective, case: Case, degrees: Degrees) -> dict[str, Any]:
    mesh = ALONE if degrees.world_size == 1 else Mesh.over_all_ranks(degrees, "cpu")
    examples = Answers(with_references(compared_answers(CONFIG.vocab_size, LENGTHS), tiny_model(Case())))
    model = tiny_model(case)
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    ranks = {"dp_degree": mesh.degrees.dp, "dp_rank": mesh.dp_rank, "collate": objective.collate}
    trainer = Trainer(
        model,
        BatchLoader(examples, 2 // degrees.dp, shuffle=True, seed=1, **ranks),
        optimizer=AdamWConfig(epsilon=1e-3),
        schedule=ScheduleConfig(learning_rate=0.02).over(10),
        precision=Precision(),
        config=StepConfig(gradient_accumulation_steps=2, max_grad_norm=0.0),
        objective=objective,
        mesh=mesh,
    )
    steps = [values(trainer.run_step()) for _ in range(4)]
    weights = whole_weights(trainer)
    batches = BatchLoader(examples, 2 // degrees.dp, shuffle=False, **ranks)
    evaluation = objective.evaluate(model, batches, Precision(), mesh)
    scores = reference_scores(model, examples, Precision(), mesh)  # type: ignore[arg-type]
    return {"steps": steps, "weights": weights, "evaluation": evaluation, "scores": scores}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_compute_what_one_rank_does(ranks: RankPool, name: str, case: str, setup: str) -> None:
    expected = run(OBJECTIVES[name], CASES[case], Degrees())
    assert len({step["loss"] for step in expected["steps"]}) == 4
    degrees = SETUPS[setup]
    for found in ranks.run(degrees.world_size, run, OBJECTIVES[name], CASES[case], degrees):
        for number, (one, other) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
            if (
                number == 0 and case == "full"
            ):  # the model is its reference: rounding alone decides which answer is ahead
                one, other = ({k: v for k, v in step.items() if k != "ordered"} for step in (one, other))
            assert one.pop("skipped") is other.get("skipped") is None
            assert one == pytest.approx({k: v for k, v in other.items() if k != "skipped"}, rel=2e-5, abs=2e-5)
        assert found["evaluation"] == pytest.approx(expected["evaluation"], rel=2e-5, abs=2e-5)
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-5)
        weights: dict[str, Tensor] = found["weights"]
        assert_close(weights, expected["weights"])
        assert all(torch.isfinite(weight).all() for weight in weights.values())
