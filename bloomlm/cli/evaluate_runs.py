"""The three kinds of evaluation, from what is loaded to a report: a protocol, answers to rows, lm-eval's tasks."""

import dataclasses
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.cli.evaluate_display import EvaluationDisplay
from bloomlm.cli.evaluate_subject import Subject
from bloomlm.data.examples import load_examples
from bloomlm.evaluation.answer_scores import score_generations
from bloomlm.evaluation.config import EvaluateConfig
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.partial_file import PartialFile
from bloomlm.evaluation.plan import Plan, Protocol
from bloomlm.evaluation.plans import make_plan, sha256_of
from bloomlm.evaluation.protocols.generation import PROTOCOL as GENERATION
from bloomlm.evaluation.protocols.generation import answer_all, answer_metrics
from bloomlm.evaluation.report import Report
from bloomlm.evaluation.run import run_plan
from bloomlm.parallel.launch import check_agreement
from bloomlm.version import __version__

DEFAULT_LENGTH = 512
"""Tokens of a prompt and of an answer, as in fine-tuning."""


class EvaluationRun:
    """One evaluation on this rank; every method makes the whole report, on every rank.

    Args:
        config: checked.
        subject: the model or program.
        messages: where notices and progress go.
    """

    def __init__(self, config: EvaluateConfig, subject: Subject, messages: Console) -> None:
        self._config = config
        self._subject = subject
        self._messages = messages

    def protocol(self, path: Path) -> Report:
        """WikiText or LAMBADA in a file, under the protocol of the flags."""
        config, subject = self._config, self._subject
        plan = make_plan(
            path,
            subject.tokenizer,
            protocol=config.protocol,
            is_lambada=config.is_lambada,
            seq_length=config.seq_length,
            overlapping_eval=config.overlapping_eval,
            limit=config.limit,
        )
        report = self._empty_report(
            task=plan.task,
            protocol=plan.protocol,
            data=path,
            settings=plan.settings,
            counts={**plan.counts, "windows": len(plan.windows), "scored_tokens": plan.num_scored_tokens},
            notices=(*_cut_notice(plan), *plan.notices),
        )
        with ExitStack() as stack:
            partial = self._open_partial(report, stack)
            display = stack.enter_context(self._display(len(plan.windows)))
            outcome = run_plan(
                subject.model,
                plan,
                max_batch_tokens=config.batch_size * plan.settings["seq_length"],
                partial=partial,
                on_progress=lambda done, totals: display.show(done, plan.running(totals)),
                mesh=subject.mesh,
            )
            run = {
                "seconds": outcome.seconds,
                "computed_tokens": outcome.num_computed_tokens,
                "tokens_per_second": outcome.tokens_per_second,
                "windows_of_a_stopped_run": outcome.num_windows_before,
            }
            report = self._finish(report, outcome.metrics, run, partial)
        if plan.line is not None and subject.mesh.is_main:
            click.echo(f" validation results on {config.eval_path} | {plan.line(outcome.metrics)}")
        return report

    def generation(self, path: Path) -> Report:
        """Answers to the rows of a file."""
        config, subject = self._config, self._subject
        examples = load_examples(
            path,
            subject.tokenizer,
            src_length=config.src_length or DEFAULT_LENGTH,
            tgt_length=config.tgt_length or DEFAULT_LENGTH,
            prompt_template=config.prompt_template,
            show_progress=subject.mesh.is_main,
        )
        count = len(examples) if config.limit is None else min(len(examples), config.limit)
        made = examples.report
        report = self._empty_report(
            task="generation",
            protocol=GENERATION,
            data=path,
            settings={
                "src_length": made.src_length,
                "tgt_length": made.tgt_length,
                "prompt_template": config.prompt_template,
            },
            counts={"examples": count, "sources_cut": made.num_sources_cut},
            notices=(str(made),) if made.num_sources_cut else (),
        )
        with ExitStack() as stack:
            partial = self._open_partial(report, stack)
            display = stack.enter_context(self._display(count))
            started = time.perf_counter()
            answers = answer_all(
                subject.model,
                subject.tokenizer,
                examples,
                max_new_tokens=made.tgt_length,
                batch_size=config.batch_size,
                limit=config.limit,
                partial=partial,
                on_progress=lambda done: display.show(done, ""),
                mesh=subject.mesh,
            )
            run = {
                "seconds": time.perf_counter() - started,
                "answers_of_a_stopped_run": 0 if partial is None else len(partial.done),
            }
            references = [examples[number].target_text for number in range(count)]
            scores = score_generations(answers, references)
            report = dataclasses.replace(
                report, settings={**report.settings, "bleu4_signature": scores.bleu4_signature}
            )
            return self._finish(report, answer_metrics(answers, references, scores), run, partial)

    def tasks(self) -> Report:
        """Tasks of lm-eval."""
        from bloomlm.evaluation.protocols.lm_eval_tasks import run_tasks  # an extra

        config, subject = self._config, self._subject
        started = time.perf_counter()
        results = run_tasks(
            subject.model,
            subject.tokenizer,
            config.tasks,
            batch_size=config.batch_size,
            max_length=config.seq_length,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            include_path=config.include_path,
            mesh=subject.mesh,
        )
        report = self._empty_report(
            task=",".join(config.tasks),
            protocol=results.protocol,
            data=None,
            settings={"num_fewshot": config.num_fewshot, "max_length": results.max_length},
            counts=results.counts,
            notices=(),
        )
        return self._finish(report, results.metrics, {"seconds": time.perf_counter() - started}, None)

    def _empty_report(
        self,
        *,
        task: str,
        protocol: Protocol,
        data: Path | None,
        settings: Mapping[str, Any],
        counts: Mapping[str, float],
        notices: tuple[str, ...],
    ) -> Report:
        """Everything but the results; notices are shown too."""
        config, mesh = self._config, self._subject.mesh
        report = Report(
            task=task,
            protocol=vars(protocol),
            data={} if data is None else {"name": str(config.eval_path), "sha256": sha256_of(data)},
            model=self._subject.description,
            settings={**settings, "limit": config.limit},
            counts=counts,
            metrics={},
            run={
                "device": self._subject.device,
                "processes": mesh.degrees.world_size,
                "tensor_parallel_degree": mesh.degrees.tp,
                "bloomlm": __version__,
                "torch": torch.__version__,
            },
            notices=notices,
        )
        check_agreement({"evaluation": self._identity(report)}, mesh)
        for notice in report.notices:
            self._messages.print(notice, style="yellow", soft_wrap=True)
        return report

    def _identity(self, report: Report) -> str:
        """Everything that decides the results."""
        decisive = [report.task, report.protocol, report.data, report.model, report.settings]
        return json.dumps([*decisive, self._subject.tokenizer.fingerprint], sort_keys=True)

    def _open_partial(self, report: Report, stack: ExitStack) -> PartialFile | None:
        """The results of a stopped run of the same evaluation, to which this one's are added."""
        if self._config.output_file is None:
            return None
        partial = stack.enter_context(
            PartialFile(self._config.output_file, identity=self._identity(report), mesh=self._subject.mesh)
        )
        if partial.done:
            self._messages.print(
                f"{len(partial.done)} results are there from a run that was stopped; going on after them"
            )
        return partial

    def _display(self, total: int) -> EvaluationDisplay:
        return EvaluationDisplay(self._messages, total=total, logging_steps=self._config.logging_steps)

    def _finish(
        self, report: Report, metrics: Mapping[str, Metric], run: Mapping[str, Any], partial: PartialFile | None
    ) -> Report:
        """The whole report, in its files where there are to be any."""
        report = dataclasses.replace(report, metrics=metrics, run={**run, **report.run})
        if self._config.output_file is not None and self._subject.mesh.is_main:
            report.save(self._config.output_file)
            atomic_write(self._config.output_file.with_suffix(".md"), report.to_markdown())
        if partial is not None:
            partial.remove()
        return report


def _cut_notice(plan: Plan) -> tuple[str, ...]:
    num_cut = plan.counts.get("contexts_cut", 0)
    if not num_cut:
        return ()
    return (
        f"{num_cut} of {plan.counts['examples']} contexts are longer than --seq_length {plan.settings['seq_length']}; "
        "their beginnings were left out",
    )
