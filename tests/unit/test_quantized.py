"""Quantised weights: their rounding, and a model on them against one in fp32 that holds the same values."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bloomlm.model.quantized as quantized
from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import AdapterError, CheckpointError, ConfigError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear, linear
from bloomlm.model.quantized import INT8, NF4, Quantization, dequantize_rows, quantize_rows, quantize_rows_nf4
from bloomlm.parallel.tensor_parallel import head_of
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_tokens
from tests.tiny_checkpoint import learned_tensors, merged_model, random_model

CONFIG = BloomConfig(vocab_size=70, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.15)
LENGTHS = (5, 9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    model = random_model(CONFIG)
    write_model(directory, model.config, model.named_parameters())
    return directory


@pytest.fixture(params=[2**22, 1000], ids=["one block", "many blocks"])
def block_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How much is made floating point at once; the weights here have 4,096 to 16,384 elements."""
    monkeypatch.setattr(quantized, "BLOCK_ELEMENTS", request.param)
    return int(request.param)


@pytest.fixture(params=[INT8, NF4], ids=lambda quantization: quantization.name)
def quantization(request: pytest.FixtureRequest) -> Quantization:
    if request.param is NF4:
        pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed; most of it is for GPUs")
    found: Quantization = request.param
    return found


def dequantized(checkpoint: Path, quantization: Quantization, dtype: torch.dtype = torch.float32) -> BloomForCausalLM:
    """A plain model that holds what the quantised weights stand for."""
    model = load_model(checkpoint, memory_map=False)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (Linear, WordEmbedding)):
                rows = quantization.linear if isinstance(module, Linear) else quantization.embedding
                module.weight.copy_(dequantize_rows(*rows.quantize(module.weight, name, "cpu"), torch.float32))
    return model.to(dtype)


