"""Number formats, the dynamic loss scale and fp32 master weights."""

import pytest
import torch
from torch import nn

from bloomlm.errors import ConfigError
from bloomlm.training.precision import LearnedParameters, LossScale, Precision, precision_from_flags


@pytest.mark.parametrize(
    ("fp16", "bf16", "level", "compute", "weights", "autocasts", "scales"),
    [
        (False, False, "O1", torch.float32, torch.float32, False, False),
        (False, False, "O2", torch.float32, torch.float32, False, False),
        (True, False, "O1", torch.float16, torch.float32, True, True),
        (True, False, "O2", torch.float16, torch.float16, False, True),
        (False, True, "O1", torch.bfloat16, torch.float32, True, False),
        (False, True, "O2", torch.bfloat16, torch.bfloat16, False, False),
    ],
)
def test_flags(
    fp16: bool, bf16: bool, level: str, compute: torch.dtype, weights: torch.dtype, autocasts: bool, scales: bool
) -> None:
    precision = precision_from_flags(fp16=fp16, bf16=bf16, fp16_opt_level=level, scale_loss=1024.0)
    assert precision.compute_dtype is compute and precision.weights_dtype is weights
    assert precision.scales_loss is scales
    with precision.autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") is autocasts
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype is (compute if autocasts else torch.float32)
    if scales:
        assert precision.initial_loss_scale == 1024.0


def test_contradictory_flags_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one"):
        precision_from_flags(fp16=True, bf16=True, fp16_opt_level="O1", scale_loss=1.0)
    with pytest.raises(ConfigError, match="expected O1 or O2"):
        precision_from_flags(fp16=True, bf16=False, fp16_opt_level="O3", scale_loss=1.0)
    with pytest.raises(ConfigError, match="scale_loss is 0"):
        Precision(initial_loss_scale=0)


def test_loss_scale_halves_and_grows() -> None:
    scale = LossScale(4.0, growth_interval=2)
    values = []
    for overflow in [False, False, False, True, False, False, True, True, True, True]:
        scale.update(overflow=overflow)
        values.append(scale.value)
    assert values == [4, 8, 8, 4, 4, 8, 4, 2, 1, 1]
    assert scale.at_minimum


def test_fp32_parameters_are_optimized_themselves() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    learned = LearnedParameters(layer.named_parameters())
    assert list(learned.optimized) == ["weight"] and learned.optimized["weight"] is layer.weight
    assert not learned.masters


def test_masters_add_gradients_in_fp32_and_keep_small_updates() -> None:
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    learned = LearnedParameters([("w", weight)])
    learned.move_gradients()
    master = learned.optimized["w"]
    assert master.dtype is torch.float32
    # in bf16, 1 + 2**-9 rounds to 1, so each of eight additions would be lost
    (weight * 1.0).backward()
    for _ in range(8):
        (weight * 2.0**-9).backward()
        assert weight.grad is None
    assert master.grad is not None and master.grad.item() == 1.0 + 8 * 2.0**-9
    with torch.no_grad():
        for _ in range(8):
            master.add_(2.0**-9)
            learned.copy_to_model()
    assert weight.item() == 1.0 + 2.0**-6
