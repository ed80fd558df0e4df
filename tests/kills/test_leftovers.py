"""Files of the cache are made once and then only read, so what a killed writer leaves must go before they have their name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bloomlm.data.cache import read_arrays, write_arrays
from bloomlm.kernels import compiled
from tests.kills.faults import Fault, watch
from tests.kills.files import differences, snapshot
from tests.kills.test_faults import in_child

ARRAYS = {"tokens": np.arange(7, dtype=np.int32), "scores": np.array([[0.5], [2.0]])}
COMPILER = """#!/bin/sh
for word; do [ "$before" = -o ] && echo compiled >"$word"; before=$word; done
"""


def cache_arrays(cache: Path) -> None:
    """As every run does: what the cache lacks is made."""
    if read_arrays(cache / "examples" / "a.safetensors") is None:
        write_arrays(cache / "examples" / "a.safetensors", ARRAYS)


def compile_operators(cache: Path) -> None:
    compiled._library()


@pytest.mark.parametrize("action", [cache_arrays, compile_operators])
def test_nothing_is_left_after_a_kill_at_any_event(
    action: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, cache = tmp_path / "compiler", tmp_path / "cache"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("BLOOMLM_CACHE", str(cache))

    def act(fault: Fault | None) -> None:
        watch(cache, fault, tmp_path / "count")
        action(cache)

    cache.mkdir()
    assert in_child(lambda: act(None)) == 0
    expected = snapshot(cache)
    num_events = (tmp_path / "count").stat().st_size
    assert num_events > 3
    for event in range(1, num_events + 1):
        shutil.rmtree(cache)
        cache.mkdir()
        assert in_child(lambda: act(Fault(event))) < 0  # noqa: B023 (called at once)
        assert in_child(lambda: act(None)) == 0
        assert (event, differences(snapshot(cache), expected)) == (event, [])
