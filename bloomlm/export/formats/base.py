"""A row in the table of formats: what the format can hold, how it is written, and the limits of the comparison."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, ProgramError
from bloomlm.export.weight_formats import QUANTIZATIONS
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
    """Written beside the program."""
    path: Path
    """Directory and prefix of the program."""
    source: str
    """Name or path of the model."""
    dtype: torch.dtype
    """Precision of the matrices without quantisation."""
    quantization: str
    """One of QUANTIZATIONS."""
    max_new_tokens: int
    """Default number of tokens that the program generates."""
    on_stage: OnStage
    """Receives the progress."""
    calibration: Tensor | None = None
    """[W, T] windows of tokens by which int4 is calibrated (calibration.py); None: without."""

    @property
    def prefix(self) -> str:
        """The beginning of the names of the program's files."""
        return self.path.name

    def count_parameters(self) -> Callable[[], None]:
        """A function to call after each parameter that is written, which reports the progress."""
        total, done = sum(1 for _ in self.model.parameters()), itertools.count(1)
        self.on_stage("weights", 0.0)
        return lambda: self.on_stage("weights", min(1.0, next(done) / total))


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One format of exported programs."""

    name: str
    """The key in both tables."""
    write: Callable[[ExportJob, Path], Mapping[str, Any]]
    """Write the program's files into a directory with the tokenizer; returns the manifest fields of this format.

    Raises ProgramError where a library is missing or the format cannot hold the model.
    """
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    """Precisions in which it can store matrices."""
    quantizations: tuple[str, ...] = QUANTIZATIONS
    """The ones of QUANTIZATIONS that it has."""
    has_virtual_tokens: bool = True
    """Whether it has a place for a prefix adapter."""
    calibrates: bool = False
    """Whether its int4 can be calibrated."""
    float32_limits: str = "float32"
    """The key in parity.LIMITS for programs in float32."""

    def stored_dtype(self, model: BloomForCausalLM, dtype: torch.dtype | None, quantization: str) -> torch.dtype:
        """The precision in which matrices are stored.

        Args:
            model: the model to write.
            dtype: the wanted precision; None: the model's where the format has it, else float32.
            quantization: the wanted quantisation.

        Raises:
            ConfigError: the format does not have the precision or the quantisation.
            ProgramError: the format has no place for the model's adapter.
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

    def check_calibration(self, quantization: str) -> None:
        """Raise ConfigError if a program in this quantisation cannot be calibrated."""
        if quantization != "int4":
            raise ConfigError(
                f"--calibration_file has no effect with --quantization {quantization}: it chooses how int4 rounds; add "
                "--quantization int4, or leave it out"
            )
        if not self.calibrates:
            raise ConfigError(
                f"--calibration_file cannot be used with --format {self.name}, whose int4 is rounded without texts; "
                "choose --format pt2, or leave it out"
            )
