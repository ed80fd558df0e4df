"""What the flags of a run mean for its evaluations: when, by which decoding, and which checkpoint is the best."""

from dataclasses import replace

from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig, note_unused

LOSS_METRICS = ("eval_loss", "eval_ppl")
TOKEN_METRICS = (*LOSS_METRICS, "eval_accuracy")
GENERATION_METRICS = ("eval_exact_match", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu4", "eval_chrf")

# Flags that act only on generated answers.
_DECODING_FLAGS = ("num_beams", "length_penalty", "top_k", "top_p", "select_topk", "no_repeat_ngram_size")


def resolve_evaluation(config: TrainingConfig, notices: list[str], *, has_metrics: bool) -> TrainingConfig:
    """Check these flags together and fill in what was left open.

    Args:
        config: with its tasks resolved.
        notices: gets a line about each flag that does nothing.
        has_metrics: whether ROUGE and BLEU can be computed here.

    Raises:
        ConfigError: flags that cannot be used, or not together, with the reason.
    """
    config = _resolve_times(config, notices)
    _check_decoding(config, notices, has_metrics=has_metrics)
    return _resolve_best_model(config)


def _resolve_times(config: TrainingConfig, notices: list[str]) -> TrainingConfig:
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


def _check_decoding(config: TrainingConfig, notices: list[str], *, has_metrics: bool) -> None:
    if config.do_generation and not config.do_eval:
        raise ConfigError("--do_generation is part of the evaluation; it contradicts --do_eval False")
    if config.do_generation and not has_metrics:
        raise ConfigError("--do_generation computes ROUGE and BLEU, which need: pip install 'bloomlm[metrics]'")
    generates = config.do_generation or config.generate_num > 0
    # PaddleNLP's command lines always give min_tgt_length; 0 is the default, so it never shows here.
    note_unused(config, notices, (*_DECODING_FLAGS, "min_tgt_length"), generates, "--do_generation or --generate_num")
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
