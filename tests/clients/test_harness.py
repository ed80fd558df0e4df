"""lm-eval's `local-completions` scores a task of 100 rows as `bloomlm evaluate` does."""

import json
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the lm_eval extra is not installed")

from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from bloomlm.evaluation.lm_eval_adapter import BloomLM  # noqa: E402
from tests.clients.conftest import MODEL  # noqa: E402
from tests.clients.server import Server  # noqa: E402

NUM_ROWS = 100
WORDS = [
    "the",
    "value",
    "of",
    "a",
    "field",
    "is",
    "set",
    "to",
    "default",
    "when",
    "no",
    "list",
    "was",
    "given",
    "and",
    "中文",
    "café",
    "return",
]


def rows() -> list[dict[str, Any]]:
    """Questions of 3 to 40 words with three answers each."""
    found = []
    for number in range(NUM_ROWS):
        words = [WORDS[(number * 7 + place * (1 + number % 5)) % len(WORDS)] for place in range(3 + number % 38)]
        choices = [WORDS[(number + place) % len(WORDS)] + " " * (place % 2) + WORDS[number % 11] for place in range(3)]
        found.append({"question": " ".join(words), "choices": choices, "answer": number % 3})
    return found


def answers(model: Any, file: Path) -> list[tuple[float, bool]]:
    """The log-likelihood of each answer to each row, and whether it is the greedy continuation."""
    task = {
        "task": "hundred",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    loaded = TaskManager(include_defaults=False).load([task])
    results = lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=0, log_samples=True)
    samples = results["samples"]["hundred"]
    assert len(samples) == NUM_ROWS
    return [tuple(response[0]) for sample in samples for response in sample["resps"]]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_log_likelihoods_are_those_of_evaluate(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    client = LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="remote",
        batch_size=batch_size,
        num_concurrent=4,
    )
    found = answers(client, file)
    expected = answers(BloomLM(MODEL, dtype="float32", device="cpu"), file)
    assert [log_prob for log_prob, _ in found] == pytest.approx([log_prob for log_prob, _ in expected], abs=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert len(found) == 3 * NUM_ROWS
