"""Workers of a thread that computes no longer end, so that they do not slow down the threads that do."""

import subprocess
import sys

import pytest

COUNT = """
import os, sys
import torch

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
before = count()
torch.zeros(1 << 20).add_(1)
with_workers = count()
if sys.argv[1] == "ended":
    from bloomlm.openmp import end_workers
    end_workers()
print(with_workers - before, count() - before, torch.ones(1 << 20).sum().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux does")
@pytest.mark.parametrize(("way", "left"), [("kept", 1), ("ended", 0)])
def test_workers_end(way: str, left: int) -> None:
    output = subprocess.run([sys.executable, "-c", COUNT, way], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["1", str(left), str(float(1 << 20))]
