"""Write models in PaddleNLP 2.6's files: model_state.pdparams, whole, in shards with an index, or one for each rank."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.checkpoint.output import FileBehind, Report, WriteBehind, no_report
from bloomlm.checkpoint.paddle.layout import (
    Cut,
    is_linear_weight,
    model_cuts,
    modules_by_kind,
    stored_name,
)
from bloomlm.checkpoint.paddle.model import STATE_FILE
from bloomlm.checkpoint.paddle.state import PaddleStateWriter
from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.checkpoint.writer import OTHER_FILES_KEYS, generation_config, plan_shards, write_json
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.model.config import BloomConfig


def write_paddle_model(
    directory: Path,
    config: BloomConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype,
    tensor_parallel_degree: int = 1,
    max_shard_size_bytes: int | None = None,
    report: Report = no_report,
) -> None:
    """Write a model into an existing directory; use atomic_directory around it.

    Args:
        directory: the directory to write into.
        config: the model's configuration, whose dtype is replaced by the written one.
        tensors: every parameter once, under its published name and in the published orientation, in any order.
        dtype: precision to write.
        tensor_parallel_degree: number of ranks to cut the model for; 1: it stays whole.
        max_shard_size_bytes: largest size of the data in one file of a whole model; a larger tensor has a file of its
            own; None: one file.
        report: called with a number of bytes after each write, bytes_on_ranks in total.

    Raises:
        ConfigError: the model cannot be divided among so many ranks, or both ranks and a file size are given.
        CheckpointError: tensors are missing or unknown, have another shape, or cannot be written.
    """
    check_degree(config, tensor_parallel_degree)
    if tensor_parallel_degree > 1 and max_shard_size_bytes is not None:
        raise ConfigError("each tensor-parallel rank is written to a file of its own; leave out max_shard_size")
    cuts = model_cuts(config)
    try:
        write_json(directory / "config.json", _paddle_config(config, dtype, tensor_parallel_degree))
        write_json(directory / "generation_config.json", generation_config(config))
        shards = _plan(cuts, dtype, tensor_parallel_degree, max_shard_size_bytes)
        with ExitStack() as stack:
            writer = _ModelWriter(directory, shards, cuts, dtype, stack, report)
            for name, tensor in tensors:
                writer.write(name, tensor)
                del tensor  # before the next one is read
            writer.finish(_variable_names(config.n_layer))
        if max_shard_size_bytes is not None and len(shards) > 1:
            weight_map = {stored_name(name): file_name for file_name, names in shards.items() for name in names}
            size_bytes = config.num_parameters * dtype.itemsize
            index = {"metadata": {"total_size": size_bytes}, "weight_map": weight_map}
            write_json(directory / f"{STATE_FILE}.index.json", index)
    except OSError as error:
        raise CheckpointError(f"the model cannot be written to {directory}: {error}") from error


def check_degree(config: BloomConfig, tensor_parallel_degree: int) -> None:
    """Raise if a model cannot be divided among a number of ranks.

    Raises:
        ConfigError: the number does not divide the heads and the vocabulary.
    """
    if tensor_parallel_degree < 1:
        raise ConfigError(f"tensor_parallel_degree is {tensor_parallel_degree}; expected at least 1")
    for what, count in (("attention heads", config.n_head), ("rows of the word embedding", config.vocab_size)):
        if count % tensor_parallel_degree:
            raise ConfigError(
                f"{count} {what} cannot be divided among {tensor_parallel_degree} tensor-parallel ranks; choose a "
                f"tensor_parallel_degree that divides {config.n_head} and {config.vocab_size}"
            )


def bytes_on_ranks(config: BloomConfig, dtype: torch.dtype, tensor_parallel_degree: int) -> int:
    """Size of a model's tensors over all ranks, each of which has a copy of the tensors that are not cut."""
    cuts = model_cuts(config).values()
    numbers = sum(math.prod(cut.piece_shape(tensor_parallel_degree)) for cut in cuts) * tensor_parallel_degree
    return numbers * dtype.itemsize


