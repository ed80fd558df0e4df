"""Scores windows with a model: packed without pads, the longest first, with the head at scored positions only.

The common beginning of windows is computed once where that is exact, see shared_prefix.py. Sliding windows share no
computation: a later window lacks the first tokens of the earlier one's context, which changes every hidden state above
the first block. They only save the head at positions that are not scored.

The order and the batches change nothing but the last bits of fp32.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bloomlm.evaluation.scoring.batches import own_share
from bloomlm.evaluation.scoring.shared_prefix import (
    Branched,
    Branches,
    Packed,
    find_branches,
    join_documents,
    num_slots,
)
from bloomlm.evaluation.scoring.windows import Window, WindowScore, WindowScorer
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import tensor_parallel_group
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX, score_labels

_CPU_BATCH_BYTES = 24 * 2**20
"""Largest size of a batch's widest activations, the MLP's, on a CPU. glibc returns larger allocations to the system at
once and gets them back page by page, which takes a tenth of the time of an evaluation."""
_CPU_BATCH_TOKENS = 512
"""A batch may always have this many tokens on a CPU."""


class EagerScorer(WindowScorer):
    """Scores windows with a BLOOM and its weights.

    Args:
        model: runs in eval mode, and gets its mode back afterwards.
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
                batches = self._limit.batches(
                    own_share(pieces, self._mesh),
                    lambda batch: self._score_batch(windows, batch),
                    num_slots,
                    most=None if shares else self._most_tokens(),
                    halves=Branches.halves,
                )
                for _, results in batches:
                    yield results
        finally:
            self._model.train(was_training)

    def _most_tokens(self) -> int | None:
        """A second limit of a batch, for CPUs: see _CPU_BATCH_BYTES."""
        weight = self._model.transformer.word_embeddings.weight
        if weight.device.type != "cpu":
            return None
        token_bytes = self._model.config.ffn_size * weight.dtype.itemsize
        return max(_CPU_BATCH_TOKENS, _CPU_BATCH_BYTES // token_bytes)

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
            replaced=embedding.replaced_rows(),
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
