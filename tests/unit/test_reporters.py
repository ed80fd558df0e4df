"""Programs that record metrics of runs: what each gets, that a resumed run continues its record, and what a failure does.

wandb, mlflow and trackio run here without a network where they are installed (extras of these names). Elsewhere only the
rules that hold for all of them are tested.
"""

import json
import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bloomlm.errors import ConfigError
from bloomlm.training.finetune import finetune
from bloomlm.training.reporters import TRACKERS, Trackers
from bloomlm.training.reporters.base import TrackedRun
from tests.unit.test_finetune import flags, material, metrics, own_cache

__all__ = ["material", "own_cache"]


class Recorder:
    """A tracker that keeps what it gets."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.closed = 0
        self.fails = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.fails:
            raise ConnectionError("the server is away")
        self.logged.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The trackers that runs open under the names wandb and mlflow."""
    opened: list[Recorder] = []

    def open_recorder(run: TrackedRun) -> Recorder:
        opened.append(Recorder(run))
        return opened[-1]

    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(TRACKERS, name, open_recorder)
    monkeypatch.setattr("bloomlm.training.resolve.installed_trackers", lambda: frozenset({"wandb", "mlflow"}))
    return opened


def some_run(directory: Path, step: int = 0) -> TrackedRun:
    return TrackedRun(output_dir=directory, step=step, flags={"r": 8, "target_modules": ("dense",), "eval_file": None})


def test_a_run_tells_each_tracker_its_flags_and_metrics(
    material: Path, tmp_path: Path, recorders: list[Recorder]
) -> None:
    out = tmp_path / "out"
    finetune(flags(material, out, lora=True, report_to="wandb, mlflow"))
    assert len(recorders) == 2
    for recorder in recorders:
        assert (recorder.run.name, recorder.run.step, recorder.closed) == ("out", 0, 1)
        assert recorder.run.parameters["target_modules"] == ["query_key_value"]
        assert "prompt_template" not in recorder.run.parameters
        found = [(step, values["train/loss"]) for step, values in recorder.logged if "train/loss" in values]
        assert found == [(entry["step"], entry["loss"]) for entry in metrics(out) if "loss" in entry]
        found = [(step, values["eval/loss"]) for step, values in recorder.logged if "eval/loss" in values]
        assert found == [(entry["step"], entry["eval_loss"]) for entry in metrics(out) if "eval_loss" in entry]
    finetune(flags(material, out, lora=True, report_to="wandb,mlflow", max_steps=8))
    assert [recorder.run.step for recorder in recorders] == [0, 0, 6, 6]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(
    tmp_path: Path, recorders: list[Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(["wandb", "mlflow"], some_run(tmp_path))
    recorders[0].fails = True
    with caplog.at_level(logging.WARNING):
        trackers.log(1, "train", {"step": 1, "loss": 2.0, "grad_norm": float("nan"), "skipped": "the loss is nan"})
        trackers.log(2, "train", {"step": 2, "loss": 1.0})
    trackers.close()
    trackers.close()
    assert [record.getMessage() for record in caplog.records] == [
        "--report_to wandb failed and is left out from here on: the server is away"
    ]
    assert recorders[1].logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0})]
    assert [recorder.closed for recorder in recorders] == [0, 1]


def test_a_tracker_that_cannot_begin_ends_the_run_before_its_first_step(
    material: Path, tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: TrackedRun) -> Recorder:
        raise PermissionError("not logged in")

    monkeypatch.setitem(TRACKERS, "mlflow", refuse)
    with pytest.raises(ConfigError, match="--report_to mlflow cannot begin: not logged in"):
        finetune(flags(material, tmp_path / "out", lora=True, report_to="wandb,mlflow"))
    assert recorders[0].closed == 1
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_an_id_is_created_once(tmp_path: Path) -> None:
    ids = iter("ab")
    assert [some_run(tmp_path).kept_id("wandb", lambda: next(ids)) for _ in range(2)] == ["a", "a"]
    assert some_run(tmp_path).kept_id("mlflow", lambda: next(ids)) == "b"


def log_twice(name: str, directory: Path) -> None:
    """A run of two steps, and the same run resumed for a third."""
    for first, last in ((1, 2), (3, 3)):
        trackers = Trackers([name], some_run(directory, first - 1))
        for step in range(first, last + 1):
            trackers.log(step, "train", {"step": step, "loss": 3.0 - step})
        trackers.log(last, "eval", {"step": last, "eval_loss": 1.0 / last})
        trackers.close()


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a wandb file: 7 bytes, then LevelDB's log format (blocks of 32 KiB; CRC, length, type, data)."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if 2**15 - position % 2**15 < 7:  # the rest of a block is too small for a header
            position += 2**15 - position % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    log_twice("wandb", tmp_path / "out")
    history: list[dict[str, Any]] = []
    ids = set()
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert config["r"] == 8 and config["target_modules"] == ["dense"]
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert ids == {(tmp_path / "out" / "runs" / "wandb_run.txt").read_text().strip()}
    found = [(row["_step"], row["train/loss"], row.get("eval/loss")) for row in history]
    assert found == [(1, 2.0, None), (2, 1.0, 0.5), (3, 0.0, pytest.approx(1 / 3))]


def test_mlflow_in_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    log_twice("mlflow", tmp_path / "out")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("bloomlm").experiment_id])
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert run.data.params == {"r": "8", "target_modules": "['dense']"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "eval/loss")] == [2, 3]


def test_trackio_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    log_twice("trackio", tmp_path / "out")
    name = (tmp_path / "out" / "runs" / "trackio_run.txt").read_text().strip()
    assert name.startswith("out-") and SQLiteStorage.get_runs("bloomlm") == [name]
    rows = [row for row in SQLiteStorage.get_logs("bloomlm", name) if "train/loss" in row]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 2.0), (2, 1.0), (3, 0.0)]
