"""TensorBoard: event files in output_dir/runs."""

from collections.abc import Mapping

from bloomlm.training.reporters.base import TrackedRun


class TensorboardTracker:
    """Writes event files."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra

        # purge_step drops what an interrupted run wrote after its last checkpoint
        self._writer = SummaryWriter(str(run.directory), purge_step=run.step + 1 if run.step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars, and flush them, so that others can follow."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
