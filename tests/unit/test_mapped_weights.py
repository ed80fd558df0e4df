"""Weights of a pt2 program: mapped, and in the page table before a step needs them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bloomlm.runtime.formats import pt2
from bloomlm.runtime.formats.pt2 import _enter_pages


def resident_bytes(path: Path) -> int:
    """Bytes of mappings of a file that this process's page table has."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.endswith(str(path)):
            inside = True
        elif inside and line.startswith("Rss:"):
            found, inside = found + int(line.split()[1]) * 1024, False
    return found


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, Tensor]:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1 << 20), "b": torch.zeros(3, 1 << 20, dtype=torch.int8)}, path)
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in ("a", "b")}


def test_weights_enter_the_page_table_in_another_thread(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path, size = tmp_path / "weights.safetensors", 7 << 20
    assert resident_bytes(path) < size / 2
    _enter_pages(weights).join()
    assert resident_bytes(path) >= size


def test_the_rest_of_large_weights_is_left_to_the_first_step(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pt2, "_MOST_BYTES", 5 << 20)
    _enter_pages(weights).join()
    assert 5 << 20 <= resident_bytes(tmp_path / "weights.safetensors") < 6 << 20
