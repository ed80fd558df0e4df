"""The report of an evaluation: JSON for programs, a table for a terminal, Markdown for a page."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from bloomlm.errors import DataError
from bloomlm.evaluation.metrics import Metric
from bloomlm.files.atomic import atomic_write

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
    """name, and sha256 of the file where there is one."""
    model: Mapping[str, Any]
    """name, fingerprint, dtype, adapter."""
    settings: Mapping[str, Any]
    """Flags that decide the numbers."""
    counts: Mapping[str, float]
    """Windows, tokens, examples."""
    metrics: Mapping[str, Metric]
    run: Mapping[str, Any]
    """Seconds, tokens/s, device, versions: what describes the run, and does not decide the numbers."""
    notices: tuple[str, ...] = field(default=())
    """What the reader of the numbers should know."""

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
        """Write the JSON, and beside it the Markdown, and the influences of the observations for --compare.

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
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("bloomlm_report")
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: a report of format {version}, and this bloomlm reads {FORMAT_VERSION}")
        metrics = {name: Metric(**fields) for name, fields in content.pop("metrics").items()}
        report = EvaluationReport(**content, metrics=metrics)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a report of --output_file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no report of bloomlm evaluate ({error})") from error
    beside = influences_path(path)
    if not beside.is_file():
        return report
    try:
        kept = json.loads(beside.read_text(encoding="utf-8"))
        known = {name: np.array(kept[name], dtype=np.float64) for name in metrics if name in kept}
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{beside}: cannot be read ({error}); remove it to compare without it") from error
    with_influences = {n: dataclasses.replace(m, influences=known.get(n)) for n, m in metrics.items()}
    return dataclasses.replace(report, metrics=with_influences)


def influences_path(report: Path) -> Path:
    """Where the influences of a report are."""
    return report.with_name(report.name.removesuffix(".json") + _INFLUENCES_SUFFIX)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4e}" if value and not 1e-3 <= abs(value) < 1e6 else f"{value:.4f}"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "\\|")
