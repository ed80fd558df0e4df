"""The pt2 format: traced functions, compiled ahead of time or not, over memory-mapped weights.

Shapes: B rows, S slots in use, M slots, N packed tokens, L blocks, H heads, K head_dim, P virtual tokens, V vocabulary.
"""

import logging
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bloomlm.errors import ProgramError
from bloomlm.row_memory import RowFeatures, RowMemory, is_paged
from bloomlm.runtime.formats.base import ProgramFormat, ProgramRows
from bloomlm.runtime.manifest import VIRTUAL, Manifest
from bloomlm.runtime.torch_internals import open_package

_LOG = logging.getLogger(__name__)

INSTRUCTION_SETS: Mapping[str, frozenset[str]] = {
    "x86-64-v3": frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"]),
    "x86-64": frozenset(),
}
"""Levels that programs are compiled for, the highest first -> the processor flags that Linux lists for each.
Kernels use longer vectors where the processor that runs them has any."""

_PAGES_BYTES = 1 << 16
"""Linux enters the pages of so many bytes at once, where they are in the page cache (fault_around_bytes)."""
_MOST_BYTES = 1 << 32
"""Of the weights that are entered before the first step, while the tokenizer is read."""

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
    """A pt2 program with the interface of LanguageModel; see ProgramFormat.open."""

    features = RowFeatures(scores_chunks=True, truncates=True, blocks=True, paged=is_paged("cpu"))

    def __init__(self, manifest: Manifest, directory: Path, prefix: str) -> None:
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        self.bytes_per_token = manifest.bytes_per_token
        tensors = _map_weights(directory / weights_file(prefix), manifest)
        _enter_pages(tensors)
        self._virtual = tensors.pop(VIRTUAL, None)
        self.is_compiled = _can_run_compiled(manifest)
        open_function = _open_compiled if self.is_compiled else _open_graph
        open_named = partial(open_function, directory, prefix, weights=tensors)
        self._prefill, self._decode_step = open_named("prefill"), open_named("decode_step")

    def open_rows(self, num_rows: int, num_tokens: int) -> "Pt2Rows":
        """Reserve room for num_rows sequences of at most num_tokens tokens each; used rows take memory."""
        manifest = self.manifest
        memory = RowMemory(
            num_blocks=manifest.n_layer,
            num_rows=num_rows,
            num_heads=manifest.n_head,
            num_slots=manifest.num_virtual_tokens + num_tokens,
            width=manifest.head_dim,
            dtype=getattr(torch, manifest.cache_dtype),
            num_virtual=manifest.num_virtual_tokens,
        )
        return Pt2Rows(manifest.format, self._prefill, self._decode_step, memory, self._virtual)


