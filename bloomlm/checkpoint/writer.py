"""Write Hugging Face model directories: config.json, generation_config.json and safetensors, in shards when large.

BloomConfig alone determines all names and shapes, so every parameter has its file and offset before the first tensor
arrives: tensors may come in any order and lazily, and only one at a time is in memory.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.checkpoint.output import FileBehind, Report, WriteBehind, no_report
from bloomlm.checkpoint.safetensors_file import build_header, num_bytes, raw_bytes, row_blocks
from bloomlm.checkpoint.tensor_reader import Rows, TensorEntry, empty_model
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import whole_tensor
from bloomlm.parallel.mesh import ALONE, Mesh

DEFAULT_SHARD_SIZE_BYTES = 5 * 10**9
# Keys of config.json that describe the files it was read from and do not hold for those that are written.
OTHER_FILES_KEYS = ("architectures", "tensor_parallel_degree", "tensor_parallel_output", "tensor_parallel_rank")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes in a size such as 5GB, 500MB, 1.5GiB or 1000000.

    Args:
        text: a number and a unit: KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB (of 1024), or none for bytes.

    Raises:
        ConfigError: the text is not a size, or is less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ConfigError(f"{text!r} is not a size; expected for example 5GB, 500MB or 1.5GiB")
    return int(float(match[1]) * unit)


def write_model(
    directory: Path,
    config: BloomConfig,
    tensors: Iterable[tuple[str, Tensor | Rows]],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    report: Report = no_report,
    mesh: Mesh = ALONE,
) -> None:
    """Write a model into an existing directory; use atomic_directory around it.

    Args:
        directory: the directory to write into.
        config: the model's configuration, whose dtype is replaced by the written one.
        tensors: (published name, tensor) of every parameter once, in any order; Rows are for one rank only.
        dtype: precision to write; None: the precision of the first tensor, which the others must share.
        max_shard_size_bytes: largest size of the data in one file; a larger tensor has a file of its own.
        report: called with a number of bytes after each write.
        mesh: the ranks that hold parts of the tensors, in the same order; one rank gathers and writes each file.

    Raises:
        CheckpointError: tensors are missing or unknown, differ in shape or precision, or cannot be written.
    """
    stream = iter(tensors)
    first = next(stream, None)
    if first is None:
        raise CheckpointError("there are no tensors to write; expected all parameters of the model")
    target = dtype or first[1].dtype
    shards = plan_shards(_parameter_entries(config, target), max_shard_size_bytes)
    try:
        with ExitStack() as stack:
            # an iterator releases what it returned; a tuple would hold the first tensor, often the largest, to the end
            remaining = chain(iter((first,)), stream)
            del first
            if mesh.is_alone:
                writer = _ShardWriter(directory, shards, stack, convert=dtype is not None, report=report)
                for name, tensor in remaining:
                    writer.write(name, tensor)
                    del tensor  # before the next one is made
                writer.check_complete()
            else:
                _gather_and_write(directory, shards, stack, remaining, mesh, convert=dtype is not None, report=report)
        if mesh.is_main:  # not earlier: the others would gather tensors with a rank that fails here
            _write_small_files(directory, config, target, shards)
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {directory}: {error}") from error


def _write_small_files(
    directory: Path, config: BloomConfig, dtype: torch.dtype, shards: Mapping[str, Mapping[str, TensorEntry]]
) -> None:
    write_json(directory / "config.json", _config_file(config, dtype))
    write_json(directory / "generation_config.json", generation_config(config))
    if len(shards) > 1:
        write_json(directory / "model.safetensors.index.json", _index(shards))


def _gather_and_write(
    directory: Path,
    shards: Mapping[str, Mapping[str, TensorEntry]],
    stack: ExitStack,
    tensors: Iterable[tuple[str, Tensor | Rows]],
    mesh: Mesh,
    *,
    convert: bool,
    report: Report,
) -> None:
    # the ranks of the first copy of the model take turns to write files
    writers = mesh.ranks_of_first_copy
    rank_of_file = {file_name: writers[number % len(writers)] for number, file_name in enumerate(shards)}
    rank_of = {name: rank_of_file[file_name] for file_name, entries in shards.items() for name in entries}
    own = {file_name: entries for file_name, entries in shards.items() if rank_of_file[file_name] == mesh.rank}
    problem: Exception | None = None
    writer: _ShardWriter | None = None
    try:
        writer = _ShardWriter(directory, own, stack, convert=convert, report=report)
    except OSError as error:
        problem = error
    for name, tensor in tensors:
        assert isinstance(tensor, Tensor), name
        whole = whole_tensor(name, tensor, mesh, rank_of.get(name, 0))
        del tensor
        # after an error this rank still takes part in gathering, because the others would wait for it
        if whole is not None and writer is not None and problem is None:
            try:
                writer.write(name, whole)
            except (OSError, CheckpointError) as error:
                problem = error
    if problem is not None:
        raise problem
    assert writer is not None
    writer.check_complete()


def plan_shards(entries: Mapping[str, TensorEntry], max_shard_size_bytes: int) -> dict[str, dict[str, TensorEntry]]:
    """Assign parameters to files in order, with a new file whenever the next parameter would not fit.

    Args:
        entries: name -> shape and dtype.
        max_shard_size_bytes: largest size of the data in one file.

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


