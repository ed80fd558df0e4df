"""Trackio: a run of the project $TRACKIO_PROJECT, stored on this machine or where $TRACKIO_SPACE_ID says."""

import os
import secrets
from collections.abc import Mapping

from bloomlm.training.reporters.base import PROJECT, TrackedRun


class TrackioTracker:
    """A run of Trackio, which a resumed run continues."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio  # an extra

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            # Trackio finds a run by its name, which must differ from those of other runs
            name=run.kept_id("trackio", lambda: f"{run.name}-{secrets.token_hex(4)}"),
            resume="allow",
            config=run.parameters,
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand metrics to Trackio's thread, which stores them."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until all is stored."""
        self._run.finish()
