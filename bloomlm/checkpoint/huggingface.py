"""Hugging Face checkpoints: safetensors or pytorch_model.bin, whole or in shards, under BLOOM's published names.

Some files lack the prefix "transformer." (they hold the bare model), some hold the tied head as a second copy, and some
of 2022 hold the attention mask as a buffer.
"""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.safetensors_file import SafetensorsFile
from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.errors import CheckpointError, first_line, name_some
from bloomlm.files.json_text import read_json
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import Bounds

MODEL_PREFIX = "transformer."
EMBEDDING = "transformer.word_embeddings.weight"
HEAD = "lm_head.weight"
# Buffers of the first releases of BLOOM in transformers and Megatron; every model builds its own.
BUFFERS = re.compile(r"\.self_attention\.(scale_mask_softmax\.causal_mask|masked_bias)$")
HEAD_ROWS_COMPARED = 16_384


class TorchFile:
    """One pytorch_model.bin, unpickled with weights_only and mapped; files older than torch 1.6 are read whole."""

    def __init__(self, path: Path) -> None:
        """Unpickle the names; the tensors' bytes stay in the file.

        Raises:
            CheckpointError: the file is damaged, or holds anything but tensors.
        """
        self._tensors = _torch_load(path)
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, mapped privately."""
        return self._tensors[name]


TensorFile = SafetensorsFile | TorchFile
"""One file of named tensors."""


class HuggingFaceReader:
    """The parameters of a checkpoint's files, under their published names."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        """Join the files of one checkpoint.

        Raises:
            CheckpointError: two tensors have one name, or the head is not the embedding.
        """
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}
        head: tuple[TensorFile, str] | None = None
        for file in files:
            for stored_name, entry in file.entries.items():
                if stored_name == HEAD:
                    head = (file, stored_name)
                    continue
                if BUFFERS.search(stored_name):
                    continue
                name = MODEL_PREFIX + stored_name.removeprefix(MODEL_PREFIX)
                if name in self.entries:
                    raise CheckpointError(f"the checkpoint's files hold {name} twice; expected it once")
                self.entries[name] = entry
                self._places[name] = (file, stored_name)
        if head is not None:
            self._check_head(*head)

    def read(self, name: str) -> Tensor:
        """One parameter."""
        file, stored_name = self._places[name]
        return file.read(stored_name)

    def open(self, name: str) -> Tensor:
        """One parameter, mapped from its file."""
        return self.read(name)

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a parameter within bounds of every dimension; other bytes of a safetensors file are not read."""
        file, stored_name = self._places[name]
        if isinstance(file, SafetensorsFile):
            return file.read_box(stored_name, bounds)
        return file.read(stored_name)[tuple(slice(*pair) for pair in bounds)]

    def _check_head(self, file: TensorFile, stored_name: str) -> None:
        """Ignore a head that equals the embedding; refuse another one."""
        if EMBEDDING not in self.entries:
            return  # check_entries reports it as missing
        head, embedding = file.read(stored_name), self.read(EMBEDDING)
        problem = ""
        if head.shape != embedding.shape:
            problem = f"has shape {tuple(head.shape)}, the embedding {tuple(embedding.shape)}"
        elif head.data_ptr() != embedding.data_ptr():
            pieces = zip(head.split(HEAD_ROWS_COMPARED), embedding.split(HEAD_ROWS_COMPARED), strict=True)
            if not all(torch.equal(a.float(), b.float()) for a, b in pieces):
                problem = "holds other values than the embedding"
        if problem:
            raise CheckpointError(
                f"{HEAD} {problem}: this head is not tied to {EMBEDDING}, as BLOOM's is; bloomlm supports no other"
            )


def find_safetensors(directory: Path) -> bool:
    """Whether a directory holds a safetensors checkpoint that PyTorch's BLOOM wrote."""
    return any((directory / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json"))


def open_safetensors(directory: Path, config: BloomConfig) -> HuggingFaceReader:
    """Open model.safetensors, or the shards that its index names."""
    return HuggingFaceReader([SafetensorsFile(path) for path in checkpoint_files(directory, "model.safetensors")])


def find_torch(directory: Path) -> bool:
    """Whether a directory holds a pytorch_model.bin checkpoint."""
    return any((directory / name).is_file() for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))


def open_torch(directory: Path, config: BloomConfig) -> HuggingFaceReader:
    """Open pytorch_model.bin, or the shards that its index names."""
    return HuggingFaceReader([TorchFile(path) for path in checkpoint_files(directory, "pytorch_model.bin")])


def checkpoint_files(directory: Path, single_name: str) -> list[Path]:
    """The single file if it exists, as in transformers, otherwise the shards of the index."""
    if (directory / single_name).is_file():
        return [directory / single_name]
    index = directory / f"{single_name}.index.json"
    try:
        weight_map = read_json(index)["weight_map"]
        shards = sorted(set(weight_map.values()))
        if any(Path(shard).name != shard for shard in shards):
            raise ValueError("its weight_map names files outside its directory")
        missing = [shard for shard in shards if not (directory / shard).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards, with a weight_map of names to files: {error!r}"
        ) from error
    if missing:
        raise CheckpointError(
            f"{directory}: {index.name} names {len(shards)} shards, and these are missing: {name_some(missing)}; "
            "fetch them again"
        )
    return [directory / shard for shard in shards]


def _torch_load(path: Path) -> dict[str, Tensor]:
    _check_archive(path)
    try:
        try:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used with files saved with" not in str(error):
                raise
            values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds Python objects besides tensors, which bloomlm does not run: "
            f"{first_line(error)}"
        ) from error
    except Exception as error:  # damaged files raise errors of every kind
        raise CheckpointError(
            f"{path} cannot be read, it is cut short or damaged: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(values, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    ):
        raise CheckpointError(f"{path} does not hold a state dict: expected a mapping of names to tensors")
    _check_bytes(path, values)
    return values


def _check_archive(path: Path) -> None:
    """Refuse an archive with compressed entries, which torch never writes: a small one may unpack to any size."""
    try:
        if not zipfile.is_zipfile(path):
            return  # of before torch 1.6
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: it is no whole archive: {first_line(error)}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} holds compressed entries, which torch.save does not write; save it again")


def _check_bytes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that repeat the few bytes of a file until they fill the memory, by strides of 0 for example."""
    found = sum(tensor.nbytes for name, tensor in tensors.items() if not BUFFERS.search(name))
    size = path.stat().st_size
    if found > 2 * size:  # twice, because embedding and head may be the same bytes
        raise CheckpointError(
            f"{path} has {size} bytes, and its tensors would take {found}: it is damaged, or holds tensors that share "
            "memory; save contiguous ones"
        )
