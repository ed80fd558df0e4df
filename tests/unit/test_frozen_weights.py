"""What adapters do not learn costs nothing: no gradient is computed for it, and no activation kept for it alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.data.loader import Batch
from bloomlm.kernels import compiled
from bloomlm.kernels.compiled import load_operators, operators
from bloomlm.model.alibi import COLUMNS
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.precision import Precision

L, D, H, V, R = 3, 24, 3, 64, 2
LENGTHS = (150, 154)  # too long to be padded into one group; in all a multiple of 16
N = sum(LENGTHS)


def model_with(adapter: Adapter) -> BloomForCausalLM:
    model = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=D, n_layer=L, n_head=H))
    model.init_weights(torch.Generator().manual_seed(0))
    apply_adapter(model, adapter)
    return model.train()


class Shapes(TorchDispatchMode):
    """Collects the shape of everything that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.seen.add(tuple(tensor.shape))
        return result


def made_shapes(adapter: Adapter) -> set[tuple[int, ...]]:
    model = model_with(adapter)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, V, (N,), generator=generator) for _ in range(2))
    batch = Batch(tokens=tokens, labels=labels, lengths=LENGTHS, num_supervised_tokens=N)
    with Shapes() as shapes:
        batch_loss(model, batch, Precision(), scale=1.0).backward()
    return shapes.seen


WEIGHTS = {(3 * D, D), (D, D), (4 * D, D), (D, 4 * D), (V, D)}


def gradients_made(adapter: Adapter) -> set[tuple[int, ...]]:
    """Shapes of weights that something was made in; a product may give the gradient transposed."""
    seen = made_shapes(adapter)
    return {shape for shape in WEIGHTS if shape in seen or shape[::-1] in seen}


def test_full_tuning_makes_a_gradient_for_every_weight() -> None:
    assert gradients_made(FullTuning()) == WEIGHTS


@pytest.mark.parametrize("adapter", [LoraConfig(r=R, target_modules=BLOCK_LINEARS), PrefixConfig(num_prefix_tokens=5)])
def test_adapters_make_no_gradient_of_any_frozen_weight(adapter: Adapter) -> None:
    assert gradients_made(adapter) == set()


def saved_elements(adapter: Adapter) -> int:
    """Elements kept for the backward pass of the blocks, each memory once, parameters not counted."""
    model = model_with(adapter)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    tokens = torch.arange(N) % V
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.transformer(tokens, Documents.packed(LENGTHS))
    return _elements(kept.values())


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in tensors)


NORM = D + 2  # its input, mean and spread


@dataclass(frozen=True)
class Kept:
    """Numbers that attention keeps of a token."""

    width: int
    """Of a query, key, value or result of all heads."""
    shares_result: bool
    """Whether the layer behind attention keeps the same memory of the result."""

    def block(self, dense_learns: bool) -> int:
        """Queries, keys, values and result, a sum of exponentials for each head, and the input of dense."""
        return 4 * self.width + H + D * (dense_learns and not self.shares_result)


@pytest.fixture(params=["PyTorch's attention", "our operator"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kept:
    if request.param == "our operator":
        load_operators()
        if operators() is None:
            pytest.skip("there is no C++ compiler, or no AVX2")
        return Kept(D, shares_result=True)
    monkeypatch.setattr(compiled, "_loaded", None)
    return Kept(D + H * COLUMNS, shares_result=False)  # position columns stand beside each head


FEW = L * (len(LENGTHS) + 1) + H
"""Our operator also keeps the starts of documents and the slopes."""


@pytest.mark.parametrize("targets", [("query_key_value",), BLOCK_LINEARS])
def test_lora_keeps_what_its_matrices_and_the_nonlinear_functions_need(
    targets: tuple[str, ...], attention: Kept
) -> None:
    # results of layer norms and GELU are made again from what is kept for their own gradients
    block = NORM + attention.block("dense" in targets) + NORM + 4 * D + R * len(targets)
    # the first norm's input does not learn, so its result is kept instead; the last norm stands behind the blocks
    expected = N * (L * block - NORM + D + NORM)
    assert expected <= saved_elements(LoraConfig(r=R, target_modules=targets)) <= expected + FEW


def test_full_tuning_keeps_every_input_but_those_that_are_made_again(attention: Kept) -> None:
    block = NORM + attention.block(True) + NORM + 4 * D
    embedding_norm, token_ids = NORM, 1
    expected = N * (L * block + embedding_norm + NORM + token_ids)
    assert expected <= saved_elements(FullTuning()) <= expected + FEW
