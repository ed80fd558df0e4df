"""Trained rows of the embedding against a full embedding whose gradient is masked, by value."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.reader import load_model
from bloomlm.data.loader import Batch, collate
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.embedding import ReplacedRows
from bloomlm.model.quantized import INT8, Quantization, dequantize_rows
from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_labels
from bloomlm.training.objectives.cross_entropy import batch_loss, evaluate_loss
from bloomlm.training.precision import Precision
from tests.distributed.models import some_examples
from tests.tiny_bloom import write_adapter
from tests.tiny_checkpoint import merged_model

TOKENS = (100, 5, 47, 20, 9, 41)
ROWS = "transformer.word_embeddings.trained_rows"
WEIGHT = "transformer.word_embeddings.weight"
M, D, V = 13, 8, 50


@pytest.fixture(scope="module")
def batch() -> Batch:
    return collate(some_examples())


def with_rows(base: Path, moved: float = 0.1, *, quantization: Quantization | None = None) -> BloomForCausalLM:
    """A model of which TOKENS' rows and a LoRA learn, the rows away from the embedding's."""
    model = load_model(base, quantization=quantization)
    apply_adapter(model, LoraConfig(r=3, trained_tokens=TOKENS), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("lora_A"):
                parameter.add_(moved * torch.randn(parameter.shape, generator=generator))
    return model


def with_full_embedding(model: BloomForCausalLM, base: Path) -> BloomForCausalLM:
    """The oracle: the same LoRA beside a whole embedding that learns and holds the rows."""
    oracle = load_model(base, memory_map=False)
    apply_adapter(oracle, LoraConfig(r=3))
    given = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            if "lora" in name:
                parameter.copy_(given[name])
        oracle.get_parameter(WEIGHT)[list(TOKENS)] = given[ROWS]
    oracle.get_parameter(WEIGHT).requires_grad_(True)
    return oracle


def gradients(model: BloomForCausalLM, batch: Batch, precision: Precision, smoothing: float) -> dict[str, Tensor]:
    loss = batch_loss(model.train(), batch, precision, scale=0.25, label_smoothing=smoothing)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_a_full_embedding_with_a_mask(base: Path, batch: Batch, smoothing: float, recompute: bool) -> None:
    model = with_rows(base)
    oracle = with_full_embedding(model, base)
    model.transformer.recompute = recompute
    expected = gradients(oracle, batch, Precision(), smoothing)
    expected[ROWS] = expected.pop(WEIGHT)[list(TOKENS)]
    found = gradients(model, batch, Precision(), smoothing)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))
    assert found[ROWS].abs().amax(1).min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(base: Path, batch: Batch, dtype: torch.dtype) -> None:
    exact = gradients(with_rows(base), batch, Precision(), 0.0)
    found = gradients(with_rows(base), batch, Precision(compute_dtype=dtype), 0.0)
    for name, gradient in exact.items():
        error = float((found[name] - gradient).norm() / gradient.norm())
        assert error < (0.01 if dtype is torch.float16 else 0.08), name


def test_on_an_int8_base_equals_the_same_values_in_fp32(base: Path, batch: Batch) -> None:
    model, exact = with_rows(base, quantization=INT8), with_rows(base)
    quantized = dict(model.named_modules())
    with torch.no_grad():
        for name, module in exact.named_modules():
            scale = getattr(quantized[name], "weight_scale", None)
            if scale is not None:
                module.weight.copy_(dequantize_rows(quantized[name].weight, scale, torch.float32))
        for name, parameter in exact.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(model.get_parameter(name))
    expected, found = (gradients(each, batch, Precision(), 0.1) for each in (exact, model))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))


def test_fresh_rows_are_the_embeddings(base: Path) -> None:
    plain, model = load_model(base), load_model(base)
    apply_adapter(model, LoraConfig(trained_tokens=TOKENS))
    ids = torch.tensor([[100, 3, 5, 5, 47]])
    torch.testing.assert_close(model(ids), plain(ids), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.get_parameter(ROWS), plain.get_parameter(WEIGHT)[list(TOKENS)])


def test_only_rows_of_their_own_get_memory(base: Path, batch: Batch) -> None:
    model = with_rows(base)
    found = gradients(model, batch, Precision(), 0.0)
    assert found[ROWS].shape == (len(TOKENS), 32) and WEIGHT not in found
    assert {name for name, p in model.named_parameters() if p.requires_grad} == found.keys() - {"loss"}


def test_merged_it_is_a_plain_model_of_the_same_logits_and_score(base: Path, batch: Batch) -> None:
    model = with_rows(base).eval()
    merged = merged_model(model)
    ids = torch.tensor([[100, 3, 5, 5, 47, 8]])
    torch.testing.assert_close(merged(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.get_parameter(WEIGHT)[list(TOKENS)], model.get_parameter(ROWS))
    found, expected = (evaluate_loss(each, [batch], Precision()) for each in (model, merged))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.token_accuracy == expected.token_accuracy


def head(dtype: torch.dtype) -> tuple[Tensor, Tensor, ReplacedRows, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, rows = (torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype) for n in (M, V, 4))
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[2], labels[3], labels[4] = -100, 49, 0
    return hidden.requires_grad_(), weight, ReplacedRows(torch.tensor([49, 0, 7, 30]), rows.requires_grad_()), labels


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_equals_that_of_a_whole_head(dtype: torch.dtype, smoothing: float, rows_per_chunk: int) -> None:
    hidden, weight, replaced, labels = head(dtype)

    def result(loss: Callable[[], Tensor]) -> list[Tensor]:
        hidden.grad = replaced.rows.grad = None
        value = loss()
        (3 * value).backward()
        assert hidden.grad is not None and replaced.rows.grad is not None
        return [value.detach(), hidden.grad, replaced.rows.grad]

    whole = weight.index_copy(0, replaced.places, replaced.rows)
    expected = result(
        lambda: F.cross_entropy(hidden @ whole.T, labels, label_smoothing=smoothing, reduction="sum") * 0.5
    )
    found = result(
        lambda: linear_cross_entropy(
            hidden,
            Head(weight, replaced=replaced),
            labels,
            scale=0.5,
            label_smoothing=smoothing,
            max_chunk_bytes=rows_per_chunk * V * dtype.itemsize,
        )
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if dtype is torch.float32 else 1e-12)


def test_a_batch_without_labels_gives_the_rows_a_zero_gradient() -> None:
    hidden, weight, replaced, labels = head(torch.float32)
    linear_cross_entropy(hidden, Head(weight, replaced=replaced), torch.full_like(labels, -100)).backward()
    assert replaced.rows.grad is not None and not replaced.rows.grad.any()


@pytest.mark.parametrize("block_columns", [1, 3, 50, None])
def test_scores_equal_those_of_a_whole_head(block_columns: int | None) -> None:
    hidden, weight, replaced, labels = head(torch.float32)
    labels = labels.clamp(min=0)
    with torch.no_grad():
        whole = weight.index_copy(0, replaced.places, replaced.rows)
    found = score_labels(hidden, Head(weight, replaced=replaced), labels, block_columns=block_columns)
    expected = score_labels(hidden, Head(whole), labels)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.is_likeliest, expected.is_likeliest)


def test_a_converted_adapter_needs_no_base_and_paddlenlp_has_none(base: Path, tmp_path: Path) -> None:
    written = write_adapter(tmp_path / "adapter", base, LoraConfig(r=3, trained_tokens=TOKENS))
    convert_adapter(open_adapter_conversion(written, FileForm.HUGGING_FACE), tmp_path / "again")
    models = [load_model(base) for _ in range(2)]
    for model, directory in zip(models, (written, tmp_path / "again"), strict=True):
        load_adapter(model, directory)
    assert torch.equal(*(model.get_parameter(ROWS) for model in models))
    with pytest.raises(AdapterError, match="6 trained rows of an embedding"):
        convert_adapter(open_adapter_conversion(written, FileForm.PADDLE), tmp_path / "paddle")


def test_tokens_that_a_model_does_not_have_are_refused(base: Path) -> None:
    with pytest.raises(AdapterError, match="trains the row of token 101; the model has 101"):
        apply_adapter(load_model(base), LoraConfig(trained_tokens=(3, 101)))