class _ModelWriter:
    """All files of a model, open; each gets its part of every tensor."""

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, list[str]],
        cuts: Mapping[str, Cut],
        dtype: torch.dtype,
        stack: ExitStack,
        report: Report,
    ) -> None:
        self._cuts, self._dtype = cuts, dtype
        self._writers: list[PaddleStateWriter] = []
        self._names: list[list[str]] = []
        self._left = set(cuts)
        behind = WriteBehind()
        for file_name, names in shards.items():
            file = stack.enter_context((directory / file_name).open("xb"))
            self._writers.append(PaddleStateWriter(FileBehind(file, behind), report))
            self._names.append(names)
        stack.enter_context(behind)  # last, so that it ends before the files are closed
        self._holders: dict[str, list[PaddleStateWriter]] = {name: [] for name in cuts}
        for writer, names in zip(self._writers, self._names, strict=True):
            for name in names:
                self._holders[name].append(writer)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write its part of a tensor into every file."""
        if name not in self._left:
            found = "it was given twice" if name in self._cuts else "BLOOM has no parameter of this name"
            raise CheckpointError(f"{name} cannot be written: {found}")
        cut, writers = self._cuts[name], self._holders[name]
        if tuple(tensor.shape) != cut.shape:
            found, expected = str(list(tensor.shape)), list(cut.shape)
            raise CheckpointError(f"{name} cannot be written: found shape {found}, config.json says {expected}")
        self._left.remove(name)
        for tp_rank, writer in enumerate(writers):
            piece = tensor
            if cut.dim is not None:
                length = cut.shape[cut.dim] // len(writers)
                piece = tensor.narrow(cut.dim, tp_rank * length, length)
            if is_linear_weight(name):
                piece = piece.t()
            writer.write(stored_name(name), piece, self._dtype)

    def finish(self, variable_names: Mapping[str, str]) -> None:
        """Complete all files; raise if some parameters were not written."""
        if self._left:
            missing = [name for name in self._cuts if name in self._left]
            raise CheckpointError(f"{len(missing)} parameters were not given to write: {name_some(missing)}")
        for writer, names in zip(self._writers, self._names, strict=True):
            writer.finish({stored_name(name): variable_names[name] for name in names})


def _plan(
    cuts: Mapping[str, Cut], dtype: torch.dtype, tp_degree: int, max_shard_size_bytes: int | None
) -> dict[str, list[str]]:
    """File name -> published names of the tensors in it."""
    if tp_degree > 1:
        return {f"model_state.tp{tp_rank:02}.pdparams": list(cuts) for tp_rank in range(tp_degree)}
    if max_shard_size_bytes is None:
        return {STATE_FILE: list(cuts)}
    shards = plan_shards({name: TensorEntry(cut.shape, dtype) for name, cut in cuts.items()}, max_shard_size_bytes)
    count = len(shards)
    if count == 1:
        return {STATE_FILE: list(cuts)}
    return {f"model_state-{i:05}-of-{count:05}.pdparams": list(shard) for i, shard in enumerate(shards.values(), 1)}


def _variable_names(n_layer: int) -> dict[str, str]:
    """Published name -> name of the Paddle variable."""
    return {
        f"{module}.{part}": f"{kind}_{number}.{part[0]}_0"
        for kind, modules in modules_by_kind(n_layer).items()
        for number, module in enumerate(modules)
        for part in (("weight",) if kind == "embedding" else ("weight", "bias"))
    }


def _paddle_config(config: BloomConfig, dtype: torch.dtype, tp_degree: int) -> dict[str, Any]:
    """The contents of config.json; PaddleNLP leaves out a dtype of float32."""
    extra = {
        key: value for key, value in config.extra.items() if key not in (*OTHER_FILES_KEYS, "transformers_version")
    }
    if tp_degree > 1:
        extra["tensor_parallel_degree"] = tp_degree
    name = None if dtype is torch.float32 else str(dtype).removeprefix("torch.")
    return {"paddlenlp_version": None} | dataclasses.replace(config, dtype=name, extra=extra).to_dict()
