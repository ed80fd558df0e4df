"""From the logits of a step to the next tokens of its sequences. Sequences with equal options choose together.

Shapes: B positions of a step, V vocabulary, W beams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

import torch
from torch import Tensor

from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.log_probs import TokenScore, log_probs_of
from bloomlm.generation.rows import History
from bloomlm.generation.sampling import choose
from bloomlm.generation.sequences import Sample, Search


@dataclass(frozen=True)
class StepLogits:
    """What the model computed in a step."""

    logits: Tensor
    """[B, V]."""
    places: Mapping[int, range]
    """Row -> its positions, one after its newest token and one after each token that was guessed."""

    @classmethod
    def joined(cls, parts: Sequence[Tensor], counts: Mapping[int, int]) -> "StepLogits":
        """Join logits of rows in order, of which counts tells the number of positions."""
        stops = accumulate(counts.values())
        places = {row: range(stop - count, stop) for (row, count), stop in zip(counts.items(), stops, strict=True)}
        return cls(parts[0] if len(parts) == 1 else torch.cat(list(parts)), places)


@dataclass(frozen=True)
class Chosen:
    """What a step decides."""

    tokens: dict[Sample, list[int]]
    """The next token of each sequence, and the one after each guess, which counts if all before it were right."""
    beams: dict[Search, Tensor]
    """[W, V] log-probabilities of each beam search, on which the options have acted."""


def choose_next(
    step: StepLogits, running: Sequence[Sample | Search], history: History, eos_token_id: int | None
) -> Chosen:
    """Apply the options of all sequences, and choose the tokens of those that do not search.

    Args:
        step: logits of at least their rows.
        running: the sequences.
        history: the tokens of their rows.
        eos_token_id: the token that ends a sequence.
    """
    groups: dict[GenerationConfig, list[Sample | Search]] = {}
    for sequence in running:
        groups.setdefault(sequence.group, []).append(sequence)
    chosen = Chosen({}, {})
    for config, members in groups.items():
        members.sort(key=lambda member: member.rows[0])
        rows = [row for member in members for row in member.rows for _ in step.places[row]]
        places = [place for member in members for row in member.rows for place in step.places[row]]
        is_all = places == list(range(len(step.logits)))
        scores = (step.logits if is_all else step.logits[places]).float()
        if isinstance(config.strategy, BeamSearch):
            scores = scores.log_softmax(dim=-1)
        scores = history.adjust(scores, rows, config, eos_token_id)
        if searches := [member for member in members if isinstance(member, Search)]:
            parts = scores.split([len(search.rows) for search in searches])
            chosen.beams.update(zip(searches, parts, strict=True))
        if samples := [member for member in members if isinstance(member, Sample)]:
            tokens = iter(_choose(samples, scores, config))
            for sample in samples:
                chosen.tokens[sample] = list(islice(tokens, len(step.places[sample.rows[0]])))
    return chosen


def scores_of(tokens: Mapping[Sample, Sequence[int]], step: StepLogits) -> dict[Sample, list[TokenScore]]:
    """The scores of the first tokens that were chosen for those sequences that report them; each names as many ids as
    the one that reports most."""
    asked = {sample: count for sample in tokens if (count := sample.config.num_log_probs) is not None}
    if not asked:
        return {}
    places = [place for sample in asked for place in step.places[sample.rows[0]][: len(tokens[sample])]]
    ids = [token for sample in asked for token in tokens[sample]]
    found = iter(log_probs_of(step.logits[places], ids, max(asked.values())))
    return {sample: list(islice(found, len(tokens[sample]))) for sample in asked}


def _choose(samples: Sequence[Sample], scores: Tensor, config: GenerationConfig) -> list[int]:
    strategy, uniforms = None, None
    if isinstance(config.strategy, Sampling):
        strategy = config.strategy
        drawn = [sample.uniforms[len(sample.tokens)] for sample in samples]
        uniforms = torch.tensor(drawn, dtype=torch.float64, device=scores.device)
    return choose(scores, strategy, uniforms).tolist()
