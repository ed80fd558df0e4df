"""Rows of two models treated alike: read, continued, copied, freed and used again."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bloomlm.generation.language_model import LanguageModel

STATM = Path("/proc/self/statm")
_PROMPTS = [[5], [6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


@torch.inference_mode()
def largest_error(one: LanguageModel, other: LanguageModel) -> float:
    """The largest relative difference of the logits of any call."""
    with memory_full_of_nan():
        sides = [model.open_rows(5, 24) for model in (one, other)]
    errors: list[float] = []

    def note(expected: torch.Tensor, found: torch.Tensor) -> None:
        errors.append(float((found - expected).norm() / expected.norm()))
        if len(expected) > 1:  # rows differ among themselves
            assert (expected - expected.roll(1, 0)).norm() / expected.norm() > 0.05

    def prefill(rows: list[int], prompts: list[list[int]]) -> None:
        note(*(side.prefill(rows, prompts) for side in sides))

    def step(rows: list[int]) -> None:
        tokens = torch.arange(40, 40 + len(rows))
        note(*(side.decode_step(rows, tokens) for side in sides))

    prefill([0, 1, 2, 3], _PROMPTS)
    step([0, 1, 2, 3])
    step([0, 1, 2, 3])
    step([3, 1])
    for side in sides:
        side.free(2)
        side.copy_row(1, 4)
    step([4, 0, 1])
    prefill([2], [[16, 17, 18]])
    prefill([0, 3], [[19, 20], [21]])  # behind what they hold
    for side in sides:
        side.copy_row(2, 1)
    step([0, 1, 2, 3, 4])
    step([4, 1])
    return max(errors)


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """Let torch.empty return NaN, which memory that was used before may hold."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def resident_bytes() -> int:
    """Memory of this process that the system really holds, as Linux counts it in STATM."""
    return int(STATM.read_text().split()[1]) * resource.getpagesize()
