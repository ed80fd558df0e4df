"""Losses and gradients of DPO, ORPO and KTO equal TRL's (1.16.0) on the same answers and weights.

TRL is no dependency of the tests; without it they are skipped. To run them: pip install trl, then this file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.data.answer_batch import ComparedExample
from bloomlm.data.example import Example
from bloomlm.training.objectives.dpo import Dpo
from bloomlm.training.objectives.kto import Kto
from bloomlm.training.objectives.orpo import Orpo
from bloomlm.training.objectives.preference import PreferenceObjective
from bloomlm.training.precision import Precision
from tests.compared_answers import compared_answers, with_references
from tests.parity.conftest import make_pair

pytest.importorskip("trl")

from datasets import Dataset
from transformers import AutoTokenizer, BloomForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TINY = Path(__file__).parents[2] / "bloomlm" / "assets" / "tiny"
TOLERANCE = 1e-5


def options(directory: Path, beta: float) -> dict[str, Any]:
    common = {"output_dir": str(directory), "report_to": [], "use_cpu": True, "bf16": False, "beta": beta}
    return {**common, "gradient_checkpointing": False, "per_device_train_batch_size": 6, "max_length": None}


def ids(example: Example) -> tuple[list[int], list[int]]:
    """The prompt and the answer."""
    return example.prompt_tokens.tolist(), example.tokens[example.num_source_tokens :].tolist()


def dpo(directory: Path, model: Any, reference: Any, examples: Sequence[ComparedExample]) -> Tensor:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 6
    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(**options(directory, 0.3)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(TINY),
    )
    batch = trainer.data_collator(
        [{"prompt_ids": ids(e)[0], "chosen_ids": ids(e)[1], "rejected_ids": ids(e.other)[1]} for e in examples]
    )
    loss: Tensor = trainer.compute_loss(model, batch)
    return loss


def kto(directory: Path, model: Any, reference: Any, examples: Sequence[ComparedExample]) -> Tensor:
    rows = [{"prompt": "a", "completion": "b", "label": index % 2 == 0} for index in range(6)]
    trainer = KTOTrainer(
        model,
        reference,
        args=KTOConfig(**options(directory, 0.3), desirable_weight=1.5, undesirable_weight=0.5),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(TINY),
    )
    batch = trainer.data_collator(
        [
            {
                "prompt_ids": ids(e)[0],
                "completion_ids": ids(e)[1],
                "KL_completion_ids": ids(e.other)[1],
                "label": e.is_desirable,
            }
            for e in examples
        ]
    )
    loss: Tensor = trainer.compute_loss(model, batch)
    return loss


def orpo(directory: Path, model: Any, reference: Any, examples: Sequence[ComparedExample]) -> Tensor:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 6
    trainer = ORPOTrainer(
        model,
        args=ORPOConfig(**options(directory, 0.4)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(TINY),
    )
    columns: list[dict[str, list[int]]] = []
    for example in examples:
        row: dict[str, Any] = {}
        for name, answer in (("chosen", example), ("rejected", example.other)):
            prompt, completion = ids(answer)
            row[f"{name}_input_ids"] = prompt + completion
            row[f"{name}_attention_mask"] = [1] * len(answer.tokens)
            row[f"{name}_labels"] = [-100] * len(prompt) + completion
        columns.append(row)
    loss: Tensor = trainer.get_batch_loss_metrics(model, trainer.data_collator(columns))[0]
    return loss


Theirs = Callable[[Path, Any, Any, Sequence[ComparedExample]], Tensor]
OBJECTIVES: dict[str, tuple[PreferenceObjective, Theirs]] = {
    "dpo": (Dpo(beta=0.3), dpo),
    "orpo": (Orpo(beta=0.4), orpo),
    "kto": (Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5), kto),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_all_gradients(name: str, tmp_path: Path) -> None:
    objective, compute = OBJECTIVES[name]
    theirs, ours = make_pair()
    their_reference, our_reference = nearby(theirs, ours)
    examples = with_references(compared_answers(101), our_reference)
    expected = compute(tmp_path, theirs, their_reference, examples)
    expected.backward()  # type: ignore[no-untyped-call]

    batch = objective.collate(examples)
    step_sums = objective.step_sums(ours, [batch], Precision())
    found = objective.batch_loss(ours.train(), batch, Precision(), step_sums=step_sums).loss
    found.backward()  # type: ignore[no-untyped-call]
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=TOLERANCE)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, p in ours.named_parameters() if p.grad is not None}
    for parameter_name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        theirs_grad = gradients[parameter_name]
        error = (parameter.grad - theirs_grad).abs().max() / theirs_grad.abs().max()
        assert error < TOLERANCE, f"{parameter_name}: relative error {error:.2e}"


def nearby(theirs: BloomForCausalLM, ours: Any) -> tuple[BloomForCausalLM, Any]:
    """The same reference model in both, a little away from the model that learns."""
    their_reference, our_reference = make_pair()
    with torch.no_grad():
        for model in (their_reference, our_reference):
            for parameter in model.parameters():
                parameter.mul_(0.98)
    return their_reference, our_reference
