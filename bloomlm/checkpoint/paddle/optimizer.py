"""What a PaddleNLP checkpoint needs to go on training: Adam's moments, master weights, step, learning rate, loss scale.

optimizer.pdopt keeps accumulators under variable names ("linear_0.w_0_moment1_0"), which the state dict of the weights
beside it translates. Ranks have files of their own (optimizer.tp00.pdopt), and so have sharding groups, each with the
accumulators of some parameters (optimizer.tp00_shard01.pdopt, optimizer.shard01.pdopt).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bloomlm.checkpoint.paddle.adapter import find_paddle_adapter, read_paddle_adapter
from bloomlm.checkpoint.paddle.adapter_files import LORA_STEM, PREFIX_STEM
from bloomlm.checkpoint.paddle.array import Held, LazyTensor
from bloomlm.checkpoint.paddle.lora import PaddleLora
from bloomlm.checkpoint.paddle.names import VARIABLE, published_tensors, structured_by_variable
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix, PrefixLayout
from bloomlm.checkpoint.paddle.ranks import RankTensors, check_ranks_complete, join_ranks
from bloomlm.checkpoint.paddle.state import PaddleState, read_paddle_state, split_tensors
from bloomlm.checkpoint.tensor_reader import name_some
from bloomlm.errors import CheckpointError
from bloomlm.model.config import BloomConfig

MODEL_STEM = "model_state"
PREFIX_MODULE = "transformer.prefix."
OPTIMIZER_FILE = re.compile(r"optimizer(?:\.tp(\d+))?(?:[._]shard(\d+))?\.pdopt")
ACCUMULATOR = re.compile(r"(.+?)(?:_fp32_master_\d+)?_(moment1|moment2|beta1_pow_acc|beta2_pow_acc)_0")
KINDS = ("moment1", "moment2", "master_weights")


@dataclass(frozen=True, kw_only=True)
class PaddleTrainingState:
    """State of AdamW and its schedule, under the parameter names of the model that resumes.

    Those are the published names; lora_A and lora_B of the plain LoRA; transformer.prefix.embedding.weight and so on of
    the encoder that resume_paddle_adapter installs.
    """

    exp_avg: Mapping[str, LazyTensor]
    """First moments."""
    exp_avg_sq: Mapping[str, LazyTensor]
    """Second moments."""
    master_weights: Mapping[str, LazyTensor]
    """fp32 parameters of a run in fp16 or bf16 at level O2; otherwise empty."""
    step: int
    """Updates made, which torch's AdamW counts per parameter."""
    learning_rate: float | None
    """Of the next update, if the files say."""
    loss_scale: float | None
    """Of a run in fp16."""


