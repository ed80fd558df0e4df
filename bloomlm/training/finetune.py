"""Fine-tuning from flags to files: a run that trains, or one that only evaluates."""

from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.main_rank import on_main
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.training_state import checkpoint_path, checkpoint_step
from bloomlm.parallel.launch import check_agreement, joined_ranks
from bloomlm.training.config import TrainingConfig
from bloomlm.training.learning_rate_range import find_learning_rate
from bloomlm.training.loop import LoopConfig, train
from bloomlm.training.meter import (
    PROFILE_DIRECTORY,
    BatchMeter,
    StepFlops,
    StepProfiler,
    measure_peak_flops,
    memory_by_kind,
)
from bloomlm.training.output_dir import (
    MERGED_DIRECTORY,
    CheckpointWriter,
    prepare,
    write_run_file,
)
from bloomlm.training.report import Reporter
from bloomlm.training.reporters import Trackers
from bloomlm.training.reporters.base import TrackedRun
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.results import (
    FinetuneResult,
    History,
    StepLog,
    StepResult,
    TrainResult,
    read_train_results,
    train_metrics,
    write_answers,
    write_results,
)
from bloomlm.training.resume import restore, restore_resume_point
from bloomlm.training.run_plan import TrainingPlan
from bloomlm.training.setup import RunSetup, build_trainer, load_batches, set_up
from bloomlm.training.summary import print_summary, show_notices, write_picture

__all__ = ["FinetuneResult", "finetune"]


def finetune(config: TrainingConfig) -> FinetuneResult:
    """Fine-tune and evaluate a model, resuming from the newest checkpoint in output_dir; or find a learning rate.

    Raises:
        ConfigError: flags that cannot be used.
        CheckpointError, DataError: files that cannot be read or written.
        TrainingError: training cannot continue.
    """
    plan = resolve(config, Machine.here())
    with joined_ranks(plan.parallelism.degrees, plan.model.device.type) as mesh:
        check_agreement({f"--{name}": value for name, value in asdict(plan.flags).items()}, mesh)
        console = Console(stderr=True, quiet=not mesh.is_main)
        if config.find_learning_rate:
            return find_learning_rate(config, plan, console, mesh)
        checkpoint = on_main(lambda: prepare(plan.output, trains=plan.training is not None), mesh)
        show_notices(plan, checkpoint, console)
        setup = set_up(plan, checkpoint, console, mesh)
        training = setup.plan.training
        run = EvaluationRun(setup) if training is None else TrainingRun(setup, training)
        with closing(run.reporter):
            on_main(lambda: write_run_file(plan.flags), mesh)  # not before it is certain that the run can begin
            return run.run()


