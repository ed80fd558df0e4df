"""`bloomlm evaluate --model_dir`: an exported program gives the numbers of its model."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.cli.evaluate import EvaluateFlags, check_flags, command
from bloomlm.errors import ConfigError
from bloomlm.evaluation.report import EvaluationReport, compare, read_report
from bloomlm.evaluation.scoring.scorers import StepScorer
from bloomlm.evaluation.scoring.windows import Window, continuation_window
from bloomlm.export.program import export_program
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from tests.tiny_bloom import write_adapter, write_bloom
from tests.tiny_checkpoint import random_model

VOCAB = 101
WIKI = " \n = The Sea = \n \n The sea , and the rain @-@ fed river ; 1 @,@ 234 ( in all ) . \n"
PASSAGES = ["the rain and the sea", "the sea and the rain", "and the ink", "an island in the sea", "in the and"]
DATA = {
    "wiki.tokens": WIKI,
    "lambada.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES),
    "rows.jsonl": "".join(json.dumps({"src": text, "tgt": "the sea"}) + "\n" for text in PASSAGES),
}
EVALUATIONS = {
    "reference": ("wiki.tokens", "--seq_length", "16", "--overlapping_eval", "4"),
    "lm_eval": ("wiki.tokens", "--protocol", "lm_eval", "--seq_length", "16"),
    "gptq": ("wiki.tokens", "--protocol", "gptq", "--seq_length", "8"),
    "reference, LAMBADA": ("lambada.jsonl",),
    "lm_eval, LAMBADA": ("lambada.jsonl", "--protocol", "lm_eval"),
    "answers": ("rows.jsonl", "--do_generation", "--tgt_length", "5"),
}

pytestmark = pytest.mark.usefixtures("no_compiler")


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_bloom(tmp_path_factory.mktemp("models") / "bloom")
    for name, text in DATA.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def program(bloom: Path) -> Path:
    loaded = load(bloom)
    export_program(loaded.model, loaded.tokenizer, bloom / "program" / "bloom", source="bloom", verify=False)
    return bloom / "program"


def report_of(report: Path, *words: object) -> EvaluationReport:
    result = CliRunner().invoke(command, [*map(str, words), "--output_file", str(report)])
    assert result.exit_code == 0, result.exception or result.output
    return read_report(report)


@pytest.mark.parametrize("evaluation", EVALUATIONS.values(), ids=EVALUATIONS)
def test_program_gives_the_numbers_of_its_model(
    bloom: Path, program: Path, tmp_path: Path, evaluation: Sequence[str]
) -> None:
    words = ("--eval_path", bloom / evaluation[0], *evaluation[1:])
    expected = report_of(tmp_path / "model.json", "--model_name_or_path", bloom, *words)
    found = report_of(tmp_path / "program.json", "--model_dir", program, *words)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in expected.metrics.items():
        assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-5), name
        if metric.standard_error is not None:
            assert found.metrics[name].standard_error == pytest.approx(metric.standard_error, rel=1e-4), name
    assert (found.counts, found.settings) == (expected.counts, expected.settings)
    named = {**expected.model, "name": str(program / "bloom"), "program": "pt2"}
    assert found.model == named and named["fingerprint"]


# what runs each format, and how near it comes: llama.cpp computes with 16-bit tables in places
RUNTIMES = {"onnx": ("onnxruntime", 1e-5), "openvino": ("openvino", 1e-3), "gguf": ("llama_cpp", 1e-2)}


@pytest.mark.parametrize("form", RUNTIMES)
def test_programs_of_other_formats_give_the_numbers_too(form: str, bloom: Path, tmp_path: Path) -> None:
    runtime, tolerance = RUNTIMES[form]
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    loaded = load(bloom)
    export_program(loaded.model, loaded.tokenizer, tmp_path / form / "bloom", source="bloom", format=form, verify=False)
    for name in ("reference", "lm_eval, LAMBADA", "answers"):
        words = ("--eval_path", bloom / EVALUATIONS[name][0], *EVALUATIONS[name][1:])
        expected = report_of(tmp_path / "model.json", "--model_name_or_path", bloom, *words)
        found = report_of(tmp_path / f"{form}.json", "--model_dir", tmp_path / form, *words)
        for key, metric in expected.metrics.items():
            assert found.metrics[key].value == pytest.approx(metric.value, rel=tolerance), (name, key)


def test_int8_program_is_close_and_is_told_apart(bloom: Path, tmp_path: Path) -> None:
    loaded = load(bloom)
    path = tmp_path / "program" / "small"
    export_program(loaded.model, loaded.tokenizer, path, source="bloom", quantization="int8", verify=False)
    words = ("--eval_path", bloom / "wiki.tokens", "--protocol", "lm_eval", "--seq_length", 16)
    model = report_of(tmp_path / "model.json", "--model_name_or_path", bloom, *words)
    program = report_of(tmp_path / "int8.json", "--model_dir", path.parent, "--model_prefix", "small", *words)
    bits = model.metrics["bits_per_byte"].value
    assert program.metrics["bits_per_byte"].value == pytest.approx(bits, rel=0.01)
    assert program.metrics["bits_per_byte"].value != pytest.approx(bits, rel=1e-5)
    assert program.model["dtype"] == "int8"
    assert "both are the same model, as float32 model and as int8 pt2 program" in compare(model, program).notices


def test_prefix_of_a_program_acts(bloom: Path, tmp_path: Path) -> None:
    prefix = write_adapter(tmp_path / "prefix", bloom, PrefixConfig(num_prefix_tokens=3))
    loaded = load(bloom, prefix_path=prefix)
    path = tmp_path / "program" / "bloom"
    export_program(loaded.model, loaded.tokenizer, path, source="bloom", verify=False)
    words = ("--eval_path", bloom / "lambada.jsonl", "--protocol", "lm_eval")
    expected = report_of(tmp_path / "a.json", "--model_name_or_path", bloom, "--prefix_path", prefix, *words)
    without = report_of(tmp_path / "b.json", "--model_name_or_path", bloom, *words)
    found = report_of(tmp_path / "c.json", "--model_dir", path.parent, *words).metrics["perplexity"].value
    assert found == pytest.approx(expected.metrics["perplexity"].value, rel=1e-5)
    assert found != pytest.approx(without.metrics["perplexity"].value, rel=1e-3)


def test_stopped_evaluation_of_a_program_goes_on(
    bloom: Path, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--model_dir", program, "--eval_path", bloom / "wiki.tokens", "--seq_length", 16, "--overlapping_eval", 4)
    words += ("--batch_size", 2)
    whole = report_of(tmp_path / "whole.json", *words)
    score_batch, calls = StepScorer._score_batch, []

    def stopping(scorer: StepScorer, batch: Sequence[Any]) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return score_batch(scorer, batch)

    monkeypatch.setattr(StepScorer, "_score_batch", stopping)
    file = tmp_path / "parts.json"
    assert CliRunner().invoke(command, [*map(str, words), "--output_file", str(file)]).exit_code != 0
    monkeypatch.undo()
    parts = report_of(file, *words)
    assert parts.run["windows_of_a_stopped_run"] == sum(calls) > 0
    assert parts.run["computed_tokens"] < whole.run["computed_tokens"]
    assert parts.metrics["avg_loss"].value == pytest.approx(whole.metrics["avg_loss"].value, rel=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        {"lora_path": "a"},
        {"prefix_path": "a"},
        {"prefix_layout": "old"},
        {"trained_tensor_parallel_degree": 2},
        {"paddle_tokenization": True},
        {"dtype": "float32"},
        {"load_autodist": True},
        {"device": "gpu"},
        {"tensor_parallel_degree": 2},
        {"model_name_or_path": "m"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_says_how_to_load_a_model_is_refused(given: dict[str, Any]) -> None:
    (name,) = given
    with pytest.raises(ConfigError, match=f"--{name} .*"):
        check_flags(EvaluateFlags(model_dir=Path("d"), eval_path="f", **given))


def test_the_name_of_a_program_needs_its_directory() -> None:
    with pytest.raises(ConfigError, match="--model_prefix names a program; give its --model_dir too"):
        check_flags(EvaluateFlags(model_name_or_path="m", eval_path="f", model_prefix="small"))
    assert check_flags(EvaluateFlags(model_dir=Path("d"), eval_path="f", model_prefix="p", device="cpu")) == ()


def test_directory_without_a_program_is_said(bloom: Path) -> None:
    words = ["--model_dir", str(bloom), "--eval_path", str(bloom / "wiki.tokens")]
    assert "it holds no exported program" in str(CliRunner().invoke(command, words).exception)


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    return random_model()


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Continuations, windows scored from their first position, windows with gaps between labels, and one without labels."""
    source = random.Random(0)

    def draw(count: int) -> np.ndarray[Any, Any]:
        return np.array([source.randrange(4, VOCAB) for _ in range(count)])

    found = [continuation_window(draw(n), draw(m))[0] for n, m in ((24, 1), (9, 4), (40, 7), (9, 1))]
    found += [Window(draw(n), draw(n)) for n in (1, 7, 30)]
    for labels in ((5, -100, -100, 6), (-100, 7, -100), (-100, -100)):
        found.append(Window(draw(12), np.array(labels)))
    return found


