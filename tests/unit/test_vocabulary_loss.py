"""linear_cross_entropy against torch's cross entropy on whole logits: loss and gradients, by value."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.model.products import uses_onednn
from bloomlm.parallel import logits
from bloomlm.parallel.logits import Logits
from bloomlm.parallel.vocabulary_head import Head, HeadProducts
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_tokens

M, D, V = 13, 8, 50


def inputs(dtype: torch.dtype = torch.float64, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(not frozen)
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[2] = labels[5] = labels[12] = -100
    return hidden, weight, labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, labels, label_smoothing=label_smoothing, reduction="sum")


def gradients(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, factor: float = 1.0
) -> tuple[Tensor, ...]:
    hidden.grad = weight.grad = None
    value = loss(hidden, weight)
    (value * factor).backward()
    assert hidden.grad is not None
    return value.detach(), hidden.grad, *([] if weight.grad is None else [weight.grad])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_cross_entropy_on_whole_logits(
    dtype: torch.dtype, factor: float, label_smoothing: float, rows_per_chunk: int
) -> None:
    hidden, weight, labels = inputs(dtype)
    max_chunk_bytes = rows_per_chunk * V * dtype.itemsize
    found = gradients(
        lambda h, w: linear_cross_entropy(
            h, Head(w), labels, label_smoothing=label_smoothing, max_chunk_bytes=max_chunk_bytes
        ),
        hidden,
        weight,
        factor,
    )
    exact = (hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_())
    expected = gradients(lambda h, w: oracle(h, w, labels, label_smoothing), *exact, factor)
    assert found[0].dtype is dtype
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < (1e-6 if dtype is torch.float32 else 1e-13)
    assert torch.equal(found[1][2], torch.zeros(D, dtype=dtype))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_in_blocks_of_columns(label_smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels lie in all blocks; the weight's gradient is taken in slices that end within blocks."""
    monkeypatch.setattr(logits, "_UNIT", 16)
    monkeypatch.setattr(logits, "_MOST_BYTES", 1)
    hidden, weight, labels = inputs(torch.float32)
    chunks = []
    monkeypatch.setattr(Logits, "row_max", lambda z, real=Logits.row_max: chunks.append(z) or real(z))
    parts: list[Callable[[slice], Tensor]] = []
    labels[:4], labels[9:] = torch.tensor([0, 15, 16, 49]), -100  # no more rows than columns of the weight
    loss = linear_cross_entropy(
        hidden, Head(weight), labels, label_smoothing=label_smoothing, max_chunk_bytes=4 * V * 4, gradient_parts=parts
    )
    (found_hidden,) = torch.autograd.grad(loss, hidden)
    found = [torch.cat([sum_of(parts, slice(i, i + size)) for i in range(0, V, size)])[:V] for size in (16, 7, 50)]
    if uses_onednn(hidden, weight):
        assert [len(z.blocks) for z in chunks] == [4] * len(chunks)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = torch.autograd.grad(oracle(*exact, labels, label_smoothing), exact)
    assert relative_error(found_hidden, expected[0]) < 1e-6
    assert all(relative_error(each, expected[1]) < 1e-6 for each in found)


def sum_of(parts: list[Callable[[slice], Tensor]], tokens: slice) -> Tensor:
    return torch.stack([part(tokens) for part in parts]).sum(0)


def test_scale_multiplies_loss_and_gradients() -> None:
    hidden, weight, labels = inputs()
    expected = gradients(lambda h, w: oracle(h, w, labels, 0.0), hidden, weight)
    found = gradients(lambda h, w: linear_cross_entropy(h, Head(w), labels, scale=0.125), hidden, weight)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs * 0.125)


def test_frozen_weight_gets_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(frozen=True)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight gradient was computed")

    monkeypatch.setattr(torch.Tensor, "addmm_", refuse)
    found = gradients(lambda h, w: linear_cross_entropy(h, Head(w), labels), hidden, weight)
    expected = gradients(lambda h, w: oracle(h, w, labels, 0.0), hidden, weight)
    assert len(found) == 2 and weight.grad is None
    torch.testing.assert_close(found[1], expected[1])
    weight.requires_grad_()
    with pytest.raises(AssertionError, match="weight gradient"):
        linear_cross_entropy(hidden, Head(weight), labels)


