"""`bloomlm plan`: computes memory and traffic of each process of a job, and the time of a step, without running it."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from bloomlm.adapters.base import apply_adapter
from bloomlm.api import DTYPES
from bloomlm.checkpoint.reader import read_config
from bloomlm.checkpoint.source import BUILTIN_PREFIX, resolve_source
from bloomlm.cli.options import config_command
from bloomlm.cli.plan_job import job_traffic, meta_model, reference_pass, step_flops, workload
from bloomlm.cli.plan_output import Fit, Plan, show_plan, write_plan
from bloomlm.errors import ConfigError
from bloomlm.flags import REQUIRED, Dtype, Flags, flag, same_flag
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES, BloomConfig, published_config
from bloomlm.model.quantized import QUANTIZATIONS
from bloomlm.parallel.mesh import Degrees, check_model_divides
from bloomlm.parallel.plan import prediction_memory, training_memory
from bloomlm.parallel.traffic import Links, step_time
from bloomlm.training.config import TrainingConfig
from bloomlm.training.objective_checks import check_preference
from bloomlm.training.precision import Precision, precision_from_flags
from bloomlm.training.resolve import Machine, adapter_from_flags, degrees_of, resolve_setup
from bloomlm.training.sections import objective_plan

CONFIG_FILE = "config.json"
DEVICE_GIGABYTES = (40, 80, 141)
"""Memory of common GPUs in 10^9 bytes: A100, A100 and H100, H200."""
MOST_AT_ONCE = 2**16
"""The largest batch size that is tried."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Flags):
    """The flags of `bloomlm plan`. Those that `bloomlm finetune` has, too, mean the same here."""

    model_name_or_path: str = flag(
        "model",
        REQUIRED,
        "a published name, from bigscience/bloom-560m to bigscience/bloom or bloomz; builtin:tiny, a directory, or a "
        "config.json",
        aliases=("model",),
    )
    vocab_size: int | None = flag(
        "model", None, "rows of the embedding, for a model with a trimmed vocabulary  [default: the model's]", minimum=1
    )

    num_processes: int | None = flag(
        "parallelism",
        None,
        "number of processes of the job  [default: tensor_parallel_degree x sharding_parallel_degree]",
        minimum=1,
    )
    tensor_parallel_degree: int = same_flag(TrainingConfig, "tensor_parallel_degree")
    sharding_parallel_degree: int = same_flag(TrainingConfig, "sharding_parallel_degree")
    sharding: Literal["", "stage1", "stage2", "stage3"] = same_flag(TrainingConfig, "sharding")

    src_length: int = same_flag(TrainingConfig, "src_length", help="tokens of each prompt")
    tgt_length: int = same_flag(TrainingConfig, "tgt_length", help="tokens of each target or completion")

    per_device_train_batch_size: int = same_flag(TrainingConfig, "per_device_train_batch_size")
    gradient_accumulation_steps: int = same_flag(TrainingConfig, "gradient_accumulation_steps")
    label_smoothing: float = same_flag(TrainingConfig, "label_smoothing")
    max_grad_norm: float = same_flag(TrainingConfig, "max_grad_norm")
    preference: Literal["dpo", "orpo", "kto"] | None = same_flag(TrainingConfig, "preference")

    device: Literal["auto", "gpu", "cuda", "cpu"] = same_flag(
        TrainingConfig, "device", help="what trains: attention on a CPU keeps less memory; auto is a GPU"
    )
    fp16: bool = same_flag(TrainingConfig, "fp16")
    bf16: bool = same_flag(TrainingConfig, "bf16")
    fp16_opt_level: Literal["O1", "O2"] = same_flag(TrainingConfig, "fp16_opt_level")
    recompute: bool = same_flag(TrainingConfig, "recompute")

    lora: bool = same_flag(TrainingConfig, "lora")
    r: int = same_flag(TrainingConfig, "r")
    target_modules: tuple[str, ...] = same_flag(TrainingConfig, "target_modules")
    base_quantization: Literal["none", "int8", "nf4"] = same_flag(TrainingConfig, "base_quantization")
    prefix_tuning: bool = same_flag(TrainingConfig, "prefix_tuning")
    num_prefix_tokens: int = same_flag(TrainingConfig, "num_prefix_tokens")
    prefix_projection: bool = same_flag(TrainingConfig, "prefix_projection")

    dtype: Dtype = flag("prediction", "bfloat16", "precision of the weights")
    batch_size: int = flag("prediction", 1, "sequences generated at the same time", minimum=1)

    flops_per_second: float = flag(
        "speed", 4e14, "floating-point operations per second that a process reaches in matrix products", minimum=1
    )
    node_bandwidth: float = flag("speed", 3e11, "bytes per second that a process sends within its machine", minimum=1)
    network_bandwidth: float = flag(
        "speed", 2.5e10, "bytes per second that a process sends to another machine", minimum=1
    )
    processes_per_node: int = flag("speed", 8, "processes on each machine", minimum=1)

    output_file: Path | None = flag("output", None, "also write the plan to this JSON file")


