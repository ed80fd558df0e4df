"""The sweep of docs/methods.md runs as printed, and its best value is that of the best run."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.documented import blocks

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_the_sweep_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    (block,) = (block for block in blocks(PAGE) if block.text.startswith("import optuna"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block.text, str(PAGE), "exec"), names)
    study = names["study"]
    losses = [json.loads((tmp_path / f"sweep/{n}/eval_results.json").read_text())["eval_loss"] for n in range(3)]
    assert [trial.value for trial in study.trials] == losses
    assert study.best_value == min(losses) and len(set(losses)) == 3
    assert set(study.best_params) == {"r", "learning_rate"}
