"""The numbers of a run in its log, on the screen, in TensorBoard, in files of results and in a picture."""

import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from bloomlm.errors import CheckpointError, format_bytes
from bloomlm.training.config import TrainingConfig
from bloomlm.training.report import MetricsFile, Reporter, duration
from bloomlm.training.reporters import Trackers
from bloomlm.training.reporters.base import TrackedRun
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.results import (
    FinetuneResult,
    History,
    StepLog,
    StepResult,
    TrainResult,
    train_metrics,
    write_answers,
    write_results,
)
from bloomlm.training.run_plan import RunPlan
from bloomlm.training.summary import (
    _series,
    draw_losses,
    next_commands,
    print_summary,
    run_title,
    smoothed,
    write_picture,
)
from tests.short_runs import save_figure


def step_log(step: int, **changes: Any) -> StepLog:
    values: dict[str, Any] = {
        "step": step,
        "epoch": step / 4,
        "loss": 2.5 - step / 10,
        "learning_rate": 1e-3,
        "grad_norm": 0.75,
        "tokens_per_second": 1234.56,
        "num_supervised_tokens": 40,
        "total_tokens": 100 * step,
        "skipped_steps": 0,
        "loss_scale": None,
        "peak_memory_bytes": 3_200_000_000,
        "eta_seconds": 201.0,
    }
    return StepLog(**{**values, **changes})


def step_result(step: int, skipped: str | None = None) -> StepResult:
    return StepResult(
        step=step,
        loss=math.nan if skipped else 1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        num_tokens=10,
        num_supervised_tokens=5,
        num_terms=5,
        sums={},
        skipped=skipped,
        step_seconds=0.1,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reporter_in(
    directory: Path, history: History, *, trackers: Trackers | None = None, **console: Any
) -> tuple[Reporter, io.StringIO]:
    shown = io.StringIO()
    screen = Console(file=shown, width=100, **console)
    return Reporter(directory, history, screen, show_bar=True, trackers=trackers), shown


def test_metrics_and_lines(tmp_path: Path) -> None:
    history = History(max_steps=8, num_train_epochs=2.0)
    reporter, shown = reporter_in(tmp_path, history)
    for step in (1, 2):
        reporter.on_step(step_result(step))
    reporter.on_log(step_log(2, loss_scale=1024.0))
    reporter.on_step(step_result(3, "the loss is nan"))
    reporter.on_log(step_log(3, loss=math.nan, skipped_steps=1))
    reporter.add_evaluation({"eval_loss": 1.5, "eval_accuracy": 0.25, "eval_runtime": 0.5})
    reporter.close()
    reporter.close()
    first, skipped, nan, evaluation = lines(tmp_path / "metrics.jsonl")
    assert first == {
        "step": 2,
        "epoch": 0.5,
        "loss": pytest.approx(2.3),
        "learning_rate": 1e-3,
        "grad_norm": 0.75,
        "tokens_per_second": 1234.6,
        "supervised_tokens": 40,
        "total_tokens": 200,
        "peak_memory_bytes": 3_200_000_000,
        "eta_seconds": 201.0,
        "skipped_steps": 0,
        "loss_scale": 1024.0,
    }
    assert skipped == {"step": 3, "skipped": "the loss is nan"}
    assert (nan["step"], nan["loss"], nan["skipped_steps"]) == (3, None, 1)
    assert evaluation == {"step": 3, "epoch": 0.75, "eval_loss": 1.5, "eval_accuracy": 0.25, "eval_runtime": 0.5}
    assert history.log_history == lines(tmp_path / "metrics.jsonl")
    assert history.evaluation_of(3) == evaluation and history.evaluation_of(2) is None
    assert shown.getvalue().splitlines() == [
        "step 2/8  epoch 0.50  loss 2.3000  lr 1.00e-03  grad 0.75  1,235 tokens/s  3.2 GB  ETA 0:03:21",
        "step 3/8  epoch 0.75  loss nan  lr 1.00e-03  grad 0.75  1,235 tokens/s  3.2 GB  ETA 0:03:21  1 skipped",
        "step 3/8  evaluation  loss 1.5000  accuracy 0.2500",
    ]


def test_a_terminal_gets_a_bar_and_evaluations_above_it(tmp_path: Path) -> None:
    reporter, shown = reporter_in(tmp_path, History(max_steps=8, num_train_epochs=2.0), force_terminal=True)
    reporter.on_step(step_result(5))
    reporter.on_log(step_log(5))
    reporter.add_evaluation({"eval_loss": 1.5})
    reporter.close()
    text = shown.getvalue()
    assert "5/8" in text and "loss 2.0000" in text and "step 5/8  evaluation  loss 1.5000" in text
    assert "step 5/8  epoch" not in text


def test_resuming_repeats_no_step_in_the_log(tmp_path: Path) -> None:
    history = History(max_steps=8, num_train_epochs=2.0)
    reporter, _ = reporter_in(tmp_path, history)
    for step in (1, 2, 3, 4):
        reporter.on_step(step_result(step))
        reporter.on_log(step_log(step))
        if step == 2:
            reporter.add_evaluation({"eval_loss": 1.5})
            history.note_best(1.5, 2, greater_is_better=False)
            history.write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # the process was killed while it wrote
    resumed = History(max_steps=10, num_train_epochs=2.5)
    resumed.read_logged(tmp_path)
    assert (resumed.global_step, resumed.max_steps, resumed.best_metric) == (2, 10, 1.5)
    assert resumed.best_model_checkpoint == "checkpoint-2"
    reporter, _ = reporter_in(tmp_path, resumed)
    for step in (3, 4, 5):
        reporter.on_step(step_result(step))
        reporter.on_log(step_log(step))
    reporter.close()
    assert [entry["step"] for entry in lines(tmp_path / "metrics.jsonl")] == [1, 2, 2, 3, 4, 5]
    assert resumed.log_history == lines(tmp_path / "metrics.jsonl")


def test_trainer_state_has_the_shape_of_transformers(tmp_path: Path) -> None:
    history = History(max_steps=8, num_train_epochs=2.0, global_step=3, epoch=0.75)
    history.log_history.append({"step": 3, "loss": math.inf})
    history.write(tmp_path)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state == {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 0.75,
        "global_step": 3,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": [{"loss": None, "step": 3}],
        "max_steps": 8,
        "num_train_epochs": 2.0,
    }
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json cannot be read"):
        history.read_logged(tmp_path)


def test_best_follows_the_direction_and_never_nan() -> None:
    history = History(max_steps=8, num_train_epochs=2.0)
    values = [(1, math.nan), (2, 3.0), (3, 2.0), (4, math.nan), (5, 2.0), (6, 4.0)]
    taken = [step for step, value in values if history.note_best(value, step, greater_is_better=False)]
    assert taken == [2, 3] and history.best_model_checkpoint == "checkpoint-3"
    greater = History(max_steps=8, num_train_epochs=2.0)
    assert [step for step, value in values if greater.note_best(value, step, greater_is_better=True)] == [2, 6]


def test_metrics_file_starts_empty_and_drops_incomplete_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    MetricsFile(path, step=0).close()
    assert path.read_text() == ""
    path.write_text('{"step": 0, "a": 1}\nrubbish\n[1]\n{"loss": 2}\n{"step": 1}\n')
    MetricsFile(path, step=0).close()
    assert lines(path) == [{"step": 0, "a": 1}]


def test_tensorboard_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = History(max_steps=8, num_train_epochs=2.0)
    run = TrackedRun(output_dir=tmp_path, step=0, flags={})
    reporter, _ = reporter_in(tmp_path, history, trackers=Trackers(["tensorboard"], run))
    for step in (1, 2):
        reporter.on_step(step_result(step))
        reporter.on_log(step_log(step))
    reporter.add_evaluation({"eval_loss": 1.5, "eval_bleu4_signature": "x"})
    reporter.close()
    events = accumulator.EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [(1, 2.4), (2, 2.3)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 1.5)]
    assert "eval/bleu4_signature" not in events.Tags()["scalars"]


