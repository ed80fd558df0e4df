"""Against lm-eval: its tasks with its own transformers model and with ours, on the same weights."""

import importlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the lm_eval extra is not installed")

from click.testing import CliRunner  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.tasks.wikitext import preprocess_wikitext  # noqa: E402

import bloomlm.export.program  # noqa: E402
from bloomlm.api import LoadedModel, load  # noqa: E402
from bloomlm.checkpoint.source import resolve_source  # noqa: E402
from bloomlm.cli.evaluate import command as evaluate_command  # noqa: E402
from bloomlm.errors import ConfigError  # noqa: E402
from bloomlm.evaluation.data_sources import Passage  # noqa: E402
from bloomlm.evaluation.lm_eval_adapter import BloomLM, generation_config  # noqa: E402
from bloomlm.evaluation.metrics import Metric  # noqa: E402
from bloomlm.evaluation.protocol import WindowPlan  # noqa: E402
from bloomlm.evaluation.protocols import lm_eval as protocol  # noqa: E402
from bloomlm.evaluation.scoring.scorers import EagerScorer  # noqa: E402
from bloomlm.generation.config import Greedy, Sampling  # noqa: E402

MAX_LENGTH = 48
PAGES = [
    ' = The Stone = \n \n A well @-@ known stone ( in the hand ) weighs 1 @,@ 234 grams , the people \'s own " stone " . \n',
    " = An Island = \n \n The island and the sea . \n \n = = Its History = = \n \n "
    + "The island was found in the year 1 @.@ 5 and again ; then they left and the rain fell . " * 6
    + "\n",
    " = Ink = \n \n Ink . \n",
]
PASSAGES = [
    "For more information, see the documentation",
    "the rain and the island and then the rain",
    'Long ago the people of the island went into the sea. "Stay," the stone said to the rain' + " and the rain" * 20,
    "one two  three",
    "an island\n\nand the ink",
    "ends in blanks ",
    "Returns the value of the value",
    "By default, this is set to ``True``,",
    "alone",
]
QUESTIONS = [
    {"question": "You can use the following", "choices": ["example", "code in the template", "template"], "answer": 0},
    {"question": "The default value of the field is", "choices": ["None", "a", "a stone in the sea"], "answer": 0},
    {"question": "Return a list of all the objects in the", "choices": ["database", "data", "ink"], "answer": 1},
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve_source("builtin:tiny").directory


@pytest.fixture(scope="module")
def bloom(directory: Path) -> LoadedModel:
    return load(directory, dtype="float32")


@pytest.fixture(scope="module")
def theirs(directory: Path) -> HFLM:
    return HFLM(pretrained=str(directory), dtype="float32", device="cpu", max_length=MAX_LENGTH, batch_size=2)


def local_task(tmp_path: Path, name: str, rows: list[dict[str, str]], **config: Any) -> dict[str, Any]:
    """lm-eval's description of a task on a file of this machine."""
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **config,
    }


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap


def run_task(model: Any, task: dict[str, Any]) -> tuple[dict[str, Any], list[list[Any]]]:
    """lm-eval's results, and the model's answers to each document.

    Not by simple_evaluate, which reads all of its tasks and asks the machine for its versions first.
    """
    loaded = TaskManager(include_defaults=False).load([task])
    results = lm_eval.evaluate(lm=model, task_dict=loaded, bootstrap_iters=100, log_samples=True)
    name = task["task"]
    answers = [[response[0] for response in sample["resps"]] for sample in results["samples"][name]]
    values = results["results"][name].items()
    return {key.removesuffix(",none"): value for key, value in values if key.endswith(",none")}, answers


def wikitext_task(tmp_path: Path) -> dict[str, Any]:
    return local_task(
        tmp_path,
        "wikitext_here",
        [{"page": page} for page in PAGES],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target=preprocess_wikitext.wikitext_detokenizer,
        process_results=preprocess_wikitext.process_results,
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )


def lambada_task(tmp_path: Path) -> dict[str, Any]:
    return local_task(
        tmp_path,
        "lambada_here",
        [{"text": text} for text in PASSAGES],
        output_type="loglikelihood",
        doc_to_text="{{text.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+text.split(' ')[-1]}}",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    )


def our_results(bloom: LoadedModel, plan: WindowPlan) -> dict[str, Metric]:
    return plan.metrics(EagerScorer(bloom.model, max_batch_tokens=100).score_all(plan.windows))


def test_wikitext_protocol_is_that_of_lm_eval(bloom: LoadedModel, theirs: HFLM, tmp_path: Path) -> None:
    expected, _ = run_task(theirs, wikitext_task(tmp_path))
    plan = protocol.wikitext(" \n" + "\n".join(PAGES), bloom.tokenizer, seq_length=MAX_LENGTH)
    assert len(plan.windows) > len(PAGES)  # one document needs several windows
    found = our_results(bloom, plan)
    assert found.keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    for name, metric in found.items():
        assert metric.value == pytest.approx(expected[name], rel=1e-5), name


