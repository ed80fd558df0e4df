"""The common part of the onnx and openvino formats: a function of new tokens and a cache, which returns the new cache.

Prompts are read one by one, without pads. Rows are decoded together: their caches are padded on the left and joined.
The joined cache is kept from step to step while the same rows take part.

Shapes: B rows, T new tokens, S slots in use, L blocks, H heads, K head_dim, P virtual tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bloomlm.errors import ProgramError
from bloomlm.row_memory import RowFeatures
from bloomlm.runtime.formats.base import ProgramRows
from bloomlm.runtime.manifest import VIRTUAL, Manifest

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], list[Array]]
"""[tokens [B, T], starts [B], cache ...] -> [logits [B, V], grown cache ...]."""


def virtual_file(prefix: str) -> str:
    """Name of the file with a prefix adapter's keys and values."""
    return f"{prefix}.virtual.safetensors"


def input_names(num_blocks: int) -> list[str]:
    """Names of the function's inputs."""
    return ["tokens", "starts", *(f"past.{index}" for index in range(2 * num_blocks))]


def output_names(num_blocks: int) -> list[str]:
    """Names of the function's outputs."""
    return ["logits", *(f"present.{index}" for index in range(2 * num_blocks))]


class StepModel:
    """A program with the interface of LanguageModel, given its loaded function; see ProgramFormat.open."""

    features = RowFeatures(truncates=True, blocks=True, paged=True)

    def __init__(self, manifest: Manifest, directory: Path, prefix: str, run: Run) -> None:
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        self.bytes_per_token = manifest.bytes_per_token
        self._run = run
        self._virtual = _read_virtual(directory / virtual_file(prefix), manifest)

    def open_rows(self, num_rows: int, num_tokens: int) -> "StepRows":
        """Room for num_rows sequences. Their memory grows with them, so num_tokens is not needed."""
        return StepRows(self.manifest.format, self._run, self._virtual, num_rows)


class StepRows(ProgramRows):
    """Sequences and their caches."""

    def __init__(self, format: str, run: Run, virtual: list[Array], num_rows: int) -> None:
        super().__init__(format)
        self._run = run
        self._virtual = virtual
        self._caches: list[list[Array] | None] = [None] * num_rows
        """Keys and values by block of each row, [H, S, K] each; None: the row is free."""
        self._joined: tuple[list[int], Array, list[Array]] | None = None
        """The rows of the last step, their first slots without pads [B], and their joined caches [B, H, S, K]."""

    def prefill(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, num_logits: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to rows, one after another; see ModelRows."""
        if num_logits is not None and max(num_logits) > 1:
            self._refuse("give the logits of several tokens of a prompt, which scoring needs")
        logits = []
        for row, prompt in zip(rows, prompts, strict=True):
            before = [part[None] for part in self._cache(row)]
            first, *grown = self._run([np.array([prompt]), np.zeros(1, dtype=np.int64), *before])
            logits.append(first)
            self._caches[row] = [part[0] for part in grown]
        self._joined = None
        wanted = torch.ones(len(rows)) if num_logits is None else torch.tensor(num_logits)
        return torch.from_numpy(np.concatenate(logits))[wanted.bool()]

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of the rows; see ModelRows."""
        rows = list(rows)
        if self._joined is None or self._joined[0] != rows:
            self._joined = rows, *self._join(rows)
        _, starts, caches = self._joined
        logits, *grown = self._run([tokens.numpy()[:, None], starts, *caches])
        self._joined = rows, starts, grown
        for place, (row, start) in enumerate(zip(rows, starts.tolist(), strict=True)):
            self._caches[row] = [part[place, :, start:] for part in grown]
        return torch.from_numpy(logits)

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first num_tokens tokens of a row; see ModelRows."""
        slots = self._slots(row, 0, num_tokens)
        self._caches[row] = [part[:, : slots.stop] for part in self._cache(row)]
        self._joined = None

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of the keys and values of some tokens: [2 * L, H, T, K]; see ModelRows."""
        slots = self._slots(row, start, stop)
        return torch.from_numpy(np.stack([part[:, slots.start : slots.stop] for part in self._cache(row)]))

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Let a row begin with tokens that were read in another row; see ModelRows."""
        pieces = zip(self._cache(row), *(block.numpy() for block in blocks), strict=True)
        self._caches[row] = [np.concatenate(piece, axis=1) for piece in pieces]
        self._joined = None

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row; they share memory, because no step writes into it."""
        self._caches[target] = self._caches[source]
        self._joined = None

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self._caches[row] = None
        self._joined = None

    def _cache(self, row: int) -> list[Array]:
        """A row's keys and values by block [H, S, K]; those of the virtual tokens where it is free."""
        cache = self._caches[row]
        return self._virtual if cache is None else cache

    def _slots(self, row: int, start: int, stop: int) -> range:
        """The slots of some tokens that a row has."""
        num_virtual, num_slots = self._virtual[0].shape[1], self._cache(row)[0].shape[1]
        if not 0 <= start <= stop <= num_slots - num_virtual:
            raise ValueError(f"row {row} has {num_slots - num_virtual} tokens; it has no tokens {start} to {stop}")
        return range(num_virtual + start, num_virtual + stop)

    def _join(self, rows: Sequence[int]) -> tuple[Array, list[Array]]:
        """The first slots of rows without pads [B], and their caches, padded on the left [B, H, S, K]."""
        caches = [cache for cache in (self._caches[row] for row in rows) if cache is not None]
        assert len(caches) == len(rows), "a row that takes a step is free"
        lengths = [cache[0].shape[1] for cache in caches]
        starts = np.array([max(lengths) - length for length in lengths], dtype=np.int64)
        joined = []
        for parts in zip(*caches, strict=True):
            heads, _, head_dim = parts[0].shape
            whole = np.zeros((len(rows), heads, max(lengths), head_dim), dtype=np.float32)
            for target, part, start in zip(whole, parts, starts.tolist(), strict=True):
                target[:, start:] = part
            joined.append(whole)
        return starts, joined


def _read_virtual(path: Path, manifest: Manifest) -> list[Array]:
    """The cache of a free row: keys and values of virtual tokens by block, [H, P, K] each; P may be 0."""
    if not manifest.num_virtual_tokens:
        shape = (manifest.n_head, 0, manifest.head_dim)
        return [np.zeros(shape, dtype=np.float32) for _ in range(2 * manifest.n_layer)]
    try:
        with safe_open(path, framework="np") as file:
            virtual = file.get_tensor(VIRTUAL)
    except (OSError, SafetensorError) as error:
        raise ProgramError(f"{path} cannot be opened as the virtual tokens of this program: {error}") from error
    return [np.ascontiguousarray(part) for part in virtual.reshape(-1, *virtual.shape[2:])]
