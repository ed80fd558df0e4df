"""Checks of flags against each other: some combinations are refused, some flags do nothing, some values follow.

Each function gets the flags as resolved so far. It raises ConfigError, with the reason, for flags that cannot be used
together, and adds a line to `notices` for each flag that does nothing and each value that it decides.
"""

from dataclasses import replace
from typing import Any

from bloomlm.errors import ConfigError
from bloomlm.parallel.mesh import Degrees
from bloomlm.training.config import TrainingConfig, default_of
from bloomlm.training.data_checks import check_data, is_text_metric
from bloomlm.training.objectives.base import Objective

DEFAULT_DATASET = "BelleGroup/school_math_0.25M"
"""The data set, on the Hugging Face hub, that finetune_generation.py has always used if none is named."""

# Flags that act only if another one is given.
_LORA_FLAGS = (
    "loraplus_lr_ratio",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "use_rslora",
    "use_dora",
    "train_new_tokens",
)
_PREFIX_FLAGS = ("num_prefix_tokens", "prefix_projection")
GENERATION_METRICS = ("eval_exact_match", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu4", "eval_chrf")

_DECODING_FLAGS = ("num_beams", "length_penalty", "top_k", "top_p", "select_topk", "no_repeat_ngram_size")


def check_parallelism(config: TrainingConfig, degrees: Degrees, notices: list[str]) -> None:
    """Check how the processes divide the work; `degrees` is how the flags divide all processes of the job."""
    if config.pipeline_parallel_degree not in (-1, 1):
        raise ConfigError(
            f"--pipeline_parallel_degree {config.pipeline_parallel_degree}: bloomlm has no pipeline parallelism; leave "
            "the flag out, and divide the model by --tensor_parallel_degree and --sharding stage3"
        )
    alone = {
        f"--base_quantization {config.base_quantization}": config.base_quantization != "none",
        "--torch_compile": config.torch_compile,
        "--optim adamw_8bit": config.optim == "adamw_8bit",
    }
    processes = degrees.world_size
    if processes > 1 and (given := [flag for flag, is_given in alone.items() if is_given]):
        raise ConfigError(f"{', '.join(given)}: needs a single process, and there are {processes}; leave it out")
    if config.sharding and degrees.dp_shard == 1:
        raise ConfigError(
            f"--sharding {config.sharding} divides weights and optimizer state among data-parallel processes, and "
            f"there is one ({processes} / tensor_parallel_degree {degrees.tp} / sharding_parallel_degree "
            f"{config.sharding_parallel_degree}); leave it out, or start more processes with --num_processes"
        )
    if config.sharding == "stage1":
        notices.append(
            "--sharding stage1 is computed as stage2, which divides gradients too and gives the same numbers"
        )
    if degrees.dp > 1:
        notices.append(
            f"{degrees.dp} data-parallel processes: a step learns from {degrees.dp} times "
            "per_device_train_batch_size examples"
        )


def resolve_tasks(config: TrainingConfig, notices: list[str]) -> TrainingConfig:
    """Decide whether to train and to evaluate, and on which data."""
    if config.max_steps <= 0 and not config.num_train_epochs > 0:
        raise ConfigError(f"--num_train_epochs is {config.num_train_epochs}; expected above 0, or give --max_steps")
    wants_eval = config.do_eval
    if wants_eval is None:
        wants_eval = bool(config.eval_file) or config.evaluation_strategy != "no" or config.do_generation
    wants_train = config.do_train
    if wants_train is None:
        wants_train = bool(config.train_file or config.mixture) or not config.do_eval
    if not (wants_train or wants_eval):
        raise ConfigError("nothing to do: give --do_train, --do_eval or both")
    if config.eval_file and not wants_eval and config.generate_num == 0:
        notices.append(f"--eval_file {config.eval_file} is not used, because --do_eval is False")
    check_data(config)
    dataset = config.dataset_name_or_path
    if not (config.train_file or config.mixture or config.eval_file or dataset):
        if config.do_generation:
            raise ConfigError("no data is named: give --train_file and --eval_file, or --dataset_name_or_path")
        dataset = DEFAULT_DATASET
        notices.append(
            f"no data is named, so {dataset} is downloaded from the Hugging Face hub, as finetune_generation.py has "
            "always done; --train_file names other data"
        )
    if wants_train and not (config.train_file or config.mixture or dataset):
        raise ConfigError("--do_train needs training data: give --train_file, --mixture or --dataset_name_or_path")
    return replace(config, do_train=wants_train, do_eval=wants_eval, dataset_name_or_path=dataset)


def resolve_device(config: TrainingConfig, notices: list[str], *, has_cuda: bool, has_bf16: bool) -> TrainingConfig:
    """Decide where to compute, and check the number formats."""
    device = config.device
    if device in ("gpu", "cuda") and not has_cuda:
        raise ConfigError(
            f"--device {device}: PyTorch finds no GPU; use --device cpu, or install a PyTorch built for CUDA"
        )
    if config.fp16 and config.bf16:
        raise ConfigError("--fp16 and --bf16 are both given; choose one (bf16 if the GPU supports it)")
    on_cpu = device == "cpu" or (device == "auto" and not has_cuda)
    if on_cpu and config.fp16:
        notices.append("--fp16 works on a CPU, but is usually slower than float32")
    if on_cpu and config.bf16 and not has_bf16:
        notices.append(
            "--bf16 will be slow: this processor has no instructions for bf16 (AVX512_BF16 or AMX); leave it out"
        )
    if config.torch_compile and on_cpu:
        raise ConfigError(
            "--torch_compile makes training on a CPU 1.7 to 2.3 times slower, because compiled products use MKL and "
            "not oneDNN; leave it out"
        )
    if not config.fp16:
        if config.scale_loss != default_of("scale_loss"):
            notices.append(f"--scale_loss {config.scale_loss:g} is not used: only --fp16 scales the loss")
        if config.fp16_opt_level == "O2" and not config.bf16:
            notices.append("--fp16_opt_level O2 is not used without --fp16 or --bf16")
    return replace(config, device="cpu" if on_cpu else "gpu")


def check_optimizer(config: TrainingConfig, notices: list[str], *, has_bitsandbytes: bool) -> None:
    """Check that bitsandbytes is there for what needs it, and that the optimizer suits the resolved device."""
    if config.base_quantization == "nf4" and not has_bitsandbytes:
        raise ConfigError("--base_quantization nf4 needs: pip install 'bloomlm[nf4]'")
    if config.optim != "adamw_8bit" or not config.do_train:
        return
    if not has_bitsandbytes:
        raise ConfigError("--optim adamw_8bit needs: pip install 'bloomlm[optim8bit]'")
    if config.device == "cpu":
        notices.append(
            "--optim adamw_8bit on a CPU saves memory but makes an update tens of times slower than --optim adamw; "
            "--gradient_accumulation_steps makes updates rarer"
        )


def check_adapters(config: TrainingConfig, notices: list[str]) -> None:
    """Check which adapter learns, and what is done with it."""
    if config.lora and config.prefix_tuning:
        raise ConfigError("--lora and --prefix_tuning are both given; a model takes one adapter, choose one")
    if not config.do_train and (config.lora or config.prefix_tuning):
        raise ConfigError(
            "--do_eval without --do_train evaluates --model_name_or_path, and a fresh adapter would change nothing. "
            "Add --do_train, or evaluate a trained adapter with `bloomlm predict --data_file`"
        )
    if config.merge_weights and config.prefix_tuning:
        raise ConfigError(
            "--merge_weights adds an adapter to the weights, which is impossible for the virtual tokens of a prefix. "
            "Leave it out; `bloomlm predict --prefix_path` uses the prefix as it is"
        )
    if config.base_quantization != "none" and not config.lora:
        raise ConfigError(
            f"--base_quantization {config.base_quantization} rounds the weights that do not learn, and without --lora "
            "all weights learn; add --lora, or leave it out"
        )
    if config.merge_weights and not config.lora:
        notices.append("--merge_weights is not used: without --lora the whole model is trained and written")
    if config.prefix_layout is not None and not config.prefix_tuning:
        raise ConfigError("--prefix_layout says how to read a prefix of another program; add --prefix_tuning")
    if config.trained_tensor_parallel_degree is not None and not (config.lora or config.prefix_tuning):
        raise ConfigError(
            "--trained_tensor_parallel_degree says how to read an adapter of another program; add --lora or "
            "--prefix_tuning. For a whole model its files show the degree"
        )
    note_unused(config, notices, _LORA_FLAGS, config.lora, "--lora")
    note_unused(config, notices, _PREFIX_FLAGS, config.prefix_tuning, "--prefix_tuning")


def resolve_evaluation_times(config: TrainingConfig, notices: list[str]) -> TrainingConfig:
    """Decide when to evaluate during training."""
    strategy = config.evaluation_strategy
    if not config.do_eval:
        if strategy != "no":
            raise ConfigError(f"--evaluation_strategy {strategy} and --do_eval False contradict each other")
        if config.load_best_model_at_end:
            raise ConfigError("--load_best_model_at_end needs evaluations to find the best checkpoint; add --do_eval")
        if config.eval_steps is not None:
            notices.append("--eval_steps is not used without --do_eval or --eval_file")
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


def check_decoding(config: TrainingConfig, notices: list[str], *, has_metrics: bool) -> None:
    """Check how answers are generated."""
    if config.min_tgt_length > config.tgt_length:
        raise ConfigError(f"--min_tgt_length {config.min_tgt_length} is above --tgt_length {config.tgt_length}")
    if config.do_generation and not config.do_eval:
        raise ConfigError("--do_generation is a part of evaluation and contradicts --do_eval False")
    if config.do_generation and not has_metrics:
        raise ConfigError("--do_generation computes ROUGE and BLEU, which need: pip install 'bloomlm[metrics]'")
    generates = config.do_generation or config.generate_num > 0
    # older command lines always give --min_tgt_length 0, which is the default and so causes no notice
    note_unused(config, notices, (*_DECODING_FLAGS, "min_tgt_length"), generates, "--do_generation or --generate_num")
    searches_beams = (config.num_beams or 1) > 1
    samples = (config.top_k or 0) > 1 or (config.top_p or 0.0) > 0
    if not config.select_topk:
        if not config.top_p:
            raise ConfigError("--select_topk False samples by --top_p alone; give --top_p, for example 0.9")
        if config.top_k:
            notices.append(f"--top_k {config.top_k} is not used: --select_topk is False")
    if searches_beams and samples:
        raise ConfigError("--num_beams searches, but --top_k and --top_p sample; give one kind of decoding")
    if config.length_penalty is not None and not searches_beams and generates:
        notices.append("--length_penalty is not used: it acts in a beam search, with --num_beams above 1")


def resolve_best_model(config: TrainingConfig, objective: Objective[Any]) -> TrainingConfig:
    """Decide which metric of the objective or of answers chooses the best checkpoint, which must then exist."""
    if not config.do_eval:
        return config
    metric = config.metric_for_best_model or "eval_loss"
    metric = metric if metric.startswith("eval_") else f"eval_{metric}"
    known = (*objective.metric_names, *(GENERATION_METRICS if config.do_generation else ()))
    # those of raw text also depend on the data, see check_best_metric
    is_of_text = objective.compared_set is None and is_text_metric(metric)
    if metric not in known and not is_of_text:
        hint = "; it needs --do_generation" if metric in GENERATION_METRICS else ""
        raise ConfigError(
            f"--metric_for_best_model {config.metric_for_best_model}{hint}; this run computes {', '.join(known)}"
        )
    greater = config.greater_is_better
    config = replace(
        config,
        metric_for_best_model=metric,
        greater_is_better=not (is_of_text or metric in objective.lower_is_better) if greater is None else greater,
    )
    if config.load_best_model_at_end and config.do_train:
        _check_best_is_saved(config)
    return config


def _check_best_is_saved(config: TrainingConfig) -> None:
    if config.save_strategy != config.evaluation_strategy:
        raise ConfigError(
            f"--load_best_model_at_end needs a checkpoint for each evaluation, but --save_strategy is "
            f"{config.save_strategy} and --evaluation_strategy is {config.evaluation_strategy}; they must be equal"
        )
    if config.save_strategy == "steps" and config.save_steps % (config.eval_steps or 1):
        raise ConfigError(
            f"--load_best_model_at_end needs an evaluation for each checkpoint, but --save_steps {config.save_steps} "
            f"is not a multiple of --eval_steps {config.eval_steps}"
        )


def check_unused(config: TrainingConfig, notices: list[str]) -> None:
    """Check for other flags that would change nothing."""
    if not config.packing:
        raise ConfigError(
            "--packing False would only waste time on padding: packed and padded examples have the same losses and "
            "gradients. Leave the flag out"
        )
    size = config.per_device_train_batch_size
    if config.max_tokens_per_batch is not None and size != default_of("per_device_train_batch_size"):
        notices.append(f"--per_device_train_batch_size {size} is not used: --max_tokens_per_batch counts tokens")
    if config.task_name is not None:
        notices.append(
            f"--task_name {config.task_name} is not used: --dataset_name_or_path or --train_file name the data"
        )
    if config.dataloader_num_workers > 0:
        notices.append("--dataloader_num_workers is not used: batches are slices of tokens that are in memory already")
    if config.warmup_steps > 0 and config.warmup_ratio > 0:
        notices.append("--warmup_ratio is not used: --warmup_steps is given too and overrides it")
    if config.find_learning_rate and (not config.do_train or config.resume_from_checkpoint):
        raise ConfigError("--find_learning_rate tries rates on a fresh model; add --do_train, and resume from nothing")
    if config.find_learning_rate and config.learning_rate != default_of("learning_rate"):
        notices.append(f"--learning_rate {config.learning_rate:g} is not used: --find_learning_rate looks for one")
    if config.early_stopping_patience is not None and not (config.do_train and config.do_eval):
        raise ConfigError("--early_stopping_patience counts evaluations during training; add --do_train and --do_eval")
    if config.early_stopping_patience is None and config.early_stopping_threshold > 0:
        notices.append("--early_stopping_threshold is not used without --early_stopping_patience")
    is_constant = config.lr_scheduler_type.startswith("constant")
    if is_constant and config.lr_decay_ratio != default_of("lr_decay_ratio"):
        notices.append(f"--lr_decay_ratio is not used: --lr_scheduler_type {config.lr_scheduler_type} does not decay")
    if config.lr_scheduler_type == "constant" and (config.warmup_steps > 0 or config.warmup_ratio > 0):
        raise ConfigError(
            "--lr_scheduler_type constant has no warm-up; use constant_with_warmup, or leave the warm-up out"
        )
    if config.overwrite_output_dir and config.resume_from_checkpoint:
        raise ConfigError("--overwrite_output_dir removes the checkpoint of --resume_from_checkpoint; choose one")
    if config.resume_from_checkpoint and not config.do_train:
        raise ConfigError("--resume_from_checkpoint resumes training; add --do_train")


def note_unused(config: TrainingConfig, notices: list[str], names: tuple[str, ...], acts: bool, needed: str) -> None:
    """Unless `acts`, add a notice that the given ones among the named flags do nothing without `needed`."""
    given = [f"--{name}" for name in names if getattr(config, name) != default_of(name)]
    if given and not acts:
        notices.append(f"{', '.join(given)}: not used without {needed}")