def test_without_grad_mode_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs()
    monkeypatch.setattr("bloomlm.parallel.vocabulary_head.HeadProducts.add_gradients", None)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            loss = linear_cross_entropy(hidden, Head(weight), labels)
        torch.testing.assert_close(loss, oracle(hidden, weight, labels, 0.0).detach())


def test_no_label_at_all_is_zero_and_differentiable() -> None:
    hidden, weight, labels = inputs()
    value, *grads = gradients(
        lambda h, w: linear_cross_entropy(h, Head(w), torch.full_like(labels, -100)), hidden, weight
    )
    assert value == 0 and len(grads) == 2
    assert torch.equal(grads[0], torch.zeros_like(hidden)) and torch.equal(grads[1], torch.zeros_like(weight))


def test_second_backward_is_refused() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy(hidden, Head(weight), labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_the_fp32_oracle(dtype: torch.dtype, autocast: bool) -> None:
    stored = torch.float32 if autocast else dtype
    hidden, weight, labels = inputs(stored)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = gradients(
            lambda h, w: linear_cross_entropy(h, Head(w), labels, max_chunk_bytes=5 * V * 4), hidden, weight
        )
        theirs = gradients(lambda h, w: F.cross_entropy((h @ w.T).float(), labels, reduction="sum"), hidden, weight)
    exact = (hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    expected = gradients(lambda h, w: oracle(h, w, labels, 0.0), *exact)
    assert found[0].dtype is torch.float32
    assert found[1].dtype is stored and found[2].dtype is stored
    for ours, plain, oracles in zip(found, theirs, expected, strict=True):
        # as near as plain cross entropy on half-precision logits, up to chance in the last bit
        assert relative_error(ours, oracles) < 1.5 * relative_error(plain, oracles) + torch.finfo(dtype).eps / 4


def test_fp16_gradients_neither_overflow_nor_vanish() -> None:
    """BLOOM's vocabulary: probabilities of 4e-6, hidden states of hundreds, many rows with one label."""
    num_rows, vocab_size = 300, 250_880
    hidden = torch.full((num_rows, 2), 200.0, dtype=torch.float16)
    hidden[:, 1] = 0.01
    weight = torch.zeros(vocab_size, 2, dtype=torch.float16)
    labels = torch.zeros(num_rows, dtype=torch.int64)
    hidden.requires_grad_()
    weight.requires_grad_()
    linear_cross_entropy(hidden, Head(weight), labels, scale=1.0 / num_rows, max_chunk_bytes=2**30).backward()
    assert weight.grad is not None
    # d loss / d W[0] = mean over rows of (1 / V - 1) * hidden, elsewhere 1 / V * hidden
    torch.testing.assert_close(weight.grad[0].float(), torch.tensor([-200.0, -0.01]), rtol=2e-3, atol=0)
    expected = torch.tensor(200.0 / vocab_size)
    torch.testing.assert_close(weight.grad[1, 0].float(), expected, rtol=1e-3, atol=0)


def test_chunks_are_equal_in_size() -> None:
    products = HeadProducts(torch.zeros(10, 2), Head(torch.zeros(V, 2)), 8 * V * 4)
    assert [(s.start, s.stop) for s in products.chunks()] == [(0, 5), (5, 10)]
    assert all(products.logits(rows).whole.shape == (5, V) for rows in products.chunks())


def test_score_tokens() -> None:
    hidden, weight, labels = inputs(torch.float32)
    logits = (hidden @ weight.T).detach()
    labels[0], labels[7] = logits[0].argmax(), logits[7].argmax()
    score = score_tokens(hidden, Head(weight), labels)
    known = labels != -100
    assert int(score.num_correct) == int((logits.argmax(1) == labels)[known].sum()) >= 2
    torch.testing.assert_close(score.loss, F.cross_entropy(logits, labels, reduction="sum"))
    assert not score.loss.requires_grad
