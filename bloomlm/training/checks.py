"""What the flags of a run mean together: refuses what cannot act, fills in what depends on other flags, says so.

Pure: what the machine has is handed in. Resolving a resolved config changes nothing, so it can be fed back.
"""

import importlib.util
from dataclasses import dataclass, fields, replace

from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig

DEFAULT_DATASET = "BelleGroup/school_math_0.25M"
"""What PaddleNLP's script learned when no data was named; this is its name on the Hugging Face hub."""

LOSS_METRICS = ("eval_loss", "eval_ppl")
TOKEN_METRICS = (*LOSS_METRICS, "eval_accuracy")
GENERATION_METRICS = ("eval_exact_match", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu4")

# Flags that act only where another one is on: (that one, its name, what needs it).
_LORA_FLAGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
_PREFIX_FLAGS = ("num_prefix_tokens", "prefix_projection")
_DECODING_FLAGS = ("num_beams", "length_penalty", "top_k", "top_p", "select_topk", "no_repeat_ngram_size")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use here."""

    has_cuda: bool
    has_tensorboard: bool
    has_matplotlib: bool
    has_metrics: bool

    @classmethod
    def here(cls, *, has_cuda: bool) -> "Machine":
        """Look which optional packages are installed."""
        return cls(
            has_cuda=has_cuda,
            has_tensorboard=_installed("tensorboard"),
            has_matplotlib=_installed("matplotlib"),
            has_metrics=_installed("sacrebleu") and _installed("rouge_score"),
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
    _check_parallelism(config)
    config = _resolve_tasks(config, notices)
    config = _resolve_device(config, machine, notices)
    _check_adapters(config, notices)
    config = _resolve_evaluation(config, notices)
    _check_decoding(config, machine, notices)
    config = _resolve_best_model(config)
    _note_idle(config, notices)
    return _resolve_reports(config, machine, notices), tuple(notices)


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


def _check_parallelism(config: TrainingConfig) -> None:
    for name in ("tensor_parallel_degree", "pipeline_parallel_degree", "sharding_parallel_degree"):
        if getattr(config, name) not in (-1, 1):
            raise ConfigError(
                f"--{name} {getattr(config, name)}: this build runs on one process; leave the flag out. "
                "To save memory use --lora, --recompute, a smaller --per_device_train_batch_size with more "
                "--gradient_accumulation_steps, or --bf16"
            )
    if config.sharding:
        raise ConfigError(
            f"--sharding {config.sharding} spreads the optimizer over processes, and this build runs on one; "
            "leave the flag out"
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
    if not config.fp16:
        if config.scale_loss != _default("scale_loss"):
            notices.append(f"--scale_loss {config.scale_loss:g} is not used: only --fp16 scales the loss")
        if config.fp16_opt_level == "O2" and not config.bf16:
            notices.append("--fp16_opt_level O2 is not used: it says how --fp16 or --bf16 compute")
    return replace(config, device="cpu" if on_cpu else "gpu")


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
    if config.merge_weights and not config.lora:
        notices.append("--merge_weights is not used: without --lora the whole model is trained and written anyway")
    _note_unused(config, notices, _LORA_FLAGS, config.lora, "--lora")
    _note_unused(config, notices, _PREFIX_FLAGS, config.prefix_tuning, "--prefix_tuning")


def _resolve_evaluation(config: TrainingConfig, notices: list[str]) -> TrainingConfig:
    strategy = config.evaluation_strategy
    if not config.do_eval:
        if strategy != "no":
            raise ConfigError(f"--evaluation_strategy {strategy} and --do_eval False contradict each other")
        if config.load_best_model_at_end:
            raise ConfigError("--load_best_model_at_end needs evaluations to find the best: add --do_eval")
        if config.eval_steps is not None:
            notices.append("--eval_steps is not used: nothing is evaluated without --do_eval or --eval_file")
        return config
    if config.do_train and strategy == "no":
        strategy = "steps"
    eval_steps = config.eval_steps
    if strategy == "steps" and eval_steps is None:
        eval_steps = config.logging_steps
    if strategy == "epoch" and eval_steps is not None:
        notices.append("--eval_steps is not used: --evaluation_strategy epoch evaluates after each epoch")
        eval_steps = None
    return replace(config, evaluation_strategy=strategy, eval_steps=eval_steps)


def _check_decoding(config: TrainingConfig, machine: Machine, notices: list[str]) -> None:
    if config.do_generation and not config.do_eval:
        raise ConfigError("--do_generation is part of the evaluation; it contradicts --do_eval False")
    if config.do_generation and not machine.has_metrics:
        raise ConfigError("--do_generation computes ROUGE and BLEU, which need: pip install 'bloomlm[metrics]'")
    generates = config.do_generation or config.generate_num > 0
    # PaddleNLP's command lines always give min_tgt_length; 0 is the default, so it never shows here.
    _note_unused(config, notices, (*_DECODING_FLAGS, "min_tgt_length"), generates, "--do_generation or --generate_num")
    searches_beams = (config.num_beams or 1) > 1
    samples = (config.top_k or 0) > 1 or (config.top_p or 0.0) > 0
    if not config.select_topk:
        if not config.top_p:
            raise ConfigError("--select_topk False draws by --top_p alone; give --top_p, for example 0.9")
        if config.top_k:
            notices.append(f"--top_k {config.top_k} is not used: --select_topk is False")
    if searches_beams and samples:
        raise ConfigError("--num_beams searches and --top_k or --top_p draw; give one kind of decoding")
    if config.length_penalty is not None and not searches_beams and generates:
        notices.append("--length_penalty is not used: it weighs the results of a beam search, --num_beams above 1")


def _resolve_best_model(config: TrainingConfig) -> TrainingConfig:
    if not config.do_eval:
        return config
    metric = config.metric_for_best_model or "eval_loss"
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    known = (*TOKEN_METRICS, *GENERATION_METRICS) if config.do_generation else TOKEN_METRICS
    if metric not in known:
        hint = "; it needs --do_generation" if metric in GENERATION_METRICS else ""
        raise ConfigError(
            f"--metric_for_best_model {config.metric_for_best_model}{hint}; this run has {', '.join(known)}"
        )
    greater = config.greater_is_better
    config = replace(
        config,
        metric_for_best_model=metric,
        greater_is_better=metric not in LOSS_METRICS if greater is None else greater,
    )
    if config.load_best_model_at_end and config.do_train:
        _check_best_is_saved(config)
    return config


def _check_best_is_saved(config: TrainingConfig) -> None:
    if config.save_strategy != config.evaluation_strategy:
        raise ConfigError(
            f"--load_best_model_at_end needs a checkpoint of what was evaluated, but --save_strategy is "
            f"{config.save_strategy} and --evaluation_strategy {config.evaluation_strategy}; give both the same"
        )
    if config.save_strategy == "steps" and config.save_steps % (config.eval_steps or 1):
        raise ConfigError(
            f"--load_best_model_at_end needs every checkpoint to be evaluated, but --save_steps {config.save_steps} "
            f"is no multiple of --eval_steps {config.eval_steps}"
        )


def _note_idle(config: TrainingConfig, notices: list[str]) -> None:
    if config.task_name is not None:
        notices.append(f"--task_name {config.task_name} is not used; --dataset_name_or_path or --train_file name data")
    if config.dataloader_num_workers > 0:
        notices.append("--dataloader_num_workers is not used: batches are cut from tokens that are already in memory")
    if config.warmup_steps > 0 and config.warmup_ratio > 0:
        notices.append("--warmup_ratio is not used: --warmup_steps is given too, and wins")
    is_constant = config.lr_scheduler_type.startswith("constant")
    if is_constant and config.lr_decay_ratio != _default("lr_decay_ratio"):
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


def _note_unused(config: TrainingConfig, notices: list[str], names: tuple[str, ...], acts: bool, needed: str) -> None:
    given = [f"--{name}" for name in names if getattr(config, name) != _default(name)]
    if given and not acts:
        notices.append(f"{', '.join(given)}: not used without {needed}")


_DEFAULTS = {item.name: item.default for item in fields(TrainingConfig)}


def _default(name: str) -> object:
    return _DEFAULTS[name]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