def plan(config: PlanConfig) -> None:
    """Run `bloomlm plan`.

    Raises:
        ConfigError: flags that cannot be used, or degrees that do not divide the model.
        CheckpointError: there is no such model, or the plan cannot be written.
    """
    found, notices = make_plan(config)
    messages = Console(stderr=True, highlight=False, markup=False)
    for notice in notices:
        messages.print(f"note: {notice}", soft_wrap=True)
    show_plan(found, Console(highlight=False, markup=False))
    if config.output_file is not None:
        write_plan(found, config.output_file)
        messages.print(f"plan in {config.output_file}", soft_wrap=True)


def make_plan(config: PlanConfig) -> tuple[Plan, tuple[str, ...]]:
    """The plan, and notices about flags that have no effect or an unexpected one."""
    model_config = find_config(config.model_name_or_path)
    if config.vocab_size is not None:
        model_config = replace(model_config, vocab_size=config.vocab_size)
    training, notices, degrees = _resolve(config)
    check_model_divides(model_config, degrees.tp)
    precision = precision_from_flags(
        fp16=config.fp16, bf16=config.bf16, fp16_opt_level=config.fp16_opt_level, scale_loss=training.scale_loss
    )
    model, reference, predicting = _models(model_config, config, training, precision)
    length = config.src_length + config.tgt_length

    objective = objective_plan(training)
    load_of = partial(workload, training, objective, precision, degrees.world_size)
    load = load_of(config.per_device_train_batch_size)
    traffic = job_traffic(model, training, objective, load, degrees)
    links = Links(
        flops_per_second=config.flops_per_second,
        node_bytes_per_second=config.node_bandwidth,
        network_bytes_per_second=config.network_bandwidth,
        ranks_per_node=config.processes_per_node,
    )
    found = Plan(
        model=config.model_name_or_path,
        num_parameters=model_config.num_parameters,
        num_learned_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        degrees=degrees,
        training_dtype=_dtype_name(precision.compute_dtype),
        weights_dtype=_dtype_name(precision.weights_dtype),
        prediction_dtype=config.dtype,
        num_step_tokens=load.num_tokens * load.accumulation * degrees.dp,
        num_rank_tokens=load.num_tokens * load.accumulation,
        batch_size=config.batch_size,
        num_cached_tokens=length,
        training=training_memory(model, degrees, load),
        prediction=prediction_memory(predicting, degrees.tp, config.batch_size, length),
        fits=_fits(
            lambda batch_size: training_memory(model, degrees, load_of(batch_size)).peak,
            lambda batch_size: prediction_memory(predicting, degrees.tp, batch_size, length).peak,
        ),
        traffic=traffic,
        time=step_time(traffic, degrees, links, step_flops(model, training, objective, load)),
        reference=reference_pass(reference, training, load, degrees, links) if objective.uses_reference else None,
    )
    return found, notices


