"""AdamW's groups and updates, and learning rates, compared with numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

from bloomlm.errors import ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.training.optimizer import (
    AdamWConfig,
    ScheduleConfig,
    build_optimizer,
    is_decayed,
    optimizer_tensors,
    set_learning_rate,
)


def test_weight_decay_acts_on_matrices_only() -> None:
    with torch.device("meta"):
        model = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    decayed = {name for name, _ in model.named_parameters() if is_decayed(name)}
    assert decayed == {
        "transformer.word_embeddings.weight",
        "transformer.h.0.self_attention.query_key_value.weight",
        "transformer.h.0.self_attention.dense.weight",
        "transformer.h.0.mlp.dense_h_to_4h.weight",
        "transformer.h.0.mlp.dense_4h_to_h.weight",
    }
    assert is_decayed("transformer.h.0.self_attention.dense.lora_A")
    assert is_decayed("transformer.prefix.embedding.weight")
    assert not is_decayed("transformer.prefix.transform.0.bias")


def test_updates_equal_those_of_adamw() -> None:
    """Two updates compared with the formula of Loshchilov and Hutter, https://arxiv.org/abs/1711.05101."""
    parameters = {
        "h.dense.weight": nn.Parameter(torch.tensor([2.0])),
        "h.dense.bias": nn.Parameter(torch.tensor([2.0])),
    }
    optimizer = build_optimizer(parameters, AdamWConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-3))
    expected = {"h.dense.weight": 2.0, "h.dense.bias": 2.0}
    mean = square = 0.0
    for number, (gradient, learning_rate) in enumerate([(0.5, 0.01), (-0.25, 0.02)], start=1):
        mean, square = 0.8 * mean + 0.2 * gradient, 0.9 * square + 0.1 * gradient**2
        update = mean / (1 - 0.8**number) / (math.sqrt(square / (1 - 0.9**number)) + 1e-3)
        expected["h.dense.weight"] *= 1 - learning_rate * 0.1
        for name, parameter in parameters.items():
            expected[name] -= learning_rate * update
            parameter.grad = torch.tensor([gradient])
        set_learning_rate(optimizer, learning_rate)
        optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.item() == pytest.approx(expected[name], rel=1e-6)
    tensors = optimizer_tensors(optimizer, parameters)
    assert set(tensors) == {
        f"optimizer/{name}/{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert tensors["optimizer/h.dense.bias/exp_avg"].item() == pytest.approx(mean)
    assert tensors["optimizer/h.dense.bias/step"].item() == 2
    assert optimizer.defaults["fused"] is True


def test_preallocated_state_changes_no_update() -> None:
    weights = [nn.Parameter(torch.tensor([0.3, -0.7])) for _ in range(2)]
    ours = build_optimizer({"w.weight": weights[0]}, AdamWConfig())
    set_learning_rate(ours, 0.1)
    plain = torch.optim.AdamW([weights[1]], lr=0.1, weight_decay=0.0, fused=True)
    for optimizer, weight in zip((ours, plain), weights, strict=True):
        for gradient in ([0.1, 0.2], [0.4, -0.1]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize(
    ("lr_scheduler_type", "expected"),
    [
        # the reference: lr k / w for k < w, else lr (1 - (1 - ratio) (k - w) / (T - w))
        ("linear", [0.0, 2.0, 4.0, 6.0, 8.0, 6.3, 4.6, 2.9]),
        ("cosine", [0.0, 2.0, 4.0, 6.0, 8.0, 8 * (0.15 + 0.425 * (1 + math.sqrt(0.5))), 4.6, None]),
        ("constant_with_warmup", [0.0, 2.0, 4.0, 6.0, 8.0, 8.0, 8.0, 8.0]),
    ],
)
def test_schedules(lr_scheduler_type: str, expected: list[float | None]) -> None:
    schedule = ScheduleConfig(
        learning_rate=8.0, lr_scheduler_type=lr_scheduler_type, warmup_steps=4, lr_decay_ratio=0.15
    ).over(8)
    for step, value in enumerate(expected):
        if value is not None:
            assert schedule(step) == pytest.approx(value), step


def test_schedule_ends_at_the_ratio() -> None:
    for kind in ("linear", "cosine"):
        schedule = ScheduleConfig(learning_rate=2.0, lr_scheduler_type=kind, lr_decay_ratio=0.1).over(10)
        assert schedule(0) == pytest.approx(2.0)
        assert schedule(5) == pytest.approx(2.0 * 0.55)
        assert schedule(10) == schedule(11) == pytest.approx(0.2)


def test_warmup_steps_override_warmup_ratio() -> None:
    assert ScheduleConfig(learning_rate=1.0, warmup_steps=2, warmup_ratio=0.5).over(10).warmup_steps == 2
    ratio = ScheduleConfig(learning_rate=1.0, warmup_ratio=0.25).over(10)
    assert ratio.warmup_steps == 2.5
    assert ratio(2) == pytest.approx(2 / 2.5)
    assert ratio(3) == pytest.approx(1 - 0.9 * 0.5 / 7.5)


def test_all_warmup_and_constant() -> None:
    assert ScheduleConfig(learning_rate=1.0, warmup_ratio=1.0).over(4)(3) == 0.75
    assert ScheduleConfig(learning_rate=1.0, lr_scheduler_type="constant").over(4)(3) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_scheduler_type": "polynomial"}, "expected one of linear, cosine"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 1}, "constant_with_warmup"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"lr_decay_ratio": -0.1}, "lr_decay_ratio is -0.1"),
    ],
)
def test_impossible_schedules_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(learning_rate=1.0, **options).over(4)  # type: ignore[arg-type]
