"""The learning-rate range test: its rates, what it suggests, and that it leaves everything else alone."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from bloomlm.errors import ConfigError
from bloomlm.training.finetune import finetune
from bloomlm.training.learning_rate_range import HIGHEST, LOWEST, RangeTest, RisingRates
from bloomlm.training.resolve import resolve
from tests.unit.test_finetune import flags, material, own_cache
from tests.unit.test_training_config import CPU, config, parse

__all__ = ["material", "own_cache"]


def test_rates_rise_by_the_same_factor() -> None:
    schedule = RisingRates(learning_rate=HIGHEST).over(8)
    assert [schedule(step) for step in range(8)] == pytest.approx([1e-7 * 10**step for step in range(8)])
    assert (schedule(0), schedule(7)) == pytest.approx((LOWEST, HIGHEST))


def found(losses: list[float]) -> RangeTest:
    schedule = RisingRates(learning_rate=HIGHEST).over(71)
    return RangeTest(tuple(schedule(step) for step in range(len(losses))), tuple(losses))


def test_the_suggestion_is_a_tenth_of_the_rate_of_the_lowest_loss() -> None:
    losses = [3.0] * 30 + [3.0 - 0.1 * n for n in range(15)] + [1.6 + 0.5 * n for n in range(10)]
    result = found(losses)
    lowest = min(range(len(losses)), key=lambda i: sum(losses[i - 4 : i + 5]) if 4 <= i < len(losses) - 4 else 1e9)
    assert lowest in (42, 43, 44)
    assert result.suggestion == pytest.approx(1e-7 * 10 ** (lowest / 10) / 10)
    losses[2] = 1.0  # a single low loss does not decide
    assert found(losses).suggestion == result.suggestion


def test_nothing_is_suggested_where_no_rate_lowers_the_loss() -> None:
    assert found([2.0 + 0.1 * n for n in range(40)]).suggestion is None
    assert found([2.0, 1.0]).suggestion is None
    assert found([]).suggestion is None


def test_a_test_writes_its_picture_alone_and_names_the_command(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "lora": True,
        "r": 3,
        "target_modules": ("query_key_value", "dense"),
        "learning_rate": 5e-5,
    }
    finetune(flags(material, out, **options, max_steps=2))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    given = flags(material, out, **options, find_learning_rate=True, overwrite_output_dir=True, max_steps=-1)
    result = finetune(given)
    assert result.picture_path == out / "learning_rate.png" and not result.interrupted
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert after.pop(out / "learning_rate.png") and after == before
    assert result.suggested_learning_rate is not None and 1e-5 < result.suggested_learning_rate < 0.1
    (command,) = (line for line in capfd.readouterr().err.splitlines() if line.strip().startswith("bloomlm finetune"))
    repeated = parse(" ".join(shlex.quote(word) for word in shlex.split(command)[2:]))
    assert repeated.learning_rate == pytest.approx(result.suggested_learning_rate, rel=0.05)
    assert (repeated.r, repeated.target_modules, repeated.find_learning_rate) == (3, options["target_modules"], False)
    assert repeated.train_file == given.train_file and repeated.output_dir == given.output_dir


def test_a_run_begins_beside_the_picture(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(flags(material, out, lora=True, find_learning_rate=True, max_steps=12))
    assert [path.name for path in out.iterdir()] == ["learning_rate.png"]
    assert finetune(flags(material, out, lora=True, max_steps=2)).step == 2


def test_what_contradicts_a_test_is_said() -> None:
    with pytest.raises(ConfigError, match="tries rates on a fresh model"):
        resolve(config(find_learning_rate=True, resume_from_checkpoint="out/checkpoint-1"), CPU)
    assert any(
        "--learning_rate 0.01 is not used" in notice
        for notice in resolve(config(find_learning_rate=True, learning_rate=0.01), CPU).notices
    )
