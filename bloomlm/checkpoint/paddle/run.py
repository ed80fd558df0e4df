"""The training state in a PaddleNLP checkpoint: weights, Adam's moments, step, learning rate, loss scale.

optimizer.pdopt holds accumulators under variable names ("linear_0.w_0_moment1_0"), which the state dict of the weights
beside it maps to parameter names. Each rank has its own file (optimizer.tp00.pdopt), and so has each sharding group,
with the accumulators of some parameters (optimizer.tp00_shard01.pdopt, optimizer.shard01.pdopt).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bloomlm.checkpoint.paddle.layout import (
    VARIABLE,
    RankTensors,
    check_ranks_complete,
    join_ranks,
    missing_numbers,
    published_tensors,
    structured_by_variable,
)
from bloomlm.checkpoint.paddle.lora import PaddleLora
from bloomlm.checkpoint.paddle.model import open_model
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix
from bloomlm.checkpoint.paddle.recorded import RecordedAdapter
from bloomlm.checkpoint.paddle.state import PaddleState, read_paddle_state, split_tensors
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError, name_some
from bloomlm.files.json_text import read_json
from bloomlm.model.config import BloomConfig

MODEL_STEM = "model_state"
TRAINER_STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = re.compile(r"optimizer(?:\.tp(\d+))?(?:[._]shard(\d+))?\.pdopt")
ACCUMULATOR = re.compile(r"(.+?)(?:_fp32_master_\d+)?_(moment1|moment2|beta1_pow_acc|beta2_pow_acc)_0")
KINDS = ("moment1", "moment2", "master_weights")


@dataclass(frozen=True, kw_only=True)
class ImportedRun:
    """The state of a run, under the parameter names of the model that resumes it.

    Those are the published names, or lora_A and lora_B of the plain LoRA, or those of a prefix's encoder
    (transformer.prefix.embedding.weight, ...).
    """

    origin: str
    """The program that wrote it."""
    adapter: RecordedAdapter | None
    """The trained adapter; None: the whole model is trained."""
    weights: Mapping[str, LazyTensor]
    """The trained parameters, as stored."""
    exp_avg: Mapping[str, LazyTensor]
    """AdamW's first moments; empty where the checkpoint has no optimizer state."""
    exp_avg_sq: Mapping[str, LazyTensor]
    """AdamW's second moments, under the same names."""
    master_weights: Mapping[str, LazyTensor]
    """fp32 copies of the parameters, if a run in fp16 or bf16 kept them; otherwise empty."""
    updates: int
    """Number of updates of the parameters, as AdamW counts them."""
    step: int
    """Number of steps done: updates, and steps that fp16 skipped."""
    max_steps: int | None
    """Planned number of steps; None: not recorded."""
    learning_rate: float | None
    """Learning rate of the next update; None: not recorded."""
    loss_scale: float | None
    """Loss scale of a run in fp16; None: not recorded."""
    losses: tuple[Mapping[str, Any], ...]
    """Log entries with a training loss."""


class WholeModel:
    """A whole model that a run trained."""

    stem = MODEL_STEM
    recorded = None

    def __init__(self, directory: Path, config: BloomConfig) -> None:
        self._directory, self._config = directory, config

    def weights(self) -> Mapping[str, LazyTensor]:
        """Its parameters."""
        return open_model(self._directory, self._config).tensors

    def join(self, ranks: list[RankTensors]) -> Mapping[str, LazyTensor]:
        """Other tensors of the parameters, such as AdamW's moments, joined and named like `weights`."""
        published = [RankTensors(rank.place, published_tensors(rank.tensors, rank.place)) for rank in ranks]
        return join_ranks(published, self._config, str(self._directory))


Learned = WholeModel | PaddleLora | PaddlePrefix
"""What a run trained."""


def find_run(directory: Path) -> bool:
    """Whether PaddleNLP wrote a checkpoint-N."""
    return any(next(directory.glob(pattern), None) is not None for pattern in ("*.pdparams", "*.pdopt"))


