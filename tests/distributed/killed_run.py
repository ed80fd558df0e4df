"""`bloomlm finetune` of which rank 1 is killed, or raises, during its third step when torchrun starts it first."""

import os
import signal
import sys
from typing import Any

from bloomlm.cli.main import main
from bloomlm.training.step import Trainer

real = Trainer.run_step


def run_step(trainer: Trainer) -> Any:
    if trainer.step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a fault of rank 1")
    return real(trainer)


Trainer.run_step = run_step  # type: ignore[method-assign]
main(sys.argv[2:])
