"""How the memory for keys and values is found and divided."""

from typing import Any

import pytest
import torch

from bloomlm.errors import ConfigError
from bloomlm.serving import memory
from bloomlm.serving.memory import KvBudget, kv_budget
from bloomlm.serving.options import EngineOptions

CPU = torch.device("cpu")
OPTIONS = EngineOptions(max_num_seqs=8, max_model_len=100)  # 7 blocks a row


def budget(options: EngineOptions = OPTIONS, **changes: Any) -> KvBudget:
    arguments: dict[str, Any] = {"bytes_per_token": 1000, "is_paged": True, "device": CPU} | changes
    return kv_budget(options, **arguments)


def with_gb(kv_cache_gb: float) -> EngineOptions:
    return EngineOptions(max_num_seqs=8, max_model_len=100, kv_cache_gb=kv_cache_gb)


def test_given_memory_is_counted_in_blocks() -> None:
    assert budget(with_gb(0.0001121)) == KvBudget(num_rows=8, num_blocks=7, num_allocated=0)
    with pytest.raises(ConfigError, match=r"needs 112.0 kB for its keys and values, and --kv_cache_gb is 0.0001119"):
        budget(with_gb(0.0001119))


def test_rows_that_are_allocated_at_once_are_as_many_as_fit(caplog: pytest.LogCaptureFixture) -> None:
    assert budget(with_gb(0.0004), is_paged=False) == KvBudget(num_rows=3, num_blocks=25, num_allocated=21)
    assert "so 3 run at once instead of --max_num_seqs 8" in caplog.text
    assert budget(with_gb(0.1), is_paged=False).num_rows == 8


def test_half_of_the_free_memory_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 10_000_000)
    assert budget().num_blocks == 312
    assert budget(mapped_bytes=4_000_000).num_blocks == 187
    with pytest.raises(ConfigError, match=r"only 0\.0 kB are free; lower --max_model_len"):
        budget(mapped_bytes=11_000_000)


def test_more_memory_than_is_free_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 10_000_000)
    assert budget(with_gb(0.01)).num_blocks == 625 and not caplog.records
    assert budget(with_gb(0.011)).num_blocks == 687
    assert "--kv_cache_gb 0.011 is more than the 10.0 MB that are free" in caplog.text


def test_rows_that_are_allocated_have_room_for_virtual_tokens() -> None:
    found = budget(with_gb(0.0004), is_paged=False, num_virtual_tokens=20)
    assert found == KvBudget(num_rows=3, num_blocks=25, num_allocated=24)
    with pytest.raises(ConfigError, match=r"100 tokens behind 20 virtual ones needs 128\.0 kB"):
        budget(with_gb(0.000112), is_paged=False, num_virtual_tokens=20)