def read_state(directory: Path, learned: Learned, adam_beta1: float) -> ImportedRun:
    """Read the state of a run; the tensors of a whole model stay unread.

    Args:
        directory: a checkpoint-N: the weights (or the adapter), and optimizer.pdopt.
        learned: the model or adapter that it trained.
        adam_beta1: the run's beta1; used only where no file records the number of steps.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit the weights.
    """
    states = _optimizer_states(directory)
    moments = _moments(states, learned, directory)
    files = states.get(0, [])
    scheduler = (files[0].values.get("LR_Scheduler") if files else None) or _values(directory / "scheduler.pdparams")
    trainer = _trainer_state(directory)
    updates = _updates(scheduler, files, trainer, adam_beta1, directory)
    last_lr = scheduler.get("last_lr")
    return ImportedRun(
        origin="PaddleNLP",
        adapter=learned.recorded,
        weights=learned.weights(),
        exp_avg=moments["moment1"],
        exp_avg_sq=moments["moment2"],
        master_weights=moments["master_weights"],
        updates=updates,
        step=_whole(trainer.get("global_step")) or updates,
        max_steps=_whole(trainer.get("max_steps")),
        learning_rate=float(last_lr) if isinstance(last_lr, (int, float)) else None,
        loss_scale=_loss_scale(directory),
        losses=_losses(trainer),
    )


def _moments(
    states: Mapping[int, list[PaddleState]], learned: Learned, directory: Path
) -> dict[str, Mapping[str, LazyTensor]]:
    """Kind -> tensors under the names of the model that resumes; empty without optimizer files."""
    if not states:
        return {kind: {} for kind in KINDS}
    ranks = [_sorted_by_kind(files, directory, learned.stem, tp_rank) for tp_rank, files in states.items()]
    whole: dict[str, Mapping[str, LazyTensor]] = {}
    for kind in KINDS:
        of_kind = [rank[kind] for rank in ranks]
        whole[kind] = learned.join(of_kind) if any(rank.tensors for rank in of_kind) else {}
    if not whole["moment1"] or whole["moment1"].keys() != whole["moment2"].keys():
        raise CheckpointError(f"{directory}: its optimizer state holds no moments of AdamW")
    return whole


def _optimizer_states(directory: Path) -> dict[int, list[PaddleState]]:
    """Tensor-parallel rank -> its optimizer files, one for each sharding group; empty if there are none."""
    paths: dict[int, dict[int, Path]] = {}
    for path in sorted(directory.glob("optimizer*.pdopt")):
        match = OPTIMIZER_FILE.fullmatch(path.name)
        if match is None:
            raise CheckpointError(
                f"{path} comes from a kind of parallel training that bloomlm does not read; expected optimizer.pdopt, "
                "or its parts of tensor-parallel ranks (.tp00) and sharding groups (.shard00)"
            )
        paths.setdefault(int(match[1] or 0), {})[int(match[2] or 0)] = path
    if not paths:
        return {}
    check_ranks_complete(sorted(paths), str(directory))
    groups = {group for of_rank in paths.values() for group in of_rank}
    for tp_rank, of_rank in paths.items():
        if missing := missing_numbers(of_rank, max(groups) + 1):
            raise CheckpointError(
                f"{directory}: of tensor-parallel rank {tp_rank} the optimizer files of sharding groups {missing} are "
                f"missing (found {sorted(path.name for path in of_rank.values())}); each holds the moments of some "
                "parameters, fetch those files too"
            )
    return {tp: [read_paddle_state(paths[tp][shard]) for shard in sorted(paths[tp])] for tp in sorted(paths)}


