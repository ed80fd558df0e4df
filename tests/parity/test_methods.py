"""LoRA+, NEFTune and early stopping, compared by value with PEFT and transformers."""

import math
import random
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_callback import EarlyStoppingCallback

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS
from bloomlm.model.documents import Documents
from bloomlm.model.noise import embedding_noise
from bloomlm.training.early_stopping import EarlyStopping
from bloomlm.training.optimizer import AdamWConfig, build_optimizer, set_learning_rate
from tests.parity.conftest import make_pair

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def settings(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, tuple[float, float]]:
    """Name of each parameter -> its learning rate and weight decay."""
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_loraplus_has_the_groups_of_peft() -> None:
    theirs, ours = make_pair()
    adapter = DoraConfig(r=3, target_modules=BLOCK_LINEARS)
    peft_config = peft.LoraConfig(r=3, target_modules=list(BLOCK_LINEARS), use_dora=True, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(theirs, peft_config)
    expected = settings(
        create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
        ),
        {parameter: name.replace(".default", "") for name, parameter in wrapped.named_parameters()},
    )
    apply_adapter(ours, adapter)
    keys = {ours.get_parameter(name): key for name, key in adapter.peft_keys(ours).items()}
    learned = {name: parameter for name, parameter in ours.named_parameters() if parameter.requires_grad}
    optimizer = build_optimizer(learned, AdamWConfig(weight_decay=0.1, loraplus_lr_ratio=16.0))
    set_learning_rate(optimizer, 2e-4)
    found = settings(optimizer, keys)
    # PEFT's module of a magnitude has a parameter named "weight"; its file does not
    assert found == {
        name.replace("magnitude_vector.weight", "magnitude_vector"): value for name, value in expected.items()
    }
    assert {rate for rate, _ in found.values()} == {2e-4, 32e-4}


def test_noise_has_the_numbers_of_transformers() -> None:
    embedding = nn.Embedding(11, 8)
    embedding.neftune_noise_alpha = 5.0  # type: ignore[assignment]
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    quiet = embedding(tokens)
    embedding.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(3)
    expected = embedding(tokens) - quiet
    torch.manual_seed(3)
    noise = embedding_noise(quiet[0], Documents.packed([5]), 5.0)
    torch.testing.assert_close(noise, expected[0], rtol=1e-5, atol=1e-6)


def test_noise_of_packed_documents_has_the_bound_of_each() -> None:
    noise = embedding_noise(torch.zeros(2000, 64), Documents.packed([400, 1600]), 5.0)
    for part, length in ((noise[:400], 400), (noise[400:], 1600)):
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.99 * bound < part.abs().max() <= bound
        assert part.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("greater_is_better", [False, True])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.0), (3, 0.125), (2, 0.5)])
def test_runs_stop_where_those_of_transformers_do(
    greater_is_better: bool, patience: int, threshold: float, tmp_path: Any
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        metric_for_best_model="eval_loss",
        greater_is_better=greater_is_better,
        eval_strategy="steps",
        report_to="none",
        use_cpu=True,
    )
    ours = EarlyStopping(
        metric="eval_loss", greater_is_better=greater_is_better, patience=patience, threshold=threshold
    )
    generator, ends = random.Random(0), set()
    for _ in range(20):
        values = [generator.randrange(24) / 16 for _ in range(12)]  # sixteenths, so that differences are exact
        callback, state, control = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl()
        end = None
        for number, value in enumerate(values, start=1):
            callback.on_evaluate(arguments, state, control, {"eval_loss": value})
            if state.best_metric is None or (value > state.best_metric) is greater_is_better:
                state.best_metric = value if state.best_metric != value else state.best_metric
            if control.should_training_stop:
                end = number
                break
        log = [{"step": 1, "loss": 2.0}, *({"step": n, "eval_loss": value} for n, value in enumerate(values))]
        found = next((n for n in range(1, len(values) + 1) if ours.is_due(log[: n + 1])), None)
        assert found == end
        ends.add(end)
    assert len(ends) > 1


def test_a_metric_that_is_no_number_does_not_improve() -> None:
    stopping = EarlyStopping(metric="eval_loss", greater_is_better=False, patience=2, threshold=0.0)
    entries = [{"step": n, "eval_loss": value} for n, value in enumerate([1.0, None, None])]
    assert [stopping.is_due(entries[:n]) for n in range(4)] == [False, False, False, True]
