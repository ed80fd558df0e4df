"""Windows of raw text and their order: what is learned, by value, and the same sequence however a run is divided."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomlm.api import load as load_bloom
from bloomlm.data import token_files
from bloomlm.data.example import Example
from bloomlm.data.loader import BatchLoader, TokenBudget, collate
from bloomlm.data.mixture import Mixture, MixtureOrder, Source
from bloomlm.data.permutation import Permutation
from bloomlm.data.windows import TextWindows, pack
from bloomlm.errors import ConfigError, TrainingError
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.precision import precision_from_flags
from tests.unit.test_token_files import DOCUMENTS, documents_of, load, write_jsonl

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, max_length=st.integers(2, 25))
@settings(max_examples=300, deadline=None)
def test_every_token_but_the_first_of_a_document_is_learned_once(lengths: list[int], max_length: int) -> None:
    ends = np.cumsum(lengths).tolist()
    *rows, total = pack(ends, max_length)
    learned: list[int] = []
    for (start, stop, first, before), (_, _, end, after) in pairwise([*rows, total]):
        cuts = [start, *(at for at in ends[first:end] if at < stop), stop]
        positions = 0
        for piece, piece_end in pairwise(cuts):
            (document,) = {np.searchsorted(ends, at, side="right") for at in range(piece, piece_end)}
            if lengths[document] - 1 <= max_length:  # a document that fits is whole
                assert (piece, piece_end) == (ends[document] - lengths[document], ends[document])
            learned += range(piece + 1, piece_end)
            positions += piece_end - piece - 1
        assert 0 < positions <= max_length
        assert after - before == positions
    starts = {0, *ends}
    assert learned == [position for position in range(ends[-1]) if position not in starts]
    assert total == (ends[-1], ends[-1], len(lengths), len(learned))


@given(lengths=LENGTHS, max_length=st.integers(2, 25))
@settings(max_examples=100, deadline=None)
def test_a_window_takes_every_document_that_fits(lengths: list[int], max_length: int) -> None:
    ends = np.cumsum(lengths).tolist()
    *rows, total = pack(ends, max_length)
    for row, later in pairwise([*rows, total]):
        if later is not total and later[2] != row[2]:  # the next one begins with a whole document
            next_positions = lengths[later[2]] - 1
            assert later[3] - row[3] + next_positions > max_length


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> TextWindows:
    directory = tmp_path_factory.mktemp("texts")
    path = write_jsonl(directory / "a.jsonl", DOCUMENTS * 2)
    return TextWindows(load(token_files.file_inputs(path), directory / "cache"), 24)


def pieces_of(example: Example) -> list[list[int]]:
    bounds = (*example.document_starts, len(example.tokens))
    return [example.tokens[start:stop].tolist() for start, stop in pairwise(bounds)]


def test_windows_hold_the_documents_in_order(windows: TextWindows) -> None:
    found: list[int] = []
    for index in range(len(windows)):
        for piece in pieces_of(windows[index]):
            continues = bool(found) and found[-1] != 2  # </s> of the small tokenizer
            assert not continues or piece[0] == found[-1]
            found += piece[continues:]
    assert found == [token for document in documents_of(windows._files) for token in document]
    assert max(len(windows[index].document_starts) for index in range(len(windows))) > 1


def test_parts_have_the_windows_and_the_sizes_of_the_whole(windows: TextWindows) -> None:
    split = len(windows) // 3
    first, second = windows.part(0, split), windows.part(split, len(windows))
    examples = [part[index] for part in (first, second) for index in range(len(part))]
    assert [e.tokens.tolist() for e in examples] == [windows[i].tokens.tolist() for i in range(len(windows))]
    assert [len(example.tokens) for example in examples] == windows.lengths.tolist()
    assert first.num_supervised_tokens + second.num_supervised_tokens == windows.num_supervised_tokens
    assert windows.num_supervised_tokens == collate(examples).num_supervised_tokens
    assert windows.num_tokens == sum(map(len, documents_of(windows._files)))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_other_texts_have_another_digest_and_moved_ones_the_same(windows: TextWindows, tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    for name, texts, same in (("moved/b.jsonl", DOCUMENTS * 2, True), ("c.jsonl", [*DOCUMENTS, *DOCUMENTS[1:]], False)):
        files = load(token_files.file_inputs(write_jsonl(tmp_path / name, texts)), tmp_path / "cache")
        assert (TextWindows(files, 24).digest == windows.digest) is same


def test_documents_of_a_window_do_not_see_each_other(tmp_path: Path) -> None:
    bloom = load_bloom("builtin:tiny", dtype="float32")
    path = write_jsonl(tmp_path / "a.jsonl", ["The date is today.", "One more.", "The model has fields. " * 9])
    files = token_files.load_token_files(
        "texts", token_files.file_inputs(path), bloom.tokenizer, cache_dir=tmp_path / "cache", show_progress=False
    )
    examples = [TextWindows(files, 40)[index] for index in range(len(TextWindows(files, 40)))]
    assert any(len(example.document_starts) > 1 for example in examples) and len(examples) > 2
    precision = precision_from_flags(fp16=False, bf16=False, fp16_opt_level="O1", scale_loss=1.0)
    found = batch_loss(bloom.model, collate(examples), precision, scale=1.0)
    expected = 0.0
    for piece in (piece for example in examples for piece in pieces_of(example)):
        log_probs = bloom.model(torch.tensor([piece[:-1]]))[0].double().log_softmax(-1)
        expected -= float(log_probs[range(len(piece) - 1), piece[1:]].sum())
    assert float(found) == pytest.approx(expected, rel=1e-6)


@given(length=st.integers(1, 600), seed=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_a_permutation_has_every_number_once(length: int, seed: int) -> None:
    order = Permutation(length, seed, 1)
    assert sorted(order[index] for index in range(length)) == list(range(length))


def test_a_permutation_is_shuffled_as_by_chance() -> None:
    length = 3000
    orders = [np.array([Permutation(length, seed)[index] for index in range(length)]) for seed in range(6)]
    for order in orders:
        # the mean of as many correlations by chance is 0, and their deviation 1 / sqrt(length) = 0.018
        assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.08
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.08
        assert np.bincount(order // 300, minlength=10).tolist() == [300] * 10
        quarters = np.bincount(order[:750] // 750, minlength=4)
        assert abs(quarters - 187.5).max() < 60
    assert len({tuple(order) for order in orders}) == 6


class CountedWindows:
    """In the place of TextWindows: windows of one token each, which is their number."""

    def __init__(self, size: int, positions: int, first: int) -> None:
        self.size, self.num_supervised_tokens, self.first = size, size * positions, first
        self.digest = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        tokens = np.array([self.first + index] * 2, dtype=np.int32)
        return Example(tokens=tokens, learned=((0, 2),), source_text="", target_text="")


def mixture_of(sources: list[tuple[int, int, float]]) -> Mixture:
    """A mixture of sources of (windows, positions a window, weight)."""
    first, made = 0, []
    for number, (size, positions, weight) in enumerate(sources):
        made.append(Source(name=f"s{number}", windows=CountedWindows(size, positions, first), weight=weight))
        first += size
    return Mixture(made, 64, name="test")


SOURCES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.floats(0.2, 5.0)), min_size=1, max_size=4)


def loader_of(mixture: Mixture, batch_size: int, dp_degree: int, dp_rank: int) -> BatchLoader:
    order = MixtureOrder(mixture, 7)
    return BatchLoader(mixture, batch_size, shuffle=True, seed=7, dp_degree=dp_degree, dp_rank=dp_rank, order=order)


def next_windows(loaders: list[BatchLoader], num_batches: int) -> list[int]:
    """The windows of the next batches of every rank, in the order of steps and ranks."""
    found: list[int] = []
    iterators = [iter(loader) for loader in loaders]
    for _ in range(num_batches):
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:  # the epoch has ended on all ranks alike
            iterators = [iter(loader) for loader in loaders]
            batches = [next(iterator) for iterator in iterators]
        for batch in batches:
            assert batch is not None
            if batch.num_supervised_tokens:
                found += batch.tokens.tolist()
    return found


@given(
    sources=SOURCES,
    batch_size=st.integers(1, 5),
    degrees=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    steps=st.integers(0, 60),
)
@settings(max_examples=80, deadline=None)
def test_a_run_resumes_with_the_same_windows_on_other_ranks(
    sources: list[tuple[int, int, float]], batch_size: int, degrees: tuple[int, int], steps: int
) -> None:
    mixture = mixture_of(sources)
    try:
        order = MixtureOrder(mixture, 7)
    except ConfigError:
        return  # a weight below one window
    expected = [window for epoch in range(400) for window in order.of_epoch(epoch)[:].tolist()]
    before = [loader_of(mixture, batch_size, degrees[0], rank) for rank in range(degrees[0])]
    found = next_windows(before, steps)
    state = before[0].state_dict()
    after = [loader_of(mixture, batch_size, degrees[1], rank) for rank in range(degrees[1])]
    for loader in after:
        loader.load_state_dict(state)
    found += next_windows(after, 20)
    assert found == expected[: len(found)] and len(found) >= 20


@given(sources=SOURCES, epochs=st.integers(1, 5))
@settings(max_examples=80, deadline=None)
def test_sources_have_their_shares_and_repeat_no_window_early(
    sources: list[tuple[int, int, float]], epochs: int
) -> None:
    mixture = mixture_of(sources)
    try:
        order = MixtureOrder(mixture, 3)
    except ConfigError:
        return
    counts = mixture.windows_per_epoch()
    assert sum(counts) == len(mixture)
    drawn = Counter[int]()
    for epoch in range(epochs):
        windows = order.of_epoch(epoch)[:].tolist()
        first = 0
        for count, (size, _, _) in zip(counts, sources, strict=True):
            assert sum(first <= window < first + size for window in windows) == count
            first += size
        drawn.update(windows)
    first = 0
    for count, (size, _, _) in zip(counts, sources, strict=True):
        times = [drawn[window] for window in range(first, first + size)]
        assert max(times) - min(times) <= 1 and sum(times) == epochs * count
        first += size


def test_weights_are_shares_of_tokens() -> None:
    # 300 windows of 10 positions and 100 of 30: equal weights take three windows of the first for one of the second
    mixture = mixture_of([(300, 10, 1.0), (100, 30, 1.0)])
    assert mixture.windows_per_epoch() == (300, 100)
    assert mixture_of([(300, 10, 3.0), (100, 30, 1.0)]).windows_per_epoch() == (360, 40)
    with pytest.raises(ConfigError, match=r"source s1 of weight 0\.001: that is less than one window of the 400"):
        mixture_of([(300, 10, 1.0), (100, 30, 0.001)]).windows_per_epoch()


def test_another_mixture_does_not_resume() -> None:
    state = loader_of(mixture_of([(30, 1, 1.0), (10, 1, 1.0)]), 2, 1, 0).state_dict()
    with pytest.raises(
        TrainingError,
        match="had order 20 of 30 windows of 0000001e; 20 of 10 windows of 0000000a, this one has 30 of 30",
    ):
        loader_of(mixture_of([(30, 1, 3.0), (10, 1, 1.0)]), 2, 1, 0).load_state_dict(state)


def test_a_budget_of_tokens_holds_whole_windows() -> None:
    mixture = mixture_of([(30, 1, 1.0)])
    assert mixture.windows_per_batch(TokenBudget(200)) == 3
    with pytest.raises(ConfigError, match="--max_tokens_per_batch 63 is less than a window"):
        mixture.windows_per_batch(TokenBudget(63))


def test_millions_of_windows_take_no_memory_and_no_scan() -> None:
    mixture = mixture_of([(10**12, 1, 1.0), (10**9, 1, 0.5)])
    order = MixtureOrder(mixture, 1).of_epoch(3)
    windows = order[10**11 : 10**11 + 50].tolist()
    assert len(set(windows)) == 50 and max(windows) < len(mixture)
