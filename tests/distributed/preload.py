"""What every rank needs, imported once for all of them."""

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import bloomlm.cli.evaluate
import bloomlm.training.finetune  # noqa: F401
from tests.short_runs import shorten_runs

torch.set_num_threads(1)
shorten_runs()
