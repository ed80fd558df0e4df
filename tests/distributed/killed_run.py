"""`bloomlm finetune` with a fault of rank 1 during its third step, when torchrun starts it first.

The first argument is the fault: "kill", "raise" or "none".
"""

import os
import signal
import sys
from typing import Any

from bloomlm.cli.main import main
from bloomlm.training.step import Trainer
from tests.short_runs import shorten_runs

fault = sys.argv[1]
real = Trainer.run_step


def run_step(trainer: Trainer) -> Any:
    if trainer.step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "raise":
            raise RuntimeError("a fault of rank 1")
    return real(trainer)


shorten_runs()
Trainer.run_step = run_step  # type: ignore[method-assign]
main(sys.argv[2:])
