"""What the flags of a run mean together: refuses what cannot act, fills in what depends on other flags, says so.

Pure: what the machine has is handed in. Resolving a resolved config changes nothing, so it can be fed back.
"""

import importlib.util
from dataclasses import dataclass, replace

from bloomlm.errors import ConfigError
from bloomlm.parallel.launch import world_size
from bloomlm.parallel.mesh import Degrees, degrees_from_flags
from bloomlm.training.checks_evaluation import resolve_evaluation
from bloomlm.training.config import TrainingConfig, default_of, note_unused

DEFAULT_DATASET = "BelleGroup/school_math_0.25M"
"""What PaddleNLP's script learned when no data was named; this is its name on the Hugging Face hub."""

# Flags that act only where another one is on.
_LORA_FLAGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
_PREFIX_FLAGS = ("num_prefix_tokens", "prefix_projection")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use here."""

    has_cuda: bool
    has_tensorboard: bool
    has_matplotlib: bool
    has_metrics: bool
    has_bitsandbytes: bool = False
    world_size: int = 1
    """Processes of the job."""

    @classmethod
    def here(cls, *, has_cuda: bool) -> "Machine":
        """Look which optional packages are installed."""
        return cls(
            has_cuda=has_cuda,
            has_tensorboard=_installed("tensorboard"),
            has_matplotlib=_installed("matplotlib"),
            has_metrics=_installed("sacrebleu") and _installed("rouge_score"),
            has_bitsandbytes=_installed("bitsandbytes"),
            world_size=world_size(),
        )


def resolve(config: TrainingConfig, machine: Machine) -> tuple[TrainingConfig, tuple[str, ...]]:
    """Check the flags together and fill in what was left open.

    Args:
        config: as given.
        machine: what there is.

    Returns:
        The config that will run, and notices: one line each about what was decided or does nothing.

    Raises:
        ConfigError: flags that cannot be used, or not together, with the reason.
    """
    notices: list[str] = []
    _check_numbers(config)
    config = _resolve_parallelism(config, machine, notices)
    config = _resolve_tasks(config, notices)
    config = _resolve_device(config, machine, notices)
    _check_optimizer(config, machine, notices)
    _check_adapters(config, notices)
    config = resolve_evaluation(config, notices, has_metrics=machine.has_metrics)
    _note_idle(config, notices)
    return _resolve_reports(config, machine, notices), tuple(notices)


def resolve_setup(config: TrainingConfig, machine: Machine) -> tuple[TrainingConfig, tuple[str, ...]]:
    """The part of `resolve` that needs no data and no device: numbers, processes, adapters.

    Args:
        config: as given.
        machine: its world_size counts.

    Raises:
        ConfigError: as in `resolve`.
    """
    notices: list[str] = []
    _check_numbers(config)
    config = _resolve_parallelism(config, machine, notices)
    _check_adapters(config, notices)
    return config, tuple(notices)


def _check_numbers(config: TrainingConfig) -> None:
    at_least: dict[str, float] = {
        "src_length": 1,
        "tgt_length": 2,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_steps": 1,
        "eval_steps": 1,
        "save_total_limit": 1,
        "max_tokens_per_batch": 1,
        "trained_tensor_parallel_degree": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        "max_grad_norm": 0,
        "warmup_steps": 0,
        "seed": 0,
        "generate_num": 0,
        "min_tgt_length": 0,
        "num_beams": 1,
        "top_k": 0,
        "no_repeat_ngram_size": 0,
        "dataloader_num_workers": 0,
    }
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name} is {value}; expected at least {least:g}")
    for name, below in (("label_smoothing", 1.0), ("adam_beta1", 1.0), ("adam_beta2", 1.0), ("lora_dropout", 1.0)):
        if not 0 <= getattr(config, name) < below:
            raise ConfigError(f"--{name} is {getattr(config, name)}; expected from 0 to below {below:g}")
    for name in ("warmup_ratio", "lr_decay_ratio", "top_p"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{name} is {value}; expected from 0 to 1")
    if not config.adam_epsilon > 0:
        raise ConfigError(f"--adam_epsilon is {config.adam_epsilon}; expected a number above 0")
    if config.max_steps <= 0 and not config.num_train_epochs > 0:
        raise ConfigError(f"--num_train_epochs is {config.num_train_epochs}; expected above 0, or give --max_steps")
    if config.min_tgt_length > config.tgt_length:
        raise ConfigError(f"--min_tgt_length {config.min_tgt_length} is above --tgt_length {config.tgt_length}")


def _resolve_parallelism(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    if config.pipeline_parallel_degree not in (-1, 1):
        raise ConfigError(
            f"--pipeline_parallel_degree {config.pipeline_parallel_degree}: bloomlm does not spread blocks over "
            "processes; leave the flag out, and divide the model by --tensor_parallel_degree and --sharding stage3"
        )
    alone = {
        "--base_quantization int8": config.base_quantization == "int8",
        "--torch_compile": config.torch_compile,
        "--optim adamw_8bit": config.optim == "adamw_8bit",
    }
    if machine.world_size > 1 and (given := [flag for flag, is_given in alone.items() if is_given]):
        raise ConfigError(f"{', '.join(given)}: for one process only, and here are {machine.world_size}; leave it out")
    degrees = degrees_of(config, machine.world_size)
    if config.sharding and degrees.dp_shard == 1:
        raise ConfigError(
            f"--sharding {config.sharding} shares weights and optimizer out among data-parallel processes, and here "
            f"is one ({machine.world_size} / tensor_parallel_degree {degrees.tp} / sharding_parallel_degree "
            f"{config.sharding_parallel_degree}); leave it out, or start more with torchrun --nproc-per-node"
        )
    if config.sharding == "stage1":
        notices.append("--sharding stage1 is computed as stage2: the same numbers, with the gradients shared out too")
    if degrees.dp_shard > 1 and not config.sharding:
        config = replace(config, sharding="stage3")
    if degrees.dp > 1:
        notices.append(
            f"{degrees.dp} data-parallel processes: a step learns from as many times per_device_train_batch_size "
            "examples"
        )
    return config


def degrees_of(config: TrainingConfig, processes: int) -> Degrees:
    """How the flags divide the processes of a job.

    Args:
        config: the flags.
        processes: how many there are.

    Raises:
        ConfigError: they cannot be divided so.
    """
    return degrees_from_flags(
        processes,
        tensor_parallel_degree=config.tensor_parallel_degree,
        sharding_parallel_degree=config.sharding_parallel_degree,
        shards=bool(config.sharding),
    )


def _resolve_tasks(config: TrainingConfig, notices: list[str]) -> TrainingConfig:
    wants_eval = config.do_eval
    if wants_eval is None:
        wants_eval = bool(config.eval_file) or config.evaluation_strategy != "no" or config.do_generation
    wants_train = config.do_train
    if wants_train is None:
        wants_train = bool(config.train_file) or not config.do_eval
    if not (wants_train or wants_eval):
        raise ConfigError("nothing to do: give --do_train, --do_eval or both")
    if config.eval_file and not wants_eval and config.generate_num == 0:
        notices.append(f"--eval_file {config.eval_file} is not used, because --do_eval is False")
    if config.train_file and config.dataset_name_or_path:
        raise ConfigError("--train_file and --dataset_name_or_path both bring examples to learn; give one of them")
    dataset = config.dataset_name_or_path
    if not (config.train_file or config.eval_file or dataset):
        if config.do_generation:
            raise ConfigError("no data named: give --train_file and --eval_file, or --dataset_name_or_path")
        dataset = DEFAULT_DATASET
        notices.append(
            f"no data named, so {dataset} is fetched from the Hugging Face hub, as PaddleNLP's script did from its "
            "own; --train_file names yours"
        )
    if wants_train and not (config.train_file or dataset):
        raise ConfigError("--do_train needs examples to learn: give --train_file or --dataset_name_or_path")
    return replace(config, do_train=wants_train, do_eval=wants_eval, dataset_name_or_path=dataset)


def _resolve_device(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    device = config.device
    if device in ("gpu", "cuda") and not machine.has_cuda:
        raise ConfigError(
            f"--device {device}: PyTorch finds no GPU here; use --device cpu, or install a PyTorch built for CUDA"
        )
    if config.fp16 and config.bf16:
        raise ConfigError("--fp16 and --bf16 were both asked for; choose one (bf16 where the GPU has it)")
    on_cpu = device == "cpu" or (device == "auto" and not machine.has_cuda)
    if on_cpu and (config.fp16 or config.bf16):
        notices.append(f"--{'fp16' if config.fp16 else 'bf16'} on a CPU works, but is mostly slower than float32 there")
    if config.torch_compile and on_cpu:
        raise ConfigError(
            "--torch_compile on a CPU makes training 1.7 to 2.3 times slower, because compiled products go to MKL and "
            "not to oneDNN; leave it out"
        )
    if not config.fp16:
        if config.scale_loss != default_of("scale_loss"):
            notices.append(f"--scale_loss {config.scale_loss:g} is not used: only --fp16 scales the loss")
        if config.fp16_opt_level == "O2" and not config.bf16:
            notices.append("--fp16_opt_level O2 is not used: it says how --fp16 or --bf16 compute")
    return replace(config, device="cpu" if on_cpu else "gpu")


def _check_optimizer(config: TrainingConfig, machine: Machine, notices: list[str]) -> None:
    if config.optim != "adamw_8bit" or not config.do_train:
        return
    if not machine.has_bitsandbytes:
        raise ConfigError("--optim adamw_8bit needs: pip install 'bloomlm[optim8bit]'")
    if config.device == "cpu":
        notices.append(
            "--optim adamw_8bit on a CPU saves memory and costs time: an update takes tens of times as long as with "
            "--optim adamw; --gradient_accumulation_steps makes updates rarer"
        )


def _check_adapters(config: TrainingConfig, notices: list[str]) -> None:
    if config.lora and config.prefix_tuning:
        raise ConfigError("--lora and --prefix_tuning were both asked for; a model takes one adapter, choose one")
    if not config.do_train and (config.lora or config.prefix_tuning):
        raise ConfigError(
            "--do_eval alone evaluates --model_name_or_path as it is; a fresh adapter would change nothing. Add "
            "--do_train, or evaluate a trained adapter with `bloomlm predict --data_file`"
        )
    if config.merge_weights and config.prefix_tuning:
        raise ConfigError(
            "--merge_weights adds an adapter into the weights, which a prefix cannot be: its virtual tokens are no "
            "weights. Leave it out; `bloomlm predict --prefix_path` uses the prefix as it is"
        )
    if config.base_quantization == "int8" and not config.lora:
        raise ConfigError(
            "--base_quantization int8 rounds weights that do not learn, beside which --lora trains an adapter; add "
            "--lora, or leave it out"
        )
    if config.merge_weights and not config.lora:
        notices.append("--merge_weights is not used: without --lora the whole model is trained and written anyway")
    if config.prefix_layout is not None and not config.prefix_tuning:
        raise ConfigError("--prefix_layout says how to read a prefix that PaddleNLP began; add --prefix_tuning")
    if config.trained_tensor_parallel_degree is not None and not (config.lora or config.prefix_tuning):
        raise ConfigError(
            "--trained_tensor_parallel_degree says how to read an adapter that PaddleNLP began; add --lora or "
            "--prefix_tuning. The ranks of a whole model are seen in its files"
        )
    note_unused(config, notices, _LORA_FLAGS, config.lora, "--lora")
    note_unused(config, notices, _PREFIX_FLAGS, config.prefix_tuning, "--prefix_tuning")


def _note_idle(config: TrainingConfig, notices: list[str]) -> None:
    if not config.packing:
        raise ConfigError(
            "--packing False would compute pads and change nothing else: losses and gradients of packed examples are "
            "those of padded ones. Leave the flag out"
        )
    size = config.per_device_train_batch_size
    if config.max_tokens_per_batch is not None and size != default_of("per_device_train_batch_size"):
        notices.append(f"--per_device_train_batch_size {size} is not used: --max_tokens_per_batch counts tokens")
    if config.task_name is not None:
        notices.append(f"--task_name {config.task_name} is not used; --dataset_name_or_path or --train_file name data")
    if config.dataloader_num_workers > 0:
        notices.append("--dataloader_num_workers is not used: batches are cut from tokens that are already in memory")
    if config.warmup_steps > 0 and config.warmup_ratio > 0:
        notices.append("--warmup_ratio is not used: --warmup_steps is given too, and wins")
    is_constant = config.lr_scheduler_type.startswith("constant")
    if is_constant and config.lr_decay_ratio != default_of("lr_decay_ratio"):
        notices.append(f"--lr_decay_ratio is not used: --lr_scheduler_type {config.lr_scheduler_type} does not decay")
    if config.lr_scheduler_type == "constant" and (config.warmup_steps > 0 or config.warmup_ratio > 0):
        raise ConfigError(
            "--lr_scheduler_type constant has no warm-up; use constant_with_warmup, or leave the warm-up out"
        )
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise ConfigError("--overwrite_output_dir removes what --resume_from_checkpoint would go on from; choose one")
    if config.resume_from_checkpoint and not config.do_train:
        raise ConfigError("--resume_from_checkpoint goes on training; add --do_train")


def _resolve_reports(config: TrainingConfig, machine: Machine, notices: list[str]) -> TrainingConfig:
    if config.report_to == "tensorboard" and not machine.has_tensorboard:
        raise ConfigError("--report_to tensorboard needs: pip install 'bloomlm[tensorboard]'")
    if config.do_train and not machine.has_matplotlib:
        notices.append("no loss picture: it needs pip install 'bloomlm[plots]'; metrics.jsonl has the numbers")
    if config.report_to != "all":
        return config
    if config.do_train and not machine.has_tensorboard:
        notices.append("no TensorBoard files: they need pip install 'bloomlm[tensorboard]'")
    return replace(config, report_to="tensorboard" if machine.has_tensorboard else "none")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
