"""The report of the benchmarks: tables drawn by value, jobs that exist, and a page that shows what is recorded."""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
NO_JOBS = {"common", "jobs", "peers", "report", "serve_client", "serve_sides", "tables"}
"""Files of the folder that measure nothing themselves."""


@pytest.fixture
def tables() -> Iterator[ModuleType]:
    yield from imported("tables")


@pytest.fixture
def report() -> Iterator[ModuleType]:
    yield from imported("report")


def imported(name: str) -> Iterator[ModuleType]:
    """A file of benchmarks/, which is no package: its scripts import each other by their bare names."""
    before = {*sys.modules}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
        for new in {*sys.modules} - before:
            if (BENCHMARKS / f"{new}.py").exists():
                del sys.modules[new]


def result(command: str, date: str = "2026-01-02", **rows: list[dict[str, float]]) -> dict:
    versions = {"Python": "3.11.2", "torch": "2.13.0"}
    named = {name.replace("__", ", ").replace("_", " "): rounds for name, rounds in rows.items()}
    head = {"processor": "A processor", "date": date, "commit": "abc1234", "command": command}
    return {**head, "versions": versions, "rows": named}


def test_a_table_has_all_rounds_and_what_compares_them(tables: ModuleType) -> None:
    rounds = {
        "transformers": [{"tokens_per_second": 50.0, "peak_memory_gb": 10.0}] * 2,
        "bloomlm": [
            {"tokens_per_second": 150.0, "peak_memory_gb": 5.0, "of_peak": 0.7},
            {"tokens_per_second": 212.34, "peak_memory_gb": 5.0, "of_peak": 0.72},
        ],
    }
    found = {"A processor": {"train_step-lora": {**result("python benchmarks/x.py --y"), "rows": rounds}}}
    assert tables.section("train_step", found).splitlines() == [
        "A processor; Python 3.11.2, torch 2.13.0:",
        "",
        "    python benchmarks/x.py --y  # 2026-01-02, commit abc1234",
        "",
        "|  | tokens/s | of the peak | peak memory, GB |",
        "| --- | --- | --- | --- |",
        "| LoRA r 8, transformers | 50 |  | 10 |",
        "| LoRA r 8, bloomlm | 150, 212 | 0.7, 0.72 | 5 |",
        "| **LoRA r 8, bloomlm : transformers** | 3, 4.25 |  | 0.5 |",
    ]


def test_sides_are_compared_at_each_point_and_less_time_is_faster(tables: ModuleType) -> None:
    rows = {
        "128 tokens, transformers": [{"seconds": 2.0, "memory_gb": 4.0}],
        "128 tokens, bloomlm": [{"seconds": 0.5, "memory_gb": 1.0}],
        "4,096 tokens, bloomlm": [{"seconds": 1234.5, "memory_gb": 2.0}],
    }
    found = {"long_context": {**result("x"), "rows": rows}}
    jobs = [job for job in tables.JOBS if job.name == "long_context"]
    assert tables.table(jobs, found)[2:] == [
        "| 128 tokens, transformers | 2 | 4 |",
        "| 128 tokens, bloomlm | 0.5 | 1 |",
        "| **128 tokens, bloomlm : transformers** | 4 | 0.25 |",
        "| 4,096 tokens, bloomlm | 1,234 | 2 |",
    ]


def test_what_is_asked_is_compared_with_the_median(tables: ModuleType) -> None:
    memory = (0.5, 0.55, 0.9)
    rows = {
        "transformers": [{"tokens_per_second": 1.0, "peak_memory_gb": 1.0}] * 3,
        "bloomlm": [{"tokens_per_second": 5.0, "peak_memory_gb": part, "of_peak": 0.6} for part in memory],
    }
    found = {"A processor": {"train_step-full": {**result("x"), "rows": rows}}}
    assert [(str(bound), value) for *_, bound, value in tables.asked(found)] == [
        ("at most 0.6", 0.55),
        ("at least 0.7", 0.6),
    ]
    assert tables.asked_lines(found)[-2:] == [
        "| train_step-full, bloomlm : transformers | peak memory, GB | at most 0.6 | 0.55 |",
        "| train_step-full, bloomlm | of the peak | at least 0.7 | **0.6** |",
    ]


def test_only_what_stands_between_markers_is_drawn_anew(tables: ModuleType) -> None:
    page = "before\n\n<!-- table: load -->\n\nold\n\n<!-- end -->\n\nbetween\n\n<!-- table: soak -->\n\n<!-- end -->\nafter\n"
    found = {"A processor": {"load": {**result("c"), "rows": {"bloomlm": [{"total_seconds": 1.5}]}}}}
    drawn = tables.redraw(page, found)
    assert "old" not in drawn and "| bloomlm | 1.5 |" in drawn
    assert drawn.endswith(
        "<!-- end -->\n\nbetween\n\n<!-- table: soak -->\n\nNot measured yet.\n\n<!-- end -->\nafter\n"
    )
    assert tables.redraw(drawn, found) == drawn


def test_the_page_shows_what_is_recorded(tables: ModuleType) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert tables.redraw(page, tables.load_results()) == page, "python benchmarks/report.py --draw draws it anew"


def test_every_script_has_a_job_and_every_job_a_table(tables: ModuleType) -> None:
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert {Path(job.script).stem for job in tables.JOBS} == scripts - NO_JOBS
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert {job.table for job in tables.JOBS} | {"asked"} == {*re.findall("<!-- table: ([a-z_]+) -->", page)}
    names = [job.name for job in tables.JOBS]
    assert len({*names}) == len(names)
    assert {path.stem for path in tables.RESULTS.glob("*/*.json")} <= {*names}


def test_the_flags_of_a_job_are_those_of_its_script(tables: ModuleType) -> None:
    common = (BENCHMARKS / "common.py").read_text(encoding="utf-8")
    for job in tables.JOBS:
        script = (BENCHMARKS / job.script).read_text(encoding="utf-8") + common
        unknown = [flag for flag in re.findall("--[a-z0-9_]+", job.command) if f'"{flag}"' not in script]
        assert unknown == [], job.command


def test_a_result_holds_until_the_code_changes(report: ModuleType, tmp_path: Path) -> None:
    job = next(job for job in report.JOBS if job.name == "load")
    path = tmp_path / "load.json"
    assert not report.is_current(job, path)
    path.write_text(json.dumps({"commit": ""}))
    assert not report.is_current(job, path)
    path.write_text(json.dumps({"commit": "0123456789abcdef"}))
    assert not report.is_current(job, path)


def test_a_job_tells_what_it_misses(report: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jobs = {job.name: job for job in report.JOBS}
    job = jobs["evaluate-lambada"]
    monkeypatch.setattr(sys.modules["jobs"], "TEXTS", tmp_path)
    monkeypatch.setattr(sys.modules["jobs"].importlib.util, "find_spec", lambda name: None if name == "lm_eval" else 1)
    assert job.missing() == ["pip install lm-eval", f"lambada_test.jsonl in {tmp_path} (BLOOMLM_BENCH_TEXTS)"]
    (tmp_path / "lambada_test.jsonl").touch()
    assert job.words(BENCHMARKS)[1:5] == ["--task", "lambada", "--file", str(tmp_path / "lambada_test.jsonl")]