def generation_config(config: BloomConfig) -> dict[str, Any]:
    """The contents of generation_config.json: the special tokens."""
    tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {"_from_model_config": True, **{name: value for name, value in tokens.items() if value is not None}}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object, keys sorted."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _ShardWriter:
    """All files of a model, open, with their headers written and an offset for every tensor."""

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, Mapping[str, TensorEntry]],
        stack: ExitStack,
        *,
        convert: bool,
        report: Report,
    ) -> None:
        self._convert, self._report = convert, report
        self._places: dict[str, tuple[FileBehind, int, TensorEntry]] = {}
        self._written: set[str] = set()
        self._behind = WriteBehind()
        for file_name, entries in shards.items():
            header, offsets = build_header(entries, {"format": "pt"})
            file = FileBehind(stack.enter_context((directory / file_name).open("xb")), self._behind)
            file.write(header)
            self._places.update({name: (file, offsets[name], entry) for name, entry in entries.items()})
        stack.enter_context(self._behind)  # last, so that it ends before the files are closed

    def write(self, name: str, tensor: Tensor | Rows) -> None:
        """Write one tensor at its offset."""
        if name not in self._places:
            raise CheckpointError(f"{name} cannot be written: BLOOM has no parameter of this name")
        file, offset, entry = self._places[name]
        if tuple(tensor.shape) != entry.shape:
            found, expected = list(tensor.shape), list(entry.shape)
            raise CheckpointError(f"{name} cannot be written: found shape {found}, config.json says {expected}")
        if tensor.dtype != entry.dtype and not self._convert:
            raise CheckpointError(
                f"{name} cannot be written: it is {tensor.dtype}, the first tensor {entry.dtype}; "
                "give the dtype to write"
            )
        file.seek(offset)
        for block in row_blocks(tensor, entry.dtype):
            self._report(file.write(raw_bytes(block)))
        self._behind.wait()  # before the next tensor is read, or changed
        self._written.add(name)

    def check_complete(self) -> None:
        """Raise if some parameters were not written."""
        if missing := [name for name in self._places if name not in self._written]:
            raise CheckpointError(f"{len(missing)} parameters were not given to write: {name_some(missing)}")


def _parameter_entries(config: BloomConfig, dtype: torch.dtype) -> dict[str, TensorEntry]:
    return {name: TensorEntry(tuple(p.shape), dtype) for name, p in empty_model(config).named_parameters()}


def _config_file(config: BloomConfig, dtype: torch.dtype) -> dict[str, Any]:
    extra = {key: value for key, value in config.extra.items() if key not in OTHER_FILES_KEYS}
    return dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."), extra=extra).to_dict()


def _index(shards: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, Any]:
    sizes = [num_bytes(entry) for entries in shards.values() for entry in entries.values()]
    weight_map = {name: file_name for file_name, entries in shards.items() for name in entries}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
