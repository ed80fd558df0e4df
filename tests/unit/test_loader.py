import json
import time

import numpy as np
import pytest
import torch

from bloomlm.data.example import Example
from bloomlm.data.examples import load_examples
from bloomlm.data.loader import Batch, BatchLoader, TokenBudget, collate
from bloomlm.errors import ConfigError, TrainingError
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from tests.bloom_tokenizer import make_tokenizer


def example(*tokens: int, source: int) -> Example:
    return Example.pair(np.array(tokens, dtype=np.int32), source, source_text="s", target_text="t")


def numbered(count: int) -> list[Example]:
    """Example i is [100 + i, 200 + i, </s>]: one source token, one target token."""
    return [example(100 + i, 200 + i, 2, source=1) for i in range(count)]


def order(batches) -> list[list[int]]:
    return [[token - 100 for token in batch.tokens.tolist() if token < 200] for batch in batches]


def test_every_learned_span_has_labels_and_nothing_else() -> None:
    tokens = np.array([5, 6, 7, 8, 9, 10, 11], dtype=np.int32)
    several = Example(tokens=tokens, learned=((0, 2), (3, 4), (6, 7)), source_text="", target_text="")
    batch = collate([several])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.labels.tolist() == [6, IGNORE_INDEX, 8, IGNORE_INDEX, IGNORE_INDEX, 11]  # nothing predicts the first
    assert batch.num_supervised_tokens == 3
    assert several.prompt_tokens.tolist() == [5, 6, 7, 8, 9, 10]


def test_collate_packs_and_shifts():
    batch = collate([example(5, 6, 7, 8, 2, source=2), example(9, 2, source=1), example(4, 5, 2, source=1)])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 4, 5]
    assert batch.labels.tolist() == [-100, 7, 8, 2, 2, 5, 2]
    assert batch.lengths == (4, 1, 2)
    assert batch.num_supervised_tokens == 6
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert IGNORE_INDEX == -100


def test_collate_without_source_learns_all_tokens_but_the_first():
    batch = collate([example(7, 8, 2, source=0)])
    assert (batch.tokens.tolist(), batch.labels.tolist()) == ([7, 8], [8, 2])
    assert batch.num_supervised_tokens == 2


def test_loss_of_a_packed_batch_equals_that_of_padded_examples():
    # the oracle: whole padded examples, logits of position i with token i + 1, source tokens masked
    examples = [example(5, 6, 7, 8, 2, source=2), example(9, 1, 2, source=1)]
    table = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))  # logits of a bigram model, by token
    batch = collate(examples)
    packed = torch.nn.functional.cross_entropy(table[batch.tokens], batch.labels, reduction="sum")
    whole = torch.tensor(0.0)
    for one in examples:
        tokens = torch.tensor(one.tokens, dtype=torch.int64)
        for i in range(one.num_source_tokens, len(tokens)):
            whole -= torch.log_softmax(table[tokens[i - 1]], dim=-1)[tokens[i]]
    torch.testing.assert_close(packed, whole)


def test_a_batch_moves_to_a_device():
    batch = collate(numbered(2)).to("meta")
    assert isinstance(batch, Batch)
    assert batch.tokens.device.type == batch.labels.device.type == "meta"
    assert (batch.lengths, batch.num_supervised_tokens) == ((2, 2), 4)


def test_epoch_in_order_keeps_the_short_last_batch():
    loader = BatchLoader(numbered(7), 3, shuffle=False)
    assert len(loader) == 3
    assert order(loader) == [[0, 1, 2], [3, 4, 5], [6]]
    assert loader.epoch == 1
    assert order(loader) == [[0, 1, 2], [3, 4, 5], [6]]


def test_shuffle_by_value():
    loader = BatchLoader(numbered(8), 4, shuffle=True, seed=42)
    # sorted draws of PCG64 with SeedSequence([42, 0]) and [42, 1], equal on every machine and numpy
    assert order(loader) == [[4, 1, 3, 6], [0, 7, 2, 5]]
    assert order(loader) == [[1, 2, 5, 3], [6, 0, 4, 7]]


def test_shuffle_depends_on_seed_and_epoch_and_loses_nothing():
    epochs = {}
    for seed in (0, 1):
        loader = BatchLoader(numbered(50), 7, shuffle=True, seed=seed)
        for epoch in range(3):
            epochs[seed, epoch] = [one for batch in order(loader) for one in batch]
            assert sorted(epochs[seed, epoch]) == list(range(50))
    assert len({tuple(one) for one in epochs.values()}) == 6
    again = BatchLoader(numbered(50), 5, shuffle=True, seed=1)
    assert [one for batch in order(again) for one in batch] == epochs[1, 0]


@pytest.mark.parametrize("stop", range(1, 10))
def test_resumes_after_any_batch(stop):
    def batches(loader):
        while True:
            yield from loader

    examples = numbered(7)
    whole = BatchLoader(examples, 2, shuffle=True, seed=3)
    expected = order(batch for batch, _ in zip(batches(whole), range(12), strict=False))
    first = BatchLoader(examples, 2, shuffle=True, seed=3)
    seen = []
    for batch in batches(first):
        seen.append(batch)
        if len(seen) == stop:
            state = json.loads(json.dumps(first.state_dict()))  # the state while the batch is in use
            break
    second = BatchLoader(examples, 2, shuffle=True, seed=3)
    second.load_state_dict(state)
    rest = [batch for batch, _ in zip(batches(second), range(12 - stop), strict=False)]
    assert order(seen) + order(rest) == expected
    assert second.epoch == 12 // 4


