"""What the table of formats says of each: what it can hold, how it is written, and what it is compared by."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, ProgramError
from bloomlm.export.weights import QUANTIZATIONS
from bloomlm.model.bloom import BloomForCausalLM

OnStage = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, from 0.0 to 1.0."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """A program to be written."""

    model: BloomForCausalLM
    """In eval mode on the CPU, with or without an adapter."""
    tokenizer: Tokenizer
    """Written beside it."""
    path: Path
    """Where it goes: directory and prefix."""
    source: str
    """What the model is called."""
    dtype: torch.dtype
    """Precision of the matrices without quantisation."""
    quantization: str
    """One of QUANTIZATIONS."""
    max_new_tokens: int
    """Tokens that it generates unless told otherwise."""
    on_stage: OnStage
    """Receives the progress."""

    @property
    def prefix(self) -> str:
        """Name of the program, with which its files' names begin."""
        return self.path.name

    def count_parameters(self) -> Callable[[], None]:
        """A function to be called after each parameter that is written; it reports the progress."""
        total, done = sum(1 for _ in self.model.parameters()), itertools.count(1)
        self.on_stage("weights", 0.0)
        return lambda: self.on_stage("weights", min(1.0, next(done) / total))


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format of exported programs."""

    name: str
    """As the runtime's table has it."""
    write: Callable[[ExportJob, Path], Mapping[str, Any]]
    """Write the program's files into a directory that has the tokenizer's; returns this format's own manifest fields.

    Raises ProgramError where a library is missing or the format has no place for the model.
    """
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    """Precisions that it keeps matrices in."""
    quantizations: tuple[str, ...] = QUANTIZATIONS
    """Those of QUANTIZATIONS that it has."""
    has_virtual_tokens: bool = True
    """Whether it has a place for a prefix adapter."""
    float32_limits: str = "float32"
    """Key, in parity.LIMITS, of what a program in float32 must keep to."""

    def stored_dtype(self, model: BloomForCausalLM, dtype: torch.dtype | None, quantization: str) -> torch.dtype:
        """The precision that matrices are kept in.

        Args:
            model: to be written.
            dtype: the precision asked for; None: the model's where the format has it, else float32.
            quantization: the one asked for.

        Raises:
            ConfigError: the format has no such precision or quantisation.
            ProgramError: it has no place for the model's adapter.
        """
        if quantization not in self.quantizations or dtype not in (None, *self.dtypes):
            names = " or ".join(str(kept).removeprefix("torch.") for kept in self.dtypes)
            raise ConfigError(f"--format {self.name} is written in {names}; leave out --dtype and --quantization")
        if model.transformer.num_virtual_tokens and not self.has_virtual_tokens:
            raise ProgramError(
                f"--format {self.name} has no place for the virtual tokens of a prefix adapter; "
                "export it as --format pt2"
            )
        wanted = dtype or model.transformer.dtype
        return wanted if wanted in self.dtypes else torch.float32
