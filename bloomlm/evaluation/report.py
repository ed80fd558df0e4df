"""The report of an evaluation (JSON for programs, a table for a terminal, Markdown for a page), and two compared.

A comparison gives the difference of each metric and its standard error. Where both models saw the same observations,
their influences are subtracted one by one, and the error of the difference follows from the result. Otherwise it is the
root of the sum of the squared errors, as for two independent samples.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bloomlm.errors import ConfigError, DataError
from bloomlm.evaluation.metrics import Metric, error_of
from bloomlm.files.atomic import atomic_write
from bloomlm.files.json_text import read_json

FORMAT_VERSION = 1
_INFLUENCES_SUFFIX = ".influences.json"


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The results of an evaluation, and everything needed to interpret and repeat it."""

    task: str
    """wikitext, lambada, generation, or lm-eval's tasks."""
    protocol: Mapping[str, str]
    """name, version, source."""
    data: Mapping[str, str]
    """name, and sha256 of the file; empty if there is no file."""
    model: Mapping[str, Any]
    """name, fingerprint, dtype, adapter."""
    settings: Mapping[str, Any]
    """The flags that decide the numbers."""
    counts: Mapping[str, float]
    """Numbers of windows, tokens, examples."""
    metrics: Mapping[str, Metric]
    run: Mapping[str, Any]
    """What describes the run and does not decide the numbers: seconds, tokens/s, device, versions."""
    notices: tuple[str, ...] = ()
    """Warnings for the reader of the numbers."""

    def to_json(self) -> str:
        """The report as a JSON object, without the influences."""
        content = {
            "bloomlm_report": FORMAT_VERSION,
            **{item.name: getattr(self, item.name) for item in dataclasses.fields(self)},
            "metrics": {
                name: {
                    "value": metric.value,
                    "standard_error": metric.standard_error,
                    "higher_is_better": metric.higher_is_better,
                }
                for name, metric in self.metrics.items()
            },
        }
        return json.dumps(content, ensure_ascii=False, indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON, and beside it the Markdown and the influences of the observations, which --compare uses.

        Raises:
            CheckpointError: it cannot be written.
        """
        influences = {name: m.influences for name, m in self.metrics.items() if m.influences is not None}
        beside = influences_path(path)
        if influences:
            atomic_write(beside, json.dumps({name: values.tolist() for name, values in influences.items()}))
        else:
            beside.unlink(missing_ok=True)
        atomic_write(path, self.to_json())
        atomic_write(path.with_suffix(".md"), self.to_markdown())

    def to_table(self) -> Table:
        """The results for a terminal."""
        table = Table()
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column("standard error", justify="right")
        for name, metric in self.metrics.items():
            table.add_row(name, _number(metric.value), _number(metric.standard_error))
        return table

    @property
    def title(self) -> str:
        """What was evaluated, in one line."""
        return f"{self.model['name']}: {self.task}, {self.protocol['name']} {self.protocol['version']}"

    def to_markdown(self) -> str:
        """The results and what decided them, as Markdown."""
        lines = [
            f"## {self.title}",
            "",
            "| metric | value | standard error | better |",
            "|---|---:|---:|---|",
        ]
        for name, metric in self.metrics.items():
            better = "higher" if metric.higher_is_better else "lower"
            lines.append(f"| {name} | {_number(metric.value)} | {_number(metric.standard_error)} | {better} |")
        lines += ["", "| | |", "|---|---|"]
        for section in ("protocol", "data", "model", "settings", "counts", "run"):
            lines += [f"| {section} {name} | {_shown(value)} |" for name, value in getattr(self, section).items()]
        lines += [f"\n{notice}" for notice in self.notices]
        return "\n".join(lines) + "\n"


def read_report(path: Path) -> EvaluationReport:
    """Read a report that was saved, with its influences if their file is there.

    Raises:
        DataError: the file cannot be read, or is not a report.
    """
    try:
        content = read_json(path)
        version = content.pop("bloomlm_report")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: a report of format {version}, and this bloomlm reads {FORMAT_VERSION}")
        metrics = {name: Metric(**fields) for name, fields in content.pop("metrics").items()}
        report = EvaluationReport(**content, metrics=metrics)
        _check_kinds(report)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a report of --output_file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no report of bloomlm evaluate ({error})") from error
    beside = influences_path(path)
    if not beside.is_file():
        return report
    try:
        kept = read_json(beside)
        known = {name: np.array(kept[name], dtype=np.float64).reshape(-1) for name in metrics if name in kept}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{beside}: cannot be read ({error}); remove it to compare without it") from error
    with_influences = {n: dataclasses.replace(m, influences=known.get(n)) for n, m in metrics.items()}
    return dataclasses.replace(report, metrics=with_influences)


def influences_path(report: Path) -> Path:
    """The file with the influences of a report."""
    return report.with_name(report.name.removesuffix(".json") + _INFLUENCES_SUFFIX)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of two reports."""

    name: str
    first: float
    second: float
    standard_error: float | None
    is_paired: bool

    @property
    def value(self) -> float:
        """The second value minus the first."""
        return self.second - self.first


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences, and notices about them."""

    differences: tuple[Difference, ...]
    notices: tuple[str, ...]

    def to_table(self, first: str, second: str) -> Table:
        """The differences as a table for a terminal; the columns have the names of the reports."""
        table = Table()
        table.add_column("metric")
        for title in (first, second, "difference", "standard error"):
            table.add_column(title, justify="right")
        for item in self.differences:
            error = "" if item.standard_error is None else f"{item.standard_error:.4g}"
            paired = " (paired)" if item.is_paired and error else ""
            table.add_row(item.name, f"{item.first:.6g}", f"{item.second:.6g}", f"{item.value:+.4g}", error + paired)
        return table


def compare(first: EvaluationReport, second: EvaluationReport) -> Comparison:
    """The difference of every metric that both reports have.

    Raises:
        ConfigError: the reports are of different tasks or protocols, or have no metric in common.
    """
    for name, one, other in (
        ("task", first.task, second.task),
        ("protocol", first.protocol["name"], second.protocol["name"]),
        ("protocol's version", first.protocol["version"], second.protocol["version"]),
    ):
        if one != other:
            raise ConfigError(f"--compare: the {name} is {one} and {other}; such numbers cannot be compared")
    common = [name for name in first.metrics if name in second.metrics]
    if not common:
        raise ConfigError(f"--compare: no metric in common ({', '.join(first.metrics)}; {', '.join(second.metrics)})")
    notices = []
    if first.data.get("sha256") != second.data.get("sha256"):
        notices.append(f"the data differ: {first.data['name']} and {second.data['name']}")
    notices += [
        f"{name} differs: {first.settings.get(name)} and {second.settings.get(name)}"
        for name in {**first.settings, **second.settings}
        if first.settings.get(name) != second.settings.get(name)
    ]
    if first.model["fingerprint"] == second.model["fingerprint"]:
        one, other = (_kept_as(report) for report in (first, second))
        notices.append("both are the same model" + ("" if one == other else f", as {one} and as {other}"))
    asked_the_same = first.data.get("sha256") == second.data.get("sha256") and first.settings == second.settings
    differences = [_difference(n, first.metrics[n], second.metrics[n], asked_the_same) for n in common]
    return Comparison(differences=tuple(differences), notices=tuple(notices))


def _check_kinds(report: EvaluationReport) -> None:
    """Raise ValueError where a report that was read has another structure than one that was saved."""
    needed = {"protocol": ("name", "version"), "data": ("name",), "model": ("fingerprint", "dtype"), "settings": ()}
    for section, names in needed.items():
        values = getattr(report, section)
        if not isinstance(values, dict) or not all(name in values for name in names):
            raise ValueError(f"{section} is {str(values)[:200]}; expected {', '.join(names) or 'names and values'}")
    for name, metric in report.metrics.items():
        if not all(value is None or isinstance(value, (int, float)) for value in (metric.value, metric.standard_error)):
            raise ValueError(f"{name} is no number")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4f}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _kept_as(report: EvaluationReport) -> str:
    """The form of the weights; an exported program has the fingerprint of its model."""
    kind = report.model.get("program")
    return f"{report.model['dtype']} {'model' if kind is None else f'{kind} program'}"


def _difference(name: str, first: Metric, second: Metric, asked_the_same: bool) -> Difference:
    error: float | None = None
    one, other = first.influences, second.influences
    is_paired = asked_the_same and one is not None and other is not None and len(one) == len(other)
    if is_paired:
        assert one is not None and other is not None
        error = error_of(other - one)
    elif first.standard_error is not None and second.standard_error is not None:
        error = math.hypot(first.standard_error, second.standard_error)
    return Difference(name=name, first=first.value, second=second.value, standard_error=error, is_paired=is_paired)
