"""Fine-tuning from flags to files: puts model, data, adapter, loop and reports together.

The order to read in: finetune, then _Run, whose methods the loop calls between its steps.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.formats import reading_from_flags
from bloomlm.checkpoint.main_rank import main_first, on_main
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.training_state import checkpoint_step
from bloomlm.checkpoint.writer import parse_size
from bloomlm.data.loader import Examples
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError
from bloomlm.flags import reading_flags
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import check_agreement, joined_ranks
from bloomlm.parallel.mesh import Mesh
from bloomlm.training import output_dir as output
from bloomlm.training.build import build_trainer, load_to_train
from bloomlm.training.checkpoints import CheckpointWriter
from bloomlm.training.checks import Machine, degrees_of, resolve
from bloomlm.training.config import TrainingConfig
from bloomlm.training.evaluate import Evaluator
from bloomlm.training.examples_of_run import RunExamples, load_run_examples
from bloomlm.training.history import History
from bloomlm.training.loop import LoopConfig, StepLog, TrainResult, train
from bloomlm.training.meter import BatchMeter, StepFlops, measure_peak_flops, memory_by_kind
from bloomlm.training.precision import Precision, precision_from_flags
from bloomlm.training.profile import PROFILE_DIRECTORY, StepProfiler
from bloomlm.training.report import (
    Reporter,
    read_train_results,
    train_metrics,
    write_generations,
    write_picture,
    write_results,
)
from bloomlm.training.resume import Begun, read_begun, restore_begun, with_recorded_flags
from bloomlm.training.step import StepResult, Trainer, steps_per_epoch
from bloomlm.training.summary import FinetuneResult, describe_parameters, print_summary, run_title
from bloomlm.version import __version__

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
    machine = Machine.here(has_cuda=torch.cuda.is_available())
    config, notices = resolve(config, machine)
    degrees = degrees_of(config, machine.world_size)
    with joined_ranks(degrees, "cuda" if config.device == "gpu" else "cpu") as mesh:
        return _finetune(config, notices, mesh)


def _finetune(config: TrainingConfig, notices: tuple[str, ...], mesh: Mesh) -> FinetuneResult:
    max_shard_size_bytes = parse_size(config.max_shard_size)
    check_agreement({f"--{name}": value for name, value in asdict(config).items()}, mesh)
    checkpoint = on_main(lambda: output.prepare(config), mesh)
    console = Console(stderr=True, quiet=not mesh.is_main)
    if checkpoint is not None:
        changes = output.changed_flags(config)
        notices = (*notices, f"going on from {checkpoint}" + (f"; since it began: {changes}" if changes else ""))
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
    run = _assemble(config, checkpoint, console, max_shard_size_bytes, mesh)
    on_main(lambda: output.write_run_file(config), mesh)  # once it is known that the run can begin, or go on
    try:
        result = run.train() if config.do_train else None
        if result is not None and result.interrupted:
            run.reporter.say(f"stopped by SIGTERM after step {result.step}; the same command goes on from there")
            return run.outcome(result, None, None)
        return run.finish(result)
    finally:
        run.reporter.close()


def _assemble(
    config: TrainingConfig, checkpoint: Path | None, console: Console, max_shard_size_bytes: int, mesh: Mesh
) -> "_Run":
    precision = precision_from_flags(
        fp16=config.fp16, bf16=config.bf16, fp16_opt_level=config.fp16_opt_level, scale_loss=config.scale_loss
    )
    source = resolve_source(config.model_name_or_path).directory
    tokenizer = Tokenizer.from_directory(source, as_gpt2=reading_from_flags(**reading_flags(config)).tokenization)
    begun = read_begun(config, source, checkpoint)
    config = with_recorded_flags(config, begun)
    # the main rank first: it tokenises, and the others find that in the cache
    examples = main_first(lambda: load_run_examples(config, tokenizer), mesh)
    check_agreement({"examples": examples.fingerprint, "version": __version__}, mesh)
    model = load_to_train(config, source, precision, checkpoint, begun.structure, mesh)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{config.model_name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding only "
            f"{model.config.vocab_size}; they belong to different models"
        )
    for line in (*examples.descriptions, describe_parameters(model, mesh)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return _Run(config, model, tokenizer, examples, precision, begun, console, max_shard_size_bytes, mesh)


class _Run:
    """A run between its start and its end: what the loop calls, and what is written when it is over."""

    def __init__(
        self,
        config: TrainingConfig,
        model: BloomForCausalLM,
        tokenizer: Tokenizer,
        examples: RunExamples,
        precision: Precision,
        begun: Begun,
        console: Console,
        max_shard_size_bytes: int,
        mesh: Mesh,
    ) -> None:
        self.config = config
        self.mesh = mesh
        self.model = model
        self.tokenizer = tokenizer
        self.examples = examples
        self.output_dir = Path(config.output_dir)
        self.max_shard_size_bytes = max_shard_size_bytes
        self.evaluator: Evaluator | None = None
        if examples.dev is not None:
            self.evaluator = Evaluator(model, tokenizer, examples.dev, config, precision, mesh)
        self.history = History(max_steps=0, num_train_epochs=config.num_train_epochs)
        self.trainer: Trainer | None = None
        self.taken_over: list[str] = []
        self.profiler: StepProfiler | None = None
        if config.do_train:
            assert examples.train is not None
            self._prepare_training(examples.train, precision, begun)
        self.reporter = Reporter(
            self.output_dir,
            self.history,
            console,
            show_bar=not config.disable_tqdm and bool(config.do_train) and mesh.is_main,
            use_tensorboard=config.report_to == "tensorboard",
            writes_files=mesh.is_main,
        )
        for line in self.taken_over:
            self.reporter.say(line)

    def _prepare_training(self, train_examples: Examples, precision: Precision, begun: Begun) -> None:
        config = self.config
        trainer, self.max_steps = build_trainer(config, self.model, train_examples, precision, self.mesh)
        self.meter = BatchMeter(trainer.batches, StepFlops(self.model))
        trainer.batches = self.meter
        self.peak_flops = measure_peak_flops(trainer.device, precision.compute_dtype)
        self.steps_per_epoch = steps_per_epoch(len(trainer.batches), config.gradient_accumulation_steps)
        self.history.max_steps = self.max_steps
        self.history.num_train_epochs = self.max_steps / self.steps_per_epoch
        self.taken_over += restore_begun(trainer, self.history, begun)
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
            structure=begun.structure,
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
        if not config.profile:
            return train(self.trainer, loop, self)
        with StepProfiler(self.output_dir / PROFILE_DIRECTORY, self.trainer.device) as self.profiler:
            return train(self.trainer, loop, self)

    def on_step(self, result: StepResult) -> None:
        """Note a step."""
        assert self.trainer is not None
        self.history.epoch = self.trainer.epoch
        self.reporter.on_step(result)
        if self.profiler is not None:
            self.profiler.step()

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
            output.install(self.output_dir, self.checkpoints.write_learned, self.mesh)
            if config.merge_weights and config.lora:
                merged_path = self.output_dir / output.MERGED_DIRECTORY
                self._write_merged(merged_path)
        eval_metrics = self._final_evaluation(final_step)
        if config.generate_num > 0:
            self._generate(config.generate_num)
        self.reporter.close()
        if not self.mesh.is_main:
            return self.outcome(result, eval_metrics, merged_path)
        if result is not None:
            picture_path = write_picture(self.history, self.output_dir, run_title(config))
            self.history.write(self.output_dir)
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
            assert self.trainer is not None
            metrics = {
                **train_metrics(result, self.history.epoch, num_examples),
                **self.meter.metrics(result.train_seconds, self.peak_flops),
                "memory_bytes": memory_by_kind(self.trainer, result.peak_memory_bytes),
            }
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

    def _write_merged(self, directory: Path) -> None:
        model = self.model
        if model.transformer.is_quantized:  # the update goes to the weights as their files have them
            model = load_model(self.config.model_name_or_path, dtype=model.transformer.dtype)
            load_adapter(model, self.output_dir)
        merge_to_directory(
            model,
            directory,
            tokenizer=self.tokenizer,
            max_shard_size_bytes=self.max_shard_size_bytes,
            mesh=self.mesh,
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
        evaluator = self.evaluator or Evaluator(
            self.model, self.tokenizer, examples, self.config, Precision(), self.mesh
        )
        rows = [
            {"instruction": example.source_text, "answer": example.target_text, "output": answer}
            for example, answer in zip(chosen, evaluator.answers(chosen), strict=True)
        ]
        if self.mesh.is_main:
            write_generations(self.output_dir / INFERENCES_FILE, rows)

    def _example_prompt(self) -> str | None:
        examples = self.examples.dev or self.examples.train
        return None if examples is None else examples[0].source_text


def _base_model_name(config: TrainingConfig) -> str:
    """What an adapter's files call its model: a directory by its full path, so that PEFT finds it from anywhere."""
    path = Path(config.model_name_or_path).expanduser()
    return str(path.resolve()) if path.is_dir() else config.model_name_or_path
