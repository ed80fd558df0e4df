"""The pt2 format: traced functions, compiled ahead of time or not, over memory-mapped weights.

Shapes: B rows, S slots in use, M slots, N packed tokens, L blocks, H heads, K head_dim, P virtual tokens, V vocabulary.
"""

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bloomlm.errors import ProgramError
from bloomlm.runtime.formats.base import ProgramFormat
from bloomlm.runtime.manifest import VIRTUAL, Manifest
from bloomlm.runtime.torch_internals import open_package

_LOG = logging.getLogger(__name__)

INSTRUCTION_SETS: Mapping[str, frozenset[str]] = {
    "x86-64-v4": frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]),
    "x86-64-v3": frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"]),
    "x86-64": frozenset(),
}
"""Levels that programs are compiled for, the highest first, and the flags by which Linux tells that they are there."""

Function = Callable[..., Tensor]


def weights_file(prefix: str) -> str:
    """Name of the weights file."""
    return f"{prefix}.safetensors"


def package_file(prefix: str) -> str:
    """Name of the compiled package."""
    return f"{prefix}.pt2"


def graph_file(prefix: str, entry_point: str) -> str:
    """Name of an uncompiled function."""
    return f"{prefix}.{entry_point}.graph.pt2"


class Pt2Model:
    """A program of this format, as the decoding loop wants it."""

    def __init__(self, manifest: Manifest, directory: Path, prefix: str) -> None:
        """Map the weights and load the functions.

        Args:
            manifest: of the program, its files checked.
            directory: where it lies.
            prefix: its name.

        Raises:
            ProgramError: a file is not what the manifest says.
        """
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        tensors = _map_weights(directory / weights_file(prefix), manifest)
        self._virtual = tensors.pop(VIRTUAL, None)
        self.is_compiled = _can_run_compiled(manifest)
        open_function = _open_compiled if self.is_compiled else _open_graph
        open_named = partial(open_function, directory, prefix, weights=tensors)
        self._prefill, self._decode_step = open_named("prefill"), open_named("decode_step")

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple["Pt2Batch", Tensor]:
        """Read the prompts, without computing on pads outside of attention."""
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        num_virtual = self.manifest.num_virtual_tokens
        num_slots = num_virtual + int(lengths.max())
        cache = self._empty_cache(len(prompts), num_slots + max_new_tokens)
        batch = Pt2Batch(self._decode_step, cache)
        batch.starts = num_slots - num_virtual - lengths
        batch.num_slots = num_slots
        if self._virtual is not None:
            _put_virtual(batch.cache, self._virtual, batch.starts)
        rows = torch.arange(len(prompts)).repeat_interleave(lengths)
        slots = torch.cat([torch.arange(num_slots - int(length), num_slots) for length in lengths])
        tokens = torch.tensor([token for prompt in prompts for token in prompt])
        used = batch.slots[:num_slots]
        return batch, self._prefill(tokens, rows, slots, lengths.cumsum(0) - 1, batch.starts, used, batch.cache)

    def _empty_cache(self, num_rows: int, num_slots: int) -> list[Tensor]:
        shape = (num_rows, self.manifest.n_head, num_slots, self.manifest.head_dim)
        return [torch.zeros(shape) for _ in range(2 * self.manifest.n_layer)]


class Pt2Batch:
    """Rows in a cache that decode_step writes into."""

    def __init__(self, decode_step: Function, cache: list[Tensor]) -> None:
        self._decode_step = decode_step
        self.cache = cache
        """Keys and values by block, [B, H, M, K] each."""
        self.starts = torch.empty(0, dtype=torch.int64)
        """[B] first slot of each row that is no pad."""
        self.num_slots = 0
        """Slots in use (S)."""
        self.slots = torch.arange(cache[0].shape[2])

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Give every row one more token."""
        assert self.num_slots < len(self.slots), "the loop asked for room for fewer tokens"
        self.num_slots += 1
        return self._decode_step(tokens, self.starts, self.slots[: self.num_slots], self.cache)

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows."""
        for index, old in enumerate(self.cache):
            new = old.new_zeros(len(rows), *old.shape[1:])
            new[:, :, : self.num_slots] = old[rows, :, : self.num_slots]
            self.cache[index] = new
        self.starts = self.starts[rows]


def instruction_set(flags: frozenset[str] | None = None) -> str:
    """The highest of INSTRUCTION_SETS that this machine has, or its own name where it is of another kind.

    Args:
        flags: of the processor; None: as Linux tells them.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    have = _processor_flags() if flags is None else flags
    return next(name for name, needed in INSTRUCTION_SETS.items() if needed <= have)


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _can_run_compiled(manifest: Manifest) -> bool:
    needed = manifest.instruction_set
    if needed is None:
        return False
    levels = list(INSTRUCTION_SETS)
    here = instruction_set()
    fits = here == needed or (here in levels and needed in levels and levels.index(here) <= levels.index(needed))
    made_by, runs_on = manifest.library_versions["torch"], torch.__version__
    if not fits:
        reason = f"it was compiled for {needed}, and this processor is of {here}"
    elif _minor(made_by) != _minor(runs_on):
        reason = f"it was compiled with PyTorch {made_by}, and this one is {runs_on}"
    else:
        return True
    _LOG.warning("%s: it runs uncompiled, which is slower; export it again on this machine", reason)
    return False


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _map_weights(path: Path, manifest: Manifest) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in manifest.weights}
    except (OSError, SafetensorError) as error:
        raise ProgramError(f"{path} cannot be opened as the weights of this program: {error}") from error
    for name, (dtype, shape) in manifest.weights.items():
        found = [str(tensors[name].dtype).removeprefix("torch."), list(tensors[name].shape)]
        if found != [dtype, shape]:
            raise ProgramError(f"{path}: {name} is {found}, the program expects {[dtype, shape]}; export it again")
    return tensors


def _open_compiled(directory: Path, prefix: str, entry_point: str, weights: Mapping[str, Tensor]) -> Function:
    function = open_package(directory / package_file(prefix), entry_point)
    constants = list(weights.values())

    def run(*arguments: Any) -> Tensor:
        *tensors, cache = arguments
        # compiled code takes addresses and believes the strides that it was traced with
        inputs = [tensor.contiguous() for tensor in tensors]
        return function([*inputs, *cache, *constants])[0]

    return run


def _open_graph(directory: Path, prefix: str, entry_point: str, weights: Mapping[str, Tensor]) -> Function:
    path = directory / graph_file(prefix, entry_point)
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # the loader raises whatever it stumbles over
        raise ProgramError(
            f"{path} cannot be loaded by PyTorch {torch.__version__}: {type(error).__name__}: {error}"
        ) from error
    return lambda *arguments: module(*arguments, dict(weights))


def _put_virtual(cache: Sequence[Tensor], virtual: Tensor, starts: Tensor) -> None:
    """Copy keys and values [L, 2, H, P, K] to the first slots of each row that are no pads."""
    for index, tensor in enumerate(cache):
        for row, start in enumerate(starts.tolist()):
            tensor[row, :, start : start + virtual.shape[3]] = virtual[index // 2, index % 2]


PT2 = ProgramFormat(name="pt2", backend="pt2", large_file=weights_file, open=Pt2Model)