def by_whole_logits(model: BloomForCausalLM, window: Window) -> tuple[float, int, int]:
    """Without any shortcut: log-probability, scored positions, and those whose likeliest token is the label."""
    log_probs = model(torch.from_numpy(window.tokens)[None])[0].detach().double().log_softmax(-1)[-len(window.labels) :]
    pairs = [(row, int(label)) for row, label in zip(log_probs, window.labels, strict=True) if label != IGNORE_INDEX]
    hits = sum(int(row.argmax()) == label for row, label in pairs)
    return sum(float(row[label]) for row, label in pairs), len(pairs), hits


def assert_scores(model: BloomForCausalLM, windows: Sequence[Window], scorer: StepScorer) -> None:
    for window, score in zip(windows, scorer.score_all(windows), strict=True):
        log_prob, num_scored, num_likeliest = by_whole_logits(model, window)
        assert score.log_prob == pytest.approx(log_prob, rel=1e-6, abs=1e-6)
        assert (score.num_scored, score.num_likeliest) == (num_scored, num_likeliest)


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 150, 100_000])
def test_steps_give_the_scores_of_whole_logits(
    model: BloomForCausalLM, windows: list[Window], max_batch_tokens: int
) -> None:
    likeliest = int(model(torch.from_numpy(windows[0].tokens)[None])[0, -1].argmax())
    windows = [*windows, Window(windows[0].tokens, np.array([likeliest]))]
    scorer = StepScorer(model, max_batch_tokens=max_batch_tokens)
    assert_scores(model, windows, scorer)
    assert scorer.score_all(windows)[-1].num_likeliest == 1


