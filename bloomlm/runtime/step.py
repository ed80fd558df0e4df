"""What the onnx and openvino formats share: a function of new tokens and a cache, which returns the grown cache.

Prompts are read one by one, without pads, and decoded together, padded on the left.

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
from bloomlm.runtime.manifest import VIRTUAL, Manifest

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], list[Array]]
"""[tokens [B, T], starts [B], cache ...] -> [logits [B, V], grown cache ...]."""


def virtual_file(prefix: str) -> str:
    """Name of the file of a prefix adapter's keys and values."""
    return f"{prefix}.virtual.safetensors"


def input_names(num_blocks: int) -> list[str]:
    """What the function takes."""
    return ["tokens", "starts", *(f"past.{index}" for index in range(2 * num_blocks))]


def output_names(num_blocks: int) -> list[str]:
    """What it gives."""
    return ["logits", *(f"present.{index}" for index in range(2 * num_blocks))]


class StepModel:
    """A program of these formats, as the decoding loop wants it."""

    def __init__(self, manifest: Manifest, directory: Path, prefix: str, run: Run) -> None:
        """Read the virtual tokens.

        Args:
            manifest: of the program, its files checked.
            directory: where it lies.
            prefix: its name.
            run: the function, loaded by its runtime.

        Raises:
            ProgramError: the virtual tokens cannot be read.
        """
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        self._run = run
        self._virtual = _read_virtual(directory / virtual_file(prefix), manifest)

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple["StepBatch", Tensor]:
        """Read the prompts, one after another."""
        num_slots = self.manifest.num_virtual_tokens + max(map(len, prompts))
        starts = [num_slots - self.manifest.num_virtual_tokens - len(prompt) for prompt in prompts]
        shape = (len(prompts), self.manifest.n_head, num_slots, self.manifest.head_dim)
        cache = [np.zeros(shape, dtype=np.float32) for _ in range(2 * self.manifest.n_layer)]
        logits = []
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            given = [np.array([prompt]), np.zeros(1, dtype=np.int64), *self._virtual]
            first, *grown = self._run(given)
            logits.append(first)
            for target, part in zip(cache, grown, strict=True):
                target[row, :, start:] = part[0]
        batch = StepBatch(self._run, cache, np.array(starts, dtype=np.int64))
        return batch, torch.from_numpy(np.concatenate(logits))


class StepBatch:
    """Rows and their cache."""

    def __init__(self, run: Run, cache: list[Array], starts: Array) -> None:
        self._run = run
        self._cache = cache
        self._starts = starts

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Give every row one more token."""
        logits, *self._cache = self._run([tokens.numpy()[:, None], self._starts, *self._cache])
        return torch.from_numpy(logits)

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows."""
        chosen = rows.numpy()
        self._cache = [part[chosen] for part in self._cache]
        self._starts = self._starts[chosen]


def _read_virtual(path: Path, manifest: Manifest) -> list[Array]:
    """The cache before a prompt: virtual tokens' keys and values by block, [1, H, P, K]; P may be 0."""
    if not manifest.num_virtual_tokens:
        shape = (1, manifest.n_head, 0, manifest.head_dim)
        return [np.zeros(shape, dtype=np.float32) for _ in range(2 * manifest.n_layer)]
    try:
        with safe_open(path, framework="np") as file:
            virtual = file.get_tensor(VIRTUAL)
    except (OSError, SafetensorError) as error:
        raise ProgramError(f"{path} cannot be opened as the virtual tokens of this program: {error}") from error
    return [np.ascontiguousarray(part)[None] for part in virtual.reshape(-1, *virtual.shape[2:])]
