"""Read a model in each form that PaddleNLP wrote for BLOOM, as a TensorReader; Paddle is not needed.

The forms, by priority where a directory holds several: model_state.pdparams or its shards with an index;
model.safetensors in PaddleNLP's layout or its shards; the shards of tensor-parallel ranks, today's
(model_state.tp00.pdparams) and those of before April 2023 (splits_mp_00_sharding_00/model_state_mp_00.pdparams);
auto_dist0.pdparams; an exported program's .pdiparams.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.huggingface import checkpoint_files, find_safetensors, find_torch
from bloomlm.checkpoint.paddle.layout import (
    PADDLE_PREFIX,
    RankTensors,
    check_ranks_complete,
    join_ranks,
    published_tensors,
)
from bloomlm.checkpoint.paddle.lazy import StoredFile, stored_array
from bloomlm.checkpoint.paddle.program import read_program_weights
from bloomlm.checkpoint.paddle.state import read_paddle_state
from bloomlm.checkpoint.safetensors_file import DTYPES, read_header
from bloomlm.checkpoint.tensor_reader import LazyTensor, Rows, TensorEntry
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.model.config import PUBLISHED_SIZES, BloomConfig
from bloomlm.parallel.layout import Bounds

STATE_FILE = "model_state.pdparams"
SAFETENSORS_FILE = "model.safetensors"
TENSOR_PARALLEL_FILE = re.compile(r"model_state\.tp(\d+)\.pdparams")
SPLIT_FILE = re.compile(r"splits_mp_(\d+)_sharding_(\d+)/model_state_mp_(\d+)\.pdparams")
PADDLE_DTYPES = DTYPES | {"U16": torch.bfloat16}  # numpy, through which PaddleNLP writes, has no bfloat16
AUTO_DIST_FILE = re.compile(r"auto_dist(\d+)\.pdparams")


@dataclass(frozen=True)
class _Form:
    """One of the forms of a checkpoint, as found in a directory."""

    name: str
    files: Mapping[int, list[Path]]
    """Tensor-parallel rank -> its files; whole models are rank 0's."""
    is_cut: bool = False
    """Whether each rank has a part of the tensors."""


class PaddleReader:
    """The parameters of a PaddleNLP checkpoint under their published names, in the published orientation."""

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Make a reader from published names and their tensors, which are not read."""
        self.tensors = tensors
        """Published name -> tensor, unread."""
        self.entries: Mapping[str, TensorEntry] = {
            name: TensorEntry(tensor.shape, tensor.dtype) for name, tensor in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        """One parameter, copied from its files; a linear's weight is a transposed view of the copy."""
        return self.tensors[name].read()

    def open(self, name: str) -> Tensor | Rows:
        """One parameter, as Rows if its rows are contiguous in its files."""
        tensor = self.tensors[name]
        if not tensor.has_rows_together:
            return tensor.read()
        return Rows(tensor.shape, tensor.dtype, partial(tensor.read_slice, 0))

    def read_box(self, name: str, bounds: Bounds) -> Tensor:
        """The part of a parameter within bounds; if they cut two dimensions, all of one dimension is read."""
        tensor = self.tensors[name]
        cut = [dim for dim, (start, stop) in enumerate(bounds) if stop - start < tensor.shape[dim]]
        if not cut:
            return tensor.read()
        first, *others = sorted(cut, key=lambda dim: (bounds[dim][1] - bounds[dim][0]) / tensor.shape[dim])
        box = tensor.read_slice(first, *bounds[first])
        for dim in others:
            box = box.narrow(dim, bounds[dim][0], bounds[dim][1] - bounds[dim][0])
        return box


def find_model(directory: Path) -> bool:
    """Whether a directory holds a model in one of PaddleNLP's forms, and not in Hugging Face's, which wins."""
    forms = _find_forms(directory)
    if not forms:
        return False
    safetensors = find_safetensors(directory) and not any(form.name == SAFETENSORS_FILE for form in forms)
    if safetensors or find_torch(directory):
        warnings.warn(
            f"{directory} holds the model in Hugging Face's files too; those are read, and {forms[0].name} is not",
            stacklevel=2,
        )
        return False
    return True


def open_model(directory: Path, config: BloomConfig) -> PaddleReader:
    """Open a checkpoint; no tensor is read.

    Args:
        directory: the checkpoint.
        config: its configuration.

    Raises:
        CheckpointError: there is no checkpoint, files are missing or damaged, or the ranks do not fit together.
    """
    forms = _find_forms(directory)
    if not forms:
        raise CheckpointError(
            f"{directory} holds no model in any of PaddleNLP's forms; expected {STATE_FILE} or shards"
        )
    form = forms[0]
    if len(forms) > 1:
        warnings.warn(
            f"{directory} holds the model in {len(forms)} forms; {form.name} is read, and "
            f"{name_some(other.name for other in forms[1:])} is not",
            stacklevel=2,
        )
    if not form.is_cut:
        return PaddleReader(_open_rank(form.files[0], str(directory)).tensors)
    degree = config.extra.get("tensor_parallel_degree")
    degree = degree if isinstance(degree, int) and degree > 1 else None
    check_ranks_complete(sorted(form.files), str(directory), degree)
    ranks = [_open_rank(form.files[tp_rank], str(form.files[tp_rank][0])) for tp_rank in sorted(form.files)]
    return PaddleReader(join_ranks(ranks, config, str(directory)))


