"""What every rank needs, imported once for all of them."""

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

import bloomlm.cli.evaluate_runs
import bloomlm.training.finetune  # noqa: F401

torch.set_num_threads(1)
