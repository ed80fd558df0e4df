"""Fine-tuning from flags to files: puts model, data, adapter, loop and reports together.

The order to read in: finetune, then _Run, whose methods the loop calls between its steps.
"""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.training_state import checkpoint_step
from bloomlm.checkpoint.writer import parse_size
from bloomlm.data.loader import Examples
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.training import output_dir as output
from bloomlm.training.build import build_trainer, load_to_train
from bloomlm.training.checkpoints import CheckpointWriter, restore
from bloomlm.training.checks import Machine, resolve
from bloomlm.training.config import TrainingConfig
from bloomlm.training.evaluate import Evaluator
from bloomlm.training.examples_of_run import RunExamples, load_run_examples
from bloomlm.training.history import History
from bloomlm.training.loop import LoopConfig, StepLog, TrainResult, train
from bloomlm.training.precision import Precision, precision_from_flags
from bloomlm.training.report import (
    Reporter,
    read_train_results,
    train_metrics,
    write_generations,
    write_picture,
    write_results,
)
from bloomlm.training.step import StepResult, Trainer, steps_per_epoch
from bloomlm.training.summary import FinetuneResult, print_summary

__all__ = ["FinetuneResult", "finetune"]

INFERENCES_FILE = "infer_result.json"


def finetune(config: TrainingConfig) -> FinetuneResult:
    """Fine-tune and evaluate a model; in an output_dir with checkpoints, go on from the newest.

    Args:
        config: the flags.

    Raises:
        ConfigError: flags that cannot be used.
        CheckpointError, DataError: files that cannot be used or written.
        TrainingError: the run cannot go on.
    """
    config, notices = resolve(config, Machine.here(has_cuda=torch.cuda.is_available()))
    max_shard_size_bytes = parse_size(config.max_shard_size)
    checkpoint = output.prepare(config)
    console = Console(stderr=True)
    if checkpoint is not None:
        changes = output.changed_flags(config)
        notices = (*notices, f"going on from {checkpoint}" + (f"; since it began: {changes}" if changes else ""))
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    run = _assemble(config, checkpoint, console, max_shard_size_bytes)
    output.write_run_file(config)  # once it is known that the run can begin, or go on
    try:
        result = run.train() if config.do_train else None
        if result is not None and result.interrupted:
            run.reporter.say(f"stopped by SIGTERM after step {result.step}; the same command goes on from there")
            return run.outcome(result, None, None)
        return run.finish(result)
    finally:
        run.reporter.close()


