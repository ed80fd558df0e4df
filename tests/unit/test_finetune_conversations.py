"""Fine-tuning on conversations: the same as on the pairs that they are, and files that know their template."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bloomlm
from bloomlm.data.chat_template import PLAIN_TEMPLATE, ChatTemplate
from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import FinetuneResult, finetune
from tests.tiny_bloom import write_bloom

QUESTIONS = [(f"the cat {number}", f"sat on {number} mats") for number in range(12)]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the end"},
    {"role": "assistant", "content": "of what?"},
    {"role": "user", "content": "a day"},
    {"role": "assistant", "content": "comes"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("chat") / "model", eos_scale=1.5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(model: Path, rows: Path, output_dir: Path, **options: Any) -> FinetuneResult:
    values: dict[str, Any] = {
        "model_name_or_path": str(model),
        "train_file": str(rows),
        "eval_file": str(rows),
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "eval_steps": 3,
        "report_to": "none",
        "device": "cpu",
    }
    return finetune(TrainingConfig(**{**values, **options}))


def test_one_turn_is_learned_as_the_pair_that_it_is(model: Path, tmp_path: Path) -> None:
    pairs = [{"src": f"User: {question}\nAssistant:", "tgt": f" {answer}"} for question, answer in QUESTIONS]
    talks = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in QUESTIONS
    ]
    expected = train(model, write_rows(tmp_path / "pairs.jsonl", pairs), tmp_path / "pairs")
    found = train(model, write_rows(tmp_path / "talks.jsonl", talks), tmp_path / "talks", chat_template="plain")
    assert found.eval_metrics["eval_loss"] == expected.eval_metrics["eval_loss"]
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("pairs", "talks"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("learn_last_turn", [False, True])
def test_the_loss_is_that_of_the_answers(model: Path, tmp_path: Path, learn_last_turn: bool) -> None:
    rows = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}])
    options = {"do_train": False, "do_eval": True, "chat_template": "plain", "learn_last_turn": learn_last_turn}
    found = train(model, rows, tmp_path / "run", **options).eval_metrics["eval_loss"]
    loaded = bloomlm.load(model)
    text, answers = ChatTemplate(PLAIN_TEMPLATE, loaded.tokenizer.special_tokens).render_with_answers(TALK)
    tokens, losses = loaded.tokenizer.encode(text), []
    with torch.no_grad():
        log_probs = loaded.model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    for start, stop in answers[1:] if learn_last_turn else answers:
        first, last = (len(loaded.tokenizer.encode(text[:end])) for end in (start, stop))
        losses += [-log_probs[place - 1, tokens[place]].item() for place in range(first, last)]
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_generated_answers_are_compared_with_the_last_one(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}])
    options = {"do_train": False, "do_eval": True, "chat_template": "plain", "generate_num": 1, "tgt_length": 5}
    train(model, rows, tmp_path / "run", **options)
    row = json.loads((tmp_path / "run" / "infer_result.json").read_text())
    prompt = "Be brief.\n\nUser: the end\nAssistant: of what?</s>User: a day\nAssistant:"
    assert (row["instruction"], row["answer"]) == (prompt, " comes")
    assert row["output"] == bloomlm.load(model).generate(prompt, max_new_tokens=5)[0].completion


@pytest.mark.parametrize("options", [{}, {"lora": True, "merge_weights": True}])
def test_the_template_is_saved_with_what_was_learned(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    rows, run = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 4), tmp_path / "run"
    train(model, rows, run, chat_template="plain", save_steps=3, **options)
    loaded = bloomlm.load(model, lora_path=run) if options else bloomlm.load(run)
    assert loaded.tokenizer.chat_template == PLAIN_TEMPLATE
    if options:
        assert bloomlm.load(run / "merged").tokenizer.chat_template == PLAIN_TEMPLATE
    # a second run finds it there
    again = train(run / "merged" if options else run, rows, tmp_path / "again", max_steps=1, eval_steps=1)
    assert again.step == 1


def test_the_template_of_the_model_is_used(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 4)
    with pytest.raises(ConfigError, match="has no chat template; give --chat_template plain"):
        train(model, rows, tmp_path / "run")
    (tmp_path / "bad.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="no Jinja template"):
        train(model, rows, tmp_path / "run", chat_template=str(tmp_path / "bad.jinja"))


def test_flags_of_other_forms_are_warned_about(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": TALK}] * 4)
    train(model, talks, tmp_path / "a", chat_template="plain", src_length=30, max_steps=1, eval_steps=1)
    assert f"--src_length: not used, because the rows of {talks} are conversations" in caplog.messages
    caplog.clear()
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"src": "a", "tgt": "b"}] * 4)
    train(model, pairs, tmp_path / "b", learn_last_turn=True, max_length=30, max_steps=1, eval_steps=1)
    assert (
        f"--max_length, --learn_last_turn: not used, because the rows of {pairs} are pairs of a source and a target"
        in caplog.messages
    )