def train_result() -> TrainResult:
    return TrainResult(
        step=8,
        interrupted=False,
        train_loss=1.25,
        train_seconds=2.0,
        num_steps=4,
        num_tokens=500,
        total_tokens=1000,
        peak_memory_bytes=10**9,
    )


def test_results_files(tmp_path: Path) -> None:
    train = train_metrics(train_result(), 2.0, 32)
    assert train["train_samples_per_second"] == 16.0 and train["train_steps_per_second"] == 2.0
    assert train["train_tokens_per_second"] == 250.0 and train["train_loss"] == 1.25 and train["epoch"] == 2.0
    write_results(tmp_path, train, {"eval_loss": 1.5})
    read = {name: json.loads((tmp_path / f"{name}_results.json").read_text()) for name in ("train", "eval", "all")}
    assert read["train"] == train and read["eval"] == {"eval_loss": 1.5}
    assert read["all"] == {**train, "eval_loss": 1.5}
    write_results(tmp_path / "eval_only", None, {"eval_loss": 1.5})
    assert {path.name for path in (tmp_path / "eval_only").iterdir()} == {"eval_results.json", "all_results.json"}


def test_generations_file_is_json_lines_in_all_scripts(tmp_path: Path) -> None:
    write_answers(tmp_path, [{"instruction": "日\n", "answer": "a", "output": "b"}])
    text = (tmp_path / "infer_result.json").read_text(encoding="utf-8")
    assert text == '{"instruction": "日\\n", "answer": "a", "output": "b"}\n'