def _assemble(config: TrainingConfig, checkpoint: Path | None, console: Console, max_shard_size_bytes: int) -> "_Run":
    precision = precision_from_flags(
        fp16=config.fp16, bf16=config.bf16, fp16_opt_level=config.fp16_opt_level, scale_loss=config.scale_loss
    )
    source = resolve_source(config.model_name_or_path).directory
    tokenizer = Tokenizer.from_directory(source)
    examples = load_run_examples(config, tokenizer)
    model = load_to_train(config, source, precision, checkpoint)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{config.model_name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding only "
            f"{model.config.vocab_size}; they belong to different models"
        )
    for line in (*examples.descriptions, _describe_parameters(model)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return _Run(config, model, tokenizer, examples, precision, checkpoint, console, max_shard_size_bytes)


class _Run:
    """A run between its start and its end: what the loop calls, and what is written when it is over."""

    def __init__(
        self,
        config: TrainingConfig,
        model: BloomForCausalLM,
        tokenizer: Tokenizer,
        examples: RunExamples,
        precision: Precision,
        checkpoint: Path | None,
        console: Console,
        max_shard_size_bytes: int,
    ) -> None:
        self.config = config
        self.model = model
        self.tokenizer = tokenizer
        self.examples = examples
        self.output_dir = Path(config.output_dir)
        self.max_shard_size_bytes = max_shard_size_bytes
        self.evaluator: Evaluator | None = None
        if examples.dev is not None:
            self.evaluator = Evaluator(model, tokenizer, examples.dev, config, precision)
        self.history = History(max_steps=0, num_train_epochs=config.num_train_epochs)
        self.trainer: Trainer | None = None
        if config.do_train:
            assert examples.train is not None
            self._prepare_training(examples.train, precision, checkpoint)
        self.reporter = Reporter(
            self.output_dir,
            self.history,
            console,
            show_bar=not config.disable_tqdm and bool(config.do_train),
            use_tensorboard=config.report_to == "tensorboard",
        )

    def _prepare_training(self, train_examples: Examples, precision: Precision, checkpoint: Path | None) -> None:
        config = self.config
        trainer, self.max_steps = build_trainer(config, self.model, train_examples, precision)
        self.steps_per_epoch = steps_per_epoch(len(trainer.batches), config.gradient_accumulation_steps)
        self.history.max_steps = self.max_steps
        self.history.num_train_epochs = self.max_steps / self.steps_per_epoch
        if checkpoint is not None:
            restore(trainer, checkpoint)
            self.history.read_logged(checkpoint)
        self.trainer = trainer
        self.begin_epoch = trainer.epoch
        self.checkpoints = CheckpointWriter(
            trainer,
            self.tokenizer,
            self.history,
            output_dir=self.output_dir,
            base_model=_base_model_name(config),
            max_shard_size_bytes=self.max_shard_size_bytes,
            save_total_limit=config.save_total_limit,
            keeps_best=config.load_best_model_at_end,
        )

    def train(self) -> TrainResult:
        """Run the loop."""
        assert self.trainer is not None
        config = self.config
        every = {"no": None, "epoch": self.steps_per_epoch}
        loop = LoopConfig(
            max_steps=self.max_steps,
            logging_steps=config.logging_steps,
            eval_steps=every.get(config.evaluation_strategy, config.eval_steps),
            save_steps=every.get(config.save_strategy, config.save_steps),
        )
        return train(self.trainer, loop, self)

    def on_step(self, result: StepResult) -> None:
        """Note a step."""
        assert self.trainer is not None
        self.history.epoch = self.trainer.epoch
        self.reporter.on_step(result)

    def on_log(self, log: StepLog) -> None:
        """Write the numbers since the last log."""
        self.reporter.on_log(log)

    def on_evaluate(self, step: int) -> None:
        """Evaluate, and note whether this is the best so far among the steps that have a checkpoint."""
        assert self.evaluator is not None and self.config.metric_for_best_model is not None
        metrics = self.evaluator.run()
        self.reporter.add_evaluation(metrics)
        if self._will_be_saved(step):
            self.history.note_best(
                metrics[self.config.metric_for_best_model],
                step,
                greater_is_better=bool(self.config.greater_is_better),
            )

    def on_save(self, step: int) -> None:
        """Write checkpoint-STEP."""
        self.checkpoints.save(step)

    def finish(self, result: TrainResult | None) -> FinetuneResult:
        """Write everything that stays: the model, results, picture, generations."""
        config = self.config
        merged_path = picture_path = None
        final_step = self.history.global_step
        if result is not None:
            if config.load_best_model_at_end and self.history.best_model_checkpoint is not None:
                final_step = checkpoint_step(Path(self.history.best_model_checkpoint))
                self.checkpoints.restore(final_step)
                self.reporter.say(f"the best checkpoint is {self.history.best_model_checkpoint}; it is the result")
            output.install(self.output_dir, self.checkpoints.write_learned)
            if config.merge_weights and config.lora:
                merged_path = self.output_dir / output.MERGED_DIRECTORY
                merge_to_directory(
                    self.model,
                    merged_path,
                    tokenizer=self.tokenizer,
                    max_shard_size_bytes=self.max_shard_size_bytes,
                )
        eval_metrics = self._final_evaluation(final_step)
        if config.generate_num > 0:
            self._generate(config.generate_num)
        if result is not None:
            picture_path = write_picture(self.history, self.output_dir, _title(config))
            self.history.write(self.output_dir)
        self.reporter.close()
        outcome = self.outcome(result, eval_metrics, merged_path, picture_path)
        write_results(self.output_dir, outcome.train_metrics, eval_metrics)
        print_summary(Console(), config, outcome, self._example_prompt())
        return outcome

    def outcome(
        self,
        result: TrainResult | None,
        eval_metrics: dict[str, Any] | None,
        merged_path: Path | None,
        picture_path: Path | None = None,
    ) -> FinetuneResult:
        """What there is to tell about the run."""
        metrics = None
        if result is not None:
            assert self.examples.train is not None
            num_examples = round((self.history.epoch - self.begin_epoch) * len(self.examples.train))
            metrics = train_metrics(result, self.history.epoch, num_examples)
            if result.num_steps == 0:  # all was done before: what was measured then stands
                metrics = read_train_results(self.output_dir) or metrics
        best = self.history.best_model_checkpoint
        return FinetuneResult(
            output_dir=self.output_dir,
            step=self.history.global_step,
            interrupted=result is not None and result.interrupted,
            train_metrics=metrics,
            eval_metrics=eval_metrics,
            best_checkpoint=None if best is None else self.output_dir / best,
            merged_path=merged_path,
            picture_path=picture_path,
        )

    def _will_be_saved(self, step: int) -> bool:
        if self.config.save_strategy == "no":
            return False
        every = self.steps_per_epoch if self.config.save_strategy == "epoch" else self.config.save_steps
        return step % every == 0 or step == self.max_steps

    def _final_evaluation(self, step: int) -> dict[str, Any] | None:
        """Metrics of the final model: those of the step it comes from, computed only if it was not evaluated then."""
        if self.evaluator is None or not self.config.do_eval:
            return None
        logged = self.history.evaluation_of(step) if self.config.do_train else None
        if logged is None:
            metrics = self.evaluator.run()
            self.reporter.add_evaluation(metrics)
            return metrics
        return {name: value for name, value in logged.items() if name.startswith("eval_")}

    def _generate(self, count: int) -> None:
        examples = self.examples.dev or self.examples.train
        assert examples is not None
        chosen = [examples[index] for index in range(min(count, len(examples)))]
        evaluator = self.evaluator or Evaluator(self.model, self.tokenizer, examples, self.config, Precision())
        rows = [
            {"instruction": example.source_text, "answer": example.target_text, "output": answer}
            for example, answer in zip(chosen, evaluator.answers(chosen), strict=True)
        ]
        write_generations(self.output_dir / INFERENCES_FILE, rows)

    def _example_prompt(self) -> str | None:
        examples = self.examples.dev or self.examples.train
        return None if examples is None else examples[0].source_text


def _base_model_name(config: TrainingConfig) -> str:
    """What an adapter's files call its model: a directory by its full path, so that PEFT finds it from anywhere."""
    path = Path(config.model_name_or_path).expanduser()
    return str(path.resolve()) if path.is_dir() else config.model_name_or_path


def _describe_parameters(model: BloomForCausalLM) -> str:
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"model: {total:,} parameters, {learned:,} ({learned / total:.2%}) of them learn"


def _title(config: TrainingConfig) -> str:
    data = config.dataset_name_or_path or Path(config.train_file or "").name
    how = "whole model"
    if config.lora:
        how = f"LoRA, r {config.r}"
    elif config.prefix_tuning:
        how = f"{config.num_prefix_tokens} prefix tokens"
    if config.label_smoothing:
        how += f", label smoothing {config.label_smoothing:g} in training"
    name = config.model_name_or_path
    return f"{name if ':' in name else '/'.join(Path(name).parts[-2:])} on {data} ({how})"
