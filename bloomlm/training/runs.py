"""The two kinds of run: one that trains, whose methods the loop calls between steps, and one that only evaluates."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console

from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.training_state import checkpoint_step
from bloomlm.data.loader import Batches, BatchLoader, Examples
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training import output_dir
from bloomlm.training.checkpoints import CheckpointWriter
from bloomlm.training.history import History, read_train_results, train_metrics, write_answers, write_results
from bloomlm.training.loop import LoopConfig, train
from bloomlm.training.meter import (
    PROFILE_DIRECTORY,
    BatchMeter,
    StepFlops,
    StepProfiler,
    measure_peak_flops,
    memory_by_kind,
)
from bloomlm.training.plot import write_picture
from bloomlm.training.precision import Precision
from bloomlm.training.report import Reporter
from bloomlm.training.results import FinetuneResult, StepLog, StepResult, TrainResult
from bloomlm.training.resume import restore_resume_point
from bloomlm.training.run_plan import TrainingPlan
from bloomlm.training.setup import RunSetup
from bloomlm.training.step import Trainer, steps_per_epoch
from bloomlm.training.summary import print_summary, run_title


def load_batches(training: TrainingPlan, examples: Examples, mesh: Mesh = ALONE) -> BatchLoader:
    """The training examples in batches, this rank's part of them."""
    return BatchLoader(
        examples,
        training.batch_size,
        shuffle=True,
        seed=training.step.seed,
        dp_degree=mesh.degrees.dp,
        dp_rank=mesh.dp_rank,
    )


def build_trainer(
    training: TrainingPlan, model: BloomForCausalLM, batches: Batches, precision: Precision, mesh: Mesh = ALONE
) -> Trainer:
    """The trainer at step 0; its schedule knows how many steps the run has.

    Args:
        training: how the model learns.
        model: with its adapter applied.
        batches: of this rank.
        precision: number formats.
        mesh: the ranks among which the model is divided.
    """
    per_epoch = steps_per_epoch(len(batches), training.step.gradient_accumulation_steps)
    max_steps = training.max_steps or max(1, math.ceil(training.num_train_epochs * per_epoch))
    return Trainer(
        model,
        batches,
        optimizer=training.optimizer,
        schedule=training.schedule.over(max_steps),
        precision=precision,
        config=training.step,
        mesh=mesh,
    )


