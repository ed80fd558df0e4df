"""Write Hugging Face model directories: config.json, generation_config.json and safetensors, in shards when large.

Every parameter has its file and its place in it before the first tensor arrives, because BloomConfig alone says all
names and shapes: tensors may come in any order and lazily, and one at a time is in memory.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bloomlm.checkpoint.atomic import atomic_directory, atomic_write
from bloomlm.checkpoint.safetensors_file import build_header, num_bytes, raw_bytes
from bloomlm.checkpoint.tensor_reader import TensorEntry, name_some
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

__all__ = ["atomic_directory", "atomic_write", "parse_size", "write_model"]

DEFAULT_SHARD_SIZE_BYTES = 5 * 10**9
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB, 1.5GiB or 1000000.

    Args:
        text: a number and a unit: KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB (of 1024), or none for bytes.

    Raises:
        ConfigError: it is no such size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"{text!r} is no size; expected for example 5GB, 500MB or 1.5GiB")
    return int(float(match[1]) * unit)


def write_model(
    directory: Path,
    config: BloomConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
) -> None:
    """Write a model into an existing directory; use atomic_directory around it.

    Args:
        directory: where to.
        config: the model's configuration; its dtype becomes what is written.
        tensors: every parameter once, under its published name, in any order.
        dtype: precision to write; None: that of the first tensor, and all must have it.
        max_shard_size_bytes: a file holds at most this much data, or a single larger tensor.

    Raises:
        CheckpointError: tensors are missing, unknown, misshapen or of mixed precision, or cannot be written.
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise CheckpointError("there are no tensors to write; expected all parameters of the model")
    target = dtype or first[1].dtype
    shards = plan_shards(_parameter_entries(config, target), max_shard_size_bytes)
    config = dataclasses.replace(config, dtype=str(target).removeprefix("torch."))
    try:
        _write_json(directory / "config.json", config.to_dict())
        _write_json(directory / "generation_config.json", _generation_config(config))
        with ExitStack() as stack:
            writer = _ShardWriter(directory, shards, stack, convert=dtype is not None)
            for name, tensor in chain([first], stream):
                writer.write(name, tensor)
            writer.check_complete()
        if len(shards) > 1:
            _write_json(directory / "model.safetensors.index.json", _index(shards))
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {directory}: {error}") from error


def plan_shards(entries: Mapping[str, TensorEntry], max_shard_size_bytes: int) -> dict[str, dict[str, TensorEntry]]:
    """Deal parameters out to files, in order, a new file where the next one would not fit.

    Args:
        entries: name -> shape and dtype.
        max_shard_size_bytes: of data in one file.

    Returns:
        File name -> its entries; a single file is called model.safetensors.
    """
    shards: list[dict[str, TensorEntry]] = [{}]
    size_bytes = 0
    for name, entry in entries.items():
        if shards[-1] and size_bytes + num_bytes(entry) > max_shard_size_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = entry
        size_bytes += num_bytes(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


class _ShardWriter:
    """All files of a model, open, each with its header written and a place for every tensor."""

    def __init__(
        self, directory: Path, shards: Mapping[str, Mapping[str, TensorEntry]], stack: ExitStack, *, convert: bool
    ) -> None:
        self._convert = convert
        self._places: dict[str, tuple[BinaryIO, int, TensorEntry]] = {}
        self._written: set[str] = set()
        for file_name, entries in shards.items():
            header, offsets = build_header(entries, {"format": "pt"})
            file = stack.enter_context((directory / file_name).open("xb"))
            file.write(header)
            self._places.update({name: (file, offsets[name], entry) for name, entry in entries.items()})

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor in its place."""
        if name not in self._places:
            raise CheckpointError(f"{name} cannot be written: BLOOM has no parameter of this name")
        file, offset, entry = self._places[name]
        if tuple(tensor.shape) != entry.shape:
            found, expected = list(tensor.shape), list(entry.shape)
            raise CheckpointError(f"{name} cannot be written: found shape {found}, config.json says {expected}")
        if tensor.dtype != entry.dtype and not self._convert:
            raise CheckpointError(
                f"{name} cannot be written: it is {tensor.dtype}, the first tensor {entry.dtype}; "
                "name the dtype to write all in"
            )
        file.seek(offset)
        file.write(raw_bytes(tensor.to(entry.dtype)))
        self._written.add(name)

    def check_complete(self) -> None:
        """Refuse a model with a parameter that nobody gave."""
        if missing := [name for name in self._places if name not in self._written]:
            raise CheckpointError(f"{len(missing)} parameters were not given to write: {name_some(missing)}")


def _parameter_entries(config: BloomConfig, dtype: torch.dtype) -> dict[str, TensorEntry]:
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    return {name: TensorEntry(tuple(p.shape), dtype) for name, p in model.named_parameters()}


def _index(shards: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, Any]:
    sizes = [num_bytes(entry) for entries in shards.values() for entry in entries.values()]
    weight_map = {name: file_name for file_name, entries in shards.items() for name in entries}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}


def _generation_config(config: BloomConfig) -> dict[str, Any]:
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True, **{name: value for name, value in tokens.items() if value is not None}}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
