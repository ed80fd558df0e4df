"""Evaluations on ranks: the results of one process, each window scored once, and continued after a stop."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel, evaluate, load
from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.errors import ConfigError
from bloomlm.evaluation.report import EvaluationReport, read_report
from bloomlm.evaluation.scoring.batches import BatchLimit
from bloomlm.evaluation.scoring.scorers import EagerScorer
from bloomlm.evaluation.scoring.windows import Window, WindowScore, continuation_window
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from tests.distributed.pool import RankPool
from tests.tiny_bloom import write_adapter, write_bloom

DEGREES = {"copies": Degrees(dp_replicate=2), "tensor parallel": Degrees(tp=2)}
PASSAGES = ["the rain and the sea", "the sea and the rain", "and the ink", "an island in the sea", "in the and"]


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("models") / "bloom")


@pytest.fixture
def lambada(tmp_path: Path) -> Path:
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return tmp_path / "lambada.jsonl"


def mesh_of(degrees: Degrees) -> Mesh:
    return ALONE if degrees.world_size == 1 else Mesh.over_all_ranks(degrees, "cpu")


def some_windows() -> list[Window]:
    """Choices after common questions, and an odd number of windows that share nothing."""
    source = np.random.default_rng(0)
    windows = []
    for length in (20, 33, 45):
        context = source.integers(4, 90, length).tolist()
        windows += [continuation_window(context, source.integers(4, 90, n).tolist())[0] for n in (1, 3, 4)]
    return windows + [Window(source.integers(4, 90, n), source.integers(4, 90, n)) for n in (2, 9, 30)]


def scores_of(bloom: Path, adapters: dict[str, Path], degrees: Degrees) -> tuple[list[WindowScore], list[int], str]:
    mesh = mesh_of(degrees)
    model = load(bloom, mesh=mesh, **adapters).model
    own = [
        number for batch in EagerScorer(model, max_batch_tokens=60, mesh=mesh).score(some_windows()) for number in batch
    ]
    whole = EagerScorer(model, max_batch_tokens=60, mesh=mesh).score_all(some_windows())
    return whole, own, model_fingerprint(model, mesh)


@pytest.mark.parametrize("kind", DEGREES)
@pytest.mark.parametrize(
    "adapter", [None, LoraConfig(r=2, target_modules=BLOCK_LINEARS), PrefixConfig(num_prefix_tokens=3)]
)
def test_scores_are_those_of_one_process(
    ranks: RankPool, bloom: Path, tmp_path: Path, kind: str, adapter: LoraConfig | PrefixConfig | None
) -> None:
    flag = "prefix_path" if isinstance(adapter, PrefixConfig) else "lora_path"
    adapters = {} if adapter is None else {flag: write_adapter(tmp_path / "adapter", bloom, adapter)}
    expected, everything, fingerprint = scores_of(bloom, adapters, Degrees())
    results = ranks.run(2, scores_of, bloom, adapters, DEGREES[kind])
    for found, _, found_fingerprint in results:
        assert found_fingerprint == fingerprint
        for one, other in zip(found, expected, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, rel=2e-6)
            assert (one.num_scored, one.num_likeliest) == (other.num_scored, other.num_likeliest)
    shares = [own for _, own, _ in results]
    if kind == "copies":  # each window once, although their number is odd
        assert sorted(shares[0] + shares[1]) == sorted(everything) and min(map(len, shares)) > 0
    else:
        assert shares[0] == shares[1] == everything


def report_of(
    bloom: Path | str, options: dict[str, Any], degrees: Degrees, stop_after: int | None = None
) -> EvaluationReport | None:
    loaded = load(bloom, dtype="float32", mesh=mesh_of(degrees))
    if stop_after is None:
        return evaluate(loaded, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bloomlm.evaluation.scoring.scorers.EagerScorer", stopping_after(stop_after))
        with pytest.raises(KeyboardInterrupt):
            evaluate(loaded, **options)
    return None


def stopping_after(num_batches: int) -> type[EagerScorer]:
    class Stopped(EagerScorer):
        def score(self, windows: Any, done: Any = ()) -> Any:
            for number, batch in enumerate(super().score(windows, done)):
                if number == num_batches:
                    raise KeyboardInterrupt
                yield batch

    return Stopped


@pytest.mark.parametrize("kind", DEGREES)
@pytest.mark.parametrize("options", [{"protocol": "lm_eval"}, {"do_generation": True, "tgt_length": 5}])
def test_reports_are_those_of_one_process(
    ranks: RankPool, bloom: Path, lambada: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    if "do_generation" in options:
        lambada.write_text("".join(json.dumps({"src": text, "tgt": "the sea"}) + "\n" for text in PASSAGES))
    file = tmp_path / "report.json"
    options = {"eval_path": lambada, "output_file": file, "batch_size": 1, **options}
    expected = report_of(bloom, options, Degrees())
    assert expected is not None
    for path in tmp_path.glob("report*"):
        path.unlink()
    for found in ranks.run(2, report_of, bloom, options, DEGREES[kind]):
        assert found.metrics.keys() == expected.metrics.keys()
        for name, metric in expected.metrics.items():
            assert found.metrics[name].value == pytest.approx(metric.value, rel=1e-6), name
            if metric.standard_error is not None:
                assert found.metrics[name].standard_error == pytest.approx(metric.standard_error, rel=1e-5), name
        assert (found.run["processes"], found.model) == (2, expected.model)
    assert json.loads(file.read_text())["counts"] == expected.counts
    assert not list(tmp_path.glob(".report*"))


def test_other_numbers_of_ranks_go_on_with_what_is_there(
    ranks: RankPool, bloom: Path, lambada: Path, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    options = {"eval_path": lambada, "protocol": "lm_eval", "seq_length": 8}
    expected = report_of(bloom, options, Degrees())
    options |= {"output_file": file, "batch_size": 1}
    ranks.run(2, report_of, bloom, options, DEGREES["copies"], 1)
    assert len(list(tmp_path.glob(".report*.partial"))) == 2
    report_of(bloom, options, Degrees(), 1)
    for found in ranks.run(2, report_of, bloom, options, DEGREES["copies"]):
        assert found.run["windows_of_a_stopped_run"] == 3
        assert expected is not None
        assert found.metrics["perplexity"].value == pytest.approx(expected.metrics["perplexity"].value, rel=1e-6)


def answers_to_lm_eval(bloom: Path, degrees: Degrees) -> tuple[list[tuple[float, bool]], list[str]]:
    from bloomlm.evaluation.lm_eval_adapter import BloomLM

    mesh = mesh_of(degrees)
    loaded: LoadedModel = load(bloom, mesh=mesh)
    model = BloomLM(loaded.model, tokenizer=loaded.tokenizer, max_length=64, mesh=mesh)
    pairs = [SimpleNamespace(args=(text, " sea")) for text in PASSAGES]
    prompts = [SimpleNamespace(args=(text, {"max_gen_toks": 4})) for text in PASSAGES]
    return model.loglikelihood(pairs), model.generate_until(prompts)


@pytest.mark.parametrize("kind", DEGREES)
def test_lm_eval_gets_all_answers_on_every_rank(ranks: RankPool, bloom: Path, kind: str) -> None:
    pytest.importorskip("lm_eval", reason="the lm_eval extra is not installed")
    log_probs, texts = answers_to_lm_eval(bloom, Degrees())
    assert len(set(texts)) > 1
    for found_log_probs, found_texts in ranks.run(2, answers_to_lm_eval, bloom, DEGREES[kind]):
        assert [value for value, _ in found_log_probs] == pytest.approx([value for value, _ in log_probs], rel=1e-6)
        assert found_texts == texts


def refusal(degrees: Degrees) -> str:
    def compute(batch: list[int]) -> None:
        raise MemoryError

    limit = BatchLimit(size=9, unit="tokens", single="window", advice="--seq_length", mesh=mesh_of(degrees))
    with pytest.raises(ConfigError) as error:
        list(limit.batches([5, 4, 3], compute, sum))
    return str(error.value)


def test_ranks_that_share_a_model_cannot_halve(ranks: RankPool) -> None:
    for message in ranks.run(2, refusal, DEGREES["tensor parallel"]):
        assert "memory ran out on a batch of 9 tokens" in message and "smaller --batch_size" in message


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["run_eval", "run_eval_tps"])
def test_make_evaluates_on_one_and_on_two_processes(tmp_path: Path, target: str) -> None:
    wiki = tmp_path / "wiki.tokens"
    wiki.write_text(" = The Sea = \n \n The sea , and the rain @-@ fed river . \n" * 8)
    # make uses the environment of the tests instead of building one
    make = ["make", "--silent", f"--old-file={sys.prefix}/.installed-dev", f"VENV={sys.prefix}", "MODEL=builtin:tiny"]
    make += [target, f"EVAL_PATH={wiki}", f"EVAL_FLAGS=--dtype float32 --output_file {tmp_path}/report.json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    output = subprocess.run(make, cwd=root, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.count(f" validation results on {wiki} | avg loss: ") == 1
    found = read_report(tmp_path / "report.json")
    assert found.run["tensor_parallel_degree"] == (2 if target == "run_eval_tps" else 1)
    expected = report_of("builtin:tiny", {"eval_path": wiki}, Degrees())
    assert expected is not None
    assert found.metrics["avg_loss"].value == pytest.approx(expected.metrics["avg_loss"].value, rel=1e-6)