class TrainingRun:
    """A run that trains, from its first step to its last file.

    Args:
        setup: model, examples and all else.
        training: how the model learns.

    Raises:
        CheckpointError, TrainingError: what the run resumes from does not fit.
    """

    def __init__(self, setup: RunSetup, training: TrainingPlan) -> None:
        assert setup.train_examples is not None
        plan, mesh = setup.plan, setup.mesh
        self._setup = setup
        self._num_examples = len(setup.train_examples)
        self._meter = BatchMeter(load_batches(training, setup.train_examples, mesh), StepFlops(setup.model))
        trainer = self._trainer = build_trainer(training, setup.model, self._meter, plan.precision, mesh)
        self._peak_flops = measure_peak_flops(trainer.device, plan.precision.compute_dtype)
        per_epoch, max_steps = trainer.steps_per_epoch, trainer.schedule.max_steps
        self._loop = LoopConfig(
            max_steps=max_steps,
            logging_steps=training.logging_steps,
            eval_steps=None if training.evaluate_every is None else training.evaluate_every.in_steps(per_epoch),
            save_steps=None if training.save_every is None else training.save_every.in_steps(per_epoch),
        )
        self._history = History(max_steps=max_steps, num_train_epochs=max_steps / per_epoch)
        resumed = restore_resume_point(trainer, self._history, setup.resume_point)
        self._first_epoch = trainer.epoch
        self._checkpoints = CheckpointWriter(
            trainer,
            setup.tokenizer,
            self._history,
            plan.output,
            base_model=plan.model.name_for_adapter,
            structure=setup.resume_point.structure,
        )
        self._profiler: StepProfiler | None = None
        self.reporter = _reporter(setup, self._history)
        for line in resumed:
            self.reporter.say(line)

    def run(self) -> FinetuneResult:
        """Train to the end, or until SIGTERM, and write everything that stays."""
        result = self._train()
        if result.interrupted:
            self.reporter.say(f"stopped by SIGTERM after step {result.step}; the same command goes on from there")
            return self._outcome(result)
        final_step = self._choose_final_step()
        merged_path = self._write_model()
        eval_metrics = self._final_evaluation(final_step)
        _write_answers(self._setup)
        self.reporter.close()
        picture_path, directory = None, self._setup.plan.output.directory
        if self._setup.mesh.is_main:
            picture_path = write_picture(self._history, directory, run_title(self._setup.plan))
            self._history.write(directory)
        outcome = self._outcome(result, eval_metrics, merged_path, picture_path)
        _report(self._setup, outcome)
        return outcome

    def on_step(self, result: StepResult) -> None:
        """Note a step."""
        self._history.epoch = self._trainer.epoch
        self.reporter.on_step(result)
        if self._profiler is not None:
            self._profiler.step()

    def on_log(self, log: StepLog) -> None:
        """Write the numbers since the last log."""
        self.reporter.on_log(log)

    def on_evaluate(self, step: int) -> None:
        """Evaluate, and note whether this is the best so far among the steps that have a checkpoint."""
        evaluation = self._setup.plan.evaluation
        metrics = self._setup.evaluator.run()
        self.reporter.add_evaluation(metrics)
        if self._loop.saves_after(step):
            value = metrics[evaluation.best_metric]
            self._history.note_best(value, step, greater_is_better=evaluation.greater_is_better)

    def on_save(self, step: int) -> None:
        """Write checkpoint-STEP."""
        self._checkpoints.save(step)

    def _train(self) -> TrainResult:
        plan = self._setup.plan
        if not plan.report.profile:
            return train(self._trainer, self._loop, self)
        with StepProfiler(plan.output.directory / PROFILE_DIRECTORY, self._trainer.device) as self._profiler:
            return train(self._trainer, self._loop, self)

    def _choose_final_step(self) -> int:
        """The last step, or that of the best checkpoint, to which the model then returns."""
        best = self._history.best_model_checkpoint
        if not self._setup.plan.output.ends_with_best or best is None:
            return self._history.global_step
        step = checkpoint_step(Path(best))
        self._checkpoints.restore(step)
        self.reporter.say(f"the best checkpoint is {best}; it is the result")
        return step

    def _write_model(self) -> Path | None:
        """Write the model or its adapter; returns where the merged model is, if it is wanted."""
        setup, output = self._setup, self._setup.plan.output
        output_dir.install(output.directory, self._checkpoints.write_learned, setup.mesh)
        if not output.merges_adapter:
            return None
        model = setup.model
        if model.transformer.is_quantized:  # the update is added to the weights as their files have them
            model = load_model(setup.plan.model.name_or_path, dtype=model.transformer.dtype)
            load_adapter(model, output.directory)
        merge_to_directory(
            model,
            output.directory / output_dir.MERGED_DIRECTORY,
            tokenizer=setup.tokenizer,
            max_shard_size_bytes=output.max_shard_size_bytes,
            mesh=setup.mesh,
        )
        return output.directory / output_dir.MERGED_DIRECTORY

    def _final_evaluation(self, step: int) -> dict[str, Any] | None:
        """Metrics of the final model: those of the step it comes from, computed only if it was not evaluated then."""
        if not self._setup.plan.evaluation.evaluates:
            return None
        logged = self._history.evaluation_of(step)
        if logged is None:
            metrics = self._setup.evaluator.run()
            self.reporter.add_evaluation(metrics)
            return metrics
        return {name: value for name, value in logged.items() if name.startswith("eval_")}

    def _outcome(
        self,
        result: TrainResult,
        eval_metrics: dict[str, Any] | None = None,
        merged_path: Path | None = None,
        picture_path: Path | None = None,
    ) -> FinetuneResult:
        directory, best = self._setup.plan.output.directory, self._history.best_model_checkpoint
        return FinetuneResult(
            output_dir=directory,
            step=self._history.global_step,
            interrupted=result.interrupted,
            train_metrics=self._train_metrics(result),
            eval_metrics=eval_metrics,
            best_checkpoint=None if best is None else directory / best,
            merged_path=merged_path,
            picture_path=picture_path,
        )

    def _train_metrics(self, result: TrainResult) -> dict[str, Any]:
        if result.num_steps == 0:  # everything was done before, and so measured before
            measured = read_train_results(self._setup.plan.output.directory)
            if measured is not None:
                return measured
        num_examples = round((self._history.epoch - self._first_epoch) * self._num_examples)
        return {
            **train_metrics(result, self._history.epoch, num_examples),
            **self._meter.metrics(result.train_seconds, self._peak_flops),
            "memory_bytes": memory_by_kind(self._trainer, result.peak_memory_bytes),
        }


class EvaluationRun:
    """A run that evaluates a model as it is.

    Args:
        setup: model, examples and all else.
    """

    def __init__(self, setup: RunSetup) -> None:
        self._setup = setup
        self.reporter = _reporter(setup, History(max_steps=0, num_train_epochs=0))

    def run(self) -> FinetuneResult:
        """Evaluate, and write the results."""
        metrics = self._setup.evaluator.run()
        self.reporter.add_evaluation(metrics)
        _write_answers(self._setup)
        self.reporter.close()
        outcome = FinetuneResult(
            output_dir=self._setup.plan.output.directory,
            step=0,
            interrupted=False,
            train_metrics=None,
            eval_metrics=metrics,
            best_checkpoint=None,
            merged_path=None,
            picture_path=None,
        )
        _report(self._setup, outcome)
        return outcome


def _reporter(setup: RunSetup, history: History) -> Reporter:
    report, is_main = setup.plan.report, setup.mesh.is_main
    return Reporter(
        setup.plan.output.directory,
        history,
        setup.console,
        show_bar=report.show_bar and setup.plan.training is not None and is_main,
        use_tensorboard=report.use_tensorboard,
        writes_files=is_main,
    )


def _write_answers(setup: RunSetup) -> None:
    """Write the answers to the first examples, if any are wanted."""
    count = setup.plan.evaluation.num_written_answers
    if count == 0:
        return
    rows = setup.evaluator.answer_rows(count)
    if setup.mesh.is_main:
        write_answers(setup.plan.output.directory, rows)


def _report(setup: RunSetup, outcome: FinetuneResult) -> None:
    if not setup.mesh.is_main:
        return
    write_results(outcome.output_dir, outcome.train_metrics, outcome.eval_metrics)
    print_summary(Console(), setup.plan, outcome, setup.evaluator.example_prompt)
