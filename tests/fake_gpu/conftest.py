"""The fake GPU that all of these tests compute on."""

import shutil

import pytest
import torch

from tests.fake_gpu.device import register_guard


@pytest.fixture(scope="session", autouse=True)
def guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.version.cuda is None and shutil.which("g++") is None:
        pytest.skip("fake CUDA tensors need g++ where PyTorch was built without CUDA")
    register_guard(tmp_path_factory.mktemp("guard"))
