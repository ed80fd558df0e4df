"""Programs that record metrics of runs (--report_to): a file and a row in TRACKERS for each.

A tracker is opened on the main rank only. One that cannot begin ends the run before its first step. One that fails
later does not, because metrics.jsonl has the numbers anyway.
"""

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bloomlm.errors import ConfigError
from bloomlm.training.reporters.base import TrackedRun, Tracker
from bloomlm.training.reporters.mlflow import MlflowTracker
from bloomlm.training.reporters.tensorboard import TensorboardTracker
from bloomlm.training.reporters.trackio import TrackioTracker
from bloomlm.training.reporters.wandb import WandbTracker

logger = logging.getLogger(__name__)

TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
}
"""Name, which is also that of the package and of our extra -> what opens it."""


def installed_trackers() -> frozenset[str]:
    """The trackers whose package is installed."""
    return frozenset(name for name in TRACKERS if importlib.util.find_spec(name) is not None)


class Trackers:
    """The trackers of a run.

    Args:
        names: names in TRACKERS.
        run: the run.

    Raises:
        ConfigError: one of them cannot begin.
    """

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        self._open: dict[str, Tracker] = {}
        for name in names:
            try:
                self._open[name] = TRACKERS[name](run)
            except Exception as error:  # each program has errors of its own
                self.close()
                raise ConfigError(
                    f"--report_to {name} cannot begin: {error or repr(error)}. Set it up, or leave it out"
                ) from error

    def log(self, step: int, group: str, entry: Mapping[str, Any]) -> None:
        """Record the numbers of an entry of the log as GROUP/NAME; a tracker that fails is left out from then on."""
        metrics = {
            f"{group}/{name.removeprefix('eval_')}": float(value)
            for name, value in entry.items()
            if isinstance(value, int | float) and name not in ("step", "epoch") and math.isfinite(value)
        }
        for name in tuple(self._open):
            self._attempt(name, lambda tracker: tracker.log(step, metrics))

    def close(self) -> None:
        """End the records; may be called repeatedly."""
        for name in tuple(self._open):
            self._attempt(name, lambda tracker: tracker.close())
        self._open.clear()

    def _attempt(self, name: str, action: Callable[[Tracker], None]) -> None:
        try:
            action(self._open[name])
        except Exception as error:  # a server of metrics that is away must not end a run of days
            logger.warning("--report_to %s failed and is left out from here on: %s", name, error or repr(error))
            del self._open[name]