def test_picture_is_drawn_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", save_figure)
    log: list[dict[str, Any]] = [
        {"step": 1, "loss": 3.0, "learning_rate": 1e-3},
        {"step": 2, "skipped": "the loss is nan"},
        {"step": 2, "loss": None, "learning_rate": 5e-4},
        {"step": 2, "eval_loss": 2.0},
        {"step": 3, "loss": 0.1, "learning_rate": 1e-4},
    ]
    assert _series(log, "loss") == ([1, 3], [3.0, 0.1])
    assert _series(log, "learning_rate") == ([1, 2, 3], [1e-3, 5e-4, 1e-4])
    assert _series(log, "eval_loss") == ([2], [2.0])
    assert smoothed([1.0, 2.0, 6.0, 3.0], 2) == [1.5, 3.0, 11 / 3, 4.5]
    history = History(max_steps=3, num_train_epochs=1.0, log_history=log)
    path = write_picture(history, tmp_path, planned(dataset_name_or_path="builtin:dates"))
    assert path == tmp_path / "loss.png"
    png = path.read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (1200, 840)
    draw_losses([{"step": i, "loss": 1.0, "learning_rate": 1.0} for i in range(1, 200)], path, "x", "pair")
    assert path.read_bytes() != png
    draw_losses([], path, "nothing logged", "pair")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert write_picture(history, tmp_path, planned(dataset_name_or_path="builtin:dates")) is None


def outcome(**changes: Any) -> FinetuneResult:
    values: dict[str, Any] = {
        "output_dir": Path("out"),
        "step": 8,
        "interrupted": False,
        "train_metrics": {
            **train_metrics(train_result(), 2.0, 32),
            "peak_flops_per_second": 2e11,
            "model_flops_utilisation": 0.75,
            "padding_avoided": 0.3,
            "memory_bytes": {"weights": 4 * 10**8, "the rest": 6 * 10**8},
        },
        "eval_metrics": {"eval_loss": 1.5, "eval_exact_match": 0.75},
        "best_checkpoint": None,
        "merged_path": None,
        "picture_path": Path("out/loss.png"),
    }
    return FinetuneResult(**{**values, **changes})


def planned(**options: Any) -> RunPlan:
    machine = Machine(has_cuda=False, has_matplotlib=True, has_metrics=True)
    return resolve(TrainingConfig(**{"output_dir": "out", **options}), machine)


def test_summary_shows_numbers_files_and_commands() -> None:
    shown = io.StringIO()
    plan = planned(model_name_or_path="builtin:tiny", dataset_name_or_path="builtin:dates", lora=True)
    print_summary(Console(file=shown, width=100), plan, outcome(), "Date: 3 Mai\nISO:")
    text = shown.getvalue()
    for part in (
        *("8 (2.00 epochs)", "1.2500 (mean of the run)", "0:00:02 (250 tokens/s)", "0.7500"),
        *("75% of the 200 GFLOP/s", "30% of the tokens that padded", "1.0 GB (weights 400.0 MB, the rest 600.0 MB)"),
        *("LoRA adapter       out\n", "loss picture       out/loss.png\n", "flags of the run   out/run.yaml\n"),
    ):
        assert part in text, part
    assert next_commands(plan, outcome(), "Date: 3 Mai\nISO:")[:2] == [
        "bloomlm predict --model_name_or_path builtin:tiny --lora_path out --prompt $'Date: 3 Mai\\nISO:'",
        "bloomlm predict --model_name_or_path builtin:tiny --lora_path out --data_file builtin:dates",
    ]


def test_next_command_names_what_was_trained() -> None:
    full = planned(output_dir="my out", train_file="t.jsonl", eval_file="e.jsonl")
    assert next_commands(full, outcome(output_dir=Path("my out")), "x" * 500) == [
        "bloomlm predict --model_name_or_path 'my out' --prompt 'Your prompt'",
        "bloomlm predict --model_name_or_path 'my out' --data_file e.jsonl",
    ]
    assert next_commands(full, outcome(output_dir=Path("my out")), "")[1:] == []  # raw text has no prompts
    talks = planned(train_file="t.jsonl", eval_file="e.jsonl", chat_template="plain", report_to="none")
    assert next_commands(talks, outcome(), "User: a") == ["bloomlm chat --model_name_or_path out"]
    prefix = planned(train_file="t.jsonl", prefix_tuning=True)
    assert next_commands(prefix, outcome(), "it's") == [
        "bloomlm predict --model_name_or_path bigscience/bloom-560m --prefix_path out --prompt 'it'\"'\"'s'"
    ]


def test_the_title_of_a_picture_names_a_mixture() -> None:
    plan = planned(model_name_or_path="builtin:tiny", mixture="texts/mixture.yaml", lora=True)
    assert run_title(plan).startswith("builtin:tiny on mixture.yaml\n")


def test_units() -> None:
    assert [duration(s) for s in (0, 61, 3 * 3600 + 59.6)] == ["0:00:00", "0:01:01", "3:01:00"]
    assert [format_bytes(n) for n in (999, 12_345_678, 3.2e9)] == ["1.0 kB", "12.3 MB", "3.2 GB"]