def exported_config(directory: Path) -> BloomConfig | None:
    """The configuration of an exported program, beside which PaddleNLP wrote no config.json.

    Args:
        directory: holds a .pdiparams file and its .info; otherwise None is returned.

    Raises:
        CheckpointError: the export is damaged.
        ConfigError: the model has none of the published sizes, so its number of heads is unknown.
    """
    if next(directory.glob("*.pdiparams"), None) is None:
        return None
    tensors = open_model(directory, PUBLISHED_SIZES["560m"]).entries
    embedding = tensors.get("transformer.word_embeddings.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{directory}: the exported program holds no word embedding; is it a BLOOM's?")
    vocab_size, hidden_size = embedding.shape
    n_layer = sum(name.endswith(".input_layernorm.weight") for name in tensors)
    for published in PUBLISHED_SIZES.values():
        if (published.hidden_size, published.n_layer) == (hidden_size, n_layer):
            return BloomConfig(vocab_size=vocab_size, hidden_size=hidden_size, n_layer=n_layer, n_head=published.n_head)
    raise ConfigError(
        f"{directory} has no config.json, and its export (hidden_size {hidden_size}, n_layer {n_layer}) is of no "
        "published size, so the number of heads is unknown; copy the config.json of the exported model there"
    )


def _find_forms(directory: Path) -> list[_Form]:
    """Every form in a directory, by priority."""
    forms = []
    if _has_checkpoint(directory, STATE_FILE):
        forms.append(_Form(STATE_FILE, {0: checkpoint_files(directory, STATE_FILE)}))
    if _has_checkpoint(directory, SAFETENSORS_FILE):
        files = checkpoint_files(directory, SAFETENSORS_FILE)
        if _is_paddle_safetensors(files[0]):
            forms.append(_Form(SAFETENSORS_FILE, {0: files}))
    for pattern, glob in (
        (TENSOR_PARALLEL_FILE, "model_state.tp*.pdparams"),
        (SPLIT_FILE, "splits_mp_*/model_state_mp_*.pdparams"),
        (AUTO_DIST_FILE, "auto_dist*.pdparams"),
    ):
        if files_by_rank := _rank_files(directory, pattern, glob):
            forms.append(_Form(glob, files_by_rank, is_cut=True))
    if programs := sorted(directory.glob("*.pdiparams")):
        if len(programs) > 1:
            raise CheckpointError(f"{directory} holds {len(programs)} exported programs; keep one of them there")
        forms.append(_Form(programs[0].name, {0: programs}))
    return forms


def _has_checkpoint(directory: Path, name: str) -> bool:
    return (directory / name).is_file() or (directory / f"{name}.index.json").is_file()


def _rank_files(directory: Path, pattern: re.Pattern[str], glob: str) -> dict[int, list[Path]]:
    """Rank -> its file, from the first sharding group if there are several, which hold the same weights."""
    files: dict[int, list[Path]] = {}
    for path in sorted(directory.glob(glob)):
        if match := pattern.fullmatch(str(path.relative_to(directory))):
            files.setdefault(int(match[1]), [path])
    return files


def _is_paddle_safetensors(path: Path) -> bool:
    """Whether PaddleNLP wrote a safetensors file; False for a damaged one, which the other reader reports."""
    try:
        header = read_header(path, PADDLE_DTYPES)
    except CheckpointError:
        return False
    return header.metadata.get("format") in ("np", "pd") or any(n.startswith(PADDLE_PREFIX) for n in header.entries)


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    header, file = read_header(path, PADDLE_DTYPES), StoredFile(path)
    return {
        name: stored_array(file, header.offsets[name], entry.shape, entry.dtype)
        for name, entry in header.entries.items()
    }


_OPENERS: Mapping[str, Callable[[Path], Mapping[str, LazyTensor]]] = {
    ".pdparams": lambda path: read_paddle_state(path).tensors,
    ".safetensors": _open_safetensors,
    ".pdiparams": read_program_weights,
}


def _open_rank(files: list[Path], source: str) -> RankTensors:
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        opened = _OPENERS[path.suffix](path)
        if twice := sorted(tensors.keys() & opened.keys()):
            raise CheckpointError(f"{source}: {name_some(twice)} is in two of its files; expected each tensor once")
        tensors |= opened
    return RankTensors(source, published_tensors(tensors, source))
