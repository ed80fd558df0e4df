"""Freed memory is used again, and products of ever new shapes take no more memory after a while."""

import os
import subprocess
import sys

import pytest
import torch

from bloomlm.model.products import uses_onednn

ONES = torch.ones(17, 64)

MEASURE = """
import resource, sys
if sys.argv[1] == "kept":
    from bloomlm.allocator import keep_freed_memory
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(2**24) for _ in range(16)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(way: str) -> int:
    """Page faults of 16 blocks of 16 MiB after as many were freed."""
    output = subprocess.run([sys.executable, "-c", MEASURE, way], check=True, capture_output=True, text=True).stdout
    return int(output)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="is for glibc, and counts pages as Linux does")
def test_freed_memory_is_used_again() -> None:
    given_back = new_pages("given back")
    if given_back < 1000:
        pytest.skip(f"this C library keeps freed memory anyway: only {given_back} new pages without the setting")
    assert new_pages("kept") < given_back / 100


PRODUCTS = """
import sys, torch
from bloomlm.cli import main
from bloomlm.model.products import product
if sys.argv[1] == "bound":
    try:
        main.main(["--version"])
    except SystemExit:
        pass
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
weights = [torch.randn(192, 64), torch.randn(256, 64)]
with torch.no_grad():
    for rows in range(17, 417):
        if rows == 117:
            before = memory()
        for weight in weights:
            product(torch.randn(rows, 64), weight)
print(memory() - before)
"""


def growth_of_products(way: str) -> int:
    """Bytes that 600 products of new shapes add to those of 200 others."""
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    command = [sys.executable, "-c", PRODUCTS, way]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return int(output.split()[-1])


@pytest.mark.skipif(
    not (uses_onednn(ONES, ONES) and sys.platform.startswith("linux")), reason="reads Linux's /proc; oneDNN on x86 only"
)
def test_a_command_keeps_the_code_of_few_products() -> None:
    assert growth_of_products("unbound") > 150e6
    assert growth_of_products("bound") < 30e6
