"""Causal attention by our operator: values and gradients against a softmax in float64, alone and in the model."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import load_operators, operators
from bloomlm.model.alibi import head_slopes
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.causal import causal_attention, takes_causal
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents

load_operators()
loaded = operators()
pytestmark = pytest.mark.skipif(
    loaded is None or loaded.causal is None, reason="there is no C++ compiler, no AVX2, or an old PyTorch"
)

# document lengths, heads, head_dim, virtual tokens: blocks that are full, one too many, single tokens, odd widths
CASES = [
    ((5,), 2, 8, 0),
    ((64, 65, 1, 200, 130), 4, 64, 0),
    ((64, 65, 1, 200, 130), 4, 64, 7),
    ((70, 3), 3, 20, 100),
    ((33,), 1, 3, 64),
]


def inputs(lengths: Sequence[int], heads: int, head_dim: int, num_virtual: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fused, virtual and the gradient of the result; products are large enough for weights of all sizes."""
    generator = torch.Generator().manual_seed(len(lengths))
    fused = 2 * torch.randn(sum(lengths), heads, 3, head_dim, generator=generator)
    virtual = torch.randn(2, heads, num_virtual, head_dim, generator=generator)
    return fused, virtual, torch.randn(sum(lengths), heads * head_dim, generator=generator)


def exact(fused: Tensor, virtual: Tensor, lengths: Sequence[int]) -> Tensor:
    """The definition, document by document."""
    outs = []
    slopes = torch.tensor(head_slopes(fused.shape[1]), dtype=fused.dtype)
    for part in fused.split(list(lengths)):
        query, own_key, own_value = part.permute(2, 1, 0, 3)
        key, value = torch.cat((virtual[0], own_key), 1), torch.cat((virtual[1], own_value), 1)
        keys, queries = torch.arange(key.shape[1]), torch.arange(virtual.shape[2], key.shape[1])
        scores = query @ key.transpose(1, 2) / math.sqrt(fused.shape[3]) + slopes[:, None, None] * keys
        weights = scores.masked_fill(keys > queries[:, None], -torch.inf).softmax(-1)
        outs.append((weights @ value).transpose(0, 1).flatten(1))
    return torch.cat(outs)


def errors(dtype: torch.dtype, *, offset: int = 0) -> list[float]:
    """The largest error of the result and of both gradients in all cases, relative to the largest number of each."""
    found = []
    for lengths, heads, head_dim, num_virtual in CASES:
        fused, virtual, gradient = inputs(lengths, heads, head_dim, num_virtual)
        fused, gradient = fused.to(dtype), gradient.to(dtype)
        oracle = [tensor.double().requires_grad_() for tensor in (fused, virtual)]
        expected = exact(*oracle, lengths)
        expected.backward(gradient.double())
        spread = torch.cat((torch.full((*fused.shape[:3], offset), math.nan, dtype=dtype), fused), -1)
        ours = [spread.requires_grad_(), virtual.requires_grad_()]
        view = ours[0][..., offset:]
        assert takes_causal(view.contiguous())
        result = causal_attention(view, lengths, torch.tensor(head_slopes(heads)), (ours[1][0], ours[1][1]))
        assert result.dtype is dtype
        result.backward(gradient)
        assert ours[0].grad is not None and ours[1].grad is not None
        pairs = [(result, expected), (ours[0].grad[..., offset:], oracle[0].grad), (ours[1].grad, oracle[1].grad)]
        for mine, right in pairs:
            assert right is not None
            if right.numel():
                found.append(float((mine - right).detach().abs().max() / right.detach().abs().max()))
    return found


@pytest.mark.parametrize("offset", [0, 8])
def test_values_and_gradients_are_those_of_the_definition(offset: int) -> None:
    assert max(errors(torch.float32, offset=offset)) < 2e-6
    assert max(errors(torch.bfloat16, offset=offset)) < 1.5e-2


@pytest.mark.parametrize("level", ["scalar", "avx2", "avx512", "avx512_bf16"])
def test_every_level_of_instructions_gives_the_same(level: str) -> None:
    """Products of bf16 round weights, too, which lower levels multiply in fp32."""
    code = (
        "import torch; from tests.unit.test_causal import errors\n"
        f"assert max(errors(torch.float32)) < 2e-6\nassert max(errors(torch.bfloat16)) < {1.5e-2 if 'bf16' in level else 1e-2}"
    )
    limits = {"BLOOMLM_MAX_CPU_ISA": level, "ONEDNN_MAX_CPU_ISA": "AVX2" if level == "avx2" else "ALL"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def made(**changes: object) -> BloomForCausalLM:
    config = {"vocab_size": 101, "hidden_size": 48, "n_layer": 2, "n_head": 3, "initializer_range": 0.2, **changes}
    model = BloomForCausalLM(BloomConfig(**config))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def step(model: BloomForCausalLM, lengths: Sequence[int]) -> list[Tensor]:
    """Hidden states of packed documents, and the gradients of some mean of them."""
    tokens = torch.arange(sum(lengths)) * 7 % 101
    model.zero_grad()
    hidden = model.transformer(tokens, Documents.packed(lengths))
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


class Counting:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *arguments: Tensor) -> None:
        self.calls += 1
        assert loaded is not None and loaded.causal is not None
        loaded.causal.forward(*arguments)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counting:
    assert loaded is not None and loaded.causal is not None
    counting = Counting()
    monkeypatch.setattr(compiled, "_loaded", replace(loaded, causal=replace(loaded.causal, forward=counting)))
    return counting


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", [FullTuning(), PrefixConfig(num_prefix_tokens=5)])
def test_the_model_learns_as_with_the_kernel_of_pytorch(
    adapter: FullTuning | PrefixConfig, recompute: bool, counted: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    apply_adapter(model, adapter, torch.Generator().manual_seed(2))
    model.transformer.recompute = recompute
    found = step(model, (9, 1, 70))
    assert counted.calls == (4 if recompute else 2)
    monkeypatch.setattr(compiled, "_loaded", None)
    expected = step(model, (9, 1, 70))
    assert len(found) == len(expected) >= 2
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=2e-5 * float(right.abs().max()) + 1e-7)


def test_prompts_are_read_as_with_the_kernel_of_pytorch(counted: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made().eval()
    apply_adapter(model, PrefixConfig(num_prefix_tokens=5), torch.Generator().manual_seed(2))
    prompts = [[i * 3 % 101 for i in range(length)] for length in (9, 1, 70)]

    def read() -> Tensor:
        with torch.inference_mode():
            return model.open_rows(3, 80).prefill([2, 0, 1], prompts)

    found = read()
    assert counted.calls == 2
    monkeypatch.setattr(compiled, "_loaded", None)
    torch.testing.assert_close(found, read(), rtol=0, atol=2e-5)


def test_other_tensors_are_left_to_pytorch() -> None:
    fused = torch.randn(4, 2, 3, 8)
    assert takes_causal(fused)
    assert not takes_causal(fused, dropout=0.1)
    assert not takes_causal(fused.double())
    assert not takes_causal(fused.half())
    assert not takes_causal(fused.to("meta"))
    assert not takes_causal(torch.nn.Parameter(fused))
