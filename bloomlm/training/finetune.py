"""Fine-tuning from flags to files: resolve the flags, join the ranks, set the run up, run it."""

from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from bloomlm.checkpoint.main_rank import on_main
from bloomlm.parallel.launch import check_agreement, joined_ranks
from bloomlm.training.config import TrainingConfig
from bloomlm.training.machine import Machine
from bloomlm.training.output_dir import changed_flags, prepare, write_run_file
from bloomlm.training.resolve import resolve
from bloomlm.training.results import FinetuneResult
from bloomlm.training.run_plan import RunPlan
from bloomlm.training.runs import EvaluationRun, TrainingRun
from bloomlm.training.setup import set_up

__all__ = ["FinetuneResult", "finetune"]


def finetune(config: TrainingConfig) -> FinetuneResult:
    """Fine-tune and evaluate a model; in an output_dir with checkpoints, resume from the newest.

    Args:
        config: the flags.

    Raises:
        ConfigError: flags that cannot be used.
        CheckpointError, DataError: files that cannot be used or written.
        TrainingError: the run cannot go on.
    """
    plan = resolve(config, Machine.here())
    with joined_ranks(plan.parallelism.degrees, plan.model.device.type) as mesh:
        check_agreement({f"--{name}": value for name, value in asdict(plan.flags).items()}, mesh)
        checkpoint = on_main(lambda: prepare(plan.output, trains=plan.training is not None), mesh)
        console = Console(stderr=True, quiet=not mesh.is_main)
        _show_notices(plan, checkpoint, console)
        setup = set_up(plan, checkpoint, console, mesh)
        training = setup.plan.training
        run = EvaluationRun(setup) if training is None else TrainingRun(setup, training)
        with closing(run.reporter):
            on_main(lambda: write_run_file(plan.flags), mesh)  # only when it is known that the run can begin
            return run.run()


def _show_notices(plan: RunPlan, checkpoint: Path | None, console: Console) -> None:
    notices = list(plan.notices)
    if checkpoint is not None:
        changes = changed_flags(plan.flags)
        notices.append(f"going on from {checkpoint}" + (f"; since it began: {changes}" if changes else ""))
    for notice in notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)
