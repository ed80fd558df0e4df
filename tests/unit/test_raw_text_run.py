"""Continued pretraining: runs on raw text, from flags to metrics, and what is refused."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.api import load as load_bloom
from bloomlm.data import splits as data_splits
from bloomlm.data.text_sources import load_mixture, read_mixture, sources_of_path, sources_of_rows
from bloomlm.errors import ConfigError, DataError
from bloomlm.training.config import TrainingConfig
from bloomlm.training.evaluate_text import text_parts
from bloomlm.training.finetune import finetune
from tests.bloom_tokenizer import make_tokenizer
from tests.unit.test_token_files import write_jsonl, write_rows

WIKITEXT = Path(__file__).parents[3] / "shared" / "data"
TEXTS = {
    "en": [
        f"The model has {number} fields. The form of the date is the same, and the name of it." for number in range(60)
    ],
    "de": [f"Das Datum ist der {number}. Januar, und die Form ist die gleiche." for number in range(40)],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def write_texts(tmp_path: Path) -> Path:
    """A mixture of two sources, one of which is a directory."""
    write_jsonl(tmp_path / "en.jsonl", TEXTS["en"])
    (tmp_path / "german").mkdir()
    for number, text in enumerate(TEXTS["de"]):
        (tmp_path / "german" / f"{number}.txt").write_text(text)
    entries = [
        {"name": "english", "path": "en.jsonl", "weight": 3, "language": "en"},
        {"name": "german", "path": "german", "weight": 1, "language": "de"},
    ]
    (tmp_path / "mixture.yaml").write_text(json.dumps(entries))  # JSON is YAML
    return tmp_path / "mixture.yaml"


def run(tmp_path: Path, **flags: Any) -> Any:
    chosen: dict[str, Any] = {
        "model_name_or_path": "builtin:tiny",
        "output_dir": str(tmp_path / "out"),
        "max_length": 64,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 2,
        "learning_rate": 1e-3,
        "lora": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return finetune(TrainingConfig(**chosen | flags))


def metrics_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_a_mixture_is_learned_and_evaluated_by_source_and_language(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mixture = write_texts(tmp_path)
    found = run(tmp_path, mixture=str(mixture), do_eval=True, eval_steps=6, max_steps=30).eval_metrics
    losses = [entry["loss"] for entry in metrics_of(tmp_path) if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    summary, shown = capfd.readouterr()
    assert "windows from" in shown and "english: weight 3" in shown and "passes an epoch" in shown
    (line,) = re.findall(r"step 6/30  evaluation.*", shown)
    assert "bits_per_byte" in line and "/" not in line.removeprefix("step 6/30")
    for group in ("english", "german", "language en", "language de"):
        name = group.replace(" ", "/")
        assert re.search(rf"bits per byte, {group} +{found[f'eval_bits_per_byte/{name}']:.4f} \(loss", summary)
    for source, language in (("english", "en"), ("german", "de")):
        for name in ("eval_loss", "eval_bits_per_byte"):
            assert found[f"{name}/{source}"] == found[f"{name}/language/{language}"]
    low, high = sorted([found["eval_loss/english"], found["eval_loss/german"]])
    assert low < found["eval_loss"] < high
    assert found["eval_ppl"] == pytest.approx(math.exp(found["eval_loss"]))


def test_rows_of_one_file_are_evaluated_by_their_own_languages(tmp_path: Path) -> None:
    """Each language has the numbers of a file with its documents alone, and all together those of the whole file."""
    rows = [
        {"text": text, "language": language}
        for number in range(12)
        for language, texts in TEXTS.items()
        for text in texts[number : number + 2]
    ]
    rows[3:3] = [{"text": "The text of no language. " * 9}, {"text": "Ein Datum. " * 40, "lang": "de"}]
    write_rows(tmp_path / "all.jsonl", rows)
    named = [row.get("language") or row.get("lang") for row in rows]
    for language in ("en", "de"):
        texts = [row["text"] for row, name in zip(rows, named, strict=True) if name == language]
        write_jsonl(tmp_path / f"{language}.jsonl", texts)
    entries = [{"name": "all", "path": "all.jsonl", "language": "en"}, {"name": "more", "path": "de.jsonl"}]
    (tmp_path / "eval.yaml").write_text(json.dumps(entries))

    def evaluated(name: str) -> Any:
        options = {"do_train": False, "do_eval": True, "lora": False, "output_dir": str(tmp_path / f"out-{name}")}
        return run(tmp_path, eval_file=str(tmp_path / name), **options).eval_metrics

    whole, alone = evaluated("all.jsonl"), {language: evaluated(f"{language}.jsonl") for language in ("en", "de")}
    assert {name for name in whole if "/" in name} == {
        f"eval_{metric}/language/{language}" for metric in ("loss", "bits_per_byte") for language in ("en", "de")
    }
    for language, expected in alone.items():
        for metric in ("eval_loss", "eval_bits_per_byte"):
            assert whole[f"{metric}/language/{language}"] == pytest.approx(expected[metric], rel=1e-6)
    for row in rows:
        row.pop("language", row.pop("lang", None))
    write_rows(tmp_path / "none.jsonl", rows)
    unnamed = evaluated("none.jsonl")
    for metric in ("eval_loss", "eval_bits_per_byte", "eval_ppl", "eval_accuracy"):
        assert whole[metric] == pytest.approx(unnamed[metric], rel=1e-6)

    mixed = evaluated("eval.yaml")  # a row's own language goes before that of its source
    assert mixed["eval_loss/all"] == pytest.approx(unnamed["eval_loss"], rel=1e-6)
    assert mixed["eval_loss/more"] == pytest.approx(alone["de"]["eval_loss"], rel=1e-6)
    assert mixed["eval_loss/language/de"] == pytest.approx(alone["de"]["eval_loss"], rel=1e-6)
    assert mixed["eval_loss/language/en"] != pytest.approx(alone["en"]["eval_loss"], rel=1e-6)
    assert {name for name in mixed if "/" in name} == {
        f"eval_{metric}/{group}"
        for metric in ("loss", "bits_per_byte")
        for group in ("all", "more", "language/en", "language/de")
    }


def test_the_parts_of_an_evaluation_know_the_lengths_of_their_windows(tmp_path: Path) -> None:
    rows = [{"text": text, "language": name} for name in TEXTS for text in TEXTS[name][:20]]
    write_rows(tmp_path / "all.jsonl", rows[::2] + rows[1::2])
    tokenizer = make_tokenizer()
    parts = text_parts(
        load_mixture(sources_of_path(tmp_path / "all.jsonl"), tokenizer, 64, show_progress=False), tokenizer
    )
    assert [part.language for part in parts] == ["en", "de"]
    for part in parts:
        windows = [part.windows[index] for index in range(len(part.windows))]
        assert list(part.windows.lengths) == [len(window.tokens) for window in windows]
        assert sum(len(window.tokens) - len(window.document_starts) for window in windows) == part.num_tokens


@pytest.mark.parametrize("metric", ["bits_per_byte", "eval_bits_per_byte/german", "bits_per_byte/language/de"])
def test_bits_per_byte_choose_the_best_checkpoint_and_end_a_run(tmp_path: Path, metric: str) -> None:
    flags = {"mixture": str(write_texts(tmp_path)), "do_eval": True, "metric_for_best_model": metric, "max_steps": 12}
    flags |= {"evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    flags |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "learning_rate": 0.3}  # it gets worse
    run(tmp_path, **flags)
    name = f"eval_{metric.removeprefix('eval_')}"
    values = [entry[name] for entry in metrics_of(tmp_path) if name in entry]
    assert 3 <= len(values) < 12
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(values)
    assert state["best_model_checkpoint"].endswith(f"checkpoint-{values.index(min(values)) + 1}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train_file": "pairs.jsonl", "metric_for_best_model": "bits_per_byte"}, "is computed of raw text, and pairs"),
        (
            {"train_file": "en.jsonl", "metric_for_best_model": "bits_per_byte/german"},
            "eval_bits_per_byte/german; the evaluation of this text has eval_loss, eval_bits_per_byte, eval_ppl",
        ),
        ({"train_file": "en.jsonl", "metric_for_best_model": "bytes"}, "this run computes eval_loss"),
        (
            {"train_file": "pairs.jsonl", "metric_for_best_model": "bits_per_byte", "preference": "orpo"},
            "this run computes eval_loss",
        ),
    ],
)
def test_metrics_that_are_not_computed_choose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"a {n}", "completion": "b"} for n in range(30)])
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, do_eval=True, **flags)


def test_losses_and_bits_per_byte_are_those_of_one_document_after_another(tmp_path: Path) -> None:
    texts = ["The model has fields.", "The date is 2024-05-17, Friday. " * 12, "人的 A中, ü."]
    write_jsonl(tmp_path / "a.jsonl", texts)
    found = run(tmp_path, eval_file=str(tmp_path / "a.jsonl"), do_train=False, do_eval=True, lora=False).eval_metrics
    bloom = load_bloom("builtin:tiny", dtype="float32")
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for text in texts:
        ids = [*bloom.tokenizer.encode(text), bloom.tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, 64):
            piece = ids[start : start + 65]
            with torch.no_grad():
                log_probs = bloom.model(torch.tensor([piece[:-1]]))[0].double().log_softmax(-1)
            nats -= float(log_probs[range(len(piece) - 1), piece[1:]].sum())
            num_tokens += len(piece) - 1
        first = bloom.tokenizer.token_bytes(ids[0])
        num_bytes += len(text.encode()) - len(first)
    assert found["eval_loss"] == pytest.approx(nats / num_tokens, rel=1e-6)
    assert found["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
    assert not any("/" in name for name in found)


def test_a_run_that_is_resumed_in_an_epoch_has_the_losses_of_one_that_is_not(tmp_path: Path) -> None:
    mixture = str(write_texts(tmp_path))
    run(tmp_path, mixture=mixture, logging_steps=1, max_steps=7, output_dir=str(tmp_path / "whole"))
    whole = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for steps in (3, 7):
        run(tmp_path, mixture=mixture, logging_steps=1, max_steps=steps, lr_scheduler_type="constant")
    again = [entry["loss"] for entry in metrics_of(tmp_path)]
    run(tmp_path, mixture=mixture, logging_steps=1, max_steps=7, lr_scheduler_type="constant",
        output_dir=str(tmp_path / "constant"))  # fmt: skip
    constant = [json.loads(line)["loss"] for line in (tmp_path / "constant" / "metrics.jsonl").read_text().splitlines()]
    assert again == constant and len(whole) == len(again) == 7


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="needs WikiText-2 in shared/data")
def test_a_model_learns_wikitext(tmp_path: Path) -> None:
    for split, size in (("valid", 200_000), ("test", 20_000)):
        text = (WIKITEXT / f"wikitext-2.{split}.tokens").read_text(encoding="utf-8")[:size]
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    flags = {"eval_file": str(tmp_path / "test.txt"), "max_length": 128, "do_eval": True, "lora": False}
    before = run(tmp_path, do_train=False, output_dir=str(tmp_path / "before"), **flags).eval_metrics
    after = run(
        tmp_path, train_file=str(tmp_path / "valid.txt"), max_steps=40, eval_steps=40,
        per_device_train_batch_size=8, **flags,
    ).eval_metrics  # fmt: skip
    assert after["eval_bits_per_byte"] < 0.85 * before["eval_bits_per_byte"]
    assert after["eval_loss"] < 0.85 * before["eval_loss"]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"mixture": "m.yaml", "train_file": "a.txt"}, ConfigError, "--train_file and --mixture both name training"),
        ({"train_file": "m.yaml"}, ConfigError, "a file that names several sources is given as --mixture"),
        ({"train_file": "en.jsonl", "generate_num": 2}, ConfigError, "--generate_num answer prompts"),
        ({"train_file": "en.jsonl", "max_tokens_per_batch": 63}, ConfigError, "is less than a window of raw text"),
        ({"train_file": "none.txt"}, DataError, r"none\.txt: no such file"),
        ({"train_file": "short.txt", "do_eval": True}, ConfigError, "too few examples to train and evaluate"),
    ],
)
def test_flags_that_raw_text_cannot_follow_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], error: type, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    (tmp_path / "short.txt").write_text("The model.")
    with pytest.raises(error, match=message):
        run(tmp_path, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"train_file": "en.jsonl", "src_length": 9, "tgt_length": 8},
            r"--src_length, --tgt_length: not used, because the rows of en\.jsonl are raw text",
        ),
        ({"train_file": "pairs.jsonl", "max_length": 9}, "--max_length: not used, because the rows of pairs"),
        ({"train_file": "judged.jsonl"}, r"judged\.jsonl: without --preference kto its labels are not used"),
    ],
)
def test_what_has_no_effect_is_noted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"src": "a", "tgt": "b"}\n')
    (tmp_path / "judged.jsonl").write_text('{"prompt": "a", "completion": "b", "label": false}\n')
    run(tmp_path, max_steps=1, **{"max_length": 1024} | flags)
    assert re.search(message, caplog.text)


def test_rows_of_the_hub_stream_into_the_same_files(tmp_path: Path) -> None:
    """A local directory, which `datasets` streams as it does one of the hub."""
    directory = tmp_path / "texts"
    directory.mkdir()
    write_jsonl(directory / "train.jsonl", TEXTS["en"])
    rows = data_splits._open_hub(str(directory)).train
    assert rows is not None
    tokenizer = make_tokenizer()
    streamed = load_mixture(sources_of_rows(rows), tokenizer, 64, show_progress=False)
    local = load_mixture(sources_of_path(directory / "train.jsonl"), tokenizer, 64, show_progress=False)
    assert len(streamed) == len(local) > 1
    assert [streamed[i].tokens.tolist() for i in range(len(streamed))] == [
        local[i].tokens.tolist() for i in range(len(local))
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not YAML"),
        ("- name: 2024-13-45", "not YAML"),
        ("a: 1", "expected a list of sources, each with name, path and weight; found {'a': 1}"),
        ("- just", "source 1: found 'just', expected name, path, weight with their values"),
        ("- {name: a, path: a, weight: 1}\n- {name: b, weight: 1}", "source 2: it has no path"),
        ("- {name: a, path: a, weight: -1}", "source 1: weight is -1, expected a number above 0"),
        ("- {name: a, path: a, weight: .nan}", "source 1: weight is nan, expected a number above 0"),
        ("- {name: a, path: a, weight: true}", "source 1: weight is True, expected a number"),
        ("- {name: a/b, path: a, weight: 1}", "source 1: name is 'a/b', expected letters"),
        (
            "- {name: a, path: a, weight: 1, lang: en}",
            "source 1: found the key 'lang', expected name, path, weight, language",
        ),
        ("- {name: a, path: a, weight: 1}\n- {name: a, path: b, weight: 1}", "two sources are named 'a'"),
    ],
)
def test_a_wrong_mixture_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        read_mixture(tmp_path / "m.yaml")


def test_a_mixture_to_evaluate_on_has_no_weights(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text("- {name: a, path: a, weight: 1}")
    with pytest.raises(DataError, match="found the key 'weight', expected name, path, language"):
        read_mixture(tmp_path / "m.yaml", weighted=False)
    (tmp_path / "m.yaml").write_text("- {name: a, path: a}")
    (source,) = read_mixture(tmp_path / "m.yaml", weighted=False).sources
    with pytest.raises(DataError, match=f"{tmp_path / 'a'}: no such file or directory"):
        source.inputs()
