"""What a trimmed vocabulary costs: held-out text before and after, and greedy text that removed tokens would have won.

Greedy decoding of the trimmed model differs from the whole one's in one case only: a removed token would have won. It
is counted twice: at every position of the held-out text, and in continuations of the beginnings of held-out texts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bloomlm.checkpoint.output import Report, no_report
from bloomlm.data.corpus import Piece
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.vocabulary.embedding import changed_model
from bloomlm.vocabulary.measure import Fit, measure
from bloomlm.vocabulary.selection import Ids
from bloomlm.vocabulary.trim import Trim

NUM_PROMPTS = 32
"""For all languages together, but at least one for each."""
BATCH_SIZE = 16
PROMPT_TOKENS = 24
NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class GreedyTexts:
    """Continuations by the whole and by the trimmed model of the same prompts."""

    num_prompts: int
    num_same: int
    """The same tokens."""
    num_removed_won: int
    """The same tokens up to one that was removed, which the whole model wrote."""
    num_prompts_changed: int
    """The prompt itself has a removed token, so that the trimmed model reads other tokens."""

    @property
    def num_other(self) -> int:
        """Other differences: two logits were so close that their rounding decided, in another batch in another way."""
        return self.num_prompts - self.num_same - self.num_removed_won - self.num_prompts_changed


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """The whole model and its figures on the held-out text, which are computed once for all sizes."""

    model: BloomForCausalLM | None
    """None: it is not loaded, and only tokens are counted."""
    tokenizer: Tokenizer
    held_out: Sequence[Piece]
    fits: Mapping[str, Fit]
    prompts: tuple[tuple[int, ...], ...]
    greedy: Sequence[tuple[int, ...]]
    """Its continuation of each prompt."""


@dataclass(frozen=True, kw_only=True)
class Effects:
    """What one trimmed vocabulary does to held-out text."""

    fits: Mapping[str, Fit]
    num_positions: int
    """Tokens of the held-out text in the whole vocabulary, from each of which the whole model chose the next one."""
    num_removed_likeliest: int
    """Positions where it would have chosen a removed one."""
    greedy: GreedyTexts


def measure_whole(
    model: BloomForCausalLM | None, tokenizer: Tokenizer, held_out: Sequence[Piece], report: Report = no_report
) -> WholeModel:
    """Measure the whole model.

    Args:
        model: in eval mode; None: only tokens are counted.
        tokenizer: its own.
        held_out: texts.
        report: called with a number of bytes of them as they are done.
    """
    fits = measure(held_out, tokenizer, model, report)
    prompts = _prompts(held_out, tokenizer) if model is not None else ()
    return WholeModel(
        model=model,
        tokenizer=tokenizer,
        held_out=held_out,
        fits=fits,
        prompts=prompts,
        greedy=() if model is None else _continue(model, prompts),
    )


def measure_trimmed(whole: WholeModel, trim: Trim, report: Report = no_report) -> Effects:
    """Measure a trimmed model, which is made in memory and shares all but the embedding with the whole one.

    Args:
        whole: the whole model.
        trim: what stays.
        report: as in measure_whole.
    """
    model = None if whole.model is None else changed_model(whole.model, trim)
    fits = measure(whole.held_out, trim.tokenizer, model, report)
    kept = set(trim.kept.tolist())
    winners = [(token, times) for fit in whole.fits.values() for token, times in fit.likeliest.items()]
    return Effects(
        fits=fits,
        num_positions=sum(times for _, times in winners),
        num_removed_likeliest=sum(times for token, times in winners if token not in kept),
        greedy=_compare_greedy(whole, model, trim.kept),
    )


def _prompts(held_out: Sequence[Piece], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    by_language: dict[str, list[str]] = {}
    for piece in held_out:
        by_language.setdefault(piece.language, []).append(piece.text)
    count = max(1, NUM_PROMPTS // max(1, len(by_language)))
    texts = [text for group in by_language.values() for text in group[:count]]
    return tuple(tuple(ids[:PROMPT_TOKENS]) for ids in tokenizer.encode_batch(texts) if ids)


def _continue(model: BloomForCausalLM, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Greedy continuations."""
    config, starts = GenerationConfig(max_new_tokens=NEW_TOKENS), range(0, len(prompts), BATCH_SIZE)
    found = [
        generation for start in starts for generation in generate(model, prompts[start : start + BATCH_SIZE], config)
    ]
    return [tuple(generation.tokens) for generation in found]


def _compare_greedy(whole: WholeModel, model: BloomForCausalLM | None, kept: Ids) -> GreedyTexts:
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    readable = [number for number, prompt in enumerate(whole.prompts) if set(prompt) <= new_ids.keys()]
    if model is None:
        return GreedyTexts(num_prompts=0, num_same=0, num_removed_won=0, num_prompts_changed=0)
    continued = _continue(model, [[new_ids[old] for old in whole.prompts[number]] for number in readable])
    num_same = num_removed_won = 0
    for number, tokens in zip(readable, continued, strict=True):
        expected = whole.greedy[number]
        own = np.array([kept[new] if new < len(kept) else -1 for new in tokens])
        until_removed = next((place for place, old in enumerate(expected) if old not in new_ids), len(expected))
        starts_alike = tuple(own[:until_removed]) == expected[:until_removed]
        num_same += starts_alike and until_removed == len(expected) == len(own)
        num_removed_won += starts_alike and until_removed < len(expected)
    return GreedyTexts(
        num_prompts=len(whole.prompts),
        num_same=num_same,
        num_removed_won=num_removed_won,
        num_prompts_changed=len(whole.prompts) - len(readable),
    )