class OfLengths(list):
    """Examples with the given numbers of tokens; all tokens of example i are i."""

    def __init__(self, lengths):
        super().__init__(example(*[number] * length, source=1) for number, length in enumerate(lengths))
        self.lengths = np.array(lengths)


def batches_of(loader):
    return [sorted(set(batch.tokens.tolist())) for batch in loader]


def test_token_budget_holds_and_loses_nothing():
    lengths = np.random.default_rng(0).integers(2, 400, 500).tolist()
    loader = BatchLoader(OfLengths(lengths), TokenBudget(1024), shuffle=True, seed=1)
    epochs = [batches_of(loader) for _ in range(3)]
    for batches in epochs:
        assert sorted(number for batch in batches for number in batch) == list(range(500))
        positions = [sum(lengths[number] - 1 for number in batch) for batch in batches]
        assert max(positions) <= 1024
        assert np.mean(positions) > 0.95 * 1024
        assert len(batches) == len(loader)
    assert epochs[0] != epochs[1] != epochs[2]
    assert {tuple(batch) for batch in epochs[0]}.isdisjoint(tuple(batch) for batch in epochs[1])
    again = BatchLoader(OfLengths(lengths), TokenBudget(1024), shuffle=True, seed=1)
    assert batches_of(again) == epochs[0]


def test_token_budget_by_hand():
    # positions 39, 16, 17, 15, 100 have classes 48, 16, 32, 16, 112; the last example is longer than a batch
    loader = BatchLoader(OfLengths([40, 17, 18, 16, 101]), TokenBudget(64), shuffle=False)
    assert batches_of(loader) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("stop", [1, 5, 11, 23])
def test_token_budget_resumes_after_any_batch(stop):
    lengths = np.random.default_rng(0).integers(2, 60, 40).tolist()

    def loader():
        return BatchLoader(OfLengths(lengths), TokenBudget(100), shuffle=True, seed=3)

    def endless(one):
        while True:
            yield from one

    expected = [batch.tokens.tolist() for batch, _ in zip(endless(loader()), range(30), strict=False)]
    first, second = loader(), loader()
    for _, _ in zip(endless(first), range(stop), strict=False):
        state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    rest = [batch.tokens.tolist() for batch, _ in zip(endless(second), range(30 - stop), strict=False)]
    assert rest == expected[stop:]
    with pytest.raises(TrainingError, match="max_tokens 100, this one has 200"):
        BatchLoader(OfLengths(lengths), TokenBudget(200), shuffle=True, seed=3).load_state_dict(state)


def test_state_after_the_last_batch_is_the_next_epoch():
    loader = BatchLoader(numbered(4), 2, shuffle=False)
    iterator = iter(loader)
    next(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (0, 2)
    next(iterator)
    assert (loader.state_dict()["epoch"], loader.state_dict()["position"]) == (1, 0)
    assert next(iterator, None) is None


def test_resumes_with_another_batch_size():
    loader = BatchLoader(numbered(7), 2, shuffle=False)
    next(iter(loader))
    other = BatchLoader(numbered(7), 3, shuffle=False)
    other.load_state_dict(loader.state_dict())
    assert order(other) == [[2, 3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("count", "shuffle", "seed", "message"),
    [(8, True, 1, "num_examples 7, this one has 8"), (7, True, 2, "seed 1, this one has 2"), (7, False, 1, "shuffle")],
)
def test_another_run_does_not_resume(count, shuffle, seed, message):
    state = BatchLoader(numbered(7), 2, shuffle=True, seed=1).state_dict()
    with pytest.raises(TrainingError, match=message):
        BatchLoader(numbered(count), 2, shuffle=shuffle, seed=seed).load_state_dict(state)


@pytest.mark.parametrize(("count", "batch_size", "seed"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_loaders_are_refused(count, batch_size, seed):
    with pytest.raises(ConfigError, match="expected a batch size of at least 1"):
        BatchLoader(numbered(count), batch_size, shuffle=True, seed=seed)


def test_batches_of_a_file(tmp_path):
    rows = [{"src": "the the", "tgt": "and"}, {"src": "中", "tgt": "the"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # first tokenised, then mapped from the cache
        examples = load_examples(path, make_tokenizer(), src_length=8, tgt_length=8, cache_dir=tmp_path)
        (batch,) = BatchLoader(examples, 8, shuffle=False)
        assert batch.tokens.tolist() == [261, 262, 264, 269, 261]
        assert batch.labels.tolist() == [-100, 264, 2, 261, 2]
        assert batch.num_supervised_tokens == examples.num_supervised_tokens == 4


def test_collating_is_fast():
    examples = [example(*range(600), source=300) for _ in range(8)]
    collate(examples)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        collate(examples)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3
