"""PaddleNLP's prefix adapters: an encoder computes E [P, 2LD], which becomes keys and values in one of several ways.

E's columns are 2L slots, first the keys of all blocks, then the values, each of H heads. Until 2023-08-09 (old layout)
the slot of a block, [P, H, K] in memory, was reshaped to keys [H, K, P] and values [H, P, K], which mixes tokens, heads
and columns; since then (new layout) it is transposed. If t tensor-parallel ranks trained the prefix, rank r took the
r-th chunk of E's columns as 2L slots of its own H/t heads. The shapes of the weights are the same in all these cases,
but the keys and values differ. pre_caches.npy does not tell the layouts apart: both were written there as the new one.

Each case only permutes the numbers of E. Arrangement (recorded.py) brings them into the order [P, L, 2, H, K] of PEFT
and of PrefixEncoder.

Shapes: P virtual tokens, L blocks, D hidden, H heads, K head_dim, t ranks, G width of the projection.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from bloomlm.adapters.prefix import PREFIX, PrefixConfig
from bloomlm.checkpoint.adapters.base_config import whole_number
from bloomlm.checkpoint.adapters.peft import PlainAdapter
from bloomlm.checkpoint.paddle.adapter_files import (
    PREFIX_CONFIG_FILE,
    PREFIX_STEM,
    AdapterFiles,
    ForeignReading,
    PrefixLayout,
    read_adapter_files,
    require_trained_degree,
)
from bloomlm.checkpoint.paddle.layout import Cut, RankTensors, join_pieces
from bloomlm.checkpoint.paddle.lazy import transposed
from bloomlm.checkpoint.paddle.recorded import Arrangement, PaddlePrefixEncoder, RecordedPrefix
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import AdapterError, CheckpointError
from bloomlm.model.config import BloomConfig

PAST_KEY_VALUES_FILE = "past_key_values.pdparams"  # written until 2023-05-29
NEW_CONFIG_KEY = "multi_query_group_num"  # written since 2023-07-19


@dataclass(frozen=True)
class PrefixParameter:
    """A parameter of PaddleNLP's encoder, which is a Sequential of an embedding and two linear layers."""

    name: str
    """Its name in PrefixEncoder."""
    variable: str
    """Name of its Paddle variable."""
    is_linear_weight: bool = False
    """Whether PaddleNLP stores it transposed, [in, out]."""


PARAMETERS = {
    "0.weight": PrefixParameter("embedding.weight", "embedding_1.w_0"),
    "1.weight": PrefixParameter("transform.0.weight", "linear_0.w_0", is_linear_weight=True),
    "1.bias": PrefixParameter("transform.0.bias", "linear_0.b_0"),
    "3.weight": PrefixParameter("transform.2.weight", "linear_1.w_0", is_linear_weight=True),
    "3.bias": PrefixParameter("transform.2.bias", "linear_1.b_0"),
}
"""Name in PaddleNLP's files -> parameter."""


@dataclass(frozen=True, kw_only=True)
class PaddlePrefix:
    """A prefix adapter's files, interpreted but not read."""

    config: PrefixConfig
    """Number of virtual tokens, and the projection that it was trained with."""
    model_config: BloomConfig
    """Configuration of its base model."""
    arrangement: Arrangement
    """How its numbers become keys and values."""
    cuts: Mapping[str, Cut]
    """PaddleNLP's parameter name -> shape as stored and cut among ranks."""
    stored: Mapping[str, LazyTensor]
    """PrefixEncoder's parameter name -> tensor in its orientation, joined from the ranks; columns in PaddleNLP's
    order."""

    stem: ClassVar[str] = PREFIX_STEM

    @property
    def recorded(self) -> RecordedPrefix:
        """The adapter in the form in which training continues."""
        return RecordedPrefix(config=self.config, arrangement=self.arrangement)

    def plain(self) -> PlainAdapter:
        """The ordinary prefix that computes the same, its tensors in PEFT's order.

        In the new layout a projection is kept, with its outputs in PEFT's order. The old layout mixes tokens, which no
        projection can reproduce, so only the keys and values are kept, computed in fp32 and rounded once.
        """
        tensors = {name: tensor.read() for name, tensor in self.stored.items()}
        if self.arrangement.layout is PrefixLayout.OLD:
            encoder = PaddlePrefixEncoder(self.config, self.model_config, self.arrangement)
            encoder.load_state_dict(tensors, assign=True)
            with torch.no_grad():
                flat = encoder.float().flat().to(tensors["embedding.weight"].dtype).clone()
            config = PrefixConfig(num_prefix_tokens=self.config.num_prefix_tokens)
            return PlainAdapter(config=config, tensors={f"{PREFIX}embedding.weight": flat})
        order = self.arrangement.columns()
        if self.config.prefix_projection:
            moved = {name: tensors[name][order] for name in ("transform.2.weight", "transform.2.bias")}
        else:
            moved = {"embedding.weight": tensors["embedding.weight"][:, order]}
        plain = tensors | moved
        return PlainAdapter(config=self.config, tensors={PREFIX + name: plain[name] for name in plain})

    def weights(self) -> dict[str, LazyTensor]:
        """The trained parameters, under their names in a model in which `recorded` is installed."""
        return {PREFIX + name: tensor for name, tensor in self.stored.items()}

    def join(self, ranks: list[RankTensors]) -> dict[str, LazyTensor]:
        """Other tensors of the trained parameters, such as AdamW's moments, joined and named like `weights`.

        Args:
            ranks: the tensors of each rank, as stored and under PaddleNLP's names.

        Raises:
            CheckpointError: the tensors do not fit the encoder's parameters.
        """
        return {PREFIX + name: tensor for name, tensor in _join(ranks, self.cuts).items()}


