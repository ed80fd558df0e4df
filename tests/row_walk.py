"""A random walk over the rows of a model, each of whose logits is compared with the whole text without a cache."""

import random

import torch
from torch import Tensor

from bloomlm.generation.language_model import LanguageModel
from bloomlm.model.bloom import BloomForCausalLM

NUM_ROWS = 6
NUM_TOKENS = 48
BLOCK = 4


class Walk:
    """Random calls on rows; `texts` holds what each row has read.

    Args:
        oracle: computes whole texts.
        model: opens the rows.
        seed: of the walk.
        tolerance: largest norm of a difference of logits, relative to that of the logits.
    """

    def __init__(
        self, oracle: BloomForCausalLM, model: LanguageModel, seed: int = 0, *, tolerance: float = 1e-5
    ) -> None:
        self._oracle = oracle
        self._tolerance = tolerance
        self._random = random.Random(seed)
        self._features = model.features
        self.rows = model.open_rows(NUM_ROWS, NUM_TOKENS)
        self.texts: list[list[int]] = [[] for _ in range(NUM_ROWS)]
        self.num_checked = 0
        """Logits that were compared."""

    @torch.inference_mode()
    def run(self, num_calls: int) -> None:
        """Make calls, of every kind that the model has."""
        calls = [self._read, self._read, self._step, self._step, self._copy, self._free]
        calls += [self._truncate] * self._features.truncates + [self._move_blocks] * self._features.blocks
        for _ in range(num_calls):
            self._random.choice(calls)()

    def _read(self) -> None:
        rows = self._random.sample(range(NUM_ROWS), self._random.randint(1, NUM_ROWS))
        rows = [row for row in rows if len(self.texts[row]) < NUM_TOKENS]
        if not rows:
            return
        chunks = [self._tokens(self._random.randint(1, NUM_TOKENS - len(self.texts[row]))) for row in rows]
        most = [len(chunk) if self._features.scores_chunks else 1 for chunk in chunks]
        counts = [self._random.choice((0, 1, self._random.randint(0, n))) for n in most]
        asked = None if self._random.random() < 0.3 else counts
        found = self.rows.prefill(rows, chunks, num_logits=asked)
        for row, chunk in zip(rows, chunks, strict=True):
            self.texts[row] = [*self.texts[row], *chunk]
        self._check(rows, [1] * len(rows) if asked is None else asked, found)

    def _step(self) -> None:
        rows = [row for row in range(NUM_ROWS) if 0 < len(self.texts[row]) < NUM_TOKENS]
        rows = self._random.sample(rows, self._random.randint(0, len(rows)))
        if not rows:
            return
        tokens = self._tokens(len(rows))
        found = self.rows.decode_step(rows, torch.tensor(tokens))
        for row, token in zip(rows, tokens, strict=True):
            self.texts[row] = [*self.texts[row], token]
        self._check(rows, [1] * len(rows), found)

    def _copy(self) -> None:
        source, target = self._random.sample(range(NUM_ROWS), 2)
        self.rows.copy_row(source, target)
        self.texts[target] = self.texts[source]

    def _free(self) -> None:
        row = self._random.randrange(NUM_ROWS)
        self.rows.free(row)
        self.texts[row] = []

    def _truncate(self) -> None:
        row = self._random.randrange(NUM_ROWS)
        kept = self._random.randint(0, len(self.texts[row]))
        self.rows.truncate(row, kept)
        self.texts[row] = self.texts[row][:kept]

    def _move_blocks(self) -> None:
        source, target = self._random.sample(range(NUM_ROWS), 2)
        stops = range(0, len(self.texts[source]) + 1, BLOCK)
        stops = stops[: self._random.randint(1, len(stops))]
        blocks = [self.rows.read_block(source, start, start + BLOCK) for start in stops[:-1]]
        self.rows.free(target)
        self.rows.write_blocks(target, blocks)
        self.texts[target] = self.texts[source][: stops[-1]]

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(4, self._oracle.vocab_size) for _ in range(count)]

    def _check(self, rows: list[int], counts: list[int], found: Tensor) -> None:
        whole = [self._oracle(torch.tensor([self.texts[row]]))[0] for row in rows]
        expected = torch.cat([logits[len(logits) - n :] for logits, n in zip(whole, counts, strict=True)])
        assert found.shape == expected.shape
        errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.le(self._tolerance).all(), f"relative errors of the logits: {errors.tolist()}"
        self.num_checked += len(found)