class Pt2Rows(ProgramRows):
    """Sequences in memory that both functions write into."""

    def __init__(
        self,
        format: str,
        prefill: Function,
        decode_step: Function,
        memory: RowMemory,
        virtual: Tensor | None,
    ) -> None:
        super().__init__(format)
        self._prefill = prefill
        self._decode_step = decode_step
        self._memory = memory
        self._virtual = virtual
        self._slots = torch.arange(memory.tensor.shape[4])
        self.cache = list(memory.tensor.flatten(0, 1))
        """Keys and values by block, [R, H, M, K] each."""

    def prefill(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, num_logits: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to rows; see ModelRows."""
        lengths = [len(prompt) for prompt in prompts]
        new = [self._start(row, length) for row, length in zip(rows, lengths, strict=True)]
        wanted = [1] * len(prompts) if num_logits is None else num_logits
        ends = zip(accumulate(lengths), wanted, strict=True)
        logits = self._prefill(
            torch.tensor(list(chain.from_iterable(prompts))),
            torch.arange(len(prompts)).repeat_interleave(torch.tensor(lengths)),
            torch.cat([self._slots[slots.start : slots.stop] for slots in new]),
            torch.tensor([place for end, count in ends for place in range(end - count, end)], dtype=torch.int64),
            torch.tensor(rows),
            torch.tensor([slots.start for slots in new]),
            self._slots[: max(lengths)],
            self._slots[: max(slots.stop for slots in new)],
            self.cache,
        )
        self._count(rows, new)
        return logits

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of the rows; see ModelRows."""
        new = [self._start(row, 1) for row in rows]
        used = self._slots[: max(slots.stop for slots in new)]
        starts = torch.tensor([slots.start for slots in new])
        logits = self._decode_step(tokens, torch.tensor(rows), starts, used, self.cache)
        self._count(rows, new)
        return logits

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first num_tokens tokens of a row; see ModelRows."""
        self._memory.truncate(row, num_tokens)

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row."""
        self._memory.copy_row(source, target)

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self._memory.free(row)

    def read_block(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of the keys and values of some tokens of a row; see ModelRows."""
        return self._memory.read_block(row, start, stop)

    def write_blocks(self, row: int, blocks: Sequence[Tensor]) -> None:
        """Let a row begin with tokens that were read in another row; see ModelRows."""
        self._write_virtual(row)
        self._memory.write_blocks(row, blocks)

    def _start(self, row: int, num_new: int) -> range:
        """Prepare a row for new tokens; returns their slots."""
        self._write_virtual(row)
        return self._memory.claim(row, num_new)

    def _write_virtual(self, row: int) -> None:
        if self._virtual is not None and self._memory.lengths[row] == 0:
            self._memory.write_virtual(row, self._virtual)

    def _count(self, rows: Sequence[int], new: Sequence[range]) -> None:
        for row, slots in zip(rows, new, strict=True):
            self._memory.lengths[row] = slots.stop


def instruction_set(flags: frozenset[str] | None = None) -> str:
    """The highest of INSTRUCTION_SETS that this processor has; elsewhere than on x86, the name of its architecture.

    Args:
        flags: flags of the processor; None: the flags that Linux lists.
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
        reason = f"it was compiled for {needed}, and this processor has {here}"
    elif _minor(made_by) != _minor(runs_on):
        reason = f"it was compiled with PyTorch {made_by}, and PyTorch {runs_on} runs here"
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


def _enter_pages(weights: Mapping[str, Tensor]) -> threading.Thread:
    """Enter mapped weights into the page table in another thread, by reading one byte in each _PAGES_BYTES.

    The first step would do so otherwise, which takes 0.1 s for 2 GB in the page cache. Of more than _MOST_BYTES
    the rest is left to it, because the process cannot end before the thread does, which may wait for the disk.
    """
    places, left = [], _MOST_BYTES
    for weight in weights.values():
        places.append(weight.flatten().view(torch.uint8)[:left:_PAGES_BYTES])
        left = max(0, left - weight.nbytes)
    # One operation, because the thread waits for Python's lock between operations. No daemon, because a process that
    # ends while one computes may crash.
    thread = threading.Thread(target=torch.cat, args=(places,))
    thread.start()
    return thread


def _open_compiled(directory: Path, prefix: str, entry_point: str, weights: Mapping[str, Tensor]) -> Function:
    function = open_package(directory / package_file(prefix), entry_point)
    constants = list(weights.values())

    def run(*arguments: Any) -> Tensor:
        *tensors, cache = arguments
        # compiled code takes addresses only, and assumes the strides that it was traced with
        inputs = [tensor.contiguous() for tensor in tensors]
        return function([*inputs, *cache, *constants])[0]

    return run


def _open_graph(directory: Path, prefix: str, entry_point: str, weights: Mapping[str, Tensor]) -> Function:
    path = directory / graph_file(prefix, entry_point)
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # the loader raises errors of many kinds
        raise ProgramError(
            f"{path} cannot be loaded by PyTorch {torch.__version__}: {type(error).__name__}: {error}"
        ) from error
    return lambda *arguments: module(*arguments, dict(weights))


PT2 = ProgramFormat(name="pt2", backend="pt2", large_file=weights_file, open=Pt2Model)