def read_paddle_prefix(directory: Path, model_config: BloomConfig, reading: ForeignReading) -> PaddlePrefix:
    """Interpret a prefix adapter's files; no tensor is read.

    Args:
        directory: holds prefix_config.json and prefix_model_state.pdparams or its .tp00, .tp01, ... shards.
        model_config: configuration of the base model.
        reading: may give its layout and the number of ranks that trained it, where the files do not record them.

    Raises:
        AdapterError: the files are missing or damaged, do not fit the model, or do not record the layout or the
            number of ranks.
    """
    files = read_adapter_files(directory, PREFIX_CONFIG_FILE, PREFIX_STEM, reading)
    config = _prefix_config(files, model_config)
    why = "each rank took its own part of the prefix's columns for its heads"
    tp_degree = require_trained_degree(files, why)
    if model_config.n_head % tp_degree:
        raise AdapterError(f"{directory}: {model_config.n_head} heads cannot be divided among {tp_degree} ranks")
    arrangement = Arrangement(
        layout=reading.prefix_layout or _detect_layout(files),
        tp_degree=tp_degree,
        head_shape=(model_config.n_layer, model_config.n_head, model_config.head_dim),
    )
    cuts = prefix_cuts(config, model_config)
    try:
        stored = _join([RankTensors(state.path.name, state.tensors) for state in files.states], cuts)
    except CheckpointError as error:
        raise AdapterError(f"{directory}: {error}; is it an adapter of another base model?") from error
    return PaddlePrefix(config=config, model_config=model_config, arrangement=arrangement, cuts=cuts, stored=stored)


def prefix_cuts(config: PrefixConfig, model_config: BloomConfig) -> dict[str, Cut]:
    """How PaddleNLP's ranks divide a prefix: tokens of the embedding, outputs of one linear, inputs of the other.

    Args:
        config: the prefix, with the width of its projection if it has one.
        model_config: configuration of the base model.

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
        f"{files.directory}: {PREFIX_CONFIG_FILE} has {NEW_CONFIG_KEY}, so PaddleNLP wrote it after 2023-07-19, but "
        "the files do not record whether before 2023-08-09, when the layout of prefixes changed. "
        "Give --prefix_layout new (releases 2.6 and later) or --prefix_layout old (versions before 2023-08-09)"
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
                f"{place}: its {key} is {values.get(key)!r}, and the base model has {size}; is it an "
                "adapter of another base model?"
            )
    if values.get(NEW_CONFIG_KEY) is not None:
        raise AdapterError(f"{place}: {NEW_CONFIG_KEY} is {values[NEW_CONFIG_KEY]}, which no BLOOM has; expected null")
    if values.get("prefix_dropout"):
        warnings.warn(
            f"{place}: prefix_dropout {values['prefix_dropout']} is ignored, because it applies in training only",
            stacklevel=2,
        )
    projection = bool(values.get("prefix_projection"))
    return PrefixConfig(
        num_prefix_tokens=whole_number(values, "num_prefix_tokens", place),
        prefix_projection=projection,
        prefix_projection_hidden_size=(
            whole_number(values, "prefix_projection_hidden_size", place) if projection else None
        ),
    )


def _join(ranks: list[RankTensors], cuts: Mapping[str, Cut]) -> dict[str, LazyTensor]:
    return {
        PARAMETERS[name].name: transposed(tensor) if PARAMETERS[name].is_linear_weight else tensor
        for name, tensor in join_pieces(ranks, cuts).items()
    }