def read_paddle_training_state(
    directory: Path,
    model_config: BloomConfig,
    *,
    adam_beta1: float = 0.9,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> PaddleTrainingState:
    """Read the optimizer state of a checkpoint; a full model's tensors are read when asked for.

    Args:
        directory: a checkpoint-N: the weights (or the adapter) and optimizer.pdopt.
        model_config: of the model, or of an adapter's base model.
        adam_beta1: that the run was started with; needed only where no file counts the steps.
        prefix_layout, trained_tensor_parallel_degree: as for read_paddle_adapter.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the weights.
    """
    stem, adapter = MODEL_STEM, None
    if find_paddle_adapter(directory):
        adapter = read_paddle_adapter(
            directory,
            model_config,
            prefix_layout=prefix_layout,
            trained_tensor_parallel_degree=trained_tensor_parallel_degree,
        )
        stem = LORA_STEM if isinstance(adapter, PaddleLora) else PREFIX_STEM
    states = _optimizer_states(directory)
    ranks = {tp_rank: _sorted_by_kind(files, directory, stem, tp_rank) for tp_rank, files in states.items()}
    whole = {kind: _join(adapter, [rank[kind] for rank in ranks.values()], model_config, directory) for kind in KINDS}
    if not whole["moment1"] or whole["moment1"].keys() != whole["moment2"].keys():
        raise CheckpointError(f"{directory}: its optimizer state holds no moments of AdamW's")
    values = states[0][0].values
    scheduler = values.get("LR_Scheduler") or _values(directory / "scheduler.pdparams")
    last_lr = scheduler.get("last_lr")
    return PaddleTrainingState(
        exp_avg=whole["moment1"],
        exp_avg_sq=whole["moment2"],
        master_weights=whole["master_weights"],
        step=_step(scheduler, states[0], adam_beta1, directory),
        learning_rate=float(last_lr) if isinstance(last_lr, (int, float)) else None,
        loss_scale=_loss_scale(directory),
    )


def _optimizer_states(directory: Path) -> dict[int, list[PaddleState]]:
    """Tensor-parallel rank -> its files, one for each sharding group."""
    paths: dict[int, dict[int, Path]] = {}
    for path in directory.glob("optimizer*.pdopt"):
        if match := OPTIMIZER_FILE.fullmatch(path.name):
            paths.setdefault(int(match[1] or 0), {})[int(match[2] or 0)] = path
    if not paths:
        raise CheckpointError(f"{directory} has no optimizer.pdopt; its training cannot go on, only start anew from it")
    check_ranks_complete(sorted(paths), str(directory))
    return {tp: [read_paddle_state(paths[tp][shard]) for shard in sorted(paths[tp])] for tp in sorted(paths)}


def _sorted_by_kind(states: list[PaddleState], directory: Path, stem: str, tp_rank: int) -> dict[str, RankTensors]:
    """One rank's moments and master weights under PaddleNLP's parameter names."""
    found: dict[str, dict[str, LazyTensor]] = {kind: {} for kind in KINDS}
    for state in states:
        for key, tensor in state.tensors.items():
            match = ACCUMULATOR.fullmatch(key)
            if match is None:
                raise CheckpointError(
                    f"{state.path} holds {key}, which AdamW does not have; BLOOM was trained by AdamW only"
                )
            if match[2] in found:
                found[match[2]][match[1]] = tensor
        found["master_weights"] |= split_tensors(state.values.get("master_weights") or {})[0]
    names = _names_of_variables(directory, stem, tp_rank, list(found["moment1"]))
    place = states[0].path.name
    named: dict[str, RankTensors] = {}
    for kind, tensors in found.items():
        if unknown := [variable for variable in tensors if variable not in names]:
            raise CheckpointError(
                f"{directory / place}: {name_some(unknown)} belongs to none of the parameters of the weights beside "
                "it: files of two runs in one directory?"
            )
        named[kind] = RankTensors(place, {names[variable]: tensor for variable, tensor in tensors.items()})
    return named


def _names_of_variables(directory: Path, stem: str, tp_rank: int, variables: list[str]) -> Mapping[str, str]:
    """Variable name -> parameter name, as the weights' state dict says, or by counting a whole model's layers."""
    own = directory / f"{stem}.tp{tp_rank:02d}.pdparams"
    paths = [own] if own.is_file() else sorted(directory.glob(f"{stem}*.pdparams"))
    names: dict[str, str] = {}
    for path in paths:
        translated = read_paddle_state(path).variable_names
        names |= {variable: name for name, variable in translated.items()}
    if not names and all(VARIABLE.fullmatch(variable) for variable in variables) and stem == MODEL_STEM:
        return structured_by_variable(variables, str(directory))
    return names


def _join(
    adapter: PaddleLora | PaddlePrefix | None, ranks: list[RankTensors], config: BloomConfig, directory: Path
) -> dict[str, LazyTensor]:
    """Tensors of all ranks under the names of the resumed model's parameters, in its parameters' shapes."""
    if not any(rank.tensors for rank in ranks):
        return {}
    if isinstance(adapter, PaddleLora):
        return {name: Held(tensor) for name, tensor in adapter.plain(adapter.join(ranks)).items()}
    if isinstance(adapter, PaddlePrefix):
        return {PREFIX_MODULE + name: tensor for name, tensor in adapter.join(ranks).items()}
    published = [RankTensors(rank.place, published_tensors(rank.tensors, rank.place)) for rank in ranks]
    return join_ranks(published, config, str(directory))


def _step(scheduler: Mapping[str, Any], states: list[PaddleState], beta1: float, directory: Path) -> int:
    """Updates made: what the schedule counts (skipped fp16 steps do not count), else by Adam's beta1 ** (step + 1)."""
    last_epoch = scheduler.get("last_epoch")
    if isinstance(last_epoch, int) and last_epoch >= 0:
        return last_epoch
    powers = [t for state in states for key, t in state.tensors.items() if "_beta1_pow_acc_" in key]
    power = float(powers[0].read().max()) if powers else 0.0
    if not 1e-30 < power < 1.0:  # below that, a few steps more or less no longer show
        raise CheckpointError(
            f"{directory}: neither scheduler.pdparams nor optimizer.pdopt says how many steps were made"
        )
    return round(math.log(power) / math.log(beta1)) - 1


def _values(path: Path) -> Mapping[str, Any]:
    return read_paddle_state(path).values if path.is_file() else {}


def _loss_scale(directory: Path) -> float | None:
    path = directory / "scaler.pdparams"
    if not path.is_file():
        return None
    state = read_paddle_state(path)
    scale: Tensor | Any = state.tensors["scale"].read().max() if "scale" in state.tensors else state.values.get("scale")
    return None if scale is None else float(scale)
