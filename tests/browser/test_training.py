"""The curves of training runs, in a real browser."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
pytest.importorskip("uvicorn", reason="the page is served by the extra serve")

from playwright.sync_api import Page, expect  # noqa: E402
from rich.console import Console  # noqa: E402

from bloomlm.training.report import Reporter  # noqa: E402
from bloomlm.training.results import History, StepLog  # noqa: E402
from tests.browser.fake_server import FakeServer  # noqa: E402


def log(step: int, loss: float, **others: Any) -> StepLog:
    values: dict[str, Any] = {
        "step": step,
        "epoch": step / 100,
        "loss": loss,
        "learning_rate": 3e-4,
        "grad_norm": 1.5,
        "tokens_per_second": 12345.6,
        "num_supervised_tokens": 10,
        "total_tokens": 100,
        "peak_memory_bytes": 1000,
        "eta_seconds": 3723.0,
        "skipped_steps": 0,
        "loss_scale": None,
    }
    return StepLog(**(values | others))


def reporter(directory: Path) -> Reporter:
    """What bloomlm finetune writes metrics.jsonl with."""
    history = History(max_steps=100, num_train_epochs=1.0)
    return Reporter(directory, history, Console(quiet=True), show_bar=False)


def write(directory: Path, losses: dict[int, float], **others: Any) -> Reporter:
    run = reporter(directory)
    for step, loss in losses.items():
        run.history.global_step = step
        run.on_log(log(step, loss, **others))
    return run


def open_training(page: Page, server: FakeServer, runs: Path) -> None:
    server.runs = runs
    page.goto(f"{server.url}/#training")


def numbers(page: Page) -> list[list[str]]:
    rows = page.locator("#numbers tbody tr")
    return [rows.nth(place).locator("th, td").all_inner_texts() for place in range(rows.count())]


def test_says_how_to_get_runs(page: Page, server: FakeServer, tmp_path: Path) -> None:
    page.goto(f"{server.url}/#training")
    expect(page.locator("#training-notice")).to_contain_text("--runs DIR")
    server.runs = tmp_path
    expect(page.locator("#no-runs")).to_be_visible()
    expect(page.locator("#training-notice")).to_be_hidden()


def test_curves_and_numbers_of_several_runs(page: Page, server: FakeServer, tmp_path: Path) -> None:
    first = write(tmp_path / "a", {10: 2.5, 20: 1.25})
    first.add_evaluation({"eval_loss": 1.75})
    write(tmp_path / "sweep" / "b", {10: 2.0, 20: 1.0, 30: 0.0005}, eta_seconds=0.0)
    os.utime(tmp_path / "sweep" / "b" / "metrics.jsonl", (1, 1))
    open_training(page, server, tmp_path)
    expect(page.locator("#numbers")).to_be_visible()
    assert numbers(page) == [
        ["a", "20", "1.25", "1.75", "12,346", "1:02:03"],
        ["sweep/b", "30", "5e-4", "\u2013", "12,346", "0:00:00"],
    ]
    titles = page.locator(".chart:visible h3").all_inner_texts()
    assert [title.split(" (")[0] for title in titles] == ["Loss", "Learning rate", "Tokens per second", "Gradient norm"]
    label = page.locator(".plot").first.get_attribute("aria-label")
    assert label is not None and "a: loss 1.25; a: eval_loss 1.75; sweep/b: loss 5e-4" in label
    expect(page.locator("#runs label", has_text="a").first).to_contain_text("live")
    expect(page.locator("#runs label", has_text="sweep/b")).not_to_contain_text("live")
    # each run has its colour in the drawing
    for place in (0, 1):
        assert painted(page, f"--run{place}") > 20
    page.uncheck("#runs [value=a]")
    expect(page.locator("#numbers tbody tr")).to_have_count(1)
    assert painted(page, "--run0") == 0


def painted(page: Page, colour: str) -> int:
    """Number of pixels of the first chart that have a colour of the style sheet."""
    return int(
        page.evaluate(
            """name => {
              const probe = document.createElement("span");
              probe.style.color = `var(${name})`;
              document.body.append(probe);
              const [r, g, b] = getComputedStyle(probe).color.match(/[0-9]+/g).map(Number);
              probe.remove();
              const canvas = document.querySelector(".plot canvas");
              const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
              let count = 0;
              for (let i = 0; i < data.length; i += 4)
                if (Math.abs(data[i] - r) + Math.abs(data[i + 1] - g) + Math.abs(data[i + 2] - b) < 6 && data[i + 3] > 200) count += 1;
              return count;
            }""",
            colour,
        )
    )


def test_values_at_a_step_by_mouse_and_keyboard(page: Page, server: FakeServer, tmp_path: Path) -> None:
    write(tmp_path / "a", {10: 2.5, 20: 1.25, 30: 0.75})
    open_training(page, server, tmp_path)
    plot = page.locator(".plot").first
    expect(plot.locator("canvas")).to_be_visible()
    plot.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tip = page.locator(".tip").first
    expect(tip).to_contain_text("step 20")
    expect(tip).to_contain_text("1.25")
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] - 40, box["y"] + 100)
    expect(tip).to_contain_text("step 30")
    # the other charts show the same step
    expect(page.locator(".tip").nth(1)).to_contain_text("step 30")


def test_follows_a_run_that_goes_on_and_is_resumed(page: Page, server: FakeServer, tmp_path: Path) -> None:
    run = write(tmp_path / "a", {10: 2.5})
    open_training(page, server, tmp_path)
    expect(page.locator("#numbers td").nth(0)).to_have_text("10")
    run.on_log(log(20, 1.25))
    expect(page.locator("#numbers td").nth(0)).to_have_text("20")
    run.close()
    # resumed from a checkpoint at step 10: step 20 is done again, then there are more lines than before
    resumed = write(tmp_path / "a", {})
    resumed.history.global_step = 10
    lines = [
        line for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 10
    ]
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    time.sleep(3.5)
    resumed.on_log(log(20, 1.125))
    expect(page.locator("#numbers td").nth(1)).to_have_text("1.125")
    assert (
        page.locator(".plot").first.get_attribute("aria-label")
        == "Loss (line: training, points: evaluation). a: loss 1.125"
    )


def test_tabs_by_keyboard_and_link(page: Page, server: FakeServer, tmp_path: Path) -> None:
    open_training(page, server, tmp_path)
    expect(page.locator("#tab-training")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#write")).to_be_hidden()
    page.focus("#tab-training")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-write")).to_be_focused()
    expect(page.locator("#write")).to_be_visible()
    expect(page.locator("#training")).to_be_hidden()
