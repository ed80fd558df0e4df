"""Rows of keys and values: what they remember under random calls, and the memory that they take."""

import mmap

import pytest
import torch

from bloomlm import row_memory
from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import GenerationError
from bloomlm.model.kv_cache import _spans
from bloomlm.row_memory import RowMemory
from tests.process_memory import STATM, memory_full_of_nan, resident_bytes
from tests.row_walk import Walk

from .test_decode import tiny_model

MIB = 2**20


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_gives_the_logits_of_whole_texts(with_prefix: bool, seed: int) -> None:
    model = tiny_model(seed)
    if with_prefix:
        apply_adapter(model, PrefixConfig(num_prefix_tokens=3), torch.Generator().manual_seed(1))
    with memory_full_of_nan():
        walk = Walk(model, model, seed)
    walk.run(150)
    assert walk.num_checked > 200


def memory_of(num_rows: int, num_slots: int) -> RowMemory:
    return RowMemory(num_blocks=3, num_rows=num_rows, num_heads=4, num_slots=num_slots, width=24, dtype=torch.float32)


@pytest.mark.skipif(not STATM.exists(), reason="counts memory as Linux does")
def test_unused_rows_take_nothing_and_freed_rows_give_their_memory_back() -> None:
    before = resident_bytes()
    memory = memory_of(num_rows=200, num_slots=100_000)
    assert memory.tensor.nbytes > 40 * 2**30 and resident_bytes() - before < 2 * MIB
    used = []
    for row in (7, 8, 150):
        slots = memory.claim(row, 20_000)
        memory.tensor[:, :, row, :, slots.start : slots.stop] = 1.0
        memory.lengths[row] = slots.stop
        used.append(resident_bytes() - before)
    row_bytes = 2 * 3 * 4 * 20_000 * 24 * 4
    assert 2.9 * row_bytes < used[-1] < 3.1 * row_bytes
    memory.free(8)
    assert resident_bytes() - before < 2.1 * row_bytes
    assert memory.tensor[:, :, 7, :, :20_000].min() == memory.tensor[:, :, 150, :, :20_000].min() == 1
    memory.free(7)
    memory.free(150)
    assert resident_bytes() - before < 0.1 * row_bytes


@pytest.mark.parametrize("num_slots", [mmap.PAGESIZE // 96, 50, 3])
def test_a_freed_row_holds_zeros_and_its_neighbours_stay(num_slots: int) -> None:
    memory = memory_of(5, num_slots)
    for row in (1, 2, 3):
        memory.tensor[:, :, row] = float("nan") if row == 2 else row
        memory.lengths[row] = memory.claim(row, num_slots).stop
    memory.free(2)
    sums = memory.tensor.sum(dim=(0, 1, 3, 5))
    assert sums.tolist() == [[float(n)] * num_slots for n in (0, 576, 0, 1728, 0)]


def test_slots_behind_a_truncated_row_hold_zeros() -> None:
    memory = memory_of(2, 8)
    memory.lengths[1] = memory.claim(1, 6).stop
    memory.tensor[:, :, 1, :, :6] = float("nan")
    memory.tensor[:, :, 1, :, :4] = 1.0
    memory.truncate(1, 4)
    assert memory.lengths == [0, 4]
    assert memory.tensor[0, 0, 1, 0, :, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert memory.tensor.sum() == 2 * 3 * 4 * 4 * 24


def test_what_a_row_does_not_have_is_refused() -> None:
    memory = memory_of(2, 8)
    memory.lengths[0] = memory.claim(0, 5).stop
    with pytest.raises(ValueError, match="row 0 has 5 tokens; it has no tokens 0 to 6"):
        memory.truncate(0, 6)
    with pytest.raises(ValueError, match="row 1 has 0 tokens; it has no tokens 0 to 1"):
        memory.read_block(1, 0, 1)
    with pytest.raises(ValueError, match="4 more tokens do not fit into a row of 8 slots, 5 in use"):
        memory.claim(0, 4)


def test_a_model_without_named_adapters_refuses_a_name() -> None:
    rows = tiny_model().open_rows(1, 4)
    rows.set_adapter(0, None)
    with pytest.raises(GenerationError, match="has no adapters with names, so it has no 'french'"):
        rows.set_adapter(0, "french")


def test_rows_that_are_not_neighbours_are_read_in_few_calls_and_few_slots() -> None:
    near = [(0, 100, 0), (1, 120, 1), (3, 110, 2)]
    far, long = (40, 90, 3), (41, 900, 4)
    assert _spans([*near, far]) == [near, [far]]
    assert _spans([*near, far, long]) == [near, [far, long]]
    assert _spans([(0, 10, 0), (1, 20, 1), (2, 900, 2)]) == [[(0, 10, 0), (1, 20, 1)], [(2, 900, 2)]]


@pytest.mark.parametrize("paged", [True, False])
def test_rows_from_inference_mode_can_be_changed_outside_it(paged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session opens its rows in inference mode and frees them anywhere; on a GPU there is no paging."""
    monkeypatch.setattr(row_memory, "_HAS_PAGING", paged and row_memory._HAS_PAGING)
    with torch.inference_mode():
        memory = memory_of(2, 3)
        memory.tensor[:, :, 1] = 1.0
        memory.lengths[1] = memory.claim(1, 3).stop
    memory.free(1)
    assert not memory.tensor.any()
