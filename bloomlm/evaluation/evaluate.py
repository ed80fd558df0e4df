"""Evaluates a model or a program: reads the data, loads what is evaluated, runs the plan and writes the report."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from bloomlm.checkpoint.main_rank import main_first, on_main
from bloomlm.errors import ConfigError
from bloomlm.evaluation.config import EvaluateConfig, check_config
from bloomlm.evaluation.data_sources import find_data
from bloomlm.evaluation.execution import Display, Execution, Subject
from bloomlm.evaluation.protocol import Plan
from bloomlm.evaluation.report import EvaluationReport
from bloomlm.files.resumable import ResumableResults
from bloomlm.parallel.launch import check_agreement
from bloomlm.parallel.mesh import Mesh
from bloomlm.version import __version__

_LOG = logging.getLogger(__name__)


class LoggedNotices:
    """A display for calls from Python: notices are logged, and progress is not shown."""

    def notice(self, text: str) -> None:
        """Log it as a warning."""
        _LOG.warning("%s", text)

    def progress(self, num_done: int, total: int, result: str) -> None:
        """Show nothing."""


def evaluate(
    config: EvaluateConfig, open_subject: Callable[[], Subject], *, mesh: Mesh, display: Display
) -> EvaluationReport:
    """Evaluate a model or a program, and write the report where the options name a file.

    Args:
        config: data, protocol and output.
        open_subject: loads what is evaluated; called after the data have been read, because loading may take long.
        mesh: the ranks, all of which must make this call; all get the whole report, and the main rank writes it.
        display: shows notices and progress.

    Raises:
        BloomlmError: options, files or data that cannot be used, or a model that does not fit into memory.
    """
    for notice in check_config(config):
        display.notice(notice)
    if config.output_file is not None:
        _check_writable(config.output_file)
    name, raw = config.eval_path, config.chosen_protocol.uses_raw_text
    path = None if name is None else main_first(lambda: find_data(name, raw=raw), mesh)
    data = None if path is None else config.task.read(path)
    subject = open_subject()
    plan = config.task.make_plan(data, subject.tokenizer, limit=config.limit, **config.task_options)
    report = _report_without_results(config, plan, subject, path)
    identity = _identity(report, subject)
    check_agreement({"evaluation": identity}, mesh)
    for notice in report.notices:
        display.notice(notice)
    with _finished_results(config, identity, mesh) as finished:
        if finished is not None and finished.done:
            display.notice(f"{len(finished.done)} results are there from a run that was stopped; continuing after them")
        execution = Execution(subject=subject, batch_size=config.batch_size, finished=finished, display=display)
        outcome = plan.run(execution)
        report = dataclasses.replace(
            report,
            metrics=outcome.metrics,
            settings={**report.settings, **outcome.settings},
            counts={**report.counts, **outcome.counts},
            run={**outcome.run, **report.run},
        )
        if finished is not None and config.output_file is not None and mesh.is_main:
            report.save(config.output_file)
            finished.remove()
    return report


def _finished_results(
    config: EvaluateConfig, identity: str, mesh: Mesh
) -> AbstractContextManager[ResumableResults | None]:
    """Keeps results while the evaluation runs, if there is an output file."""
    if config.output_file is None:
        return nullcontext()
    return ResumableResults(
        config.output_file,
        identity=identity,
        writer=mesh.dp_rank if mesh.tp_rank == 0 else None,
        on_one=lambda read: on_main(read, mesh),
    )


def _check_writable(output_file: Path) -> None:
    """Refuse a file that cannot be written, before the evaluation runs for hours."""
    directory = output_file.parent
    while not directory.exists():
        directory = directory.parent
    if output_file.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ConfigError(f"--output_file {output_file} cannot be written; give a file in a directory that can")


def _report_without_results(
    config: EvaluateConfig, plan: Plan, subject: Subject, path: Path | None
) -> EvaluationReport:
    return EvaluationReport(
        task=plan.task,
        protocol=vars(plan.definition),
        data={} if path is None else {"name": str(config.eval_path), "sha256": _sha256_of(path)},
        model=subject.description,
        settings={**plan.settings, "limit": config.limit},
        counts=plan.counts,
        metrics={},
        run={
            "device": subject.device,
            "processes": subject.mesh.degrees.world_size,
            "tensor_parallel_degree": subject.mesh.degrees.tp,
            "bloomlm": __version__,
            "torch": torch.__version__,
        },
        notices=(*_cut_notice(plan), *plan.notices),
    )


def _identity(report: EvaluationReport, subject: Subject) -> str:
    """Everything that decides the results."""
    decisive: list[Mapping[str, Any] | str] = [report.task, report.protocol, report.data, report.model, report.settings]
    return json.dumps([*decisive, subject.tokenizer.fingerprint], sort_keys=True)


def _cut_notice(plan: Plan) -> tuple[str, ...]:
    num_cut = plan.counts.get("contexts_cut", 0)
    if not num_cut:
        return ()
    return (
        f"{num_cut} of {plan.counts['examples']} contexts are longer than --seq_length {plan.settings['seq_length']}; "
        "their beginnings were left out",
    )


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
