"""References of preference tuning: the base model's log-probabilities, computed once, found again, never stale."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.checkpoint.reader import load_model
from bloomlm.parallel.mesh import ALONE
from bloomlm.training import reference, setup
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.training.precision import Precision
from tests.compared_answers import answer_log_prob, compared_answers
from tests.tiny_bloom import write_bloom

ROWS = [{"prompt": f"{i} two", "chosen": f"three {i}", "rejected": "four " * (i + 1)} for i in range(6)]


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_bloom(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(material: Path, **options: Any) -> dict[str, Any]:
    """The first logged line of a short run."""
    values: dict[str, Any] = {
        "model_name_or_path": str(material / "model"),
        "train_file": str(material / "train.jsonl"),
        "output_dir": str(material / "out"),
        "overwrite_output_dir": True,
        "preference": "dpo",
        "max_steps": 2,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "report_to": "none",
        "learning_rate": 1e-3,
    }
    finetune(TrainingConfig(**values | options))
    first: dict[str, Any] = json.loads((material / "out" / "metrics.jsonl").read_text().splitlines()[0])
    return first


def references(material: Path) -> list[Path]:
    return sorted((material / "cache" / "reference").glob("*"))


def test_scores_are_those_of_whole_logits_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model("builtin:tiny", dtype=torch.float32)
    answers = compared_answers(model.config.vocab_size)
    with torch.no_grad():
        expected = [[float(answer_log_prob(model, each)) for each in (answer, answer.other)] for answer in answers]
    for tokens in (5, 20, 4096):
        monkeypatch.setattr(reference, "BATCH_TOKENS", tokens)
        found = reference.reference_scores(model, answers, Precision(), ALONE)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.from_numpy(found), torch.tensor(expected).double(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"lora": True, "use_dora": True}], ids=["full", "dora"])
def test_rewards_begin_at_zero_where_the_model_begins_at_its_reference(material: Path, options: dict[str, Any]) -> None:
    first = run(material, **options)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (first["rewards_chosen"], first["rewards_rejected"]) == pytest.approx((0.0, 0.0), abs=1e-5)


def test_a_prefix_moves_the_model_from_its_reference(material: Path) -> None:
    """The reference is the model without the prefix, whose random virtual tokens act from the first step on."""
    first = run(material, prefix_tuning=True)
    assert abs(first["rewards_chosen"]) > 1e-3


def test_runs_share_a_reference_until_the_model_changes(
    material: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(material, lora=True)
    assert "reference: log-probabilities of 12 answers" in capsys.readouterr().err
    (path,) = references(material)
    again = run(material, preference_beta=0.5)
    assert "reference:" not in capsys.readouterr().err and references(material) == [path]
    assert again["loss"] == pytest.approx(first["loss"], abs=1e-5)
    weights = material / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes())  # the same bytes at a later time
    run(material)
    assert len(references(material)) == 2
    run(material, preference="kto")  # other answers are compared
    assert len(references(material)) == 3
    run(material, preference="orpo")
    assert len(references(material)) == 3


def test_a_damaged_reference_is_computed_again(material: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(material)
    (path,) = references(material)
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        first = run(material)
    assert "damaged" in caplog.text and first["rewards_chosen"] == pytest.approx(0.0, abs=1e-5)
    assert path.read_bytes() != bytes(content)


def test_the_reference_is_computed_with_the_operators_of_training(
    material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    scores = reference.reference_scores

    def noted(*args: Any) -> Any:
        calls.append("reference")
        return scores(*args)

    monkeypatch.setattr(setup, "load_operators_for", lambda device: calls.append("operators"))
    monkeypatch.setattr(reference, "reference_scores", noted)
    run(material)
    assert calls[:2] == ["operators", "reference"]


MESSAGES = [{"role": "user", "content": "one"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("two", "three")]
FORMS: dict[str, dict[str, Any]] = {
    "dpo": {"chosen": MESSAGES + ANSWERS[0], "rejected": MESSAGES + ANSWERS[1]},
    "orpo": {"prompt": MESSAGES, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    "kto": {"prompt": MESSAGES, "completion": ANSWERS[0], "label": False},
}


@pytest.mark.parametrize("preference", [*FORMS, None])
def test_messages_are_learned_by_a_template_that_is_saved(
    preference: str | None, material: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = material / "talks.jsonl"
    path.write_text(f"{json.dumps(FORMS[preference or 'kto'])}\n" * 4)
    options = {"train_file": str(path), "preference": preference, "chat_template": "plain", "learning_rate": 0.01}
    first = run(material, **options, max_steps=20, src_length=9)
    last = json.loads((material / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] < 0.9 * first["loss"]
    assert "--src_length: not used, because the rows of" in caplog.text
    assert "User: " in json.loads((material / "out" / "tokenizer_config.json").read_text())["chat_template"]
