"""--profile: where the time of a few steps goes, as a Chrome trace and a table of the most costly operations."""

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bloomlm.checkpoint.atomic import atomic_write

WARM_UP_STEPS = 2
PROFILED_STEPS = 3
PROFILE_DIRECTORY = "profile"
TRACE_FILE = "trace.json"
TABLE_FILE = "operations.txt"
_TABLE_ROWS = 10


class StepProfiler:
    """Profiles the steps after the first two; a run that is shorter has no profile.

    Args:
        directory: where the files go.
        device: of the model.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self.directory = directory
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._sort_by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WARM_UP_STEPS - 1, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "StepProfiler":
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)

    def step(self) -> None:
        """Note that a step is over."""
        self._profile.step()

    def _write(self, finished: profile) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self.directory / TRACE_FILE))
        table = finished.key_averages().table(sort_by=self._sort_by, row_limit=_TABLE_ROWS)
        atomic_write(self.directory / TABLE_FILE, str(table) + "\n")
