"""PaddleNLP's prefix adapters: an encoder gives E [P, 2LD], and three things decide what it means.

E's columns are 2L slots, first the keys of all blocks, then the values, each of H heads. Until 2023-08-09 (old layout)
the slot of a block, [P, H, K] in memory, was reread as keys [H, K, P] and values [H, P, K] by reshape, which mixes
tokens, heads and columns; since then (new layout) it is transposed as one would expect. And where t tensor-parallel
ranks trained, rank r took the r-th chunk of E's columns as 2L slots of its own H/t heads. The weights fit any of these,
and each gives another model; pre_caches.npy does not help, it was written in the new layout by both.

All of it only permutes the numbers of E: `arrange` does, into the order [P, L, 2, H, K] of PEFT and of PrefixEncoder.

Shapes: P virtual tokens, L blocks, D hidden, H heads, K head_dim, t ranks, G width of the projection.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.adapters.prefix import PrefixConfig, PrefixEncoder
from bloomlm.checkpoint.paddle.adapter_files import (
    PREFIX_CONFIG_FILE,
    PREFIX_STEM,
    AdapterFiles,
    read_adapter_files,
    require_trained_degree,
    whole_number,
)
from bloomlm.checkpoint.paddle.array import LazyTensor, Transposed
from bloomlm.checkpoint.paddle.names import Cut
from bloomlm.checkpoint.paddle.ranks import RankTensors, join_pieces
from bloomlm.errors import AdapterError, CheckpointError, name_some
from bloomlm.model.config import BloomConfig

PAST_KEY_VALUES_FILE = "past_key_values.pdparams"  # written until 2023-05-29
NEW_CONFIG_KEY = "multi_query_group_num"  # written since 2023-07-19
# Name in PaddleNLP's Sequential -> name in PrefixEncoder.
NAMES = {
    "0.weight": "embedding.weight",
    "1.weight": "transform.0.weight",
    "1.bias": "transform.0.bias",
    "3.weight": "transform.2.weight",
    "3.bias": "transform.2.bias",
}


class PrefixLayout(Enum):
    """How a block's slot of E becomes its keys and values."""

    OLD = "old"
    NEW = "new"


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What decides the meaning of E."""

    layout: PrefixLayout
    """Reread (old) or transposed (new)."""
    tp_degree: int
    """Ranks that trained it (t)."""
    head_shape: tuple[int, int, int]
    """L, H, K."""

    def arrange(self, encoded: Tensor) -> Tensor:
        """E [P, 2LD] as the flat prefix [P, 2LD], columns in the order (block, key or value, head, column)."""
        n_layer, n_head, head_dim = self.head_shape
        tokens, heads = encoded.shape[0], n_head // self.tp_degree
        slots = encoded.view(tokens, self.tp_degree, 2, n_layer, heads, head_dim)
        if self.layout is PrefixLayout.OLD:
            memory = slots.permute(1, 2, 3, 0, 4, 5).reshape(self.tp_degree, 2, n_layer, -1)
            keys = memory[:, 0].view(self.tp_degree, n_layer, heads, head_dim, tokens).permute(4, 1, 0, 2, 3)
            values = memory[:, 1].view(self.tp_degree, n_layer, heads, tokens, head_dim).permute(3, 1, 0, 2, 4)
            return torch.stack((keys, values), dim=2).reshape(tokens, -1)
        return slots.permute(0, 3, 2, 1, 4, 5).reshape(tokens, -1)

    def columns(self) -> Tensor:
        """New layout: for each column of the flat prefix, [2LD], the column of E that it is."""
        assert self.layout is PrefixLayout.NEW, "the old layout mixes tokens too"
        n_layer, n_head, head_dim = self.head_shape
        return self.arrange(torch.arange(2 * n_layer * n_head * head_dim).view(1, -1))[0]


@dataclass(frozen=True, kw_only=True)
class PaddlePrefix:
    """An adapter's files, understood but unread."""

    config: PrefixConfig
    """Number of virtual tokens, and the projection it was trained with."""
    arrangement: Arrangement
    """What its numbers mean."""
    cuts: Mapping[str, Cut]
    """PaddleNLP's parameter name -> shape as stored and cut among ranks."""
    stored: Mapping[str, LazyTensor]
    """PrefixEncoder's parameter name -> tensor in its orientation, joined from the ranks; columns in PaddleNLP's
    order."""

    def join(self, ranks: list[RankTensors]) -> dict[str, LazyTensor]:
        """Tensors of the encoder's parameters, such as Adam's moments, put together as `stored` is.

        Args:
            ranks: of each rank, tensors under PaddleNLP's names and as stored.

        Raises:
            CheckpointError: they do not fit the encoder's parameters.
        """
        return _join(ranks, self.cuts)

    def encoder(self, model_config: BloomConfig) -> "PaddlePrefixEncoder":
        """The encoder as it was trained, to be trained further."""
        encoder = PaddlePrefixEncoder(self.config, model_config, self.arrangement)
        encoder.load_state_dict({name: tensor.read() for name, tensor in self.stored.items()}, assign=True)
        return encoder

    def plain(self, model_config: BloomConfig) -> tuple[PrefixConfig, dict[str, Tensor]]:
        """The same prefix for a PrefixEncoder: its configuration, and its tensors in PEFT's order.

        A projection is kept in the new layout, which moves only its outputs. In the old layout, which mixes tokens,
        there is no such projection: the keys and values that it gave are all that is left (computed in fp32 and rounded
        once).
        """
        if self.arrangement.layout is PrefixLayout.OLD:
            encoder = self.encoder(model_config)
            dtype = encoder.embedding.weight.dtype
            with torch.no_grad():
                flat = encoder.float().flat().to(dtype).clone()
            return PrefixConfig(num_prefix_tokens=self.config.num_prefix_tokens), {"embedding.weight": flat}
        order = self.arrangement.columns()
        tensors = {name: tensor.read() for name, tensor in self.stored.items()}
        if not self.config.prefix_projection:
            return self.config, {"embedding.weight": tensors["embedding.weight"][:, order]}
        last = {name: tensors[name][order] for name in ("transform.2.weight", "transform.2.bias")}
        return self.config, tensors | last


