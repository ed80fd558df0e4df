"""Scores windows with a BLOOM and its weights, or step by step with any language model, as exported programs are.

EagerScorer packs windows without pads, the longest first, and computes the head at scored positions only. The common
beginning of windows is computed once where that is exact; see shared_prefix.py. Sliding windows share no computation: a
later window lacks the first tokens of the earlier one's context, which changes every hidden state above the first
block. They only save the head at positions that are not scored. The order and the batches change nothing but the last
bits of fp32.

StepScorer takes models that give the logits of one position at a time. One prefill reads the context up to the first
scored position. The tokens after it go through decode_step one by one, and each step gives the logits of one more
position. So an evaluation runs the two functions that generate text, in every format. It takes a decode_step for each
scored token, which the windows of a batch share.

    tokens   t0 t1 t2 t3      t0 t1 t2 in a prefill, which gives the logits after t2; t3 in a decode_step
    labels         t3 t4

Shapes: B windows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.evaluation.scoring.batches import own_share
from bloomlm.evaluation.scoring.shared_prefix import (
    Branched,
    Branches,
    Packed,
    find_branches,
    join_documents,
    num_slots,
)
from bloomlm.evaluation.scoring.windows import Tokens, Window, WindowScore, WindowScorer
from bloomlm.generation.language_model import LanguageModel
from bloomlm.kernels.compiled import load_operators_for
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.decoding import eval_mode
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import head_of
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX, score_labels

_CPU_BATCH_BYTES = 24 * 2**20
"""Largest size of a batch's widest activations, the MLP's, on a CPU. glibc returns larger allocations to the system at
once and gets them back page by page, which takes a tenth of the time of an evaluation."""
_CPU_BATCH_TOKENS = 512
"""A batch may always have this many tokens on a CPU."""


def window_scorer(model: LanguageModel, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> WindowScorer[Any]:
    """The scorer for this kind of model; its arguments are those of WindowScorer."""
    if isinstance(model, BloomForCausalLM):
        return EagerScorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)
    return StepScorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)


class EagerScorer(WindowScorer[BloomForCausalLM]):
    """Scores windows with a BLOOM and its weights, in eval mode; the model's mode is restored afterwards."""

    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        groups = find_branches(join_documents(windows, numbers), self.max_batch_tokens)
        load_operators_for(self._model.transformer.word_embeddings.weight.device)
        with eval_mode(self._model):
            for shares in (False, True):
                pieces = [group for group in groups if bool(group.num_shared) == shares]
                pieces.sort(key=lambda piece: (piece.longest_rest, piece.num_shared), reverse=True)
                batches = self._limit.batches(
                    own_share(pieces, self._mesh),
                    lambda batch: self._score_batch(windows, batch),
                    num_slots,
                    most=None if shares else self._most_tokens(),
                    halves=Branches.halves,
                )
                for _, results in batches:
                    yield results

    def _most_tokens(self) -> int | None:
        """A second limit of a batch, for CPUs: see _CPU_BATCH_BYTES."""
        weight = self._model.transformer.word_embeddings.weight
        if weight.device.type != "cpu":
            return None
        token_bytes = self._model.config.ffn_size * weight.dtype.itemsize
        return max(_CPU_BATCH_TOKENS, _CPU_BATCH_BYTES // token_bytes)

    @torch.inference_mode()
    def _score_batch(self, windows: Sequence[Window], pieces: Sequence[Branches]) -> dict[int, WindowScore]:
        batch = Branched(pieces) if pieces[0].num_shared else Packed([piece.documents[0] for piece in pieces])
        numbers, rows, labels = [], [], []
        for place in batch.placed:
            for number in place.document.windows:
                window = windows[number]
                scored = np.flatnonzero(window.labels != IGNORE_INDEX)
                numbers.append(number)
                rows.append(place.rows(len(window.tokens) - len(window.labels) + scored))
                labels.append(window.labels[scored])
        device = self._model.transformer.word_embeddings.weight.device
        scores = score_labels(
            batch.hidden(self._model, torch.from_numpy(np.concatenate(rows)).to(device)),
            head_of(self._model),
            torch.from_numpy(np.concatenate(labels)).to(device),
        )
        self.num_computed_tokens += batch.num_tokens
        counts = [len(part) for part in labels]
        log_probs = scores.log_probs.double().cpu().split(counts)
        hits = scores.is_likeliest.cpu().split(counts)
        return {
            number: WindowScore(log_prob=float(log_prob.sum()), num_scored=count, num_likeliest=int(hit.sum()))
            for number, count, log_prob, hit in zip(numbers, counts, log_probs, hits, strict=True)
        }


class StepScorer(WindowScorer[LanguageModel]):
    """Scores windows through prefill and decode_step."""

    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        forced = {number: _Forced.of(windows[number]) for number in numbers}
        # so that the windows of a batch take about equally many steps
        order = sorted(numbers, key=lambda number: (len(forced[number].tokens), forced[number].size), reverse=True)
        batches = self._limit.batches(
            own_share(order, self._mesh),
            lambda batch: self._score_batch([forced[number] for number in batch]),
            # all windows of a batch are padded to its longest one
            lambda batch: len(batch) * max(forced[number].size for number in batch),
        )
        for batch, results in batches:
            yield dict(zip(batch, results, strict=True))

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence["_Forced"]) -> list[WindowScore]:
        """Score windows together, those with the most steps first."""
        num_steps = [len(window.tokens) for window in batch]
        tokens = torch.zeros(len(batch), num_steps[0], dtype=torch.int64)
        labels = torch.full((len(batch), num_steps[0] + 1), IGNORE_INDEX)
        for row, window in enumerate(batch):
            tokens[row, : num_steps[row]] = torch.from_numpy(window.tokens)
            labels[row, : num_steps[row] + 1] = torch.from_numpy(window.labels)
        rows = self._model.open_rows(len(batch), max(window.size for window in batch))
        logits = rows.prefill(range(len(batch)), [window.prompt.tolist() for window in batch])
        self.num_computed_tokens += sum(len(window.prompt) for window in batch)
        log_probs, num_likeliest = torch.zeros(len(batch), dtype=torch.float64), torch.zeros(len(batch))
        num_rows = len(batch)
        for step in range(num_steps[0] + 1):
            step_log_probs, is_likeliest = _score_labels(logits, labels[:num_rows, step])
            log_probs[:num_rows] += step_log_probs
            num_likeliest[:num_rows] += is_likeliest
            if step == num_steps[0]:
                break
            num_rows = sum(count > step for count in num_steps)
            logits = rows.decode_step(range(num_rows), tokens[:num_rows, step])
            self.num_computed_tokens += num_rows
        return [
            WindowScore(log_prob=float(log_prob), num_scored=window.num_scored, num_likeliest=int(hits))
            for window, log_prob, hits in zip(batch, log_probs, num_likeliest, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class _Forced:
    """A window as prefill and decode_step need it, without the tokens after its last scored position."""

    prompt: Tokens
    """Tokens up to the first scored position."""
    tokens: Tokens
    """Tokens after it, one for each step."""
    labels: Tokens
    """The labels of the prefill and of every step; IGNORE_INDEX where there is none."""

    @classmethod
    def of(cls, window: Window) -> "_Forced":
        """Split a window that has a scored position."""
        scored = np.flatnonzero(window.labels != IGNORE_INDEX)
        first, last = (int(place) + len(window.tokens) - len(window.labels) for place in scored[[0, -1]])
        return cls(
            window.tokens[: first + 1], window.tokens[first + 1 : last + 1], window.labels[scored[0] : scored[-1] + 1]
        )

    @property
    def size(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.tokens)

    @property
    def num_scored(self) -> int:
        """Positions that have a label."""
        return int(np.count_nonzero(self.labels != IGNORE_INDEX))


def _score_labels(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, V] logits, [B] labels -> [B] log-probabilities in fp64 and whether it is the likeliest; 0 without a label."""
    has_label = labels != IGNORE_INDEX
    columns = labels.masked_fill(~has_label, 0)
    log_probs = logits.float().log_softmax(-1).gather(1, columns[:, None]).squeeze(1).double()
    return log_probs.masked_fill(~has_label, 0.0), (logits.max(-1).indices == columns) & has_label