def test_lambada_protocol_is_that_of_lm_eval(bloom: LoadedModel, theirs: HFLM, tmp_path: Path) -> None:
    expected, _ = run_task(theirs, lambada_task(tmp_path))
    passages = [Passage(text=text, where=f"line {n}") for n, text in enumerate(PASSAGES, start=1)]
    plan = protocol.lambada(passages, bloom.tokenizer, seq_length=MAX_LENGTH)
    assert plan.counts["contexts_cut"] == 1
    found = our_results(bloom, plan)
    assert found["perplexity"].value == pytest.approx(expected["perplexity"], rel=1e-5)
    assert 0 < found["acc"].value < 1
    assert found["acc"].value == expected["acc"]
    assert found["acc"].standard_error == pytest.approx(expected["acc_stderr"])


def test_choices_get_the_log_probabilities_of_lm_eval(bloom: LoadedModel, theirs: HFLM, tmp_path: Path) -> None:
    task = local_task(
        tmp_path,
        "choices_here",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    ours = BloomLM(bloom.model, tokenizer=bloom.tokenizer, max_length=MAX_LENGTH, batch_size=2)
    (values, found), (their_values, expected) = (run_task(model, task) for model in (ours, theirs))
    assert values == their_values
    assert len(found) == len(expected) == len(QUESTIONS)
    for one, other in zip(found, expected, strict=True):
        for (log_prob, is_greedy), (their_log_prob, theirs_is_greedy) in zip(one, other, strict=True):
            assert log_prob == pytest.approx(their_log_prob, rel=1e-5)
            assert is_greedy == theirs_is_greedy


def test_generations_are_those_of_lm_eval(bloom: LoadedModel, theirs: HFLM, tmp_path: Path) -> None:
    task = local_task(
        tmp_path,
        "answers_here",
        [{"question": text, "answer": "x"} for text in ("You can use", "Return the", "The default " * 30)],
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": [".", "\n\n"], "max_gen_toks": 12},
        metric_list=[{"metric": "exact_match"}],
    )
    ours = BloomLM(bloom.model, tokenizer=bloom.tokenizer, max_length=MAX_LENGTH, batch_size=2)
    (_, found), (_, expected) = (run_task(model, task) for model in (ours, theirs))
    assert found == expected
    assert any(answer for (answer,) in found)


def test_model_is_registered_and_named_by_an_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    name = project["project"]["entry-points"]["lm_eval.models"]["bloomlm"]
    module, _, attribute = name.partition(":")
    assert getattr(importlib.import_module(module), attribute) is BloomLM
    assert get_model("bloomlm") is BloomLM


@pytest.fixture
def task_directory(tmp_path: Path) -> Path:
    """A directory with a task, as --include_path takes it."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "here.yaml").write_text(
        f"""task: lambada_here
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
    )
    return tmp_path


def test_command_of_lm_eval_runs_the_model(task_directory: Path) -> None:
    command = [sys.executable, "-m", "bloomlm.evaluation.lm_eval_main", "--model", "bloomlm", "--tasks", "lambada_here"]
    command += ["--model_args", "pretrained=builtin:tiny,dtype=float32", "--include_path", str(task_directory)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(task_directory / "cache"), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "|lambada_here|" in output.replace(" ", "")
    assert "0.2222" in output  # 2 of 9


def test_tasks_are_handed_over(task_directory: Path) -> None:
    words = ["--model_name_or_path", "builtin:tiny", "--dtype", "float32", "--tasks", "lambada_here"]
    words += ["--include_path", str(task_directory), "--output_file", str(task_directory / "report.json")]
    result = CliRunner().invoke(evaluate_command, words)
    assert result.exit_code == 0, result.exception
    report = json.loads((task_directory / "report.json").read_text())
    acc = report["metrics"]["lambada_here acc"]
    assert acc["value"] == pytest.approx(2 / len(PASSAGES))
    assert acc["standard_error"] == pytest.approx((2 / 9 * 7 / 9 / 8) ** 0.5)
    assert report["counts"] == {"lambada_here examples": len(PASSAGES)}
    assert report["protocol"]["version"] == lm_eval.__version__


def test_tasks_are_run_on_exported_programs(task_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)
    loaded = load("builtin:tiny", dtype="float32")
    path = task_directory / "program" / "bloom"
    bloomlm.export.program.export_program(loaded.model, loaded.tokenizer, path, source="tiny", verify=False)
    words = ["--model_dir", str(path.parent), "--tasks", "lambada_here", "--include_path", str(task_directory)]
    result = CliRunner().invoke(evaluate_command, [*words, "--output_file", str(task_directory / "report.json")])
    assert result.exit_code == 0, result.exception
    report = json.loads((task_directory / "report.json").read_text())
    assert report["metrics"]["lambada_here acc"]["value"] == pytest.approx(2 / len(PASSAGES))
    assert report["model"]["program"] == "pt2"


def test_unknown_tasks_are_refused() -> None:
    words = ["--model_name_or_path", "builtin:tiny", "--tasks", "no_such_task_here"]
    result = CliRunner().invoke(evaluate_command, words)
    assert "lm-eval knows no no_such_task_here" in str(result.exception)


def test_options_of_generation_are_read_or_refused() -> None:
    config = generation_config({"until": "\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7})
    assert (config.strategy, config.max_new_tokens, config.stop) == (Greedy(), 9, ("\n",))
    config = generation_config({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3})
    assert config.strategy == Sampling(temperature=0.7, top_p=0.9)
    with pytest.raises(ConfigError, match="generation_kwargs"):
        generation_config({"typical_p": 0.5})
