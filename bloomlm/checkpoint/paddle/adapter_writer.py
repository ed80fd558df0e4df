"""Write adapters in PaddleNLP 2.6's files: a plain LoRA, or a prefix in the new layout; whole, or a file for each rank.

Source: the files that PaddleNLP 2.6 wrote, and the configuration keys of its LoRAConfig and PrefixConfig.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.adapters.base import Adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PREFIX, PrefixConfig, PrefixEncoder
from bloomlm.checkpoint.adapters.peft import PlainAdapter
from bloomlm.checkpoint.paddle.adapter_files import (
    LORA_CONFIG_FILE,
    LORA_STEM,
    PREFIX_CONFIG_FILE,
    PREFIX_STEM,
    PrefixLayout,
)
from bloomlm.checkpoint.paddle.layout import LINEARS, MODEL_PREFIX, is_linear_weight, model_cuts, stored_name
from bloomlm.checkpoint.paddle.lora import PARTS, lora_cuts
from bloomlm.checkpoint.paddle.prefix import PARAMETERS, prefix_cuts
from bloomlm.checkpoint.paddle.recorded import Arrangement, Blocks
from bloomlm.checkpoint.paddle.state import PaddleStateWriter
from bloomlm.checkpoint.writer import write_json
from bloomlm.errors import AdapterError, CheckpointError, ConfigError, name_some
from bloomlm.model.config import BloomConfig

PRE_CACHES_FILE = "pre_caches.npy"


@dataclass(frozen=True)
class _Stored:
    """A tensor as PaddleNLP stores it."""

    tensor: Tensor
    dim: int | None
    """Dimension that the ranks divide; None: each rank holds the whole tensor."""
    variable: str
    """Name of its Paddle variable."""


def write_paddle_adapter(
    directory: Path, adapter: PlainAdapter, model_config: BloomConfig, *, tensor_parallel_degree: int = 1
) -> None:
    """Write an adapter into an existing directory; use atomic_directory around it.

    Args:
        directory: the directory to write into.
        adapter: a LoRA or a prefix.
        model_config: configuration of its base model.
        tensor_parallel_degree: number of ranks on which PaddleNLP will run it; 1: one file for one device.

    Raises:
        AdapterError: PaddleNLP 2.6 has no such adapter.
        ConfigError: the adapter cannot be divided among so many ranks.
        CheckpointError: the files cannot be written.
    """
    try:
        write = _WRITERS.get(type(adapter.config))
        if write is None:
            raise AdapterError(f"PaddleNLP 2.6 has no {adapter.config.kind}; write PEFT's files (--to hf)")
        write(directory, adapter.config, adapter.tensors, model_config, tensor_parallel_degree)
    except OSError as error:
        raise CheckpointError(f"the adapter cannot be written to {directory}: {error}") from error


def _write_lora(
    directory: Path, config: LoraConfig, tensors: Mapping[str, Tensor], model_config: BloomConfig, tp_degree: int
) -> None:
    if config.trained_tokens:
        raise AdapterError(
            f"PaddleNLP 2.6's files cannot hold {len(config.trained_tokens)} trained rows of an embedding; merge the "
            "adapter into its base model and convert that, or write PEFT's files (--to hf)"
        )
    modules = [name.removesuffix(PARTS[0]) for name in tensors if name.endswith(PARTS[0])]
    lora_rank, lora_alpha = _rank_and_alpha(config, modules)
    cuts = lora_cuts(
        list(tensors),
        {module: Blocks(slots=(True,), groups=1) for module in modules},
        lora_rank,
        model_cuts(model_config),
    )
    stored: dict[str, _Stored] = {}
    for name, tensor in tensors.items():
        dim = cuts[name].dim
        if name.endswith(PARTS):
            tensor = tensor.t()
        elif is_linear_weight(name):
            tensor, dim = tensor.t(), None if dim is None else 1 - dim
        stored[stored_name(name)] = _Stored(tensor, dim, _lora_variable(name, modules))
    biases = [name for name in config.replaced_names if name.endswith(".bias")]
    others = [name for name in config.replaced_names if not name.endswith(".bias")]
    values = {
        "dtype": _dtype_name(tensors[f"{modules[0]}{PARTS[0]}"]),
        "enable_lora_list": None,
        "head_dim": None,
        "lora_alpha": lora_alpha,
        "lora_dropout": config.lora_dropout,
        "merge_weights": False,
        "r": lora_rank,
        "target_modules": [f".*{linear}" for linear in LINEARS if any(module.endswith(linear) for module in modules)],
        "tensor_parallel_degree": tp_degree if tp_degree > 1 else -1,
        "trainable_bias": _trainable_bias(biases, modules),
        "trainable_modules": [re.escape(stored_name(name)) for name in others] or None,
    }
    write_json(directory / LORA_CONFIG_FILE, values)
    _write_states(directory, LORA_STEM, stored, tp_degree)


def _rank_and_alpha(config: LoraConfig, modules: list[str]) -> tuple[int, float]:
    """The r and lora_alpha that all modules share; PaddleNLP 2.6 has one of each and scales by lora_alpha / r."""
    kinds = {(config.rank_of(module), config.scaling_of(module)): module for module in modules}
    if len(kinds) != 1:
        raise AdapterError(
            f"PaddleNLP 2.6 gives all layers one rank and one lora_alpha; this LoRA has {len(kinds)} pairs of "
            f"them, first in {name_some(kinds.values())}. Write PEFT's files (--to hf), or merge it into its base model"
        )
    lora_rank, scaling = next(iter(kinds))
    alpha = scaling * lora_rank
    return lora_rank, round(alpha) if round(alpha) / lora_rank == scaling else alpha


def _lora_variable(name: str, modules: list[str]) -> str:
    module, _, part = name.rpartition(".")
    if part.startswith("lora_"):
        return f"lo_ra_linear_{modules.index(module)}.w_{1 + PARTS.index(f'.{part}')}"
    return f"{module.removeprefix(MODEL_PREFIX).replace('.', '_')}_0.{part[0]}_0"


def _trainable_bias(biases: list[str], modules: list[str]) -> str | None:
    """The value for the trained biases: "lora" if only layers with an update have any, otherwise "all"."""
    if not biases:
        return None
    return "lora" if all(name.removesuffix(".bias") in modules for name in biases) else "all"


def _write_prefix(
    directory: Path, config: PrefixConfig, tensors: Mapping[str, Tensor], model_config: BloomConfig, tp_degree: int
) -> None:
    if model_config.n_head % tp_degree:
        raise ConfigError(f"{model_config.n_head} heads cannot be divided among {tp_degree} tensor-parallel ranks")
    head_shape = (model_config.n_layer, model_config.n_head, model_config.head_dim)
    arrangement = Arrangement(layout=PrefixLayout.NEW, tp_degree=tp_degree, head_shape=head_shape)
    # position in the flat prefix of each of PaddleNLP's columns
    places = arrangement.columns().argsort()
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    own = dict(tensors)
    if config.prefix_projection:
        own |= {name: tensors[name][places] for name in ("transform.2.weight", "transform.2.bias")}
        cuts = prefix_cuts(_with_width(config, model_config), model_config)
    else:
        own["embedding.weight"] = tensors["embedding.weight"][:, places]
        cuts = prefix_cuts(config, model_config)
    stored: dict[str, _Stored] = {}
    for name, cut in cuts.items():
        parameter = PARAMETERS[name]
        tensor = own[parameter.name]
        stored[name] = _Stored(tensor.t() if parameter.is_linear_weight else tensor, cut.dim, parameter.variable)
    values = {
        "dtype": _dtype_name(tensors["embedding.weight"]),
        "hidden_size": model_config.hidden_size,
        "multi_query_group_num": None,
        "num_attention_heads": model_config.n_head,
        "num_hidden_layers": model_config.n_layer,
        "num_prefix_tokens": config.num_prefix_tokens,
        "prefix_dropout": 0.0,
        "prefix_projection": config.prefix_projection,
        "prefix_projection_hidden_size": config.prefix_projection_hidden_size or model_config.hidden_size,
        "tensor_parallel_degree": tp_degree if tp_degree > 1 else -1,
    }
    write_json(directory / PREFIX_CONFIG_FILE, values)
    _write_states(directory, PREFIX_STEM, stored, tp_degree)
    if tp_degree == 1:
        _write_pre_caches(directory / PRE_CACHES_FILE, config, tensors, model_config)


def _with_width(config: PrefixConfig, model_config: BloomConfig) -> PrefixConfig:
    return PrefixConfig(
        num_prefix_tokens=config.num_prefix_tokens,
        prefix_projection=True,
        prefix_projection_hidden_size=config.prefix_projection_hidden_size or model_config.hidden_size,
    )


def _write_pre_caches(
    path: Path, config: PrefixConfig, tensors: Mapping[str, Tensor], model_config: BloomConfig
) -> None:
    """Write the keys and values [L, 2, H, P, K] for PaddleNLP's predictor."""
    with torch.device("meta"):
        encoder = PrefixEncoder(config, model_config)
    encoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    with torch.no_grad():
        caches = encoder.flat().unflatten(1, encoder.head_shape).permute(1, 2, 3, 0, 4)
        caches = caches.to(tensors["embedding.weight"].dtype).contiguous()
    if caches.dtype is torch.bfloat16:  # numpy has no bfloat16; Paddle stores its bits as uint16
        np.save(path, caches.view(torch.int16).numpy().view(np.uint16))
    else:
        np.save(path, caches.detach().numpy())


def _write_states(directory: Path, stem: str, stored: Mapping[str, _Stored], tp_degree: int) -> None:
    for name, entry in stored.items():
        if entry.dim is not None and entry.tensor.shape[entry.dim] % tp_degree:
            raise ConfigError(
                f"{name} of shape {list(entry.tensor.shape)} cannot be divided among {tp_degree} tensor-parallel "
                "ranks; choose another tensor_parallel_degree"
            )
    for tp_rank in range(tp_degree):
        file_name = f"{stem}.pdparams" if tp_degree == 1 else f"{stem}.tp{tp_rank:02}.pdparams"
        with (directory / file_name).open("xb") as file:
            writer = PaddleStateWriter(file)
            for name, entry in stored.items():
                piece = entry.tensor
                if entry.dim is not None:
                    length = piece.shape[entry.dim] // tp_degree
                    piece = piece.narrow(entry.dim, tp_rank * length, length)
                writer.write(name, piece, piece.dtype)
            writer.finish({name: entry.variable for name, entry in stored.items()})


_WRITERS: dict[type[Adapter], Callable[[Path, Any, Mapping[str, Tensor], BloomConfig, int], None]] = {
    LoraConfig: _write_lora,
    PrefixConfig: _write_prefix,
}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
