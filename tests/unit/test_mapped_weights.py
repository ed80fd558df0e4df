"""Weights of a pt2 program: mapped, and in the page table before a step needs them."""

import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

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


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/smaps")
def test_weights_enter_the_page_table_in_another_thread(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1 << 20), "b": torch.zeros(3, 1 << 20, dtype=torch.int8)}, path)
    with safe_open(path, framework="pt") as file:
        weights = {name: file.get_tensor(name) for name in ("a", "b")}
    size = sum(weight.nbytes for weight in weights.values())
    assert resident_bytes(path) < size / 2
    _enter_pages(weights)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
    assert resident_bytes(path) >= size