def _models(
    model_config: BloomConfig, config: PlanConfig, training: TrainingConfig, precision: Precision
) -> tuple[BloomForCausalLM, BloomForCausalLM, BloomForCausalLM]:
    """The model that learns, the same as it was read, which is the reference, and the one that predicts."""
    adapter, quantization = adapter_from_flags(training), QUANTIZATIONS.get(config.base_quantization)
    linear_dtype = precision.linear_dtype(training.device, learns=adapter.trains_base)
    model, reference = (meta_model(model_config, precision.weights_dtype, linear_dtype, quantization) for _ in range(2))
    predicting = meta_model(model_config, DTYPES[config.dtype])
    for adapted in (model, predicting):
        apply_adapter(adapted, adapter)
    return model, reference.requires_grad_(False), predicting


def find_config(name: str) -> BloomConfig:
    """The configuration of a model, without fetching anything.

    Args:
        name: a published model, builtin:NAME, a directory or a config.json.

    Raises:
        ConfigError: the name is none of these, or the model is not a BLOOM.
        CheckpointError: the directory has no config.json.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.name == CONFIG_FILE:
        return read_config(path.parent)
    if path.is_dir() or name.startswith(BUILTIN_PREFIX):
        return read_config(resolve_source(name).directory)
    config = published_config(name)
    if config is None:
        sizes = ", ".join(f"bigscience/bloom-{size}" for size in PUBLISHED_SIZES if size != "176b")
        raise ConfigError(
            f"{name} is no published BLOOM and no directory or {CONFIG_FILE} here. The published ones are {sizes}, "
            "bigscience/bloom, and the same with bloomz; of any other, name its directory"
        )
    return config


def _resolve(config: PlanConfig) -> tuple[TrainingConfig, tuple[str, ...], Degrees]:
    if config.sharding and config.num_processes is None and config.sharding_parallel_degree < 1:
        raise ConfigError(f"--sharding {config.sharding}: among how many processes? Add --num_processes")
    shared = {item.name for item in fields(TrainingConfig)} & {item.name for item in fields(config)}
    training = TrainingConfig(**{name: getattr(config, name) for name in shared}, output_dir="", do_train=True)
    processes = config.num_processes or max(1, config.tensor_parallel_degree) * max(1, config.sharding_parallel_degree)
    machine = Machine(has_cuda=True, has_matplotlib=False, has_metrics=False, world_size=processes)
    training, notices = resolve_setup(training, machine)
    idle: list[str] = []
    check_preference(training, idle)
    if config.fp16_opt_level == "O2" and not (config.fp16 or config.bf16):
        idle.append("--fp16_opt_level O2 is not used: it says how --fp16 or --bf16 compute")
    if processes <= config.processes_per_node and config.network_bandwidth != PlanConfig.network_bandwidth:
        idle.append(f"--network_bandwidth is not used: {processes} processes are on one machine")
    return training, (*notices, *idle), degrees_of(training, processes)


def _fits(training_peak: Callable[[int], int], prediction_peak: Callable[[int], int]) -> list[Fit]:
    """The largest batches on each device, from functions that return the peak memory of a batch size in bytes."""
    return [
        Fit(
            gigabytes=gigabytes,
            largest_train_batch_size=_largest(training_peak, gigabytes),
            largest_batch_size=_largest(prediction_peak, gigabytes),
        )
        for gigabytes in DEVICE_GIGABYTES
    ]


def _largest(peak_bytes: Callable[[int], int], gigabytes: int) -> int:
    """The largest batch size up to MOST_AT_ONCE whose peak fits; 0 where not even one example fits."""
    return bisect.bisect_right(range(1, MOST_AT_ONCE + 1), gigabytes * 10**9, key=peak_bytes)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


command = config_command(
    "plan",
    PlanConfig,
    plan,
    help="""Compute what each process of a job holds in memory and sends, and how long a step takes.

    It tells which batches fit on common GPUs, in training and in prediction. Nothing is loaded or downloaded.

    \b
    bloomlm plan --model bigscience/bloom --tensor_parallel_degree 8 --lora --bf16 --fp16_opt_level O2 --recompute
    bloomlm plan --model bigscience/bloom-7b1 --num_processes 8 --sharding stage3 --bf16 --recompute
    """,
)
