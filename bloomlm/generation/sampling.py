"""Pure functions from logits to logits and to ids.

Each acts on many sequences at once. The definitions are those of transformers' logits processors, with which tests
compare values; what transformers lacks, and the order of all, is that of vLLM. A sequence's history is padded behind
its end, and pads never count as tokens.

Shapes: B sequences, V vocabulary, S tokens of history (pads included).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bloomlm.generation.config import Sampling


def most_likely(logits: Sequence[Tensor]) -> list[int]:
    """The id with the largest logit at each position, the first one among equal logits.

    Args:
        logits: tensors [B, V].
    """
    if logits[0].device.type != "cpu":
        return [int(token) for token in torch.cat(list(logits)).argmax(dim=-1).tolist()]
    # Without a copy of the logits, and numpy's argmax takes a quarter of the time of PyTorch's.
    return [int(token) for part in logits for token in part.float().numpy().argmax(axis=-1)]


def draw(logits: Tensor, strategy: Sampling, uniforms: Tensor) -> Tensor:
    """A random next token of each row.

    Args:
        logits: [B, V] of the next token.
        strategy: how to sample.
        uniforms: [B] random numbers in [0, 1).

    Returns:
        [B] int64.
    """
    if strategy.temperature != 1.0:
        logits = apply_temperature(logits, strategy.temperature)
    if strategy.min_p:
        logits = keep_min_p(logits, strategy.min_p)
    if strategy.top_k:
        logits = keep_top_k(logits, strategy.top_k)
    if strategy.top_p < 1.0:
        logits = keep_top_p(logits, strategy.top_p)
    return sample(logits, uniforms)


def apply_repetition_penalty(logits: Tensor, history: Tensor, lengths: Tensor, penalty: float) -> Tensor:
    """Make the tokens that occurred less likely: positive logits are divided by the penalty, negative multiplied.

    Args:
        logits: [B, V].
        history: [B, S] prompt and generated tokens, at least one, then pads.
        lengths: [B] number of tokens of each row without pads.
        penalty: above 1.0 discourages repetition, below 1.0 encourages it.

    Returns:
        [B, V].

    Source: CTRL, https://arxiv.org/abs/1909.05858, section 4.1.
    """
    # A pad becomes the row's first token, which is real; a token written twice gets the same value twice.
    is_pad = torch.arange(history.shape[1], device=history.device) >= lengths[:, None]
    seen = torch.where(is_pad, history[:, :1], history)
    scores = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def apply_count_penalties(logits: Tensor, generated: Sequence[Tensor], frequency: float, presence: float) -> Tensor:
    """Subtract frequency * (times that the row contains the token) + presence from each token that a row contains.

    Args:
        logits: [B, V].
        generated: ids of each row's continuation, without its prompt.
        frequency: frequency_penalty.
        presence: presence_penalty.

    Returns:
        [B, V].

    Source: OpenAI's API reference, as vLLM computes it.
    """
    # counted where the tokens are, so that logits on a GPU need not be waited for
    counted = [tokens.unique(return_counts=True) for tokens in generated]
    rows = torch.cat([torch.full_like(ids, row) for row, (ids, _) in enumerate(counted)])
    places = torch.stack((rows, torch.cat([ids for ids, _ in counted]))).to(logits.device)
    penalties = torch.cat([frequency * counts + presence for _, counts in counted]).to(logits)
    return logits.index_put(tuple(places), -penalties, accumulate=True)


def add_bias(logits: Tensor, bias: Sequence[tuple[int, float]]) -> Tensor:
    """[B, V] -> [B, V] with numbers added to the logits of some ids, each named once."""
    logits = logits.clone()
    ids, numbers = zip(*bias, strict=True)
    logits[:, list(ids)] += torch.tensor(numbers, device=logits.device)
    return logits


def ban_repeated_ngrams(logits: Tensor, history: Tensor, lengths: Tensor, ngram_size: int) -> Tensor:
    """Ban each token that would complete a run of ngram_size tokens that the row contains already.

    Args:
        logits: [B, V].
        history: [B, S] prompt and generated tokens, then pads.
        lengths: [B] number of tokens of each row without pads.
        ngram_size: length of the runs that may occur once only.

    Returns:
        [B, V], minus infinity at banned tokens.
    """
    if history.shape[1] < ngram_size:
        return logits
    ngrams = history.unfold(1, ngram_size, 1)  # [B, S - n + 1, n]
    places = lengths[:, None] + torch.arange(1 - ngram_size, 0, device=history.device)  # the last n - 1 tokens
    suffix = history.gather(1, places.clamp(min=0))
    ends = torch.arange(ngram_size, history.shape[1] + 1, device=history.device)
    completes = (ngrams[..., :-1] == suffix[:, None]).all(dim=-1) & (ends <= lengths[:, None])
    banned = torch.zeros_like(logits, dtype=torch.int8)
    banned.scatter_reduce_(1, ngrams[..., -1], completes.to(torch.int8), reduce="amax")
    return logits.masked_fill(banned.bool(), -torch.inf)


def ban_tokens(logits: Tensor, ids: Sequence[int], rows: Sequence[int]) -> Tensor:
    """[B, V] -> [B, V] with minus infinity at ids of some rows (`</s>` while a sequence is too short)."""
    logits = logits.clone()
    logits[torch.tensor(rows)[:, None], torch.tensor(ids)] = -torch.inf
    return logits


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """[B, V] -> [B, V] / temperature."""
    return logits / temperature


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """[B, V] -> [B, V] with minus infinity where a token's probability is below min_p times the row's highest.

    Source: min-p sampling, https://arxiv.org/abs/2407.01082.
    """
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf)


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """[B, V] -> [B, V] with minus infinity below each row's k-th largest value (ties with it stay)."""
    smallest_kept = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep each row's fewest most likely tokens whose probabilities add up to top_p or more, at least one.

    Args:
        logits: [B, V].
        top_p: above 0, at most 1.0.

    Returns:
        [B, V], minus infinity at all other tokens.

    Source: nucleus sampling, https://arxiv.org/abs/1904.09751.
    """
    if logits.device.type == "cpu":
        ascending = torch.from_numpy(np.sort(logits.numpy(), axis=-1))  # a tenth of the time of PyTorch's sort
    else:
        ascending = logits.sort(dim=-1).values
    below_or_here = ascending.softmax(dim=-1).cumsum(dim=-1)
    removed = below_or_here <= 1.0 - top_p
    removed[:, -1] = False
    num_removed = removed.sum(dim=-1, keepdim=True)
    smallest_kept = ascending.gather(1, num_removed)
    largest_removed = ascending.gather(1, (num_removed - 1).clamp(min=0))
    if ((smallest_kept == largest_removed) & (num_removed > 0)).any():  # equal logits, of which some stay
        order = logits.sort(dim=-1).indices
        return logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def uniform_numbers(seed: int, sequence_indices: Sequence[int], count: int) -> Tensor:
    """The random numbers of sequences: row i depends on (seed, sequence_indices[i]) alone.

    Args:
        seed: seed of the run.
        sequence_indices: number of each sequence within the whole run [B].
        count: random numbers of each sequence; the first ones do not depend on it.

    Returns:
        [B, count] float64 in [0, 1).
    """
    rows = [np.random.default_rng((seed, index)).random(count) for index in sequence_indices]
    return torch.from_numpy(np.stack(rows))


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one id from each row's softmax by inverting its cumulative distribution.

    Args:
        logits: [B, V], minus infinity where an id cannot be drawn.
        uniforms: [B] in [0, 1), float64.

    Returns:
        [B] int64.
    """
    # In float64: in float32 the rounding of 250,880 additions outweighs the probability of a rare token.
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the actual total, and "right", so that an id of probability 0 is never drawn.
    threshold = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return ids.clamp_(max=logits.shape[-1] - 1)
