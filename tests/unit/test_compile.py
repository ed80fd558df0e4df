"""Compiled blocks give the same values, and other documents do not have them compiled again."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.model.documents import Documents
from tests.unit.test_adapters import tiny_model

LENGTHS = ((3, 6), (7, 4, 5), (20,), (2, 9, 1, 1), (6, 6))


@pytest.mark.filterwarnings("ignore")  # dynamo's own
@pytest.mark.parametrize("adapter", [FullTuning(), LoraConfig(r=2, target_modules=BLOCK_LINEARS)])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_same_gradients_from_few_graphs(adapter: FullTuning | LoraConfig, recompute: bool) -> None:
    torch.compiler.reset()
    counter = CompileCounter()

    def gradients(compiled: bool) -> dict[str, Tensor]:
        model = tiny_model().train()
        apply_adapter(model, adapter, torch.Generator().manual_seed(0))
        model.transformer.recompute = recompute
        if compiled:
            model.transformer.compile_blocks(counter)
        for lengths in LENGTHS:
            tokens = torch.arange(sum(lengths)) % 64
            hidden = model.transformer(tokens, Documents.packed(lengths))
            model.logits(hidden).square().mean().backward()
            graphs.append(counter.frame_count)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    graphs: list[int] = []
    expected = gradients(compiled=False)
    assert graphs.pop() == 0
    graphs.clear()
    found = gradients(compiled=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert 0 < graphs[1] == graphs[-1], graphs