class TrainingRun:
    """A run that trains, from its first step to its last file. The loop calls its on_... methods.

    Raises:
        CheckpointError, TrainingError: the checkpoint to resume from does not fit.
    """

    def __init__(self, setup: RunSetup, training: TrainingPlan) -> None:
        assert setup.train_examples is not None
        plan, mesh = setup.plan, setup.mesh
        self._setup = setup
        self._num_examples = len(setup.train_examples)
        batches = load_batches(training, setup.train_examples, plan.objective, mesh)
        self._meter = BatchMeter(batches, StepFlops(setup.model))
        trainer = self._trainer = build_trainer(
            training, setup.model, self._meter, plan.objective, plan.precision, mesh
        )
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
            trainer=trainer,
            tokenizer=setup.tokenizer,
            history=self._history,
            output=plan.output,
            base_model=plan.model.name_for_adapter,
            recorded_adapter=setup.resume_point.recorded_adapter,
        )
        self._early_stopping = training.early_stopping
        self._profiler: StepProfiler | None = None
        self.reporter = _reporter(setup, self._history)
        for line in resumed:
            self.reporter.say(line)

    def run(self) -> FinetuneResult:
        """Train to the end or until SIGTERM, then write model, results and picture."""
        self._checkpoints.prune()  # a run that was killed after it had saved may not have done so
        result = self._train()
        if result.interrupted:
            self.reporter.say(f"stopped by SIGTERM after step {result.step}; the same command continues from there")
            return self._outcome(result)
        if result.step < self._loop.max_steps:
            assert self._early_stopping is not None
            self.reporter.say(f"stopped after step {result.step}: {self._early_stopping.describe()}")
        final_step = self._choose_final_step()
        merged_path = self._write_model()
        eval_metrics = self._final_evaluation(final_step)
        _write_answers(self._setup)
        self.reporter.close()
        picture_path, directory = None, self._setup.plan.output.directory
        if self._setup.mesh.is_main:
            picture_path = write_picture(self._history, directory, self._setup.plan)
            self._history.write(directory)
        outcome = replace(
            self._outcome(result), eval_metrics=eval_metrics, merged_path=merged_path, picture_path=picture_path
        )
        _report(self._setup, outcome)
        return outcome

    def on_step(self, result: StepResult) -> None:
        """Record a step."""
        self._history.epoch = self._trainer.epoch
        self.reporter.on_step(result)
        if self._profiler is not None:
            self._profiler.step()

    def on_log(self, log: StepLog) -> None:
        """Write the numbers since the last log."""
        self.reporter.on_log(log)

    def on_evaluate(self, step: int) -> None:
        """Evaluate, and record whether this is the best evaluation so far of a step that has a checkpoint."""
        evaluation = self._setup.plan.evaluation
        metrics = self._setup.evaluator.run()
        self.reporter.add_evaluation(metrics)
        if self._loop.saves_after(step):
            value = metrics[evaluation.best_metric]
            self._history.note_best(value, step, greater_is_better=evaluation.greater_is_better)

    def on_save(self, step: int) -> None:
        """Write checkpoint-STEP."""
        self._checkpoints.save(step)

    def ends_early(self) -> bool:
        """Whether too many evaluations in a row did not improve; the log alone decides, so a run that resumes knows."""
        return self._early_stopping is not None and self._early_stopping.is_due(self._history.log_history)

    def _train(self) -> TrainResult:
        plan = self._setup.plan
        if not plan.report.profile:
            return train(self._trainer, self._loop, self)
        with StepProfiler(plan.output.directory / PROFILE_DIRECTORY, self._trainer.device) as self._profiler:
            return train(self._trainer, self._loop, self)

    def _choose_final_step(self) -> int:
        """The step of the model to write: the last one, or that of the best checkpoint, which is then restored."""
        best, output = self._history.best_model_checkpoint, self._setup.plan.output
        if not output.ends_with_best or best is None:
            return self._history.global_step
        step = checkpoint_step(Path(best))
        restore(self._trainer, checkpoint_path(output.directory, step))
        self.reporter.say(f"the result is the best checkpoint, {best}")
        return step

    def _write_model(self) -> Path | None:
        """Write the model or its adapter, and the merged model if one is wanted; returns the path of the latter."""
        setup, output = self._setup, self._setup.plan.output
        self._checkpoints.write_final()
        if not output.merges_adapter:
            return None
        model = setup.model
        if model.transformer.is_quantized:  # the update is added to the weights as they are stored
            model = load_model(setup.plan.model.name_or_path, dtype=model.transformer.dtype)
            load_adapter(model, output.directory)
        merged_path = output.directory / MERGED_DIRECTORY
        merge_to_directory(
            model,
            merged_path,
            tokenizer=setup.tokenizer,
            max_shard_size_bytes=output.max_shard_size_bytes,
            mesh=setup.mesh,
        )
        return merged_path

    def _final_evaluation(self, step: int) -> dict[str, Any] | None:
        """Metrics of the final model: those logged after this step, or new ones if it was not evaluated then."""
        if not self._setup.plan.evaluation.evaluates:
            return None
        logged = self._history.evaluation_of(step)
        if logged is None:
            metrics = self._setup.evaluator.run()
            self.reporter.add_evaluation(metrics)
            return metrics
        return {name: value for name, value in logged.items() if name.startswith("eval_")}

    def _outcome(self, result: TrainResult) -> FinetuneResult:
        directory, best = self._setup.plan.output.directory, self._history.best_model_checkpoint
        return FinetuneResult(
            output_dir=directory,
            step=self._history.global_step,
            interrupted=result.interrupted,
            train_metrics=self._train_metrics(result),
            best_checkpoint=None if best is None else directory / best,
        )

    def _train_metrics(self, result: TrainResult) -> dict[str, Any]:
        if result.num_steps == 0:  # an earlier process did, and measured, all steps
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
    """A run that evaluates a model and does not train it."""

    def __init__(self, setup: RunSetup) -> None:
        self._setup = setup
        self.reporter = _reporter(setup, History(max_steps=0, num_train_epochs=0))

    def run(self) -> FinetuneResult:
        """Evaluate, and write the results."""
        metrics = self._setup.evaluator.run()
        self.reporter.add_evaluation(metrics)
        _write_answers(self._setup)
        self.reporter.close()
        directory = self._setup.plan.output.directory
        outcome = FinetuneResult(output_dir=directory, step=0, interrupted=False, eval_metrics=metrics)
        _report(self._setup, outcome)
        return outcome


def _reporter(setup: RunSetup, history: History) -> Reporter:
    report, is_main = setup.plan.report, setup.mesh.is_main
    directory = setup.plan.output.directory
    tracked = TrackedRun(output_dir=directory, step=history.global_step, flags=asdict(setup.plan.flags))
    return Reporter(
        directory,
        history,
        setup.console,
        show_bar=report.show_bar and setup.plan.training is not None and is_main,
        trackers=Trackers(report.trackers, tracked) if is_main else None,
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
    if setup.mesh.is_main:
        write_results(outcome.output_dir, outcome.train_metrics, outcome.eval_metrics)
        print_summary(Console(), setup.plan, outcome, setup.evaluator.example_prompt)
