"""What a run can use on this machine. Passed to `resolve`, so that tests can describe any machine."""

import importlib.util
from dataclasses import dataclass

import torch

from bloomlm.parallel.launch import world_size


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run can use here."""

    has_cuda: bool
    has_tensorboard: bool
    has_matplotlib: bool
    has_metrics: bool
    """ROUGE and BLEU can be computed."""
    has_bitsandbytes: bool = False
    world_size: int = 1
    """Processes of the job."""

    @classmethod
    def here(cls) -> "Machine":
        """Look for a GPU, for optional packages and for other processes of the job."""
        return cls(
            has_cuda=torch.cuda.is_available(),
            has_tensorboard=_installed("tensorboard"),
            has_matplotlib=_installed("matplotlib"),
            has_metrics=_installed("sacrebleu") and _installed("rouge_score"),
            has_bitsandbytes=_installed("bitsandbytes"),
            world_size=world_size(),
        )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
