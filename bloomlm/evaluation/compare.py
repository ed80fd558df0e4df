"""Two reports side by side: the difference of each metric and its standard error.

Where both models saw the same observations, their influences are subtracted one by one, and the error of the difference
follows from the result. Otherwise it is the root of the sum of the squared errors, as for two independent samples.
"""

import math
from dataclasses import dataclass

from rich.table import Table

from bloomlm.errors import ConfigError
from bloomlm.evaluation.metrics import Metric, error_of
from bloomlm.evaluation.report import EvaluationReport


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The second report minus the first, in one metric."""

    name: str
    first: float
    second: float
    standard_error: float | None
    is_paired: bool

    @property
    def value(self) -> float:
        """By how much the second is larger."""
        return self.second - self.first


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences, and notices about them."""

    differences: tuple[Difference, ...]
    notices: tuple[str, ...]

    def to_table(self, first: str, second: str) -> Table:
        """The differences as a table for a terminal.

        Args:
            first, second: names of the reports.
        """
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


def _kept_as(report: EvaluationReport) -> str:
    """The form of the weights, as an exported program has the fingerprint of its model."""
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
