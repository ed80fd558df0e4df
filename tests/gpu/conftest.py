"""Tests that need a GPU: skipped, with the reason, where PyTorch finds none."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REASON = "needs a CUDA GPU, and PyTorch finds none here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def exact_fp32() -> None:
    """PyTorch's default, on which the comparisons in fp32 rely: products in fp32 do not go through TF32."""
    assert not torch.backends.cuda.matmul.allow_tf32
