"""Standard errors against formulas and against resampling, and those of differences."""

import math

import numpy as np
import pytest

from bloomlm.errors import ConfigError
from bloomlm.evaluation.metrics import Metric, exponential, linear, mean, ratio
from bloomlm.evaluation.report import EvaluationReport, compare, influences_path, read_report


def draw(count: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    words = random.integers(20, 200, count).astype(float)
    return -words * random.normal(3.0, 0.4, count), words


def test_mean_has_the_textbook_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0]
    metric = mean(values, higher_is_better=True)
    assert metric.value == 0.75
    assert metric.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean([1.0], higher_is_better=True).standard_error is None


def test_perplexity_by_word_has_the_error_of_resampling() -> None:
    log_probs, words = draw()
    metric = exponential(ratio(log_probs.tolist(), words, higher_is_better=True), scale=-1.0)
    random = np.random.default_rng(1)
    samples = []
    for _ in range(2000):
        chosen = random.integers(0, len(words), len(words))
        samples.append(math.exp(-log_probs[chosen].sum() / words[chosen].sum()))
    assert metric.value == pytest.approx(math.exp(-log_probs.sum() / words.sum()))
    assert metric.standard_error == pytest.approx(float(np.std(samples)), rel=0.1)
    assert not metric.higher_is_better


def test_units_scale_the_error_and_turn_the_direction() -> None:
    metric = mean([1.0, 3.0, 5.0], higher_is_better=True)
    turned = linear(metric, -2.0)
    assert (turned.value, turned.higher_is_better) == (-6.0, False)
    assert turned.standard_error == pytest.approx(2 * (metric.standard_error or 0))


def test_exponent_stops_at_its_limit() -> None:
    metric = exponential(mean([25.0, 27.0], higher_is_better=False), limit=20.0)
    assert (metric.value, metric.standard_error) == (math.exp(20.0), 0.0)
    assert math.isfinite(exponential(mean([1e6, 1e6], higher_is_better=False)).value)


def make_report(metric: Metric, **changes: object) -> EvaluationReport:
    fields: dict[str, object] = {
        "task": "wikitext",
        "protocol": {"name": "lm_eval", "version": "1", "source": "s"},
        "data": {"name": "wiki", "sha256": "d"},
        "model": {"name": "a|b", "fingerprint": str(metric.value), "dtype": "float32", "adapter": None},
        "settings": {"seq_length": 8},
        "counts": {"windows": 400},
        "metrics": {"word_perplexity": metric},
        "run": {"seconds": 1.0},
        "notices": ("mind the gap",),
    }
    return EvaluationReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_paired_difference_is_surer_than_two_samples(tmp_path) -> None:  # type: ignore[no-untyped-def]
    log_probs, words = draw()
    noise = np.random.default_rng(2).normal(0.0, 0.01, len(words)) * words
    first = exponential(ratio(log_probs.tolist(), words, higher_is_better=True), scale=-1.0)
    second = exponential(ratio((log_probs + 0.05 * words + noise).tolist(), words, higher_is_better=True), scale=-1.0)
    for name, metric in (("a", first), ("b", second)):
        make_report(metric).save(tmp_path / f"{name}.json")
    one, other = read_report(tmp_path / "a.json"), read_report(tmp_path / "b.json")
    (difference,) = compare(one, other).differences
    random = np.random.default_rng(3)
    samples = []
    for _ in range(2000):
        chosen = random.integers(0, len(words), len(words))
        values = [
            math.exp(-x[chosen].sum() / words[chosen].sum()) for x in (log_probs, log_probs + 0.05 * words + noise)
        ]
        samples.append(values[1] - values[0])
    assert difference.is_paired
    assert difference.value == pytest.approx(second.value - first.value)
    assert difference.standard_error == pytest.approx(float(np.std(samples)), rel=0.1)

    influences_path(tmp_path / "b.json").unlink()
    (difference,) = compare(one, read_report(tmp_path / "b.json")).differences
    assert not difference.is_paired
    assert difference.standard_error == pytest.approx(math.hypot(first.standard_error or 0, second.standard_error or 0))


def test_other_data_are_not_paired_and_other_protocols_refused() -> None:
    metric = mean([1.0, 2.0, 4.0], higher_is_better=True)
    report = make_report(metric)
    other = make_report(metric, data={"name": "else", "sha256": "e"}, settings={"seq_length": 9})
    comparison = compare(report, other)
    assert not comparison.differences[0].is_paired
    assert comparison.notices == (
        "the data differ: wiki and else",
        "seq_length differs: 8 and 9",
        "both are the same model",
    )
    with pytest.raises(ConfigError, match="the protocol is lm_eval and gptq"):
        compare(report, make_report(metric, protocol={"name": "gptq", "version": "1", "source": "s"}))
    with pytest.raises(ConfigError, match="version is 1 and 2"):
        compare(report, make_report(metric, protocol={"name": "lm_eval", "version": "2", "source": "s"}))
    with pytest.raises(ConfigError, match="no metric in common"):
        compare(report, make_report(metric, metrics={"acc": metric}))


def test_report_comes_back_as_it_was(tmp_path) -> None:  # type: ignore[no-untyped-def]
    report = make_report(mean([1.0, 2.0, 4.5], higher_is_better=True))
    report.save(tmp_path / "r.json")
    back = read_report(tmp_path / "r.json")
    found, expected = back.metrics["word_perplexity"], report.metrics["word_perplexity"]
    assert found.influences is not None and expected.influences is not None
    assert found.influences.tolist() == expected.influences.tolist()
    assert (found.value, found.standard_error) == (expected.value, expected.standard_error)
    assert back.to_json() == report.to_json()
    assert tuple(back.notices) == report.notices


def test_markdown_says_all_of_it() -> None:
    text = make_report(mean([1.0, 2.0, 4.5], higher_is_better=True)).to_markdown()
    assert "| word_perplexity | 2.5000 | 1.0408 | higher |" in text
    for line in (
        "| protocol source | s |",
        "| settings seq_length | 8 |",
        "| model name | a\\|b |",
        "| model adapter | - |",
    ):
        assert line in text
    assert text.rstrip().endswith("mind the gap")
