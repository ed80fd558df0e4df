"""linear_log_probs against torch.log_softmax on whole logits: values, and gradients of a loss that is no sum."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bloomlm.model.embedding import ReplacedRows
from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_log_probs import linear_log_probs
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy

M, D, V = 13, 8, 50
LABELLED = [0, 1, 3, 4, 6, 7, 8, 9, 10, 11]


def inputs(dtype: torch.dtype, *, head_learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(M, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(head_learns)
    labels = torch.randint(0, V, (M,), generator=generator)
    labels[2] = labels[5] = labels[12] = -100
    return hidden, weight, labels


def oracle(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = torch.tensor(LABELLED)
    return torch.log_softmax(hidden[rows] @ weight.T, dim=1).gather(1, labels[rows, None])[:, 0]


def preference(log_probs: Tensor) -> Tensor:
    """A loss of two sequences, in which each token's gradient depends on all others."""
    return -torch.nn.functional.logsigmoid(log_probs[:6].sum() - log_probs[6:].sum()) + log_probs.mean().exp()


def results(log_probs_of: Callable[..., Tensor], *tensors: Tensor, factor: float = 1.0) -> list[Tensor]:
    for tensor in tensors:
        tensor.grad = None
    log_probs = log_probs_of(*tensors)
    (preference(log_probs) * factor).backward()
    return [log_probs.detach(), *(tensor.grad for tensor in tensors if tensor.grad is not None)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("factor", [1.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_log_softmax_of_whole_logits(
    dtype: torch.dtype, factor: float, head_learns: bool, rows_per_chunk: int
) -> None:
    hidden, weight, labels = inputs(dtype, head_learns=head_learns)
    found = results(
        lambda h, w: linear_log_probs(h, Head(w), labels, max_chunk_bytes=rows_per_chunk * V * dtype.itemsize),
        hidden,
        weight,
        factor=factor,
    )
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, weight)]
    expected = results(lambda h, w: oracle(h, w, labels), *exact, factor=factor)
    assert len(found) == len(expected) == 2 + head_learns and found[0].dtype is dtype
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < (2e-6 if dtype is torch.float32 else 1e-13)


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_replaced_rows_learn_and_the_weight_does_not(rows_per_chunk: int) -> None:
    hidden, weight, labels = inputs(torch.float64, head_learns=False)
    labels[3], labels[4] = 49, 0
    places = torch.tensor([49, 0, 7, 30])
    rows = torch.randn(4, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    found = results(
        lambda h, r: linear_log_probs(
            h, Head(weight, replaced=ReplacedRows(places, r)), labels, max_chunk_bytes=rows_per_chunk * V * 8
        ),
        hidden,
        rows,
    )
    expected = results(lambda h, r: oracle(h, weight.index_copy(0, places, r), labels), hidden, rows)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_learns", [True, False])
def test_half_precision_is_as_near_as_the_cross_entropy(head_learns: bool, dtype: torch.dtype) -> None:
    """Under autocast, with a loss scale that overflows float16 unless it is applied in float32."""
    hidden, weight, labels = inputs(torch.float32, head_learns=head_learns)
    scale = 2.0**20
    with torch.autocast("cpu", dtype):
        linear_cross_entropy(hidden, Head(weight), labels, scale=scale).backward()
    expected = [tensor.grad for tensor in (hidden, weight) if tensor.grad is not None]
    hidden.grad = weight.grad = None
    with torch.autocast("cpu", dtype):
        log_probs = linear_log_probs(hidden, Head(weight), labels)
    (log_probs.sum() * -scale).backward()
    found = [tensor.grad for tensor in (hidden, weight) if tensor.grad is not None]
    assert len(found) == 1 + head_learns
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-2 and torch.isfinite(ours).all()


def test_without_labels_every_gradient_is_zero() -> None:
    hidden, weight, labels = inputs(torch.float32, head_learns=True)
    log_probs = linear_log_probs(hidden, Head(weight), torch.full_like(labels, -100))
    assert log_probs.shape == (0,)
    log_probs.sum().backward()
    for tensor in (hidden, weight):
        assert tensor.grad is not None and not tensor.grad.any()


def test_a_second_backward_pass_is_refused() -> None:
    hidden, weight, labels = inputs(torch.float32, head_learns=True)
    loss = linear_log_probs(hidden, Head(weight), labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        loss.backward()


def test_the_weight_gradient_takes_memory_that_is_not_needed() -> None:
    hidden, weight, labels = inputs(torch.float32, head_learns=True)
    memory = [torch.full_like(weight, torch.nan, requires_grad=False)]
    address = memory[0].data_ptr()
    linear_log_probs(hidden, Head(weight), labels, gradient_memory=memory).sum().backward()
    assert not memory and weight.grad is not None and weight.grad.data_ptr() == address
    assert torch.isfinite(weight.grad).all()
