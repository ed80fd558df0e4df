"""DPO, ORPO and KTO on packed answers against their formulas, answer by answer on whole logits: loss and gradients."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter, FullTuning
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.data.answer_batch import ComparedExample, collate_pairs
from bloomlm.data.loader import BatchLoader
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE
from bloomlm.training.objectives.dpo import Dpo
from bloomlm.training.objectives.kto import Kto
from bloomlm.training.objectives.orpo import Orpo
from bloomlm.training.objectives.preference import PreferenceObjective, score_answers
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer
from tests.compared_answers import compared_answers, dpo_loss, kto_loss, orpo_loss, with_references
from tests.distributed.models import Case, assert_close, tiny_model

Oracle = Callable[[BloomForCausalLM, Sequence[ComparedExample]], Tensor]
OBJECTIVES: dict[str, tuple[PreferenceObjective, Oracle]] = {
    "dpo": (Dpo(beta=0.3), lambda m, e: dpo_loss(m, e, 0.3)),
    "conservative dpo": (Dpo(beta=0.3, label_smoothing=0.2), lambda m, e: dpo_loss(m, e, 0.3, 0.2)),
    "orpo": (Orpo(beta=0.4), lambda m, e: orpo_loss(m, e, 0.4)),
    "kto": (
        Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
        lambda m, e: kto_loss(m, e, 0.3, 1.5, 0.5),
    ),
}
ADAPTERS: dict[str, Adapter] = {
    "full": FullTuning(),
    "lora": LoraConfig(r=3),
    "lora with rows": LoraConfig(r=3, trained_tokens=(47, 5, 20, 3)),
    "dora": DoraConfig(r=3),
    "prefix": PrefixConfig(num_prefix_tokens=3),
}


def models(adapter: Adapter) -> tuple[BloomForCausalLM, list[ComparedExample]]:
    """A float64 model that learns, and answers with log-probabilities under another one."""
    model = tiny_model(Case(adapter=adapter)).double()
    reference = tiny_model(Case()).double()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(0.95)
    return model, with_references(compared_answers(model.config.vocab_size), reference)


def gradients(model: BloomForCausalLM) -> dict[str, Tensor]:
    found = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def loss_and_gradients(
    objective: PreferenceObjective, model: BloomForCausalLM, examples: Sequence[ComparedExample], sizes: Sequence[int]
) -> tuple[float, dict[str, Tensor]]:
    """Of one step with microbatches of these sizes."""
    model.train()
    pieces = [list(examples[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    batches = [objective.collate(piece) for piece in pieces]
    step_sums = objective.step_sums(model, batches, Precision())
    total = 0.0
    for batch in batches:
        result = objective.batch_loss(model, batch, Precision(), step_sums=step_sums, loss_scale=8.0)
        result.loss.backward()
        total += float(result.loss.detach()) / 8.0
    return total, {name: gradient / 8.0 for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("sizes", [[6], [2, 3, 1], [6, 0]], ids=["one batch", "three", "one without answers"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_the_formula(name: str, adapter: str, sizes: list[int]) -> None:
    objective, oracle = OBJECTIVES[name]
    model, examples = models(ADAPTERS[adapter])
    loss, found = loss_and_gradients(objective, model, examples, sizes)
    expected_loss = oracle(model, examples)
    expected_loss.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(expected_loss.detach()), rel=1e-10)
    assert_close(found, gradients(model), 1e-6)  # DoRA keeps norms in float32


def test_no_answer_sees_another_one_of_its_batch() -> None:
    model, examples = models(FullTuning())
    changed = dataclasses.replace(examples[0], tokens=examples[0].tokens[::-1].copy())
    with torch.no_grad():
        first, second = (
            score_answers(model, collate_pairs([pair, *examples[1:]]), Precision()).answers
            for pair in (examples[0], changed)
        )
    assert first[0] != second[0]
    torch.testing.assert_close(first[1:], second[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_evaluation_is_the_loss_of_all_answers_whatever_the_batches(name: str) -> None:
    objective, oracle = OBJECTIVES[name]
    model, examples = models(FullTuning())
    model.train()
    found = [
        objective.evaluate(
            model, BatchLoader(examples, size, shuffle=False, collate=objective.collate), Precision(), ALONE
        )
        for size in (1, 4, 6)
    ]
    assert model.training and found[0].keys() == set(objective.metric_names)
    with torch.no_grad():
        expected = float(oracle(model, examples))
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-10)
        assert metrics == pytest.approx(found[0], rel=1e-10)


def test_rewards_of_pairs() -> None:
    sums = {"pairs": 4.0, "chosen": 2.0, "rejected": -1.0, "ordered": 3.0}
    assert Dpo().metrics(sums) == {
        "rewards_chosen": 0.5,
        "rewards_rejected": -0.25,
        "rewards_margin": 0.75,
        "rewards_accuracy": 0.75,
    }


def test_rewards_of_judged_answers() -> None:
    sums = {"answers": 5.0, "desirable": 2.0, "chosen": 1.0, "rejected": -0.6, "kl": 1.5}
    assert Kto().metrics(sums) == pytest.approx(
        {"rewards_chosen": 0.5, "rewards_rejected": -0.2, "rewards_margin": 0.7, "kl": 0.3}
    )
    only = Kto().metrics({**sums, "desirable": 5.0, "rejected": 0.0})
    assert only["rewards_chosen"] == 0.2 and math.isnan(only["rewards_rejected"])


def test_a_run_of_steps_logs_sums_over_its_answers_and_resumes_with_them() -> None:
    objective = Dpo()
    _, examples = models(LoraConfig(r=3))

    def trainer() -> Trainer:
        return Trainer(
            tiny_model(Case(adapter=LoraConfig(r=3))),
            BatchLoader(examples, 2, shuffle=True, seed=1, collate=objective.collate),
            optimizer=AdamWConfig(),
            schedule=ScheduleConfig(learning_rate=0.01).over(10),
            precision=Precision(),
            config=StepConfig(gradient_accumulation_steps=2),
            objective=objective,
        )

    first = trainer()
    results = [first.run_step() for _ in range(2)]
    assert [result.num_terms for result in results] == [4, 2] and [r.sums["pairs"] for r in results] == [4, 2]
    assert first.window.sums["chosen"] == pytest.approx(sum(result.sums["chosen"] for result in results))
    mean = sum(result.loss * result.num_terms for result in results) / 6
    assert first.window.mean_loss == pytest.approx(mean)
    second = trainer()
    tensors, _ = second.state()
    saved, saved_values = first.state()
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])
    second.load_state(tensors, saved_values)
    assert second.window.sums == first.window.sums
    assert second.run_step().loss == first.run_step().loss
