"""The parts of a RunPlan that follow from flags alone, one function a section.

The flags have been checked, and values that depend on others filled in.
"""

from pathlib import Path
from typing import Any

from bloomlm.checkpoint.writer import parse_size
from bloomlm.data.loader import TokenBudget
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling, Strategy
from bloomlm.training.config import TrainingConfig
from bloomlm.training.early_stopping import EarlyStopping
from bloomlm.training.objectives.base import Objective
from bloomlm.training.objectives.cross_entropy import CrossEntropy
from bloomlm.training.objectives.dpo import Dpo
from bloomlm.training.objectives.kto import Kto
from bloomlm.training.objectives.orpo import Orpo
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.run_plan import DataPlan, EvaluationPlan, Interval, OutputPlan, TrainingPlan
from bloomlm.training.step import StepConfig


def data_plan(config: TrainingConfig) -> DataPlan:
    """Where the examples are."""
    return DataPlan(
        dataset_name_or_path=config.dataset_name_or_path,
        train_file=config.train_file,
        mixture=config.mixture,
        eval_file=config.eval_file,
        prompt_template=config.prompt_template,
        src_length=config.src_length,
        tgt_length=config.tgt_length,
        max_length=config.max_length,
        chat_template=config.chat_template,
        learn_last_turn=config.learn_last_turn,
        show_progress=not config.disable_tqdm,
    )


def objective_plan(config: TrainingConfig) -> Objective[Any]:
    """What is minimised."""
    beta = config.preference_beta
    match config.preference:
        case None:
            return CrossEntropy(label_smoothing=config.label_smoothing)
        case "dpo":
            return Dpo(beta=beta, label_smoothing=config.label_smoothing)
        case "orpo":
            return Orpo(beta=beta)
        case "kto":
            weights = config.desirable_weight, config.undesirable_weight
            return Kto(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])


def fuses_update(config: TrainingConfig, num_processes: int) -> bool:
    """Whether weights are updated within the backward pass: all of them learn, and nothing needs all gradients first.

    What learns beside an adapter is too small to be worth it.
    """
    learns_all = not (config.lora or config.prefix_tuning)
    is_one_microbatch = num_processes == 1 and config.gradient_accumulation_steps == 1
    return learns_all and is_one_microbatch and config.max_grad_norm == 0 and not config.fp16


def training_plan(config: TrainingConfig, num_processes: int) -> TrainingPlan:
    """How the model learns in a job of so many processes."""
    budget = config.max_tokens_per_batch
    return TrainingPlan(
        batch_size=config.per_device_train_batch_size if budget is None else TokenBudget(budget),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps if config.max_steps > 0 else None,
        step=StepConfig(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            fuses_update=fuses_update(config, num_processes),
        ),
        optimizer=AdamWConfig(
            weight_decay=config.weight_decay,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
            optim=config.optim,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
        ),
        schedule=ScheduleConfig(
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            warmup_ratio=config.warmup_ratio,
            lr_decay_ratio=config.lr_decay_ratio,
        ),
        logging_steps=config.logging_steps,
        evaluate_every=_interval(config.evaluation_strategy, config.eval_steps),
        save_every=_interval(config.save_strategy, config.save_steps),
        early_stopping=_early_stopping(config),
    )


def _early_stopping(config: TrainingConfig) -> EarlyStopping | None:
    if config.early_stopping_patience is None:
        return None
    return EarlyStopping(
        metric=config.metric_for_best_model or "eval_loss",
        greater_is_better=bool(config.greater_is_better),
        patience=config.early_stopping_patience,
        threshold=config.early_stopping_threshold,
    )


def _interval(strategy: str, steps: int | None) -> Interval | None:
    return None if strategy == "no" else Interval(None if strategy == "epoch" else steps)


def evaluation_plan(config: TrainingConfig) -> EvaluationPlan:
    """How it is evaluated."""
    return EvaluationPlan(
        evaluates=bool(config.do_eval),
        batch_size=config.per_device_eval_batch_size,
        scores_answers=config.do_generation,
        decoding=_decoding(config),
        num_written_answers=config.generate_num,
        best_metric=config.metric_for_best_model or "eval_loss",
        greater_is_better=bool(config.greater_is_better),
    )


def _decoding(config: TrainingConfig) -> GenerationConfig:
    """Greedy decoding unless the flags ask for a beam search or for sampling."""
    top_k = config.top_k or 0 if config.select_topk else 0
    top_p = config.top_p or 0.0
    strategy: Strategy = Greedy()
    if config.num_beams is not None and config.num_beams > 1:
        penalty = 1.0 if config.length_penalty is None else config.length_penalty
        strategy = BeamSearch(num_beams=config.num_beams, length_penalty=penalty)
    elif top_k > 1 or top_p > 0:
        # as a flag, top_p 0 means off; in Sampling, 1.0 keeps all tokens
        strategy = Sampling(top_k=top_k, top_p=top_p or 1.0, seed=config.seed)
    return GenerationConfig(
        strategy=strategy,
        max_new_tokens=config.tgt_length,
        min_new_tokens=config.min_tgt_length,
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
    )


def output_plan(config: TrainingConfig) -> OutputPlan:
    """What is written."""
    chosen = config.resume_from_checkpoint
    return OutputPlan(
        directory=Path(config.output_dir),
        overwrites=config.overwrite_output_dir,
        resume_from=None if chosen is None else Path(chosen),
        save_total_limit=config.save_total_limit,
        ends_with_best=config.load_best_model_at_end,
        merges_adapter=config.merge_weights and config.lora,
        max_shard_size_bytes=parse_size(config.max_shard_size),
    )
