"""The files of a PaddleNLP adapter: a JSON configuration, and a state dict, whole or one for each rank."""

import re
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bloomlm.checkpoint.adapters.peft import read_adapter_config
from bloomlm.checkpoint.paddle.layout import check_ranks_complete
from bloomlm.checkpoint.paddle.state import PaddleState, read_paddle_state
from bloomlm.errors import AdapterError, CheckpointError, ConfigError

LORA_CONFIG_FILE = "lora_config.json"
PREFIX_CONFIG_FILE = "prefix_config.json"
LORA_STEM = "lora_model_state"
PREFIX_STEM = "prefix_model_state"


class PrefixLayout(Enum):
    """How a block's part of a prefix becomes its keys and values; see prefix.py."""

    OLD = "old"
    NEW = "new"


@dataclass(frozen=True, kw_only=True)
class ForeignReading:
    """What the user knows about PaddleNLP's files that the files do not record."""

    prefix_layout: PrefixLayout | None = None
    """Layout of a prefix adapter, which changed in August 2023; None: detect it from the files."""
    trained_tensor_parallel_degree: int | None = None
    """Number of tensor-parallel ranks that trained an adapter; None: detect it from the files."""
    tokenization: bool = False
    """Whether vocab.json and merges.txt split words like GPT-2's tokenizer, as PaddleNLP did, and not like BLOOM's."""

    @classmethod
    def from_flags(
        cls,
        *,
        prefix_layout: str | None = None,
        trained_tensor_parallel_degree: int | None = None,
        paddle_tokenization: bool = False,
    ) -> "ForeignReading":
        """The value for three command-line flags.

        Raises:
            ConfigError: there is no such prefix_layout.
        """
        layouts = {layout.value: layout for layout in PrefixLayout}
        if prefix_layout is not None and prefix_layout not in layouts:
            raise ConfigError(f"prefix_layout is {prefix_layout!r}; expected one of {', '.join(layouts)}")
        return cls(
            prefix_layout=None if prefix_layout is None else layouts[prefix_layout],
            trained_tensor_parallel_degree=trained_tensor_parallel_degree,
            tokenization=paddle_tokenization,
        )

    @property
    def adapter_flags(self) -> tuple[str, ...]:
        """Names of the given flags that apply to an adapter."""
        return tuple(
            name for name in ("prefix_layout", "trained_tensor_parallel_degree") if getattr(self, name) is not None
        )


AS_THE_FILES_TELL = ForeignReading()


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """The files of an adapter."""

    directory: Path
    """The directory that holds them."""
    values: dict[str, Any]
    """Its JSON configuration."""
    states: list[PaddleState]
    """State dicts, one for each tensor-parallel rank or one for all."""
    trained_tp_degree: int | None
    """Number of tensor-parallel ranks that trained it; None: its files do not record it."""


def read_adapter_files(
    directory: Path, config_file: str, stem: str, reading: ForeignReading = AS_THE_FILES_TELL
) -> AdapterFiles:
    """Open an adapter; no tensor is read.

    The number of ranks that trained it is known if each rank's file is there (.tp00, .tp01, ...), or if a single file
    names its variables: a single process writes these names, and merging files loses them.

    Args:
        directory: the adapter.
        config_file: name of its JSON configuration.
        stem: name of its state dict, without the suffix.
        reading: may give the number of ranks that trained it.

    Raises:
        AdapterError: files are missing or damaged, or contradict `reading`.
    """
    values = read_adapter_config(directory / config_file)
    whole = directory / f"{stem}.pdparams"
    shards = _shards(directory, stem)
    degree = values.get("tensor_parallel_degree")
    degree = degree if isinstance(degree, int) and degree > 1 else None
    try:
        if whole.is_file():
            if shards:
                warnings.warn(
                    f"{directory} holds {whole.name} and ranks' shards; the shards are not read", stacklevel=2
                )
            states = [read_paddle_state(whole)]
            told = degree or (1 if states[0].variable_names else None)
            trained = reading.trained_tensor_parallel_degree or told
        elif shards:
            check_ranks_complete(sorted(shards), str(directory), degree)
            states = [read_paddle_state(shards[tp_rank]) for tp_rank in sorted(shards)]
            trained = len(states)
        else:
            raise AdapterError(f"{directory} has {config_file} but neither {whole.name} nor {stem}.tp00.pdparams")
    except CheckpointError as error:
        raise error if isinstance(error, AdapterError) else AdapterError(str(error)) from error
    if reading.trained_tensor_parallel_degree not in (None, trained):
        raise AdapterError(
            f"{directory} holds the shards of {trained} tensor-parallel ranks, but trained_tensor_parallel_degree is "
            f"{reading.trained_tensor_parallel_degree}; leave it out"
        )
    return AdapterFiles(directory=directory, values=values, states=states, trained_tp_degree=trained)


def require_trained_degree(files: AdapterFiles, why: str) -> int:
    """The number of ranks that trained an adapter.

    Args:
        files: the adapter.
        why: what depends on the number, for the error message.

    Raises:
        AdapterError: neither the files nor the user gave it.
    """
    if files.trained_tp_degree is None:
        raise AdapterError(
            f"{files.directory}: this adapter was merged from the files of tensor-parallel ranks (its state dict names "
            f"no variables), and the number of ranks is not recorded, but decides what the adapter computes: {why}. "
            "Give --trained_tensor_parallel_degree N, which is 1 if one device trained it"
        )
    return files.trained_tp_degree


def _shards(directory: Path, stem: str) -> dict[int, Path]:
    pattern = re.compile(rf"{stem}\.tp(\d+)\.pdparams")
    matches = [(pattern.fullmatch(path.name), path) for path in directory.glob(f"{stem}.tp*.pdparams")]
    return {int(match[1]): path for match, path in matches if match}
