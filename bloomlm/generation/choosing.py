"""From the logits of a step to the next tokens of its sequences. Sequences with equal options choose together.

Shapes: B positions of a step, V vocabulary, W beams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    places: Mapping[int, int]
    """Row -> its position."""


@dataclass(frozen=True)
class Chosen:
    """What a step decides."""

    tokens: dict[Sample, int]
    """The next token of each sequence."""
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
        rows = [row for member in members for row in member.rows]
        places = [step.places[row] for row in rows]
        is_all = places == list(range(len(step.logits)))
        scores = (step.logits if is_all else step.logits[places]).float()
        if isinstance(config.strategy, BeamSearch):
            scores = scores.log_softmax(dim=-1)
        scores = history.adjust(scores, rows, config, eos_token_id)
        if searches := [member for member in members if isinstance(member, Search)]:
            parts = scores.split([len(search.rows) for search in searches])
            chosen.beams.update(zip(searches, parts, strict=True))
        if samples := [member for member in members if isinstance(member, Sample)]:
            chosen.tokens.update(zip(samples, _choose(samples, scores, config), strict=True))
    return chosen


def scores_of(chosen: Mapping[Sample, int], step: StepLogits) -> dict[Sample, TokenScore]:
    """The scores of the chosen tokens of those sequences that report them."""
    asked = {sample: count for sample in chosen if (count := sample.config.num_log_probs) is not None}
    if not asked:
        return {}
    logits = step.logits[[step.places[sample.rows[0]] for sample in asked]]
    found = log_probs_of(logits, [chosen[sample] for sample in asked], max(asked.values()))
    return {
        sample: score._replace(top_log_probs=score.top_log_probs[:count])
        for (sample, count), score in zip(asked.items(), found, strict=True)
    }


def _choose(samples: Sequence[Sample], scores: Tensor, config: GenerationConfig) -> list[int]:
    strategy, uniforms = None, None
    if isinstance(config.strategy, Sampling):
        strategy = config.strategy
        drawn = [sample.uniforms[len(sample.tokens)] for sample in samples]
        uniforms = torch.tensor(drawn, dtype=torch.float64, device=scores.device)
    return choose(scores, strategy, uniforms).tolist()