def test_each_token_is_computed_once(model: BloomForCausalLM, windows: list[Window]) -> None:
    scorer = StepScorer(model, max_batch_tokens=1)
    scorer.score_all(windows)
    unused = 12 + 1  # tokens of the window without labels, and the one after the last label
    assert scorer.num_computed_tokens == sum(len(window.tokens) for window in windows) - unused


class SmallMemory:
    """A model that fails where rows times the longest sequence exceeds a number of tokens."""

    limit = 80

    def __init__(self, model: BloomForCausalLM) -> None:
        self._model = model
        self.vocab_size, self.eos_token_id = model.vocab_size, model.eos_token_id

    def open_rows(self, num_rows: int, num_tokens: int) -> Any:
        if num_rows * num_tokens > self.limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return self._model.open_rows(num_rows, num_tokens)


def test_batches_are_halved_when_memory_runs_out(model: BloomForCausalLM, windows: list[Window]) -> None:
    scorer = StepScorer(SmallMemory(model), max_batch_tokens=1000)
    assert_scores(model, windows, scorer)
    assert scorer.max_batch_tokens < 500
    with pytest.raises(ConfigError, match="single window of 90 tokens"):
        StepScorer(SmallMemory(model), max_batch_tokens=1000).score_all([continuation_window(range(4, 94), [5])[0]])
