"""The picture of a run: training and evaluation loss above, learning rate below. Needs the `plots` extra."""

import importlib.util
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bloomlm.files.atomic import atomic_write
from bloomlm.training.history import History

PICTURE_FILE = "loss.png"

_TRAIN, _EVAL, _RATE = "#2563a8", "#d1622b", "#4b8b5e"
_MANY_POINTS = 60
_LOG_RANGE = 25


def write_picture(history: History, output_dir: Path, title: str) -> Path | None:
    """Draw loss.png; None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    path = output_dir / PICTURE_FILE
    draw_losses(history.log_history, path, title)
    return path


def draw_losses(log_history: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the log of a run into a PNG file.

    Args:
        log_history: entries with step and loss, learning_rate or eval_loss, in the order of the steps.
        path: of the picture.
        title: of the picture.
    """
    # matplotlib is an extra and slow to import; figures without pyplot need no display and no global state
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    _draw_loss_panel(losses, log_history)
    steps, values = _series(log_history, "learning_rate")
    rates.plot(steps, values, color=_RATE, linewidth=1.6, marker="o" if len(steps) == 1 else None)
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step (updates of the weights)")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (losses, rates):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "bloomlm"})
    atomic_write(path, buffer.getvalue())


def _draw_loss_panel(axes: Any, log_history: Sequence[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    steps, values = _series(log_history, "loss")
    if len(steps) > _MANY_POINTS:
        axes.plot(steps, values, color=_TRAIN, alpha=0.3, linewidth=0.8)
        width = len(steps) // 30
        axes.plot(steps, _smoothed(values, width), color=_TRAIN, linewidth=1.8, label=f"training, mean of {width} logs")
    else:
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, color=_TRAIN, linewidth=1.6, marker=marker, markersize=3.5, label="training")
    eval_steps, eval_values = _series(log_history, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_values, color=_EVAL, marker="o", markersize=4.5, linewidth=1.6, label="evaluation")
        best = min(range(len(eval_values)), key=eval_values.__getitem__)
        axes.annotate(
            f"lowest {eval_values[best]:.4g}",
            (eval_steps[best], eval_values[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="right" if best == len(eval_values) - 1 and best > 0 else "center",
            color=_EVAL,
            fontsize=9,
        )
    axes.set_ylabel("loss per learned token (nats)")
    if steps or eval_steps:
        axes.legend(frameon=False)
        low, high = min([*values, *eval_values]), max([*values, *eval_values])
        if low > 0 and high > _LOG_RANGE * low:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())


def _series(log_history: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [
        (entry["step"], entry[name])
        for entry in log_history
        if entry.get(name) is not None and math.isfinite(entry[name])
    ]
    return [step for step, _ in points], [value for _, value in points]


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and its neighbours; values at the ends have fewer of them."""
    reach = width // 2
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
