"""Scores of windows against whole logits, in batches of every size, with common beginnings computed once."""

import random

import numpy as np
import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import ConfigError
from bloomlm.evaluation.scoring import scorers
from bloomlm.evaluation.scoring.batches import BatchLimit
from bloomlm.evaluation.scoring.scorers import EagerScorer
from bloomlm.evaluation.scoring.shared_prefix import Branched, Packed, find_branches, join_documents
from bloomlm.evaluation.scoring.windows import Window, WindowScore, continuation_window
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX, score_labels
from tests.tiny_checkpoint import random_model

VOCAB = 101


def draw(count: int, source: random.Random) -> list[int]:
    return [source.randrange(4, VOCAB) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> BloomForCausalLM:
    return random_model()


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Questions with choices of several lengths, some of which begin others, and windows that share nothing."""
    source = random.Random(0)
    found = []
    for length in (24, 40, 57):
        context = draw(length, source)
        for _ in range(3):
            choice = draw(source.randrange(1, 6), source)
            found += [continuation_window(context, choice)[0], continuation_window(context, choice[:1])[0]]
    for length in (1, 7, 30):
        tokens, labels = np.array(draw(length, source)), np.array(draw(length, source))
        labels[source.randrange(length)] = IGNORE_INDEX
        found.append(Window(tokens, labels))
    return found


def by_whole_logits(model: BloomForCausalLM, window: Window) -> WindowScore:
    """Without any shortcut."""
    log_probs = model(torch.from_numpy(window.tokens)[None])[0].detach().double().log_softmax(-1)[-len(window.labels) :]
    pairs = [(row, int(label)) for row, label in zip(log_probs, window.labels, strict=True) if label != IGNORE_INDEX]
    return WindowScore(
        log_prob=sum(float(row[label]) for row, label in pairs),
        num_scored=len(pairs),
        num_likeliest=sum(int(row.argmax()) == label for row, label in pairs),
    )


def assert_scores(found: list[WindowScore], expected: list[WindowScore]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, rel=1e-6, abs=1e-6)
        assert (one.num_scored, one.num_likeliest) == (other.num_scored, other.num_likeliest)


@pytest.mark.parametrize("max_batch_tokens", [1, 64, 150, 100_000])
def test_scores_are_those_of_whole_logits_in_any_batch(
    model: BloomForCausalLM, windows: list[Window], max_batch_tokens: int
) -> None:
    found = EagerScorer(model, max_batch_tokens=max_batch_tokens).score_all(windows)
    assert_scores(found, [by_whole_logits(model, window) for window in windows])


def test_order_changes_nothing(model: BloomForCausalLM, windows: list[Window]) -> None:
    order = list(range(len(windows)))
    random.Random(1).shuffle(order)
    shuffled = EagerScorer(model, max_batch_tokens=200).score_all([windows[number] for number in order])
    straight = EagerScorer(model, max_batch_tokens=200).score_all(windows)
    assert_scores(shuffled, [straight[number] for number in order])


def test_prefix_adapter_acts_on_shared_and_lone_windows_alike(windows: list[Window]) -> None:
    model = random_model()
    plain = EagerScorer(model, max_batch_tokens=300).score_all(windows)
    apply_adapter(model, PrefixConfig(num_prefix_tokens=3), torch.Generator().manual_seed(0))
    found = EagerScorer(model, max_batch_tokens=300).score_all(windows)
    assert_scores(found, [by_whole_logits(model, window) for window in windows])
    assert abs(found[0].log_prob - plain[0].log_prob) > 1e-3


def test_what_windows_share_is_computed_once(model: BloomForCausalLM, windows: list[Window]) -> None:
    scorer = EagerScorer(model, max_batch_tokens=100_000)
    scorer.score_all(windows)
    documents = join_documents(windows, range(len(windows)))
    groups = find_branches(documents, 100_000)
    assert len(documents) < len(windows) - 5  # choices that begin others
    assert sorted(len(group.documents) for group in groups if group.num_shared) == [3, 3, 3]
    assert scorer.num_computed_tokens < sum(len(document.tokens) for document in documents) / 2


def test_head_sees_scored_positions_only(
    model: BloomForCausalLM, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def counting(hidden, head, labels):  # type: ignore[no-untyped-def]
        rows.append(len(hidden))
        return score_labels(hidden, head, labels)

    monkeypatch.setattr(scorers, "score_labels", counting)
    EagerScorer(model, max_batch_tokens=200).score_all(windows)
    assert sum(rows) == sum(window.num_scored for window in windows)


def test_windows_without_labels_cost_nothing(model: BloomForCausalLM) -> None:
    scorer = EagerScorer(model, max_batch_tokens=10)
    silent = Window(np.array([5, 6]), np.array([IGNORE_INDEX]))
    assert scorer.score_all([silent]) == [WindowScore(log_prob=0.0, num_scored=0, num_likeliest=0)]
    assert scorer.num_computed_tokens == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_batches_are_halved_when_memory_runs_out(
    model: BloomForCausalLM, windows: list[Window], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sizes = []

    def small_memory(hidden):  # type: ignore[no-untyped-def]
        def limited(batch, model, rows):  # type: ignore[no-untyped-def]
            sizes.append(batch.num_tokens)
            if batch.num_tokens > 70:
                raise error
            return hidden(batch, model, rows)

        return limited

    for kind in (Packed, Branched):
        monkeypatch.setattr(kind, "hidden", small_memory(kind.hidden))
    scorer = EagerScorer(model, max_batch_tokens=1000)
    found = scorer.score_all(windows)
    assert_scores(found, [by_whole_logits(model, window) for window in windows])
    assert max(sizes) > 70
    assert scorer.max_batch_tokens < 500


def test_batches_hold_as_much_as_fits() -> None:
    computed = []

    def compute(batch: list[int]) -> list[int]:
        computed.append(sum(batch))
        if sum(batch) > 10:
            raise MemoryError
        return [piece + 100 for piece in batch]

    limit = BatchLimit(size=24, unit="tokens", single="piece of {size}", advice="--size")

    def halves(piece: int) -> tuple[int, ...]:
        return (piece // 2, piece - piece // 2) if piece > 10 else (piece,)

    found = list(limit.batches([16, 8, 6, 4, 3, 3], compute, sum, halves=halves))
    # 24 do not fit, so the limit is 12; 16 is above it and halved alone, which lowers the limit to 8
    assert computed == [24, 16, 8, 8, 8, 6, 7, 3]
    assert found == [([8], [108])] * 3 + [([6], [106]), ([4, 3], [104, 103]), ([3], [103])]
    with pytest.raises(ConfigError, match="memory ran out on a single piece of 16; give a smaller --size"):
        list(limit.batches([16], compute, sum))
    assert list(limit.batches([4, 3, 1, 1], compute, sum, most=4)) == [([4], [104]), ([3, 1], [103, 101]), ([1], [101])]


def test_other_errors_are_not_taken_for_want_of_memory(
    model: BloomForCausalLM, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch, model, rows):  # type: ignore[no-untyped-def]
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(Packed, "hidden", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        EagerScorer(model, max_batch_tokens=1000).score_all(windows)


def test_single_window_that_does_not_fit_is_an_error(
    model: BloomForCausalLM, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(batch, model, rows):  # type: ignore[no-untyped-def]
        raise MemoryError

    monkeypatch.setattr(Packed, "hidden", full)
    with pytest.raises(ConfigError, match="single window of 30 tokens"):
        EagerScorer(model, max_batch_tokens=1000).score_all([windows[-1]])


def test_long_context_loses_its_beginning() -> None:
    window, is_cut = continuation_window([1, 2, 3, 4], [5, 6], max_length=3)
    assert (window.tokens.tolist(), window.labels.tolist(), is_cut) == ([3, 4, 5], [5, 6], True)
    window, is_cut = continuation_window([1, 2, 3, 4], [5, 6], max_length=5)
    assert (window.tokens.tolist(), is_cut) == ([1, 2, 3, 4, 5], False)
    window, is_cut = continuation_window([1], [2, 3, 4, 5], max_length=2)
    assert (window.tokens.tolist(), window.labels.tolist(), is_cut) == ([3, 4], [4, 5], True)


def test_mode_of_the_model_is_kept(model: BloomForCausalLM, windows: list[Window]) -> None:
    model.train()
    EagerScorer(model, max_batch_tokens=100).score_all(windows[-1:])
    assert model.training
    model.eval()
