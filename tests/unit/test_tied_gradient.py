"""The tied weight's gradient, made in one piece of memory, against autograd's own sum of its two parts."""

import pytest
import torch
from torch import Tensor

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from bloomlm.model.embedding import GradientParts
from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from tests.paddle_files import make_model

TOKENS = torch.tensor([5, 9, 5, 3, 7, 9, 2])
LABELS = torch.tensor([9, -100, 3, 7, 9, -100, 1])


def weight_gradient(model: BloomForCausalLM, microbatches: int = 1, memory: list[Tensor] | None = None) -> Tensor:
    weight = model.transformer.word_embeddings.weight
    weight.grad = None
    for batch in range(microbatches):
        hidden = model.transformer(TOKENS + batch, Documents.packed([4, 3]))
        linear_cross_entropy(hidden, Head(weight), LABELS, gradient_memory=memory).backward()
    assert weight.grad is not None
    return weight.grad


def test_rows_are_added_to_the_heads_gradient() -> None:
    plain = make_model()  # autograd adds two dense gradients
    for in_place in (True, False):
        model = make_model()
        model.transformer.word_embeddings.choose_gradient(in_place=in_place)
        for microbatches in (1, 3):
            expected = weight_gradient(plain, microbatches)
            torch.testing.assert_close(weight_gradient(model, microbatches), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_chunk_bytes", [1, 2**20])
@pytest.mark.parametrize("hidden_factor", [1, 2])
def test_parts_add_up_to_the_gradient(hidden_factor: int, max_chunk_bytes: int) -> None:
    """Of two documents 5 tokens have labels; autograd gets the head's gradient where they are more than the width."""
    plain, model = make_model(), make_model()
    parts = model.transformer.word_embeddings.collect_gradient()
    gradients = []
    for each, of_head in ((plain, None), (model, parts.of_head)):
        weight = each.transformer.word_embeddings.weight
        hidden = each.transformer(TOKENS, Documents.packed([4, 3])).repeat(hidden_factor * 4, 1)
        labels = LABELS.repeat(hidden_factor * 4)
        loss = linear_cross_entropy(
            hidden, Head(weight), labels, max_chunk_bytes=max_chunk_bytes, label_smoothing=0.1, gradient_parts=of_head
        )
        (3.0 * loss).backward()
        gradients.append(weight.grad)
    assert gradients[0] is not None
    width = len(gradients[0][0])
    assert (gradients[1] is None) is (20 * hidden_factor <= width)
    for number, (rows, gradient) in enumerate(parts.take(7, gradients[1])):
        assert rows.start == 7 * number
        torch.testing.assert_close(gradient, gradients[0][rows], rtol=1e-5, atol=1e-6)
    assert rows.stop == len(gradients[0])
    assert not parts.of_head


def test_no_second_matrix_is_made() -> None:
    model = make_model()
    model.transformer.word_embeddings.choose_gradient(in_place=True)
    weight = model.transformer.word_embeddings.weight
    memory = [torch.full_like(weight.detach(), torch.nan)]
    address = memory[0].data_ptr()
    expected = weight_gradient(model).clone()
    gradient = weight_gradient(model, memory=memory)
    assert torch.equal(gradient, expected)
    assert gradient.data_ptr() == address
    assert not memory  # nobody else holds it: what comes next would overwrite it


def test_memory_that_does_not_fit_is_not_used() -> None:
    model = make_model()
    weight = model.transformer.word_embeddings.weight.detach()
    for unfit in (weight[:-1].clone(), weight.double()):
        assert torch.equal(weight_gradient(model, memory=[unfit]), weight_gradient(model))


def test_a_loss_without_the_head_has_the_embeddings_gradient_alone() -> None:
    plain, model = make_model(), make_model()
    model.transformer.word_embeddings.choose_gradient(in_place=True)
    for each in (plain, model):
        each.transformer(TOKENS, Documents.packed([4, 3])).pow(3).sum().backward()
    found, expected = (each.transformer.word_embeddings.weight.grad for each in (model, plain))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_single_part_in_bf16_stays_so_and_is_rounded_once_where_rows_were_looked_up() -> None:
    weight = torch.zeros(8, 4, dtype=torch.bfloat16)
    of_head = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    rows = torch.tensor([5, 1, *[5] * 30])
    looked_up = torch.full((len(rows), 4), 2.0**-7, dtype=weight.dtype)  # in bf16 sums, most of these would be lost
    sums = of_head.float().index_add_(0, rows, looked_up.float())
    for given in (None, torch.ones(8, 4, dtype=weight.dtype)):
        parts = GradientParts(weight)
        parts.of_head.append(lambda block: of_head[block].clone())
        parts.add_looked_up(rows, looked_up)
        gradient = torch.cat([gradient for _, gradient in parts.take(3, given)])
        if given is None:
            assert torch.equal(gradient, sums.to(weight.dtype))
        else:
            torch.testing.assert_close(gradient, sums + 1.0)
