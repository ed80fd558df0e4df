"""The block-sparse kernel's mask and results, computed by torch's own slow form of it on a CPU, against attention.py."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from bloomlm.kernels import compiled
from bloomlm.model import attention, flex
from bloomlm.model.alibi import fused_columns, head_slopes, query_columns
from bloomlm.model.documents import Documents
from tests.unit.test_adapters import tiny_model

HEADS, HEAD_DIM = 3, 10  # 18 wide with the position columns: no power of two
SLOW = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def packed(lengths: tuple[int, ...], num_virtual: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    generator = torch.Generator().manual_seed(0)
    columns = fused_columns(
        Documents.packed(lengths).positions(torch.device("cpu")),
        query_columns(torch.tensor(head_slopes(HEADS)), HEAD_DIM),
    )
    fused = torch.randn(sum(lengths), HEADS, 3, HEAD_DIM, generator=generator)
    virtual = torch.randn(2, HEADS, num_virtual, HEAD_DIM, generator=generator)
    return attention.with_columns(fused, columns), attention.virtual_with_columns(*virtual) if num_virtual else None


@pytest.mark.parametrize("num_virtual", [0, 4])
def test_the_mask_is_that_of_each_document_alone(num_virtual: int) -> None:
    lengths = (3, 150, 1, 120)
    mask = flex.document_mask(lengths, num_virtual, torch.device("cpu"))
    num_tokens = sum(lengths)
    places = torch.arange(num_tokens)
    found = mask.mask_mod(None, None, places[:, None], torch.arange(num_virtual + num_tokens)[None])
    alone = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths]).bool()
    assert torch.equal(found, torch.cat((torch.ones(num_tokens, num_virtual, dtype=torch.bool), alone), 1))
    assert mask.shape == (1, 1, num_tokens, num_virtual + num_tokens)
    # blocks of 128 x 128 that hold nothing, and no others, are left out
    blocks = F.max_pool2d(found[None].float(), 128, ceil_mode=True)[0]
    assert torch.equal(mask.to_dense()[0, 0].float(), blocks) and (num_virtual or blocks.sum() < blocks.numel())
    assert flex.document_mask(lengths, num_virtual, torch.device("cpu")) is mask


@SLOW
@pytest.mark.parametrize("num_virtual", [0, 4])
@pytest.mark.parametrize("lengths", [(3, 150, 1, 20), (1, 2)])
def test_equals_the_documents_computed_one_by_one(lengths: tuple[int, ...], num_virtual: int) -> None:
    fused, virtual = packed(lengths, num_virtual)
    found = flex.attend_documents(fused, lengths, HEAD_DIM**-0.5, virtual, kernel=torch_flex.flex_attention)
    expected = attention._attend_documents(fused, Documents.packed(lengths), HEAD_DIM**-0.5, virtual, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@SLOW
def test_training_takes_it_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_loaded", None)  # or a CPU would use an operator of our own
    lengths, calls = (5, 130, 2), []
    tokens = torch.randint(0, 64, (sum(lengths),))

    def gradients(model_lengths: tuple[int, ...]) -> dict[str, Tensor]:
        model = tiny_model().train()
        model.transformer(tokens, Documents.packed(model_lengths)).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(lengths)
    kernel: Callable[..., Tensor] = torch_flex.flex_attention
    monkeypatch.setattr(flex, "is_available", lambda device: True)
    monkeypatch.setattr(flex, "_compiled_kernel", lambda: lambda *a, **k: calls.append(1) or kernel(*a, **k))
    # torch refuses gradients on a CPU, where its slow form has them all the same
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    found = gradients(lengths)
    assert len(calls) == 2, "one call a block"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    gradients((sum(lengths),))
    with torch.no_grad():
        tiny_model().transformer(tokens, Documents.packed(lengths))
    assert len(calls) == 2, "one document, or no gradients: the plain kernel serves"
