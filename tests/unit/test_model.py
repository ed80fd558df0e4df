"""The model's own parts: ALiBi columns, packing, cache, recompute."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.model.alibi import fused_columns, head_slopes, key_columns, query_columns
from bloomlm.model.attention import _groups, attend, virtual_with_columns, with_columns
from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache
from bloomlm.model.products import uses_onednn
from tests.process_memory import STATM, memory_full_of_nan, resident_bytes
from tests.tiny_checkpoint import TINY, random_model

from .test_adapters import tiny_model


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_columns_give_the_bias_exactly_in_16_bits(head_dim: int) -> None:
    slopes = torch.tensor(head_slopes(16))
    positions = torch.tensor([-64, 0, 1, 255, 256, 257, 2047, 2048, 30_001, 65_535])
    query, key = query_columns(slopes, head_dim), key_columns(positions)
    assert torch.equal(query.bfloat16().float(), query)
    assert torch.equal(key.bfloat16().float(), key)
    bias = (query.double() @ key.double().t()) / math.sqrt(head_dim)
    torch.testing.assert_close(bias, slopes.double()[:, None] * positions.double(), rtol=1e-7, atol=0)


def test_slopes() -> None:
    assert head_slopes(8) == [2.0**-i for i in range(1, 9)]
    # 6 heads: the 4 of a model with 4 heads, then every other one of a model with 8
    assert head_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_documents_pack_and_unpack() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 0, 0]])
    documents = Documents.from_mask(mask)
    padded = torch.arange(9).view(3, 3) + 1
    assert documents.lengths == (2, 3, 1)
    assert documents.pack(padded).tolist() == [2, 3, 4, 5, 6, 7]
    assert documents.unpack(documents.pack(padded)).tolist() == (padded * mask).tolist()
    with pytest.raises(ValueError, match="row 1"):
        Documents.from_mask(torch.tensor([[1, 1], [0, 0]]))


@pytest.mark.parametrize("with_gradients", [True, False])
def test_hooks_of_every_layer_see_its_result(with_gradients: bool) -> None:
    """Whichever operations are one operator otherwise; a hook may also replace the result."""
    model, ids = tiny_model(), torch.randint(0, 64, (2, 9))
    layers = {name: module for name, module in model.transformer.h.named_modules() if not list(module.children())}
    found: dict[str, Tensor] = {}
    with torch.set_grad_enabled(with_gradients):
        expected = model(ids)
        for name, layer in layers.items():
            layer.register_forward_hook(lambda _, inputs, result, name=name: found.update({name: result}))
        torch.testing.assert_close(model(ids), expected)
        assert found.keys() == layers.keys()
        first = layers["0.mlp.dense_h_to_4h"]
        torch.testing.assert_close(
            found["0.mlp.dense_h_to_4h"], F.linear(found["0.post_attention_layernorm"], *first.parameters())
        )
        first.register_forward_hook(lambda _, inputs, result: torch.zeros_like(result))
        model(ids)
    bias = layers["0.mlp.dense_4h_to_h"].bias
    torch.testing.assert_close(found["0.mlp.dense_4h_to_h"], bias.expand(18, -1))


def test_recompute_gives_the_same_gradients() -> None:
    ids = torch.randint(0, 64, (2, 9))
    grads = []
    for recompute in (False, True):
        model = tiny_model().train()
        model.transformer.recompute = recompute
        calls: list[int] = []
        model.transformer.h[0].input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids).square().mean().backward()
        assert len(calls) == (2 if recompute else 1)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 2, 3], [1, 30, 2]], ids=["equal", "masked", "one by one"])
@torch.no_grad()
def test_rows_equal_sequences_without_a_cache(lengths: list[int]) -> None:
    """Prefill, steps of some rows in any order, more tokens for others, a copy, and rows that are used again."""
    model = tiny_model()
    with memory_full_of_nan():
        rows = model.open_rows(4, 40)
    texts: dict[int, list[int]] = {
        row: torch.randint(0, 64, (n,)).tolist() for row, n in zip((3, 0, 1), lengths, strict=True)
    }

    def check(chosen: list[int], found: torch.Tensor) -> None:
        for row, logits in zip(chosen, found, strict=True):
            torch.testing.assert_close(logits, model(torch.tensor([texts[row]]))[0, -1], rtol=1e-4, atol=1e-5)

    def step(chosen: list[int]) -> None:
        tokens = torch.randint(0, 64, (len(chosen),))
        for row, token in zip(chosen, tokens.tolist(), strict=True):
            texts[row].append(token)
        check(chosen, rows.decode_step(chosen, tokens))

    def read(chosen: list[int], counts: list[int]) -> None:
        new = [torch.randint(0, 64, (count,)).tolist() for count in counts]
        for row, tokens in zip(chosen, new, strict=True):
            texts[row] = [*texts.get(row, []), *tokens]
        check(chosen, rows.prefill(chosen, new))

    check([3, 0, 1], rows.prefill([3, 0, 1], [texts[row] for row in (3, 0, 1)]))
    step([0, 1])
    step([3, 0])
    read([1, 0], [3, 3])
    rows.copy_row(0, 2)
    texts[2] = list(texts[0])
    step([2, 0, 3, 1])
    rows.cache.values[:, 3, :, : rows.cache.lengths[3]] = torch.nan  # what an earlier sequence left behind
    rows.free(3)
    del texts[3]
    read([3, 2], [2, 1])
    step([0, 1, 2, 3])


@pytest.mark.skipif(not STATM.exists(), reason="counts memory as Linux does")
@torch.no_grad()
def test_only_rows_in_use_take_memory() -> None:
    model = tiny_model()
    slot_bytes = KVCache(model.config, 1, 1, dtype=torch.float32).keys.nbytes * 2
    before = resident_bytes()
    rows = model.open_rows(64, 4 * 2**20 // slot_bytes)
    assert rows.cache.keys.nbytes * 2 > 250 * 2**20
    rows.prefill([3, 50], [[5, 6], [7]])
    rows.decode_step([50, 3], torch.tensor([8, 9]))
    assert resident_bytes() - before < 50 * 2**20


def test_cache_overflow_is_refused() -> None:
    model = tiny_model()
    cache = KVCache(model.config, 1, 4, dtype=torch.float32)
    with pytest.raises(ValueError, match="5 more tokens"):
        model(torch.zeros(1, 5, dtype=torch.long), kv_cache=cache)


def test_double_precision_gradients_equal_finite_differences() -> None:
    model = tiny_model().double()
    hidden = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    documents = Documents.packed((2, 3))
    alibi = model.transformer.alibi(documents.positions(hidden.device))
    assert torch.autograd.gradcheck(lambda x: model.transformer.h[0](x, alibi, documents), hidden)


def test_short_documents_are_computed_together_and_long_ones_alone() -> None:
    lengths = (30, 200, 28, 29, 5, 128, 3)
    assert _groups(lengths) == ((1,), (5,), (0, 3, 2, 4), (6,))


@pytest.mark.parametrize("num_virtual", [0, 3])
def test_documents_of_a_pack_equal_single_documents(num_virtual: int) -> None:
    lengths = (9, 130, 8, 8, 2)
    model = tiny_model()
    if num_virtual:
        apply_adapter(model, PrefixConfig(num_prefix_tokens=num_virtual), torch.Generator().manual_seed(1))
    tokens = torch.arange(sum(lengths)) % model.config.vocab_size
    outside = torch.randn(sum(lengths), model.config.hidden_size, generator=torch.Generator().manual_seed(2))

    def run(pieces: list[tuple[Tensor, Documents, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        outs = []
        for piece, documents, gradient in pieces:
            out = model.transformer(piece, documents)
            out.backward(gradient)
            outs.append(out.detach())
        return torch.cat(outs), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, packed_gradients = run([(tokens, Documents.packed(lengths), outside)])
    singles = zip(tokens.split(lengths), lengths, outside.split(lengths), strict=True)
    single, single_gradients = run([(piece, Documents.packed([n]), gradient) for piece, n, gradient in singles])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_gradients, single_gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_virtual", [0, 3])
@pytest.mark.parametrize("lengths", [(1,), (64,), (65, 65), (127, 200, 3)])
def test_attention_in_blocks_equals_the_kernel(num_virtual: int, lengths: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    documents = Documents.packed(list(lengths))
    columns = fused_columns(documents.positions(torch.device("cpu")), query_columns(torch.tensor(head_slopes(4)), 16))
    fused = with_columns(torch.randn(sum(lengths), 4, 3, 16, generator=generator), columns)
    virtual = None
    if num_virtual:
        key, value = torch.randn(2, 4, num_virtual, 16, generator=generator)
        virtual = virtual_with_columns(key, value)
    kernel = attend(fused, documents, head_dim=16, virtual=virtual)
    with torch.no_grad():
        in_blocks = attend(fused, documents, head_dim=16, virtual=virtual)
    torch.testing.assert_close(in_blocks, kernel, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("post_layernorm", [False, True])
def test_wanted_rows_are_those_of_all_rows(post_layernorm: bool) -> None:
    config = replace(TINY, apply_residual_connection_post_layernorm=post_layernorm)
    model = random_model(config)
    tokens = torch.arange(4, 16)
    documents = Documents.packed((7, 5))
    rows = torch.tensor([11, 0, 6, 6])
    with torch.no_grad():
        whole = model.transformer(tokens, documents)
        torch.testing.assert_close(model.transformer(tokens, documents, rows=rows), whole[rows])
        assert model.transformer(tokens, documents, rows=rows[:0]).shape == (0, config.hidden_size)


def test_many_tokens_are_computed_in_multiples_and_equal_documents_alone() -> None:
    model, lengths = tiny_model(), (130, 90, 61)
    tokens = torch.randint(4, 64, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    rows: list[int] = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))

    def run(parts: list[tuple[Tensor, Documents]]) -> tuple[Tensor, list[Tensor]]:
        hidden = torch.cat([model.transformer(part, documents) for part, documents in parts])
        return hidden, list(torch.autograd.grad(hidden.square().sum(), model.transformer.parameters()))

    together, gradients = run([(tokens, Documents.packed(lengths))])
    assert set(rows) == {288 if uses_onednn(together, together) else 281}
    alone, expected = run([(part, Documents.packed([len(part)])) for part in tokens.split(lengths)])
    torch.testing.assert_close(together, alone)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    chosen = torch.tensor([0, 129, 130, 280])
    torch.testing.assert_close(model.transformer(tokens, Documents.packed(lengths), rows=chosen), alone[chosen])


def test_under_autocast_recompute_has_the_same_bits_and_packing_the_same_values() -> None:
    model, lengths = tiny_model().train(), (17, 1, 12)
    tokens = torch.randint(4, 64, (sum(lengths),), generator=torch.Generator().manual_seed(0))

    def gradients(parts: list[tuple[Tensor, Documents]]) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.cat([model.transformer(part, documents) for part, documents in parts])
        return list(torch.autograd.grad(hidden[:, 3].sum(), model.transformer.parameters()))

    packed = [(tokens, Documents.packed(lengths))]
    kept, alone = gradients(packed), gradients([(t, Documents.packed([len(t)])) for t in tokens.split(lengths)])
    model.transformer.recompute = True
    for found, again, single in zip(kept, gradients(packed), alone, strict=True):
        assert torch.equal(found, again)
        assert (found - single).norm() <= 2e-2 * single.norm() + 1e-6


def test_a_model_without_memory_gives_shapes() -> None:
    """On the meta device, which has no autocast."""
    tokens = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    assert tiny_model().to("meta")(tokens).shape == (2, 5, 64)
