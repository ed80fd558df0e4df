"""`bloomlm evaluate` from flags to files."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import evaluate as evaluate_model
from bloomlm.api import load
from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.cli.evaluate import EvaluateFlags, check_flags, command
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import BloomlmError, ConfigError, DataError
from bloomlm.evaluation import data_sources
from bloomlm.evaluation.config import check_config, make_config
from bloomlm.evaluation.metrics import mean
from bloomlm.evaluation.protocol import Definition, Protocol, Task, WindowPlan, running_perplexity
from bloomlm.evaluation.protocols import PROTOCOLS
from bloomlm.evaluation.scoring import scorers
from bloomlm.evaluation.scoring.scorers import EagerScorer
from bloomlm.evaluation.scoring.windows import continuation_window
from bloomlm.files.resumable import ResumableResults
from tests.tiny_bloom import write_adapter, write_bloom

WIKI = " \n = The Sea = \n \n The sea , and the rain @-@ fed river ; 1 @,@ 234 ( in all ) . \n"
PASSAGES = ["the rain and the sea", "the sea and the rain", "and the ink", "an island in the sea", "in the and"]


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("models") / "bloom")


@pytest.fixture
def wiki(tmp_path: Path) -> Path:
    (tmp_path / "wiki.tokens").write_text(WIKI)
    return tmp_path / "wiki.tokens"


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return tmp_path / "lambada.jsonl"


def evaluate(*words: object) -> Result:
    result = CliRunner().invoke(command, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, (BloomlmError, SystemExit)):
        raise result.exception
    return result


def evaluate_well(*words: object) -> str:
    result = evaluate(*words)
    assert result.exit_code == 0, result.exception or result.output
    return result.stdout


def test_reference_line_is_printed_as_the_script_did(bloom: Path, wiki: Path) -> None:
    output = evaluate_well(
        *("--model_type", "bloom", "--model_name_or_path", bloom, "--eval_path", wiki, "--batch_size", "2"),
        *("--seq_length", "16", "--overlapping_eval", "8", "--dtype", "float32"),
    )
    number = r"\d\.\d{4}E[+-]\d\d"
    line = rf" validation results on {re.escape(str(wiki))} \| avg loss: {number} \| ppl: {number} \| adjusted ppl: {number} \| token ratio: [\d.]+ \|"
    assert re.fullmatch(line, output.splitlines()[0])


def test_batch_size_changes_nothing(bloom: Path, wiki: Path, tmp_path: Path) -> None:
    reports = []
    for batch_size in (1, 3, 50):
        file = tmp_path / f"{batch_size}.json"
        evaluate_well(
            *("--model_name_or_path", bloom, "--eval_path", wiki, "--seq_length", 16, "--overlapping_eval", 4),
            *("--batch_size", batch_size, "--output_file", file),
        )
        reports.append(json.loads(file.read_text())["metrics"]["avg_loss"]["value"])
    assert reports == pytest.approx([reports[0]] * 3, rel=1e-6)


def test_report_has_what_is_needed_to_read_it(bloom: Path, lambada: Path, tmp_path: Path) -> None:
    file = tmp_path / "out" / "report.json"
    output = evaluate_well(
        *("--model_name_or_path", bloom, "--eval_path", lambada, "--protocol", "lm_eval", "--limit", 4),
        *("--seq_length", 8, "--output_file", file),
    )
    report = json.loads(file.read_text())
    assert report["task"] == "lambada"
    assert report["protocol"]["name"] == "lm_eval" and report["protocol"]["version"]
    assert report["settings"] == {"seq_length": 8, "limit": 4}
    assert report["counts"]["examples"] == report["counts"]["windows"] == 4
    assert report["counts"]["contexts_cut"] > 0
    assert "longer than --seq_length 8" in report["notices"][0]
    assert report["model"]["fingerprint"] == model_fingerprint(load(bloom).model)
    assert report["model"]["dtype"] == "float32"
    assert report["run"]["computed_tokens"] > 0 and report["run"]["seconds"] > 0
    assert report["metrics"]["acc"]["standard_error"] is not None
    assert "perplexity" in output and "│ acc " in output
    assert "| settings seq_length | 8 |" in (tmp_path / "out" / "report.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json",
        "report.md",
        "report.influences.json",
    }


def test_stopped_evaluation_goes_on(bloom: Path, wiki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--model_name_or_path", bloom, "--eval_path", wiki, "--seq_length", 16, "--overlapping_eval", 4)
    words += ("--batch_size", 2, "--output_file")
    evaluate_well(*words, tmp_path / "whole.json")
    whole = json.loads((tmp_path / "whole.json").read_text())

    class Stopped(EagerScorer):
        def score(self, windows, done=()):  # type: ignore[no-untyped-def]
            for number, batch in enumerate(super().score(windows, done)):
                if number == 3:
                    raise KeyboardInterrupt
                yield batch

    monkeypatch.setattr(scorers, "EagerScorer", Stopped)
    assert evaluate(*words, tmp_path / "parts.json").exit_code != 0
    assert not (tmp_path / "parts.json").exists()
    monkeypatch.undo()
    (partial,) = tmp_path.glob(".parts.json.*.partial")
    with partial.open("ab") as file:  # as if the power failed while a line was written
        file.write(b'{"number": 1, "log_pro')
    other = evaluate(
        *words, tmp_path / "parts.json", "--limit", 2
    )  # another evaluation, which must not use the results
    assert other.exit_code == 0
    result = evaluate(*words, tmp_path / "parts.json")
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert "6 results are there" in result.stderr
    assert parts["run"]["windows_of_a_stopped_run"] == 6
    assert parts["run"]["computed_tokens"] < whole["run"]["computed_tokens"]
    for name, metric in whole["metrics"].items():
        assert parts["metrics"][name]["value"] == pytest.approx(metric["value"], rel=1e-6)
    assert not list(tmp_path.glob(".*.partial"))


def test_adapters_are_evaluated(bloom: Path, lambada: Path, tmp_path: Path) -> None:
    lora = write_adapter(tmp_path / "lora", bloom, LoraConfig(r=2))
    prefix = write_adapter(tmp_path / "prefix", bloom, PrefixConfig(num_prefix_tokens=3))
    values, names = set(), set()
    for number, extra in enumerate(((), ("--lora_path", lora), ("--prefix_path", prefix))):
        file = tmp_path / f"{number}.json"
        words = ("--model_name_or_path", bloom, "--eval_path", lambada, "--protocol", "lm_eval")
        evaluate_well(*words, *extra, "--output_file", file)
        report = json.loads(file.read_text())
        assert report["model"]["adapter"] == (str(extra[1]) if extra else None)
        values.add(report["metrics"]["perplexity"]["value"])
        names.add(report["model"]["fingerprint"])
    assert len(values) == len(names) == 3


def test_compare_shows_differences(bloom: Path, lambada: Path, tmp_path: Path) -> None:
    other = write_bloom(tmp_path / "other", eos_scale=3.0)
    for name, model in (("a", bloom), ("b", other)):
        words = ("--model_name_or_path", model, "--eval_path", lambada, "--protocol", "lm_eval")
        evaluate_well(*words, "--output_file", tmp_path / f"{name}.json")
    output = evaluate_well("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert "difference" in output and "(paired)" in output and "perplexity" in output
    result = evaluate("--compare", tmp_path / "a.json", lambada)
    assert "no report" in str(result.exception)


def test_answers_to_rows_are_scored(bloom: Path, tmp_path: Path) -> None:
    loaded = load(bloom)
    rows = [{"src": text, "tgt": "the sea"} for text in ("the rain", "and the ink in")]
    right = loaded.generate(["an island"], max_new_tokens=5)[0].completion
    rows.append({"src": "an island", "tgt": right})
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--model_name_or_path", bloom, "--eval_path", file, "--do_generation", "--tgt_length", 5)
    evaluate_well(*words, "--batch_size", 2, "--output_file", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["exact_match"]["value"] == pytest.approx(1 / 3)
    assert report["metrics"]["exact_match"]["standard_error"] == pytest.approx(1 / 3)
    assert report["metrics"].keys() == {"exact_match", "rouge1", "rouge2", "rougeL", "bleu4", "chrf"}
    assert 0 < report["metrics"]["chrf"]["value"] <= 100


def test_stopped_answers_go_on(bloom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps({"src": text, "tgt": "the sea"}) + "\n" for text in PASSAGES))
    options = {"eval_path": file, "protocol": "generation", "tgt_length": 5, "batch_size": 2}
    whole = evaluate_model(bloom, **options)
    add, written = ResumableResults.add, []

    def stop_after_one(self: ResumableResults, results: dict[int, dict]) -> None:
        if written:
            raise KeyboardInterrupt
        written.extend(results)
        add(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(ResumableResults, "add", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            evaluate_model(bloom, **options, output_file=tmp_path / "report.json")
    parts = evaluate_model(bloom, **options, output_file=tmp_path / "report.json")
    assert parts.run["answers_of_a_stopped_run"] == len(written) == 2
    assert parts.settings == whole.settings
    assert {name: metric.value for name, metric in parts.metrics.items()} == {
        name: metric.value for name, metric in whole.metrics.items()
    }


def test_a_new_protocol_is_a_row_of_the_table(bloom: Path, wiki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan_lines(path: Path, tokenizer: Tokenizer, *, seq_length: int, limit: int | None) -> WindowPlan:
        lines = [tokenizer.encode(line) for line in path.read_text().splitlines() if line.strip()][:limit]
        return WindowPlan(
            definition=Definition(name="lines", version="1", source="this test"),
            task="lines",
            settings={"seq_length": seq_length},
            counts={"lines": len(lines)},
            windows=[continuation_window(ids[:1], ids[1:], seq_length)[0] for ids in lines],
            metrics=lambda scores: {"log_prob": mean([score.log_prob for score in scores], higher_is_better=True)},
            running=running_perplexity,
        )

    protocol = Protocol(name="lines", help="each line by itself", tasks=(Task(name="lines", make_plan=plan_lines),))
    monkeypatch.setitem(PROTOCOLS, "lines", protocol)
    loaded = load(bloom)
    report = evaluate_model(loaded, eval_path=wiki, protocol="lines", limit=2)
    expected = []
    for line in (" = The Sea = ", " The sea , and the rain @-@ fed river ; 1 @,@ 234 ( in all ) . "):
        ids = torch.tensor(loaded.tokenizer.encode(line))
        log_probs = loaded.model(ids[None, :-1])[0].detach().log_softmax(-1)
        expected.append(float(log_probs.gather(1, ids[1:, None]).sum()))
    assert report.metrics["log_prob"].value == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert report.settings == {"seq_length": 2048, "limit": 2}
    assert report.counts["lines"] == 2


def test_fingerprint_follows_the_weights(bloom: Path) -> None:
    model = load(bloom).model
    name = model_fingerprint(model)
    assert model_fingerprint(load(bloom).model) == name
    model.transformer.h[1].mlp.dense_4h_to_h.weight.data.mul_(1.001)
    assert model_fingerprint(model) != name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "missing --model_name_or_path"),
        ({"model_name_or_path": "m"}, "found neither; expected --eval_path"),
        ({"model_name_or_path": "m", "eval_path": "f", "tasks": ("t",)}, "found --tasks and --eval_path"),
        ({"model_name_or_path": "m", "eval_path": "f", "model_type": "gpt"}, "BLOOM only"),
        ({"model_name_or_path": "m", "eval_path": "f", "load_autodist": True}, "no auto_dist"),
        ({"model_name_or_path": "m", "eval_path": "f.jsonl", "protocol": "gptq"}, "WikiText only"),
        ({"model_name_or_path": "m", "eval_path": "f", "limit": 0}, "--limit is 0"),
        ({"model_name_or_path": "m", "tasks": ("t",), "do_generation": True}, "--do_generation needs --eval_path"),
        ({"model_name_or_path": "m", "eval_path": "f", "output_file": Path("r.md")}, "ends in .json"),
        ({"compare": ("a",)}, "two reports, found 1"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_flags(EvaluateFlags(**options))


def test_what_cannot_be_written_is_refused_at_once(bloom: Path, wiki: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    for file in (tmp_path / "report.json", wiki / "report.json"):
        result = evaluate("--model_name_or_path", bloom, "--eval_path", wiki, "--output_file", file)
        assert f"--output_file {file} cannot be written" in str(result.exception)


def test_ranks_that_are_not_there_are_refused(bloom: Path, wiki: Path) -> None:
    words = ("--model_name_or_path", bloom, "--eval_path", wiki, "--tensor_parallel_degree")
    assert "--tensor_parallel_degree 4 with 1 process" in str(evaluate(*words, 4).exception)
    assert "--tensor_parallel_degree is 0" in str(evaluate(*words, 0).exception)


def test_flags_without_effect_are_said() -> None:
    flags = EvaluateFlags(model_name_or_path="m", eval_path="f.jsonl", overlapping_eval=8, seed=1, tgt_length=4)
    assert [notice.split()[0] for notice in (*check_config(flags), *check_flags(flags))] == [
        "--overlapping_eval",
        "--tgt_length",
        "--seed",
    ]
    flags = EvaluateFlags(model_name_or_path="m", tasks=("t",), protocol="gptq", logging_steps=3)
    assert [notice.split()[0] for notice in (*check_config(flags), *check_flags(flags))] == [
        "--protocol",
        "--logging_steps",
    ]
    flags = EvaluateFlags(compare=("a", "b"), eval_path="f", limit=3)
    assert check_flags(flags) == tuple(f"--{name} has no effect with --compare" for name in ("eval_path", "limit"))


def test_what_the_file_is_follows_from_its_name() -> None:
    for name, is_lambada in (
        ("lambada", True),
        ("x.jsonl", True),
        ("wiki.valid.tokens", False),
        ("wikitext-2:valid", False),
    ):
        assert make_config({"eval_path": name}).is_lambada == is_lambada
    assert not make_config({"eval_path": "x.jsonl", "cloze_eval": False}).is_lambada


def test_data_sets_are_fetched_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name, repository, configuration, split):  # type: ignore[no-untyped-def]
        asked.append((repository, configuration, split))
        return ["", " = A = \n", "b \n"]

    monkeypatch.setattr(data_sources, "_fetch", fetch)
    raw = data_sources.find_data("wikitext-2", raw=True, cache_dir=tmp_path)
    tokens = data_sources.find_data("wikitext-103:valid", raw=False, cache_dir=tmp_path)
    cloze = data_sources.find_data("lambada", raw=True, cache_dir=tmp_path)
    assert data_sources.find_data("wikitext-2", raw=True, cache_dir=tmp_path) == raw
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("Salesforce/wikitext", "wikitext-103-v1", "validation"),
        ("EleutherAI/lambada_openai", "default", "test"),
    ]
    assert raw.read_text() == tokens.read_text() == " \n = A = \nb \n"
    assert [json.loads(line)["text"] for line in cloze.read_text().splitlines()] == ["", " = A = \n", "b \n"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing.tokens", "no such file; expected one such as .* wikitext-2, wikitext-103, lambada"),
        ("wikitext-2:train", "no split 'train'; it has test, valid"),
        ("lambada:valid", "no split 'valid'; it has test"),
    ],
)
def test_unknown_data_are_errors(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        data_sources.find_data(name, raw=True, cache_dir=tmp_path)


def test_no_network_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*words, **options):  # type: ignore[no-untyped-def]
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"could not be fetched .* Connect to the network once, or give a file"):
        data_sources.find_data("wikitext-2", raw=True, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_that_give_no_numbers_are_an_error(tmp_path: Path, bloom: Path, lambada: Path) -> None:
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.checkpoint.writer import write_model

    model = load_model(bloom, memory_map=False)
    model.transformer.ln_f.weight.data[0] = math.nan
    (tmp_path / "nan").mkdir()
    write_model(tmp_path / "nan", model.config, model.named_parameters())
    Tokenizer.from_directory(bloom).save(tmp_path / "nan")
    result = evaluate("--model_name_or_path", tmp_path / "nan", "--eval_path", lambada)
    assert "gives no probabilities" in str(result.exception)
