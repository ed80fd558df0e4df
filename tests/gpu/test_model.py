"""Logits and gradients on the GPU against those on the CPU: fp32 to its rounding, 16 bits to theirs."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter, FullTuning
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.checkpoint.reader import load_model
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.model.quantized import INT8
from tests.gpu.models import CONFIG, GPU, LENGTHS, on_gpu, random_model, relative_error
from tests.tiny_bloom import write_adapter, write_bloom

ADAPTERS = [FullTuning(), LoraConfig(r=3, target_modules=BLOCK_LINEARS), DoraConfig(r=3), PrefixConfig()]
HALF = [torch.bfloat16, torch.float16]


def hidden_states(model: BloomForCausalLM, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    device = model.transformer.word_embeddings.weight.device
    return model.transformer(tokens.to(device), Documents.packed(lengths))


def some_tokens(count: int, config: BloomConfig = CONFIG) -> Tensor:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(side: str) -> None:
    ids, mask = some_tokens(3 * 50).view(3, 50), torch.ones(3, 50, dtype=torch.int64)
    for row, pads in enumerate((0, 11, 40)):
        mask[row, slice(0, pads) if side == "left" else slice(50 - pads, 50)] = 0
    model = random_model()
    with torch.no_grad():
        found, expected = on_gpu(model)(ids.to(GPU), mask.to(GPU)), model(ids, mask)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
@pytest.mark.parametrize("lengths", [(80, 80, 80), LENGTHS], ids=["equal", "different"])
def test_gradients_in_fp32(adapter: Adapter, lengths: tuple[int, ...]) -> None:
    """Different lengths go through the block-sparse kernel on the GPU, and one by one on the CPU."""
    tokens = some_tokens(sum(lengths))
    expected, found = random_model(adapter).train(), on_gpu(random_model(adapter)).train()
    results = {}
    for model in (expected, found):
        states = hidden_states(model, tokens, lengths)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(4)).to(states.device)
        (model.logits(states).logsumexp(-1).mean() + (states * weights).mean()).backward()
        results[model] = states
    assert relative_error(results[found], results[expected]) < 1e-5
    gradients = {name: parameter.grad for name, parameter in found.named_parameters()}
    learned = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert learned.keys() == {name for name, gradient in gradients.items() if gradient is not None}
    for name, gradient in learned.items():
        assert relative_error(gradients[name], gradient) < 2e-4, name


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("length", [200, 3000], ids=["short", "long"])
def test_16_bits_are_as_exact_as_on_the_cpu(dtype: torch.dtype, length: int) -> None:
    """At position 3,000 a bias cast to bf16 would be off by up to 8."""
    tokens, model = some_tokens(length), random_model()
    with torch.no_grad():
        exact = hidden_states(model, tokens, (length,))
        half = copy.deepcopy(model).to(dtype)
        on_cpu = relative_error(hidden_states(half, tokens, (length,)), exact)
        error = relative_error(hidden_states(on_gpu(half), tokens, (length,)), exact)
    assert error < 1.2 * on_cpu


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.kind)
def test_gradients_under_autocast(adapter: Adapter, dtype: torch.dtype) -> None:
    tokens = some_tokens(sum(LENGTHS))
    errors = {}
    expected = random_model(adapter).train()
    hidden_states(expected, tokens, LENGTHS).float().square().sum().backward()
    for device in ("cpu", "cuda"):
        model = copy.deepcopy(expected).to(device)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=dtype):
            states = hidden_states(model, tokens, LENGTHS)
        states.float().square().sum().backward()
        exact = dict(expected.named_parameters())
        errors[device] = max(
            relative_error(p.grad, exact[name].grad) for name, p in model.named_parameters() if p.grad is not None
        )
    assert errors["cuda"] < 1.5 * errors["cpu"], errors


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=3), PrefixConfig()], ids=["base", "lora", "prefix"])
def test_loading_to_the_gpu(tmp_path: Path, adapter: Adapter | None) -> None:
    base = write_bloom(tmp_path / "base")
    path = None if adapter is None else write_adapter(tmp_path / "adapter", base, adapter)
    expected = load(base, adapter_path=path).model
    found = load(base, adapter_path=path, device="cuda").model
    tensors = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    assert {tensor.device.type for tensor in tensors.values()} == {"cuda"}
    for name, parameter in expected.named_parameters():
        assert torch.equal(tensors[name].cpu(), parameter), name
    assert {p.dtype for p in load(base, dtype="bfloat16", device="cuda").model.parameters()} == {torch.bfloat16}


def test_int8_weights(tmp_path: Path) -> None:
    base = write_bloom(tmp_path / "base")
    expected, found = load_model(base, quantization=INT8), load_model(base, quantization=INT8, device=GPU)
    for name, parameter in expected.named_parameters():
        assert torch.equal(dict(found.named_parameters())[name].cpu(), parameter), name
    tokens = some_tokens(90, expected.config)
    with torch.no_grad():
        states = hidden_states(expected, tokens, (90,)), hidden_states(found, tokens, (90,))
        logits = expected.logits(states[0]), found.logits(states[1])
    torch.testing.assert_close(logits[1].cpu(), logits[0], rtol=1e-4, atol=1e-4)