def _sorted_by_kind(states: list[PaddleState], directory: Path, stem: str, tp_rank: int) -> dict[str, RankTensors]:
    """One rank's moments and master weights under PaddleNLP's parameter names."""
    found: dict[str, dict[str, LazyTensor]] = {kind: {} for kind in KINDS}
    for state in states:
        for key, tensor in state.tensors.items():
            match = ACCUMULATOR.fullmatch(key)
            if match is None:
                raise CheckpointError(
                    f"{state.path} holds {key}, which is not part of AdamW's state; bloomlm resumes runs of AdamW only"
                )
            if match[2] in found:
                found[match[2]][match[1]] = tensor
        found["master_weights"] |= split_tensors(state.values.get("master_weights") or {})[0]
    names = _names_of_variables(directory, stem, tp_rank, list(found["moment1"]))
    place = states[0].path.name
    if not names:
        raise CheckpointError(
            f"{directory / place}: the weights beside it do not name their variables (as if merged from ranks), so "
            "its moments cannot be matched with parameters; remove the optimizer files to resume without them"
        )
    named: dict[str, RankTensors] = {}
    for kind, tensors in found.items():
        if unknown := [variable for variable in tensors if variable not in names]:
            raise CheckpointError(
                f"{directory / place}: {name_some(unknown)} belongs to none of the parameters of the weights beside "
                "it: are these the files of two runs?"
            )
        named[kind] = RankTensors(place, {names[variable]: tensor for variable, tensor in tensors.items()})
    return named


def _names_of_variables(directory: Path, stem: str, tp_rank: int, variables: list[str]) -> Mapping[str, str]:
    """Variable name -> parameter name, from the state dict of the weights, or by counting a whole model's layers."""
    own = directory / f"{stem}.tp{tp_rank:02d}.pdparams"
    paths = [own] if own.is_file() else sorted(directory.glob(f"{stem}*.pdparams"))
    names: dict[str, str] = {}
    for path in paths:
        translated = read_paddle_state(path).variable_names
        names |= {variable: name for name, variable in translated.items()}
    if not names and all(VARIABLE.fullmatch(variable) for variable in variables) and stem == MODEL_STEM:
        return structured_by_variable(variables, str(directory))
    return names


def _updates(
    scheduler: Mapping[str, Any], states: list[PaddleState], trainer: Mapping[str, Any], beta1: float, directory: Path
) -> int:
    """Number of updates, from the schedule (without steps that fp16 skipped) or from AdamW's beta1 ** (updates + 1)."""
    last_epoch = _whole(scheduler.get("last_epoch"))
    if last_epoch is not None:
        return last_epoch
    powers = [t for state in states for key, t in state.tensors.items() if "_beta1_pow_acc_" in key]
    power = float(powers[0].read().max()) if powers else 0.0
    if 1e-30 < power < 1.0:  # below that, the power no longer tells neighbouring steps apart
        return round(math.log(power) / math.log(beta1)) - 1
    global_step = _whole(trainer.get("global_step"))
    if global_step is None:
        raise CheckpointError(
            f"{directory}: none of scheduler.pdparams, optimizer.pdopt and {TRAINER_STATE_FILE} says how many steps "
            "were made; fetch one of them too"
        )
    return global_step


def _trainer_state(directory: Path) -> Mapping[str, Any]:
    path = directory / TRAINER_STATE_FILE
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}; fetch it again, or remove it") from error
    return values if isinstance(values, dict) else {}


def _losses(trainer: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    logged = trainer.get("log_history")
    entries = logged if isinstance(logged, list) else []
    return tuple(entry for entry in entries if isinstance(entry, dict) and {"step", "loss"} <= entry.keys())


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _values(path: Path) -> Mapping[str, Any]:
    return read_paddle_state(path).values if path.is_file() else {}


def _loss_scale(directory: Path) -> float | None:
    path = directory / "scaler.pdparams"
    if not path.is_file():
        return None
    state = read_paddle_state(path)
    scale: Tensor | Any = state.tensors["scale"].read().max() if "scale" in state.tensors else state.values.get("scale")
    return None if scale is None else float(scale)