class PaddlePrefixEncoder(PrefixEncoder):
    """PaddleNLP's encoder with its own order of columns, so that its optimizer state fits it."""

    def __init__(self, config: PrefixConfig, model_config: BloomConfig, arrangement: Arrangement) -> None:
        super().__init__(config, model_config)
        self.model_config = model_config
        self.arrangement = arrangement

    def flat(self) -> Tensor:
        """[P, 2 * L * D] in PEFT's order."""
        return self.arrangement.arrange(super().flat())

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[PrefixConfig, dict[str, Tensor]]:
        """What it gives, as a prefix without projection, whose columns would come in another order."""
        with torch.device("meta"):
            whole = PaddlePrefixEncoder(self.config, self.model_config, self.arrangement)
        whole.load_state_dict(dict(tensors), assign=True)
        with torch.no_grad():
            return PrefixConfig(num_prefix_tokens=self.config.num_prefix_tokens), {"embedding.weight": whole.flat()}


def read_paddle_prefix(
    directory: Path,
    model_config: BloomConfig,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> PaddlePrefix:
    """Read a prefix adapter.

    Args:
        directory: holds prefix_config.json and prefix_model_state.pdparams or its .tp00, .tp01, ... shards.
        model_config: of the base model.
        prefix_layout: None: as the files tell.
        trained_tensor_parallel_degree: ranks that trained it; None: as the files tell.

    Raises:
        AdapterError: the files are missing or damaged, do not fit the model, or leave layout or degree open.
    """
    files = read_adapter_files(directory, PREFIX_CONFIG_FILE, PREFIX_STEM, trained_tensor_parallel_degree)
    config = _prefix_config(files, model_config)
    why = "each rank took its own part of the prefix's columns for its heads"
    tp_degree = require_trained_degree(files, why)
    if model_config.n_head % tp_degree:
        raise AdapterError(f"{directory}: {model_config.n_head} heads cannot be divided among {tp_degree} ranks")
    arrangement = Arrangement(
        layout=prefix_layout or _detect_layout(files),
        tp_degree=tp_degree,
        head_shape=(model_config.n_layer, model_config.n_head, model_config.head_dim),
    )
    cuts = prefix_cuts(config, model_config)
    try:
        stored = _join([RankTensors(state.path.name, state.tensors) for state in files.states], cuts)
    except CheckpointError as error:
        raise AdapterError(f"{directory}: {error}; is it an adapter of another base model?") from error
    return PaddlePrefix(config=config, arrangement=arrangement, cuts=cuts, stored=stored)


def prefix_cuts(config: PrefixConfig, model_config: BloomConfig) -> dict[str, Cut]:
    """What PaddleNLP's ranks hold of a prefix: tokens of the embedding, outputs of one linear, inputs of the other.

    Args:
        config: of the prefix; with a projection it names its width.
        model_config: of the base model.

    Returns:
        Stored name -> stored shape and cut.
    """
    flat_size = 2 * model_config.n_layer * model_config.hidden_size
    if not config.prefix_projection:
        return {"0.weight": Cut((config.num_prefix_tokens, flat_size), 0)}
    width = config.prefix_projection_hidden_size
    assert width is not None
    return {
        "0.weight": Cut((config.num_prefix_tokens, model_config.hidden_size), 0),
        "1.weight": Cut((model_config.hidden_size, width), 1),
        "1.bias": Cut((width,), 0),
        "3.weight": Cut((width, flat_size), 0),
        "3.bias": Cut((flat_size,), None),
    }


def _detect_layout(files: AdapterFiles) -> PrefixLayout:
    if (files.directory / PAST_KEY_VALUES_FILE).is_file() or NEW_CONFIG_KEY not in files.values:
        return PrefixLayout.OLD
    raise AdapterError(
        f"{files.directory}: {PREFIX_CONFIG_FILE} has {NEW_CONFIG_KEY}, which PaddleNLP writes since 2023-07-19, and "
        "it changed how a prefix is laid out on 2023-08-09; nothing in the files tells the weeks between from later. "
        "Say --prefix_layout new (releases 2.6 and later) or --prefix_layout old (versions before 2023-08-09)"
    )


def _prefix_config(files: AdapterFiles, model_config: BloomConfig) -> PrefixConfig:
    values, place = files.values, files.directory
    expected = {
        "num_attention_heads": model_config.n_head,
        "num_hidden_layers": model_config.n_layer,
        "hidden_size": model_config.hidden_size,
    }
    for key, size in expected.items():
        if values.get(key) != size:
            raise AdapterError(
                f"{place}: its configuration says {key} {values.get(key)!r}, the base model's {size}; it is an "
                "adapter of another model"
            )
    if values.get(NEW_CONFIG_KEY) is not None:
        raise AdapterError(f"{place}: {NEW_CONFIG_KEY} {values[NEW_CONFIG_KEY]!r} is no BLOOM's; expected null")
    if values.get("prefix_dropout"):
        warnings.warn(f"{place}: prefix_dropout {values['prefix_dropout']} acted in training only", stacklevel=2)
    projection = bool(values.get("prefix_projection"))
    return PrefixConfig(
        num_prefix_tokens=whole_number(values, "num_prefix_tokens", place),
        prefix_projection=projection,
        prefix_projection_hidden_size=(
            whole_number(values, "prefix_projection_hidden_size", place) if projection else None
        ),
    )


def _join(ranks: list[RankTensors], cuts: Mapping[str, Cut]) -> dict[str, LazyTensor]:
    for rank in ranks:
        if odd := sorted(set(cuts) ^ set(rank.tensors)):
            raise CheckpointError(f"{rank.place}: expected {', '.join(cuts)}; it differs in {name_some(odd)}")
    joined = {name: join_pieces(name, cut, ranks) for name, cut in cuts.items()}
    return {
        NAMES[name]: Transposed(tensor) if name in ("1.weight", "3.weight") else tensor
        for name, tensor in joined.items()
    }
