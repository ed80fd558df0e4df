"""The weights file of an exported program: each matrix in one of the formats of weight_formats.py, and all in one file.

Every tensor is stacked over the blocks, so that a program has some twenty inputs and not hundreds. The file is written
one matrix at a time: the weights of a model that load_model has mapped are copied from file to file, and memory holds
one matrix in fp32 and its encoded form.

Shapes: L blocks, H heads, K head_dim, P virtual tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bloomlm.checkpoint.merge import merged_parameters
from bloomlm.checkpoint.safetensors_file import build_header, num_bytes, raw_bytes
from bloomlm.checkpoint.tensor_reader import TensorEntry
from bloomlm.errors import CheckpointError
from bloomlm.export.weight_formats import WeightFormat
from bloomlm.model.alibi import head_slopes
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime.manifest import VIRTUAL

EMBEDDING = "word_embeddings"
FREQUENT = "frequent_tokens"
"""Tokens whose rows of the embedding are looked up with more bits: what rounding took from them, rounded again."""
FREQUENT_PLACES = f"{FREQUENT}.places"
"""[V] the place of each token among the frequent ones; -1 elsewhere."""
SLOPES = "head_slopes"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTER_NORMS = ("word_embeddings_layernorm", "ln_f")


def weight_entries(
    config: BloomConfig, weights: WeightFormat, num_virtual: int, num_frequent: int = 0
) -> dict[str, TensorEntry]:
    """Name -> shape and dtype of every tensor in the file, in its order.

    Args:
        config: the model's shape.
        weights: how matrices are stored.
        num_virtual: tokens of a prefix adapter.
        num_frequent: tokens of FREQUENT.
    """
    hidden, layers, fp32 = config.hidden_size, config.n_layer, torch.float32
    linears = {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (config.ffn_size, hidden),
        "dense_4h_to_h": (hidden, config.ffn_size),
    }
    entries = {f"{EMBEDDING}.{suffix}": entry for suffix, entry in weights.entries(config.vocab_size, hidden).items()}
    for name, (num_out, num_in) in linears.items():
        for suffix, entry in weights.entries(num_out, num_in).items():
            entries[f"{name}.{suffix}"] = TensorEntry((layers, *entry.shape), entry.dtype)
        entries[f"{name}.bias"] = TensorEntry((layers, num_out), fp32)
    for kind in ("weight", "bias"):
        entries.update({f"{name}.{kind}": TensorEntry((layers, hidden), fp32) for name in _NORMS})
        entries.update({f"{name}.{kind}": TensorEntry((hidden,), fp32) for name in _OUTER_NORMS})
    entries[SLOPES] = TensorEntry((config.n_head,), fp32)
    if num_frequent:
        entries[FREQUENT_PLACES] = TensorEntry((config.vocab_size,), torch.int16)
        rows = weights.entries(num_frequent, hidden)
        entries.update({f"{FREQUENT}.{suffix}": entry for suffix, entry in rows.items()})
    if num_virtual:
        entries[VIRTUAL] = TensorEntry((layers, 2, config.n_head, num_virtual, config.head_dim), fp32)
    # wide dtypes first, so that every tensor is aligned to its own element size
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))


def write_weights(
    path: Path, model: BloomForCausalLM, entries: Mapping[str, TensorEntry], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the file.

    Args:
        path: a new file.
        model: the model, of which a prefix's keys and values are stored.
        entries: the result of weight_entries for the model.
        tensors: what named_tensors gives.

    Raises:
        CheckpointError: a weight cannot be stored in this format, or the file cannot be written.
    """
    header, starts = build_header(entries, {"format": "pt"})
    try:
        with path.open("xb") as file:
            file.write(header)
            virtual = virtual_tokens(model)
            if virtual is not None:
                _write_at(file, starts[VIRTUAL], virtual)
            for name, tensor in tensors:
                name, _, layer = name.partition("@")
                start = starts[name] + (int(layer) * num_bytes(entries[name]) // model.config.n_layer if layer else 0)
                _write_at(file, start, tensor.to(entries[name].dtype))
            file.truncate(max(starts[name] + num_bytes(entry) for name, entry in entries.items()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def virtual_tokens(model: BloomForCausalLM) -> Tensor | None:
    """Keys and values [L, 2, H, P, K] in fp32 that a prefix adapter puts before every prompt; None without one."""
    prefix = model.transformer.prefix
    if prefix is None:
        return None
    with torch.no_grad():
        return torch.stack([torch.stack(block) for block in prefix()]).float()


def named_tensors(
    model: BloomForCausalLM, weights: WeightFormat, on_parameter: Callable[[], None] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a program except virtual tokens, named NAME or NAME@BLOCK, blocks in order."""
    yield SLOPES, torch.tensor(head_slopes(model.config.n_head))
    for name, parameter in merged_parameters(model, torch.float32):
        if parameter.dim() == 1:
            yield stored_name(name), parameter
        else:
            for suffix, part in weights.encode(parameter.detach(), name).items():
                yield stored_name(name, suffix), part
        if on_parameter is not None:
            on_parameter()


def layer_of(name: str) -> int | None:
    """The block that a parameter belongs to; None outside of the blocks."""
    return int(name.split(".")[2]) if name.startswith("transformer.h.") else None


def stored_name(name: str, suffix: str | None = None) -> str:
    """The name, as named_tensors gives it, of a parameter, or of one of the tensors that encode it."""
    *_, module, kind = name.split(".")
    layer = layer_of(name)
    return f"{module}.{suffix or kind}" + ("" if layer is None else f"@{layer}")


def _write_at(file: BinaryIO, start: int, tensor: Tensor) -> None:
    file.seek(start)
    file.write(raw_bytes(tensor))
