"""Operations compared with torch's counter; padding and memory compared with numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.data.loader import Batch
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from bloomlm.training.meter import BatchMeter, StepFlops, StepProfiler, measure_peak_flops, memory_by_kind
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig, Trainer
from tests.tiny_checkpoint import random_model

LENGTHS, NUM_SUPERVISED = (7, 3, 5), 6


def make_batch() -> Batch:
    tokens = torch.arange(sum(LENGTHS)) % 50
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[:NUM_SUPERVISED] = 1
    return Batch(tokens=tokens, labels=labels, lengths=LENGTHS, num_supervised_tokens=NUM_SUPERVISED)


class OneBatch:
    """An epoch of one batch."""

    def __len__(self) -> int:
        return 1

    def __iter__(self):
        yield make_batch()

    def state_dict(self):
        return {"position": 3}

    def load_state_dict(self, state):
        self.loaded = state


def learning(adapter: Adapter) -> BloomForCausalLM:
    model = random_model(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    apply_adapter(model, adapter, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    "adapter",
    [
        FullTuning(),
        LoraConfig(r=2),
        LoraConfig(r=3, target_modules=BLOCK_LINEARS),
        LoraConfig(r=2, target_modules=("dense_4h_to_h",)),
        PrefixConfig(num_prefix_tokens=4),
        DoraConfig(r=2),
        DoraConfig(r=3, target_modules=BLOCK_LINEARS, lora_dropout=0.5),
    ],
    ids=["full", "qkv", "all", "last", "prefix", "dora", "dora with dropout"],
)
def test_flops_equal_those_that_torch_counts(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learning(adapter).train()
    batch = make_batch()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # the counter does not know the products of oneDNN
    in_place = {torch.ops.aten.addmm_: lambda out, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        batch_loss(model, batch, Precision(), scale=1.0).backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    pairs = sum(n * (n + 1) // 2 for n in LENGTHS)
    if isinstance(adapter, PrefixConfig):
        pairs += adapter.num_prefix_tokens * sum(LENGTHS)
    attention = 12 * model.config.hidden_size * model.config.n_layer * pairs
    assert StepFlops(model).of(LENGTHS, NUM_SUPERVISED) - attention == counted


def test_meter_counts_batches_as_they_are_yielded() -> None:
    flops = StepFlops(learning(FullTuning()))
    inner = OneBatch()
    meter = BatchMeter(inner, flops)
    for _ in range(2):
        (batch,) = meter
        assert batch.lengths == LENGTHS
    assert (meter.num_tokens, meter.num_padded_tokens) == (2 * 15, 2 * 21)
    found = meter.metrics(train_seconds=2.0, peak_flops_per_second=1e6)
    speed = flops.of(LENGTHS, NUM_SUPERVISED)
    assert found["model_flops_per_second"] == speed
    assert found["model_flops_utilisation"] == round(speed / 1e6, 4)
    assert found["padding_avoided"] == round(1 - 15 / 21, 4)
    assert 0 <= found["data_seconds"] < 1
    assert len(meter) == 1
    assert meter.state_dict() == {"position": 3}
    meter.load_state_dict({"position": 1})
    assert inner.loaded == {"position": 1}


def make_trainer(model: BloomForCausalLM, precision: Precision, **step: Any) -> Trainer:
    return Trainer(
        model,
        OneBatch(),
        optimizer=AdamWConfig(),
        schedule=ScheduleConfig(learning_rate=1e-3).over(9),
        precision=precision,
        config=StepConfig(**step),
    )


def test_memory_by_kind() -> None:
    model = learning(FullTuning())
    size = sum(p.numel() for p in model.parameters())
    kinds = memory_by_kind(make_trainer(model, Precision()), 100 * size)
    steps = 4 * len(list(model.parameters()))
    assert kinds == {
        "weights": 4 * size,
        "gradients": 4 * size,
        "optimizer": 8 * size + steps,
        "activations and the rest": 100 * size - 16 * size - steps,
    }
    half = learning(FullTuning()).to(torch.bfloat16)
    kinds = memory_by_kind(make_trainer(half, Precision(compute_dtype=torch.bfloat16, half_weights=True)), 0)
    assert (kinds["weights"], kinds["gradients"]) == (2 * size, 4 * size)  # gradients add up in fp32
    assert kinds["optimizer"] == 12 * size + steps  # moments and fp32 weights
    assert kinds["activations and the rest"] == 0


def test_memory_by_kind_of_a_fused_update() -> None:
    model = learning(FullTuning())
    trainer = make_trainer(model, Precision())
    fused = make_trainer(learning(FullTuning()), Precision(), fuses_update=True, max_grad_norm=0.0)
    (one, other) = (memory_by_kind(each, 0) for each in (trainer, fused))
    assert (one["weights"], one["optimizer"]) == (other["weights"], other["optimizer"])
    assert other["gradients"] == max(4 * p.numel() for p in model.transformer.h.parameters())


def test_peak_is_measured() -> None:
    assert measure_peak_flops(torch.device("cpu"), torch.float32, size=64, repeats=2) > 1e6


def test_profile_of_the_third_to_fifth_step(tmp_path: Path) -> None:
    trainer = make_trainer(learning(LoraConfig(r=2)), Precision())
    with StepProfiler(tmp_path / "profile", torch.device("cpu")) as profiler:
        for _ in range(5):
            assert not (tmp_path / "profile").exists()
            trainer.run_step()
            profiler.step()
    table = (tmp_path / "profile" / "operations.txt").read_text()
    assert table.count("\naten::") + table.count("\n ") >= 9
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    num_norms = sum(event.get("name") == "aten::native_layer_norm" for event in trace["traceEvents"])
    n_layer = trainer.model.config.n_layer
    # lora_A's gradient needs the result of a layer norm again, which the first block keeps (nothing below it learns)
    num_remade = n_layer - 1
    assert num_norms == 3 * (2 + 2 * n_layer + num_remade)
