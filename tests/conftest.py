"""What all tests share."""

import pytest
import torch

torch.set_num_threads(1)  # threads cost more than they save on tiny tensors


@pytest.fixture(scope="session", autouse=True)
def short_runs() -> None:
    from tests.short_runs import shorten_runs

    shorten_runs()
