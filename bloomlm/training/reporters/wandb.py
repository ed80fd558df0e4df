"""Weights & Biases: a run of the project $WANDB_PROJECT, online or as $WANDB_MODE says."""

import os
import secrets
from collections.abc import Mapping

from bloomlm.training.reporters.base import PROJECT, TrackedRun


class WandbTracker:
    """A run of wandb, which a resumed run continues."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb  # an extra

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.kept_id("wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            config=run.parameters,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand metrics to wandb's own process, which sends them."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Wait until all is sent or stored."""
        self._run.finish()