def with_lora(model: BloomForCausalLM, kind: type[LoraConfig] = LoraConfig) -> BloomForCausalLM:
    apply_adapter(model, kind(r=3, target_modules=BLOCK_LINEARS))
    generator = torch.Generator().manual_seed(1)
    for parameter in learned_tensors(model).values():
        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def step(model: BloomForCausalLM, label_smoothing: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of two documents and the gradients of what learns."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, CONFIG.vocab_size, (sum(LENGTHS),), generator=generator)
    labels = torch.randint(0, CONFIG.vocab_size, (sum(LENGTHS),), generator=generator)
    labels[::3] = -100
    loss = linear_cross_entropy(
        model.transformer(tokens, Documents.packed(LENGTHS)),
        head_of(model),
        labels,
        label_smoothing=label_smoothing,
        max_chunk_bytes=3 * CONFIG.vocab_size * 4,
    )
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_rounding_is_symmetric_by_row_and_at_most_half_a_step(block_elements: int) -> None:
    weight = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0.0
    weight[8] = torch.linspace(-127, 127, 32).round()
    values, scale = quantize_rows(weight, "w")
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(scale, weight.abs().amax(1) / 127)
    back = dequantize_rows(values, scale, torch.float32)
    assert ((back - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert torch.equal(back[7], weight[7]) and torch.equal(back[8], weight[8])
    assert values.abs().amax() == 127 and values.amin() >= -127


def test_nf4_has_the_codes_scales_and_values_of_bitsandbytes(block_elements: int) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(50, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0.0
    codes, scale = quantize_rows_nf4(weight, "w")
    expected_codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codes.reshape(-1), expected_codes.reshape(-1))
    assert torch.equal(scale.reshape(-1), state.absmax) and scale.shape == (50, 3)
    expected = functional.dequantize_4bit(expected_codes, state)
    assert torch.equal(dequantize_rows(codes, scale, torch.float32), expected)
    chosen = torch.tensor([3, 3, 49, 0])
    assert torch.equal(dequantize_rows(codes[chosen], scale[chosen], torch.float32), expected[chosen])
    table = functional.get_4bit_type("nf4", device="cpu")  # by hand: the nearest of 16 values, times the scale
    nearest = (weight.view(50, 3, 64) / scale.clamp_min(1e-30)[..., None])[..., None].sub(table).abs().argmin(-1)
    assert torch.equal(expected, (table[nearest] * scale[..., None]).view(50, 192))


def test_a_model_in_nf4_keeps_its_embedding_in_int8_and_halves_the_rest_again(checkpoint: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, plain = load_model(checkpoint, quantization=NF4), load_model(checkpoint)
    assert model.transformer.word_embeddings.weight.dtype is torch.int8
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(linears) == 8 and {layer.weight.dtype for layer in linears} == {torch.uint8}
    expected = [module.weight.numel() for module in plain.modules() if isinstance(module, Linear)]
    assert [layer.num_weights for layer in linears] == expected
    stored = sum(
        tensor.nbytes for layer in linears for tensor in (layer.weight, layer.weight_scale) if tensor is not None
    )
    assert stored * 8 == 4.5 * sum(expected)


def test_rows_that_nf4_cannot_divide_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=r"w has rows of 96 weights, and nf4 needs a multiple of 64; use .* int8"):
        quantize_rows_nf4(torch.zeros(4, 96), "w")


def test_weights_without_finite_numbers_are_refused(
    checkpoint: Path, tmp_path: Path, quantization: Quantization
) -> None:
    model = load_model(checkpoint, memory_map=False)
    with torch.no_grad():
        model.transformer.h[1].mlp.dense_4h_to_h.weight[3, 5] = torch.inf
    write_model(tmp_path, model.config, model.named_parameters())
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.dense_4h_to_h\.weight holds NaN or infinite"):
        load_model(tmp_path, quantization=quantization)


def test_a_model_in_int8_has_one_copy_of_each_weight(checkpoint: Path) -> None:
    model = load_model(checkpoint, quantization=INT8)
    plain = load_model(checkpoint)
    assert model.state_dict().keys() == plain.state_dict().keys()
    matrices = sum(p.numel() for p in plain.parameters() if p.dim() == 2)
    rows = sum(len(p) for p in plain.parameters() if p.dim() == 2)
    vectors = sum(p.numel() for p in plain.parameters() if p.dim() == 1)
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(t.numel() * t.itemsize for t in tensors) == matrices + 4 * rows + 4 * vectors
    assert {p.dtype for p in model.parameters() if p.dim() == 2} == {torch.int8}


@pytest.mark.parametrize("kind", [LoraConfig, DoraConfig])
def test_equals_an_fp32_model_of_the_same_values(
    checkpoint: Path, block_elements: int, quantization: Quantization, kind: type[LoraConfig]
) -> None:
    model, exact = load_model(checkpoint, quantization=quantization), dequantized(checkpoint, quantization)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), exact(ids), rtol=1e-5, atol=1e-5)
    (loss, gradients), (exact_loss, exact_gradients) = (
        step(with_lora(model, kind), 0.1),
        step(with_lora(exact, kind), 0.1),
    )
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == exact_gradients.keys() == {*learned_tensors(model)}
    for name, gradient in exact_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("how", ["bf16 autocast", "fp16 autocast", "bf16 weights"])
def test_half_precision_stays_near_the_same_model_in_fp32(
    checkpoint: Path, quantization: Quantization, how: str, recompute: bool
) -> None:
    dtype = torch.float16 if "fp16" in how else torch.bfloat16
    weights_dtype = dtype if "weights" in how else torch.float32
    model = with_lora(load_model(checkpoint, quantization=quantization, dtype=weights_dtype))
    model.transformer.recompute = recompute
    assert model.transformer.dtype is weights_dtype
    with torch.autocast("cpu", dtype=dtype, enabled="autocast" in how):
        loss, gradients = step(model)
    exact_loss, exact_gradients = step(with_lora(dequantized(checkpoint, quantization)))
    torch.testing.assert_close(loss, exact_loss, rtol=0.02, atol=0)
    for name, gradient in exact_gradients.items():
        error = (gradients[name].float() - gradient).norm() / gradient.norm()
        assert error < (0.01 if dtype is torch.float16 else 0.08), (name, error)


def test_the_score_of_an_evaluation(checkpoint: Path, block_elements: int) -> None:
    model, exact = load_model(checkpoint, quantization=INT8), dequantized(checkpoint, INT8)
    hidden, labels = torch.randn(9, 64), torch.randint(0, CONFIG.vocab_size, (9,))
    labels[:2] = model.logits(hidden)[:2].argmax(1)
    found, expected = (score_tokens(hidden, head_of(each), labels) for each in (model, exact))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    assert found.num_correct == expected.num_correct >= 2


def test_generates_what_the_same_model_in_fp32_generates(checkpoint: Path, quantization: Quantization) -> None:
    prompts, config = [[3, 4, 5], [6, 7]], GenerationConfig(max_new_tokens=6)
    found, expected = (
        generate(m, prompts, config)
        for m in (load_model(checkpoint, quantization=quantization), dequantized(checkpoint, quantization))
    )
    assert [result.tokens for result in found] == [result.tokens for result in expected]


def test_nothing_but_the_codes_and_scales_is_kept_for_the_backward_pass(quantization: Quantization) -> None:
    weight, scale = quantization.linear.quantize(torch.randn(80, 64), "w", "cpu")
    x, bias = torch.randn(8, 64, requires_grad=True), torch.randn(80, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = linear(x, weight, bias, scale)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr(), scale.data_ptr()]
    out.backward(torch.ones_like(out))
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad, dequantize_rows(weight, scale, torch.float32).sum(0).expand(8, -1))
    assert torch.equal(bias.grad, torch.full((80,), 8.0))


def test_what_quantised_weights_cannot_do_is_said(checkpoint: Path, tmp_path: Path, quantization: Quantization) -> None:
    for adapter in (FullTuning(), PrefixConfig()):
        with pytest.raises(AdapterError, match="LoRA only"):
            apply_adapter(load_model(checkpoint, quantization=quantization), adapter)
    model = with_lora(load_model(checkpoint, quantization=quantization))
    with pytest.raises(AdapterError, match="a quantised weight cannot take"):
        merged_model(model)
    with pytest.raises(AdapterError, match="were quantised when it was loaded"):
        merge_to_directory(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_bitsandbytes_advises_nothing_when_it_is_imported() -> None:
    pytest.importorskip("bitsandbytes")
    code = "from bloomlm.model.quantized import bitsandbytes_functional; bitsandbytes_functional()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr == ""
