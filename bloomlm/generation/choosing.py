"""From the logits of a step to the next tokens of its sequences. Sequences with equal options choose together.

Shapes: B positions of a row, V vocabulary, W beams.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.log_probs import TokenScore, log_probs_of
from bloomlm.generation.rows import History
from bloomlm.generation.sampling import draw, most_likely
from bloomlm.generation.sequences import LogitOptions, Sample, Search

StepLogits = Mapping[int, Tensor]
"""Row -> logits [B, V], one after its newest token and one after each token that was guessed."""

_PLAIN = LogitOptions(GenerationConfig())


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
    groups: dict[LogitOptions, list[Sample | Search]] = {}
    for sequence in running:
        groups.setdefault(sequence.group, []).append(sequence)
    chosen = Chosen({}, {})
    for group, members in groups.items():
        members.sort(key=lambda member: member.rows[0])
        samples = [member for member in members if isinstance(member, Sample)]
        searches = [member for member in members if isinstance(member, Search)]
        own_rows = [row for member in members for row in member.rows]
        logits = [step[row] for row in own_rows]
        if group == _PLAIN:
            found = most_likely(logits)
        else:
            scores = torch.cat(logits).float()
            if searches:
                scores = scores.log_softmax(dim=-1)
            rows = [row for row, own in zip(own_rows, logits, strict=True) for _ in own]
            scores = history.adjust(scores, rows, group.config, eos_token_id)
            if searches:
                parts = scores.split([len(search.rows) for search in searches])
                chosen.beams.update(zip(searches, parts, strict=True))
                continue
            found = _choose(samples, scores, group.config)
        tokens = iter(found)
        chosen.tokens.update((sample, list(islice(tokens, len(step[sample.rows[0]])))) for sample in samples)
    return chosen


def scores_of(tokens: Mapping[Sample, Sequence[int]], step: StepLogits) -> dict[Sample, list[TokenScore]]:
    """The scores of the first tokens that were chosen for those sequences that report them.

    Each score names as many ids as the sequence that reports most.
    """
    asked = {sample: count for sample in tokens if (count := sample.config.num_log_probs) is not None}
    if not asked:
        return {}
    logits = torch.cat([step[sample.rows[0]][: len(tokens[sample])] for sample in asked])
    ids = [token for sample in asked for token in tokens[sample]]
    found = iter(log_probs_of(logits, ids, max(asked.values())))
    return {sample: list(islice(found, len(tokens[sample]))) for sample in asked}


def _choose(samples: Sequence[Sample], scores: Tensor, config: GenerationConfig) -> list[int]:
    if not isinstance(config.strategy, Sampling):
        return most_likely([scores])
    drawn = [sample.uniforms[len(sample.tokens)] for sample in samples]
    uniforms = torch.tensor(drawn, dtype=torch.float64, device=scores.device)
    return draw(scores, config.strategy, uniforms).tolist()
