"""Logits, losses and gradients equal those of transformers' BloomForCausalLM."""

import pytest
import torch
import torch.nn.functional as F

from bloomlm.model.documents import Documents
from bloomlm.model.kv_cache import KVCache

from .conftest import make_pair

RELATIVE = 2e-5


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = RELATIVE) -> None:
    """Largest difference, relative to the largest value."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < tolerance, f"relative error {error:.2e}"


def left(mask_lengths: list[int], length: int) -> torch.Tensor:
    return torch.stack([(torch.arange(length) >= length - n).long() for n in mask_lengths])


def right(mask_lengths: list[int], length: int) -> torch.Tensor:
    return torch.stack([(torch.arange(length) < n).long() for n in mask_lengths])


MASKS = {
    "none": None,
    "left": left([11, 4, 7], 11),
    "right": right([5, 11, 9], 11),
    "middle": torch.tensor([[1] * 4 + [0] * 3 + [1] * 4, [1] * 11, [0, 1] * 5 + [1]]),
}


@pytest.mark.parametrize("post_layernorm", [False, True])
@pytest.mark.parametrize("n_head", [1, 4, 6, 12])
@pytest.mark.parametrize("mask_name", MASKS)
def test_logits_and_all_gradients(n_head: int, post_layernorm: bool, mask_name: str) -> None:
    theirs, ours = make_pair(n_head, post_layernorm)
    ids = torch.randint(4, 101, (3, 11))
    mask = MASKS[mask_name]
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    their_logits = theirs(ids, attention_mask=mask).logits
    our_logits = ours(ids, attention_mask=mask)
    assert_close(our_logits[real], their_logits[real])

    # a label where both the position and the next one are real
    labels = torch.where(real[:, 1:] & real[:, :-1], ids[:, 1:], -100)
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
        for logits in (our_logits, their_logits)
    ]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        reference = expected[name].grad
        # key biases have no gradient in exact arithmetic: compare those against the layer's largest gradient
        scale = max(reference.abs().max(), 1e-3 * theirs.transformer.word_embeddings.weight.grad.abs().max())
        assert (parameter.grad - reference).abs().max() < 5 * RELATIVE * scale, name


def test_loss_equals_theirs_with_labels() -> None:
    theirs, ours = make_pair(6)
    ids = torch.randint(4, 101, (2, 9))
    expected = theirs(ids, labels=ids).loss
    logits = ours(ids)
    assert_close(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), expected)


@pytest.mark.parametrize("n_head", [4, 6])
@pytest.mark.parametrize("mask_name", ["none", "left"])
@pytest.mark.parametrize("step", [1, 3])
def test_cached_steps(n_head: int, mask_name: str, step: int) -> None:
    theirs, ours = make_pair(n_head)
    ids = torch.randint(4, 101, (3, 17))
    mask = MASKS[mask_name]
    full_mask = F.pad(torch.ones(3, 11, dtype=torch.long) if mask is None else mask, (0, 6), value=1)
    expected = theirs(ids, attention_mask=full_mask).logits
    cache = KVCache(ours.config, 3, 17, dtype=torch.float32)
    with torch.no_grad():
        logits = [ours(ids[:, :11], mask, kv_cache=cache)]
        for start in range(11, 17, step):
            logits.append(ours(ids[:, start : start + step], kv_cache=cache))
    real = full_mask.bool()
    assert_close(torch.cat(logits, dim=1)[real], expected[real])
    assert cache.lengths == full_mask.sum(dim=1).tolist()


def test_packed_documents_equal_single_ones() -> None:
    theirs, ours = make_pair(6)
    documents = [torch.randint(4, 101, (n,)) for n in (5, 1, 12, 5)]
    hidden = ours.transformer(torch.cat(documents), Documents.packed([len(d) for d in documents]))
    expected = torch.cat([theirs(d[None]).logits[0] for d in documents])
    assert_close(ours.logits(hidden), expected)


@pytest.mark.parametrize("n_head", [4, 6])
def test_bf16_is_no_worse_than_transformers(n_head: int) -> None:
    """Both in bf16 against transformers in fp32 on the same (bf16) weights, at lengths where a bf16 bias is off by 4."""
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(3):
        theirs, ours = make_pair(n_head, dtype=torch.bfloat16, seed=seed)
        ids = torch.randint(4, 101, (1, 700))
        with torch.no_grad():
            low = {"ours": ours(ids).float(), "theirs": theirs(ids).logits.float()}
            oracle = theirs.float()(ids).logits
        for name, logits in low.items():
            errors[name].append((logits - oracle).square().mean().sqrt().item())
    assert sum(errors["ours"]) <= sum(errors["theirs"]), errors


def test_autocast_is_no_worse_than_transformers() -> None:
    """Logits and gradients of fp32 weights in bf16 products, both against transformers in fp32."""
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(3):
        theirs, ours = make_pair(4, seed=seed)
        ids = torch.randint(4, 101, (2, 150))  # so many tokens that ours computes them in multiples
        pairs = {"exact": (theirs, False), "theirs": (theirs, True), "ours": (ours, True)}
        found = {}
        for name, (model, rounds) in pairs.items():
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=rounds):
                logits = model(ids) if model is ours else model(ids).logits
            logits.float().log_softmax(-1)[..., 7].sum().backward()
            gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
            found[name] = [logits.detach().float(), *(gradients[key] for key in sorted(gradients))]
        for name, low in errors.items():
            for value, exact in zip(found[name], found["exact"], strict=True):
                low.append(((value - exact).norm() / exact.norm().clamp(min=1e-6)).item())
    assert sum(errors["ours"]) <= 1.05 * sum(errors["theirs"]), errors
    assert max(errors["ours"]) < 0.1
