"""MLflow: a run of the experiment $MLFLOW_EXPERIMENT_NAME, stored where $MLFLOW_TRACKING_URI says."""

import os
import time
from collections.abc import Mapping

from bloomlm.training.reporters.base import PROJECT, TrackedRun

_MOST_PARAMETERS = 100
"""MLflow's limit for one call."""


class MlflowTracker:
    """A run of MLflow, which a resumed run continues."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient  # an extra

        self._client = MlflowClient()
        self._id = run.kept_id("mlflow", lambda: self._create(run))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment_id = self._client.create_experiment(name) if found is None else found.experiment_id
        created: str = self._client.create_run(experiment_id, run_name=run.name).info.run_id
        parameters = [Param(key, str(value)) for key, value in run.parameters.items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(created, params=parameters[start : start + _MOST_PARAMETERS])
        return created

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Store metrics; waits for the server."""
        from mlflow.entities import Metric

        now = time.time_ns() // 10**6  # in milliseconds
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._id)
