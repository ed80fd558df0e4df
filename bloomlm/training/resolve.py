"""Turns flags into a RunPlan: checks them together and fills in values that depend on other flags.

The result depends on flags and machine alone. Resolving resolved flags changes nothing, so run.yaml repeats a run.
"""

import importlib.util
from dataclasses import dataclass, replace

import torch

from bloomlm.adapters.base import Adapter, FullTuning
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.formats import ForeignReading
from bloomlm.errors import ConfigError
from bloomlm.flags import reading_flags
from bloomlm.kernels.processor import BFLOAT16, instruction_sets
from bloomlm.model.quantized import QUANTIZATIONS
from bloomlm.parallel.launch import world_size
from bloomlm.parallel.mesh import Degrees, degrees_from_flags
from bloomlm.training.checks import (
    check_adapters,
    check_decoding,
    check_optimizer,
    check_parallelism,
    check_unused,
    resolve_best_model,
    resolve_device,
    resolve_evaluation_times,
    resolve_tasks,
)
from bloomlm.training.config import TrainingConfig
from bloomlm.training.objective_checks import check_preference
from bloomlm.training.precision import precision_from_flags
from bloomlm.training.reporters import TRACKERS, installed_trackers
from bloomlm.training.run_plan import (
    ModelPlan,
    ParallelPlan,
    ReportPlan,
    RunPlan,
)
from bloomlm.training.sections import (
    data_plan,
    evaluation_plan,
    fuses_update,
    objective_plan,
    output_plan,
    training_plan,
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use on this machine; passed to `resolve`, so that tests can describe any machine."""

    has_cuda: bool
    has_matplotlib: bool
    has_metrics: bool
    """Whether ROUGE and BLEU can be computed."""
    has_bf16: bool = True
    """Whether the processor has instructions for products in bf16."""
    has_bitsandbytes: bool = False
    trackers: frozenset[str] = frozenset()
    """Programs for --report_to that are installed."""
    world_size: int = 1
    """Number of processes of the job."""

    @classmethod
    def here(cls) -> "Machine":
        """Look for a GPU, for optional packages and for other processes of the job."""
        return cls(
            has_cuda=torch.cuda.is_available(),
            has_matplotlib=_installed("matplotlib"),
            has_metrics=_installed("sacrebleu") and _installed("rouge_score"),
            has_bf16=not BFLOAT16.isdisjoint(instruction_sets()),
            has_bitsandbytes=_installed("bitsandbytes"),
            trackers=installed_trackers(),
            world_size=world_size(),
        )


def resolve(config: TrainingConfig, machine: Machine) -> RunPlan:
    """Check the flags, fill in values that depend on others, and make the plan.

    Raises:
        ConfigError: flags cannot be used, or not together; the message says why.
    """
    notices: list[str] = []
    config = _resolve_flags(config, machine, notices)
    return RunPlan(
        flags=config,
        notices=tuple(notices),
        seed=config.seed,
        model=ModelPlan(
            name_or_path=config.model_name_or_path,
            device=torch.device("cuda" if config.device == "gpu" else "cpu"),
            quantization=QUANTIZATIONS.get(config.base_quantization),
            recompute=config.recompute,
            noise_alpha=config.neftune_noise_alpha,
            compiles_blocks=config.torch_compile,
        ),
        adapter=adapter_from_flags(config),
        trains_new_tokens=config.train_new_tokens and config.lora,
        precision=precision_from_flags(
            fp16=config.fp16, bf16=config.bf16, fp16_opt_level=config.fp16_opt_level, scale_loss=config.scale_loss
        ),
        parallelism=ParallelPlan(
            degrees=degrees_of(config, machine.world_size), reshard_after_forward=config.sharding == "stage3"
        ),
        data=data_plan(config),
        objective=objective_plan(config),
        training=training_plan(config, machine.world_size) if config.do_train else None,
        evaluation=evaluation_plan(config),
        output=output_plan(config),
        report=ReportPlan(
            show_bar=not config.disable_tqdm,
            trackers=() if config.report_to == "none" else tuple(config.report_to.split(",")),
            profile=config.profile,
        ),
        reading=ForeignReading.from_flags(**reading_flags(config)),
    )


def resolve_setup(config: TrainingConfig, machine: Machine) -> tuple[TrainingConfig, tuple[str, ...]]:
    """The part of `resolve` that needs neither data nor device: processes and adapters.

    Returns:
        The flags with values filled in, and notices for the user.

    Raises:
        ConfigError: as in `resolve`.
    """
    notices: list[str] = []
    config = _resolve_parallelism(config, machine, notices)
    check_adapters(config, notices)
    return config, tuple(notices)


def degrees_of(config: TrainingConfig, num_processes: int) -> Degrees:
    """How the flags divide the processes of a job; raises ConfigError if that is impossible."""
    return degrees_from_flags(
        num_processes,
        tensor_parallel_degree=config.tensor_parallel_degree,
        sharding_parallel_degree=config.sharding_parallel_degree,
        shards=bool(config.sharding),
    )


def adapter_from_flags(config: TrainingConfig) -> Adapter:
    """The adapter that the flags describe; raises ConfigError if it is impossible."""
    if config.lora:
        kind = DoraConfig if config.use_dora else LoraConfig
        return kind(
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            use_rslora=config.use_rslora,
        )
    if config.prefix_tuning:
        return PrefixConfig(num_prefix_tokens=config.num_prefix_tokens, prefix_projection=config.prefix_projection)
    return FullTuning()


def _resolve_flags(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    config = _resolve_parallelism(config, machine, notices)
    config = resolve_tasks(config, notices)
    config = resolve_device(config, notices, has_cuda=machine.has_cuda, has_bf16=machine.has_bf16)
    check_optimizer(config, notices, has_bitsandbytes=machine.has_bitsandbytes)
    check_adapters(config, notices)
    config = resolve_evaluation_times(config, notices)
    check_decoding(config, notices, has_metrics=machine.has_metrics)
    check_preference(config, notices)
    config = resolve_best_model(config, objective_plan(config))
    check_unused(config, notices)
    if config.do_train and fuses_update(config, machine.world_size):
        notices.append("each weight is updated in the backward pass, so that the gradients never exist all at once")
    return _resolve_reports(config, machine, notices)


def _resolve_parallelism(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    degrees = degrees_of(config, machine.world_size)
    check_parallelism(config, degrees, notices)
    return replace(config, sharding="stage3") if degrees.dp_shard > 1 and not config.sharding else config


def _resolve_reports(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    if config.do_train and not machine.has_matplotlib:
        notices.append("no loss picture, which needs pip install 'bloomlm[plots]'; metrics.jsonl has the numbers")
    if config.report_to == "all":
        has_tensorboard = "tensorboard" in machine.trackers
        if config.do_train and not has_tensorboard:
            notices.append("no TensorBoard files, which need pip install 'bloomlm[tensorboard]'")
        return replace(config, report_to="tensorboard" if has_tensorboard else "none")
    names = [name.strip() for name in config.report_to.split(",")]
    if names != ["none"] and (unknown := [name for name in names if name not in TRACKERS]):
        raise ConfigError(
            f"--report_to {config.report_to}: {', '.join(map(repr, unknown))} is none of {', '.join(TRACKERS)}, which "
            "may be joined by commas; all and none stand alone"
        )
    if missing := [name for name in names if name != "none" and name not in machine.trackers]:
        raise ConfigError(f"--report_to {config.report_to} needs: pip install 'bloomlm[{','.join(missing)}]'")
    return replace(config, report_to=",".join(dict.fromkeys(names)))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
