"""PaddleNLP's LoRA adapters of three eras, each read as the plain LoRA that computes the same.

| era | its configuration has | what is added to the weight [in, out] of a layer |
|---|---|---|
| A, to 2023-06-13 | enable_lora_list, no head_dim | A_j @ B_j in the j-th third of each rank's columns |
| M, to 2023-06-27 | enable_lora_list and head_dim | A_j @ B_j in the j-th third of each head's columns |
| B and later | enable_lora_list null | A @ B |

The thirds of era A are not BLOOM's queries, keys and values, whose columns are ordered by head; but they were trained
this way and are read this way. k enabled slots make a plain LoRA of rank k * r whose lora_B is zero outside the blocks:
y += scaling * x (A_1 ... A_k) blocks(B_1 ... B_k), with the scaling lora_alpha / r of the adapter.

Shapes: R lora rank of the plain LoRA, r lora rank of the adapter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.patterns import check_pattern
from bloomlm.checkpoint.adapters.base_config import whole_number
from bloomlm.checkpoint.adapters.peft import PlainAdapter
from bloomlm.checkpoint.paddle.adapter_files import (
    LORA_CONFIG_FILE,
    LORA_STEM,
    AdapterFiles,
    ForeignReading,
    read_adapter_files,
    require_trained_degree,
)
from bloomlm.checkpoint.paddle.layout import (
    Cut,
    RankTensors,
    join_pieces,
    model_cuts,
    published_name,
    published_tensors,
)
from bloomlm.checkpoint.paddle.lazy import held
from bloomlm.checkpoint.paddle.recorded import Blocks, RecordedLora
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import AdapterError, CheckpointError, ConfigError, name_some
from bloomlm.model.config import BloomConfig

PARTS = (".lora_A", ".lora_B")


@dataclass(frozen=True, kw_only=True)
class PaddleLora:
    """A LoRA adapter's files, interpreted but not read."""

    config: LoraConfig
    """Configuration of the plain LoRA; every module of its target_modules gets an update, which may be zero."""
    blocks: Mapping[str, Blocks]
    """Published module name -> its blocks."""
    cuts: Mapping[str, Cut]
    """Parameter name -> shape as stored and cut among ranks: lora_A [in, k * r], lora_B [r, out * k / parts]; a
    parameter of the model that the adapter replaces (a trained bias) as published."""
    stored: Mapping[str, LazyTensor]
    """Parameter name -> tensor in the shape of its cut, joined from the ranks."""

    stem: ClassVar[str] = LORA_STEM

    @property
    def recorded(self) -> RecordedLora:
        """The adapter in the form in which training continues."""
        return RecordedLora(config=self.config, blocks=self.blocks)

    def plain(self) -> PlainAdapter:
        """The ordinary LoRA that computes the same."""
        return PlainAdapter(config=self.config, tensors=self._plain_tensors(self.stored))

    def weights(self) -> dict[str, LazyTensor]:
        """The trained parameters, under their names in a model with the plain LoRA."""
        return {name: held(tensor) for name, tensor in self._plain_tensors(self.stored).items()}

    def join(self, ranks: list[RankTensors]) -> dict[str, LazyTensor]:
        """Other tensors of the trained parameters, such as AdamW's moments, joined and named like `weights`.

        Args:
            ranks: the tensors of each rank, as stored and under PaddleNLP's names.

        Raises:
            CheckpointError: the tensors do not fit the adapter's parameters.
        """
        stored = join_pieces([_renamed(rank) for rank in ranks], self.cuts)
        return {name: held(tensor) for name, tensor in self._plain_tensors(stored).items()}

    def _plain_tensors(self, stored: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor of the plain LoRA: lora_A [R, in], lora_B [out, R], replaced parameters."""
        plain: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            if name.endswith(".lora_A"):
                plain[name] = tensor.read().t().contiguous()
            elif name.endswith(".lora_B"):
                plain[name] = self.blocks[name.removesuffix(".lora_B")].place(tensor.read())
            else:
                plain[name] = tensor.read()
        return plain


def read_paddle_lora(directory: Path, model_config: BloomConfig, reading: ForeignReading) -> PaddleLora:
    """Interpret a LoRA adapter's files; no tensor is read.

    Args:
        directory: holds lora_config.json and lora_model_state.pdparams or its .tp00, .tp01, ... shards.
        model_config: configuration of the base model.
        reading: may give the number of ranks that trained it, which era A needs and merged files do not record.

    Raises:
        AdapterError: the files are missing or damaged, do not fit the model, or lack the number of ranks.
    """
    files = read_adapter_files(directory, LORA_CONFIG_FILE, LORA_STEM, reading)
    refuse_unknown_variants(files.values, directory)
    lora_rank = whole_number(files.values, "r", directory)
    cuts = model_cuts(model_config)
    blocks: dict[str, Blocks] = {}
    for module in _modules(files):
        name = published_name(module)
        if f"{name}.bias" not in cuts or "norm" in name:
            raise AdapterError(f"{directory}: it updates {module}, which is not a linear layer of the base model")
        blocks[name] = _blocks(files, _slots(files.values, module, directory), cuts[f"{name}.weight"].shape[0])
    try:
        ranks = [_renamed(RankTensors(state.path.name, state.tensors)) for state in files.states]
        own_cuts = lora_cuts(list(ranks[0].tensors), blocks, lora_rank, cuts)
        stored = join_pieces(ranks, own_cuts)
    except CheckpointError as error:
        raise AdapterError(f"{directory}: {error}; is it an adapter of another base model?") from error
    replaced_names = tuple(name for name in stored if not name.endswith(PARTS))
    try:
        config = _plain_config(files, blocks, lora_rank, replaced_names)
    except ConfigError as error:
        raise AdapterError(f"{directory}: {error}") from error
    return PaddleLora(config=config, blocks=blocks, cuts=own_cuts, stored=stored)


def lora_cuts(
    names: list[str], blocks: Mapping[str, Blocks], lora_rank: int, cuts: Mapping[str, Cut]
) -> dict[str, Cut]:
    """How PaddleNLP's ranks divide a LoRA.

    A layer that is cut by outputs has its lora_B cut, one that is cut by inputs its lora_A; the other one is whole.

    Args:
        names: names of the adapter's tensors; all but lora_A and lora_B are parameters of the model.
        blocks: module name -> its blocks.
        lora_rank: the adapter's r.
        cuts: shapes and cuts of the model's parameters.

    Returns:
        Parameter name -> shape and cut, for lora_A and lora_B as stored, for others as published.

    Raises:
        CheckpointError: a tensor belongs neither to a LoRA nor to the model.
    """
    own: dict[str, Cut] = {}
    for module, block in blocks.items():
        weight = cuts[f"{module}.weight"]
        outputs, inputs = weight.shape
        k = block.num_enabled
        own[f"{module}.lora_A"] = Cut((inputs, k * lora_rank), 0 if weight.dim == 1 else None)
        width = outputs // len(block.slots) * k
        own[f"{module}.lora_B"] = Cut((lora_rank, width), 1 if weight.dim == 0 else None)
    for name in names:
        if name not in own:
            if name not in cuts:
                raise CheckpointError(f"{name} belongs neither to a LoRA nor to the model")
            own[name] = cuts[name]
    return own


def refuse_unknown_variants(values: Mapping[str, Any], directory: Path) -> None:
    """Refuse the variants of LoRA of later releases of PaddleNLP, which compute something else.

    Raises:
        AdapterError: the configuration enables one of them.
    """
    for key in ("rslora", "pissa", "lora_use_mixer", "use_mora", "lorapro", "do_qat"):
        if values.get(key):
            raise AdapterError(
                f"{directory}: its configuration says {key} {values[key]!r}, which bloomlm does not read"
            )


def _modules(files: AdapterFiles) -> list[str]:
    """Names of the modules with an update, as stored, in order."""
    parts = {part: [n.removesuffix(part) for n in files.states[0].tensors if n.endswith(part)] for part in PARTS}
    if set(parts[".lora_A"]) != set(parts[".lora_B"]) or not parts[".lora_A"]:
        odd = sorted(set(parts[".lora_A"]) ^ set(parts[".lora_B"]))
        raise AdapterError(
            f"{files.directory}: expected lora_A and lora_B of the same modules; found {len(parts['.lora_A'])} and "
            f"{len(parts['.lora_B'])} ({name_some(odd) or 'no tensor of a LoRA'})"
        )
    return parts[".lora_A"]


def _slots(values: Mapping[str, Any], module: str, directory: Path) -> tuple[bool, ...]:
    """The entry of enable_lora_list for a module, chosen by the last pattern of target_modules that matches it."""
    enable_lists = values.get("enable_lora_list")
    if enable_lists is None:
        return (True,)
    targets = values.get("target_modules")
    targets = [targets] if isinstance(targets, str) else targets
    if isinstance(enable_lists, list) and enable_lists and all(isinstance(flag, bool) for flag in enable_lists):
        enable_lists = [enable_lists]
    if not isinstance(targets, list) or not isinstance(enable_lists, list) or len(targets) != len(enable_lists):
        raise AdapterError(
            f"{directory}: enable_lora_list {enable_lists!r} does not match target_modules {targets!r}; "
            "expected one entry for each"
        )
    try:
        patterns = [check_pattern(target) for target in targets]
    except AdapterError as error:
        raise AdapterError(f"{directory}: target_modules: {error}") from error
    matching = [e for target, e in zip(patterns, enable_lists, strict=True) if re.fullmatch(target, module)]
    if not matching:
        raise AdapterError(
            f"{directory}: {module} matches none of target_modules {targets!r}, so it has no entry of enable_lora_list"
        )
    match matching[-1]:
        case None:
            return (True,)
        case [*flags] if any(flags) and all(isinstance(flag, bool) for flag in flags):
            return tuple(flags)
    raise AdapterError(
        f"{directory}: enable_lora_list has {matching[-1]!r} for {module}; expected true and false values"
    )


def _blocks(files: AdapterFiles, slots: tuple[bool, ...], outputs: int) -> Blocks:
    """The layout of a module's lora_B, which depends on the era."""
    if len(slots) == 1:
        return Blocks(slots=slots, groups=1)
    if "head_dim" not in files.values:
        why = "before June 2023 PaddleNLP applied each rank's columns of lora_B within that rank's part of the weight"
        groups = require_trained_degree(files, why)
    else:
        groups, rest = divmod(outputs, len(slots) * whole_number(files.values, "head_dim", files.directory))
        if rest:
            raise AdapterError(
                f"{files.directory}: head_dim {files.values['head_dim']} does not divide {outputs} outputs"
            )
    if outputs % (groups * len(slots)):
        raise AdapterError(f"{files.directory}: {outputs} outputs cannot be cut into {groups} x {len(slots)} parts")
    return Blocks(slots=slots, groups=groups)


def _renamed(rank: RankTensors) -> RankTensors:
    """A rank's tensors under published names; all but lora_A and lora_B also in the published orientation."""
    updates = {published_name(name): tensor for name, tensor in rank.tensors.items() if name.endswith(PARTS)}
    others = {name: tensor for name, tensor in rank.tensors.items() if not name.endswith(PARTS)}
    return RankTensors(rank.place, updates | published_tensors(others, rank.place))


def _plain_config(
    files: AdapterFiles, blocks: Mapping[str, Blocks], lora_rank: int, replaced_names: tuple[str, ...]
) -> LoraConfig:
    """The plain LoRA's configuration: k times the rank and k times lora_alpha leave the scaling as it was."""
    alpha = files.values.get("lora_alpha")
    dropout = files.values.get("lora_dropout", 0.0)
    if not isinstance(alpha, (int, float)) or not isinstance(dropout, (int, float)):
        raise AdapterError(f"{files.directory}: lora_alpha is {alpha!r} and lora_dropout {dropout!r}; expected numbers")
    numbers = [block.num_enabled for block in blocks.values()]
    usual = max(set(numbers), key=numbers.count)
    others = {module: block.num_enabled for module, block in blocks.items() if block.num_enabled != usual}
    return LoraConfig(
        r=usual * lora_rank,
        lora_alpha=usual * alpha,
        lora_dropout=float(dropout),
        target_modules=tuple(dict.fromkeys(module.rpartition(".")[2] for module in blocks)),
        rank_pattern={module: k * lora_rank for module, k in others.items()},
        alpha_pattern={module: k * alpha for module, k in others.items()},
        replaced_names=replaced_names,
    )
