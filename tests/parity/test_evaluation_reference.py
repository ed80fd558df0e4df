"""The reference protocol against what PaddleNLP's script printed, and against transformers on the same windows."""

import pytest
import torch
from transformers import BloomForCausalLM as HFBloom

from bloomlm.api import LoadedModel, load
from bloomlm.evaluation.data_sources import read_passages, read_text
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.protocol import WindowPlan
from bloomlm.evaluation.protocols import reference
from bloomlm.evaluation.scoring.scorers import EagerScorer
from bloomlm.model.bloom import BloomForCausalLM
from tests.paddle_fixtures import FIXTURES
from tests.parity.conftest import make_pair

SEQ_LENGTH = 64


def expected_lines() -> dict[str, str]:
    """The lines that the script printed, by the name of the setting."""
    lines = (FIXTURES / "eval_data" / "EXPECTED.txt").read_text().splitlines()
    return {
        setting.removeprefix(f"seq_length={SEQ_LENGTH} "): printed.partition(" | ")[2]
        for setting, printed in zip(lines[::2], lines[1::2], strict=True)
    }


@pytest.fixture(scope="module")
def bloom() -> LoadedModel:
    return load(FIXTURES / "models" / "bloom_h64_l3_a4", paddle_tokenization=True)


def metrics(bloom: LoadedModel, plan: WindowPlan) -> dict[str, Metric]:
    return plan.metrics(EagerScorer(bloom.model, max_batch_tokens=8 * SEQ_LENGTH).score_all(plan.windows))


@pytest.mark.parametrize("overlapping_eval", [16, 32, 64])
def test_wikitext_line_is_the_printed_one(bloom: LoadedModel, overlapping_eval: int) -> None:
    text = read_text(FIXTURES / "eval_data" / "wiki.valid.tokens")
    plan = reference.wikitext(text, bloom.tokenizer, seq_length=SEQ_LENGTH, overlapping_eval=overlapping_eval)
    line = reference.wikitext_line(metrics(bloom, plan), plan.counts)
    assert line == expected_lines()[f"overlapping_eval={overlapping_eval}"]


def test_lambada_line_is_the_printed_one(bloom: LoadedModel) -> None:
    passages = read_passages(FIXTURES / "eval_data" / "lambada_mixed.jsonl")
    plan = reference.lambada(passages, bloom.tokenizer, seq_length=SEQ_LENGTH)
    line = reference.lambada_line(metrics(bloom, plan), plan.counts)
    assert line == expected_lines()["lambada_mixed"]


def test_sliding_windows_score_as_transformers_does(pair: tuple[HFBloom, BloomForCausalLM]) -> None:
    """Against all logits of transformers, one window at a time."""
    theirs, ours = pair
    ids = torch.randint(4, 101, (90,), generator=torch.Generator().manual_seed(0))
    windows = reference.sliding_windows(ids.numpy(), 24, 5, 3)
    found = EagerScorer(ours, max_batch_tokens=100).score_all(windows)
    for window, score in zip(windows, found, strict=True):
        with torch.no_grad():
            logits = theirs(torch.from_numpy(window.tokens)[None]).logits[0, -len(window.labels) :]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(window.labels), reduction="sum")
        assert score.log_prob == pytest.approx(-float(loss), rel=1e-5)


def test_post_layernorm_model_too() -> None:
    theirs, ours = make_pair(n_head=6, post_layernorm=True)
    tokens = torch.randint(4, 101, (1, 40), generator=torch.Generator().manual_seed(1))
    plan_windows = reference.sliding_windows(tokens[0].numpy(), 40, 40, 3)
    with torch.no_grad():
        log_probs = theirs(tokens).logits[0].log_softmax(-1)
    labels = torch.from_numpy(plan_windows[0].labels)
    expected = float(log_probs.gather(1, labels[:, None]).sum())
    assert EagerScorer(ours, max_batch_tokens=100).score_all(plan_windows)[0].log_prob == pytest.approx(
        expected, rel=1e-5
    )
