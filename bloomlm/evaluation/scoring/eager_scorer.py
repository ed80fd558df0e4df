"""Scores windows: packed without pads, longest first, the head at scored positions only.

What windows have in common is computed once where that is exact, see shared_prefix.py. Sliding windows have nothing in
common: a later window has lost the beginning of the earlier one's context, and every hidden state above the first
block shows it. What is saved there is the head, at all positions but the few that are scored.

Order and batches change nothing but the last bits of fp32.
"""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bloomlm.errors import ConfigError
from bloomlm.evaluation.copies import free_memory, is_out_of_memory, own_share
from bloomlm.evaluation.scoring.shared_prefix import (
    Branched,
    Branches,
    Packed,
    find_branches,
    join_documents,
    num_slots,
)
from bloomlm.evaluation.scoring.window_scorer import WindowScorer
from bloomlm.evaluation.scoring.windows import Window, WindowScore
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import tensor_parallel_group
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX, score_labels

_LOG = logging.getLogger(__name__)
_CPU_BATCH_BYTES = 24 * 2**20
"""On a CPU: size of a batch's widest activations, the MLP's. glibc gives larger pieces of memory back to the system at
once and gets them anew, page by page, which takes a tenth of the time of an evaluation."""
_CPU_BATCH_TOKENS = 512
"""On a CPU a batch may have so many tokens in any case."""


class Scorer(WindowScorer):
    """Scores windows with one model, in batches of at most max_batch_tokens.

    When memory runs out the batch is cut in two, and later batches stay that small.

    Args:
        model: run in eval mode, and put back into its mode afterwards.
        max_batch_tokens: tokens in memory at once; a single longer window is computed alone.
        mesh: the ranks; each copy of the model scores its share.
    """

    def __init__(self, model: BloomForCausalLM, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> None:
        super().__init__(max_batch_tokens=max_batch_tokens, mesh=mesh)
        self._model = model

    def _score_own(self, windows: Sequence[Window], numbers: Sequence[int]) -> Iterator[dict[int, WindowScore]]:
        groups = find_branches(join_documents(windows, numbers), self.max_batch_tokens)
        was_training = self._model.training
        self._model.eval()
        try:
            for shares in (False, True):
                pieces = [group for group in groups if bool(group.num_shared) == shares]
                pieces.sort(key=lambda piece: (piece.longest_rest, piece.num_shared), reverse=True)
                yield from self._score_pieces(windows, own_share(pieces, self._mesh))
        finally:
            self._model.train(was_training)

    def _score_pieces(self, windows: Sequence[Window], pieces: Sequence[Branches]) -> Iterator[dict[int, WindowScore]]:
        """Score pieces, which either all share or all do not, the largest first."""
        waiting = list(pieces)
        while waiting:
            batch = self._next_batch(waiting)
            try:
                results = self._score_batch(windows, batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                waiting[: len(batch)] = self._smaller(batch, error)
                continue
            del waiting[: len(batch)]
            yield results

    def _next_batch(self, waiting: Sequence[Branches]) -> list[Branches]:
        limit = self.max_batch_tokens
        weight = self._model.transformer.word_embeddings.weight
        if weight.device.type == "cpu" and not waiting[0].num_shared:
            token_bytes = self._model.config.ffn_size * weight.dtype.itemsize
            limit = min(limit, max(_CPU_BATCH_TOKENS, _CPU_BATCH_BYTES // token_bytes))
        size = 1
        while size < len(waiting) and num_slots(waiting[: size + 1]) <= limit:
            size += 1
        return list(waiting[:size])

    def _smaller(self, batch: Sequence[Branches], error: Exception) -> list[Branches]:
        """What to try instead of a batch that did not fit; batches are smaller from now on."""
        size = num_slots(batch)
        free_memory(f"a batch of {size} tokens", self._mesh, error)
        if len(batch) == 1 and len(batch[0].documents) == 1:
            raise ConfigError(
                f"memory ran out on a single window of {size} tokens; give a smaller --seq_length, or a device "
                f"with more memory ({error})"
            ) from error
        self.max_batch_tokens = size // 2
        _LOG.warning("memory ran out on a batch of %d tokens; going on with %d", size, self.max_batch_tokens)
        return list(batch[0].halves()) if len(batch) == 1 else list(batch)

    @torch.inference_mode()
    def _score_batch(self, windows: Sequence[Window], pieces: Sequence[Branches]) -> dict[int, WindowScore]:
        embedding = self._model.transformer.word_embeddings
        batch = Branched(pieces) if pieces[0].num_shared else Packed([piece.documents[0] for piece in pieces])
        numbers, rows, labels = [], [], []
        for place in batch.placed:
            for number in place.document.windows:
                window = windows[number]
                scored = np.flatnonzero(window.labels != IGNORE_INDEX)
                numbers.append(number)
                rows.append(place.rows(len(window.tokens) - len(window.labels) + scored))
                labels.append(window.labels[scored])
        device = embedding.weight.device
        scores = score_labels(
            batch.hidden(self._model, torch.from_numpy(np.concatenate(rows)).to(device)),
            embedding.weight,
            torch.from_numpy(np.concatenate(labels)).to(device),
            weight_scale=embedding.weight_scale,
            ranks=tensor_parallel_group(self._model),
        )
        self.num_computed_tokens += batch.num_tokens
        counts = [len(part) for part in labels]
        log_probs = scores.log_probs.double().cpu().split(counts)
        hits = scores.is_likeliest.cpu().split(counts)
        return {
            number: WindowScore(log_prob=float(log_prob.sum()), num_scored=count, num_likeliest=int(hit.sum()))
            for number, count, log_prob, hit in zip(numbers, counts, log_probs, hits, strict=True)
        }
