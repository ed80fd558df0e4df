"""Requests in a batch get the tokens and log-probabilities that they get alone, whatever arrives and leaves beside them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bloomlm.errors import ServingError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.serving.batch import Batch
from bloomlm.serving.job import Ended, Started
from bloomlm.serving.memory import KvBudget
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, TokenOutput
from bloomlm.serving.scheduler import BLOCK_TOKENS, num_blocks_of
from tests.serving import Alone, small_model

MAX_LEN = 80
TOLERANCE = 5e-5  # of log-probabilities; weights as large as those of this model amplify rounding


def stem(number: int) -> list[int]:
    """A text with which several prompts begin."""
    return torch.randint(4, 101, (60,), generator=torch.Generator().manual_seed(number)).tolist()


@dataclass(kw_only=True)
class Arrival:
    """A request, when it comes, and what has come of it."""

    request: GenerationRequest
    gap: int
    """Steps since the one before."""
    cancelled_after: int | None
    """Steps."""
    steps: int = 0
    scores: Any = None
    outputs: dict[int, list[TokenOutput]] = field(default_factory=dict)
    started: Started | None = None
    ended: Ended | None = None

    @property
    def tokens(self) -> dict[int, list[int]]:
        return {index: [output.token for output in outputs] for index, outputs in self.outputs.items()}


class Run:
    """Steps of a batch."""

    def __init__(self, batch: Batch, arrivals: Sequence[Arrival] = ()) -> None:
        self.batch = batch
        self.arrivals = list(arrivals)
        self.num_steps = 0

    def finish(self) -> None:
        coming = list(enumerate(self.arrivals))
        wait = 0
        while coming or not self.batch.is_empty:
            while coming and coming[0][1].gap <= wait:
                number, arrival = coming.pop(0)
                self.batch.add(number, arrival.request, b"")
                wait = 0
            wait += 1
            for number, arrival in enumerate(self.arrivals):
                if (
                    arrival.steps == arrival.cancelled_after
                    and arrival.ended is None
                    and (number, arrival) not in coming
                ):
                    self.batch.cancel(number)
            self.step()

    def step(self) -> None:
        self.batch.step()
        for number, item in self.batch.take_news():
            arrival = self.arrivals[number]
            assert arrival.ended is None, "nothing comes after the end"
            if isinstance(item, Started):
                arrival.started = item
            elif isinstance(item, Ended):
                arrival.ended = item
            elif isinstance(item, TokenOutput):
                assert arrival.started is not None
                arrival.outputs.setdefault(item.index, []).append(item)
            else:
                assert arrival.scores is None and not arrival.outputs
                arrival.scores = item
        for arrival in self.arrivals:
            arrival.steps += 1
        self.num_steps += 1
        assert self.num_steps < 2000, "a request never ends"


def make_batch(max_step_tokens: int = 24, num_blocks: int = 40, num_rows: int = 6, **options: Any) -> Batch:
    loaded = small_model()
    chosen = EngineOptions(
        max_num_seqs=num_rows, max_step_tokens=max_step_tokens, max_model_len=MAX_LEN, max_queue=100, **options
    )
    budget = KvBudget(num_rows=num_rows, num_blocks=num_blocks, num_allocated=0)
    return Batch(loaded.model, loaded.tokenizer.decode, chosen, budget)


def arrival(prompt: list[int], gap: int = 0, cancelled_after: int | None = None, **options: Any) -> Arrival:
    config_options = {"max_new_tokens": 6} | options.pop("config", {})
    request = GenerationRequest(prompt=prompt, config=GenerationConfig(**config_options), **options)
    return Arrival(request=request, gap=gap, cancelled_after=cancelled_after)


ALONE = Alone(small_model())


def check(found: Arrival) -> None:
    """Compare with the request alone; a cancelled one has the beginning of its tokens."""
    request = found.request
    assert found.ended is not None and found.ended.error is None
    expected = ALONE.results(request)
    complete = found.cancelled_after is None or found.cancelled_after > found.steps
    if request.score_only:
        assert not found.outputs
    else:
        for index, (tokens, reason) in enumerate(expected):
            outputs = found.outputs.get(index, [])
            assert [output.token for output in outputs] == tokens[: len(outputs)]
            if outputs and len(outputs) == len(tokens):
                assert outputs[-1].finish_reason == reason
            assert len(outputs) == len(tokens) or found.cancelled_after is not None or not complete
            if request.config.num_log_probs is not None:
                log_probs = ALONE.log_probs(request.prompt + tokens)[len(request.prompt) - 1 :]
                for output, row in zip(outputs, log_probs, strict=False):
                    assert_scored(output.token, output.log_prob, output.top_log_probs, row)
    if found.scores is not None:
        assert found.scores[0] is None and len(found.scores) == len(request.prompt)
        rows = ALONE.log_probs(request.prompt)
        for token, score, row in zip(request.prompt[1:], found.scores[1:], rows, strict=True):
            assert_scored(token, score.log_prob, score.top_log_probs, row)


def assert_scored(token: int, log_prob: float | None, top: Any, row: torch.Tensor) -> None:
    assert log_prob == pytest.approx(float(row[token]), abs=TOLERANCE)
    values = [value for _, value in top]
    assert values == pytest.approx(row.topk(len(top)).values.tolist(), abs=TOLERANCE)
    assert [float(row[other]) for other, _ in top] == pytest.approx(values, abs=TOLERANCE)


configs = st.builds(
    lambda strategy, length, count, repetition, stop, num_log_probs: GenerationConfig(
        strategy=strategy,
        max_new_tokens=length,
        num_return_sequences=1 if isinstance(strategy, Greedy) else count,
        repetition_penalty=repetition,
        stop=stop,
        num_log_probs=None if isinstance(strategy, BeamSearch) else num_log_probs,
    ),
    st.sampled_from(
        [Greedy(), Greedy(), Sampling(seed=3), Sampling(seed=9, top_k=20, temperature=1.5), BeamSearch(num_beams=2)]
    ),
    st.integers(1, 20),
    st.integers(1, 2),
    st.sampled_from([1.0, 1.0, 1.3]),
    st.sampled_from([(), (), ("25>", "<17><")]),
    st.sampled_from([None, 0, 3]),
)
arrivals = st.builds(
    lambda number, length, own, config, gap, cancel, scored, first: Arrival(
        request=GenerationRequest(
            prompt=stem(number)[:length] + own,
            config=config,
            prompt_log_probs=scored[0],
            score_only=scored[1],
            first_sequence=first,
        ),
        gap=gap,
        cancelled_after=cancel,
    ),
    st.integers(0, 1),
    st.integers(1, 50),
    st.lists(st.integers(4, 100), max_size=10),
    configs,
    st.integers(0, 4),
    st.sampled_from([None, None, None, 0, 3, 9]),
    st.sampled_from([(None, False), (None, False), (None, False), (2, False), (0, True), (None, True)]),
    st.sampled_from([0, 0, 5]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(arrivals, min_size=1, max_size=10),
    st.sampled_from([25, 32, 200]),
    st.sampled_from([num_blocks_of(MAX_LEN) * 2, 30]),
    st.booleans(),
    st.sampled_from([0, 0, 3]),
)
def test_requests_get_what_they_get_alone(
    drawn: list[Arrival], max_step_tokens: int, num_blocks: int, prefix_caching: bool, prompt_lookup: int
) -> None:
    batch = make_batch(max_step_tokens, num_blocks, prefix_caching=prefix_caching, prompt_lookup=prompt_lookup)
    Run(batch, drawn).finish()
    for found in drawn:
        check(found)
    assert batch.kv_usage == 0 and batch.num_running == 0 and not batch._readers and not batch._owners


def test_a_long_prompt_leaves_every_step_to_the_running_sequences() -> None:
    batch = make_batch(max_step_tokens=10)
    running, long = arrival(stem(0)[:9], config={"max_new_tokens": 20, "min_new_tokens": 20}), arrival(stem(1), gap=3)
    run = Run(batch, [running, long])
    run.finish()
    assert run.num_steps == 20 and long.ended is not None  # 60 tokens in chunks of 9 beside one token of the other
    check(running)
    check(long)


def test_equal_prefixes_that_arrive_together_are_read_once() -> None:
    batch = make_batch(max_step_tokens=20)
    prefix = stem(0)[:48]
    together = [arrival([*prefix, 50 + number, 4]) for number in range(5)]
    Run(batch, together).finish()
    cached = [found.started.num_cached_tokens for found in together if found.started]
    assert cached == [0, 48, 48, 48, 48]
    assert (batch.prefix_queries, batch.prefix_hits) == (250, 192)
    for found in together:
        check(found)


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    """Its logits are needed, also where all blocks of the prompt are saved."""
    batch = make_batch()
    first, second = arrival(stem(0)[:48]), arrival(stem(0)[:48], gap=20)
    Run(batch, [first, second]).finish()
    assert second.started is not None and second.started.num_cached_tokens == 32
    check(second)


def test_a_request_that_waits_for_a_cancelled_one_reads_by_itself() -> None:
    batch = make_batch(max_step_tokens=8)
    prefix = stem(0)[:48]
    first, second = arrival([*prefix, 5], cancelled_after=3), arrival([*prefix, 6])
    Run(batch, [first, second]).finish()
    assert second.started is not None and 0 < second.started.num_cached_tokens < 48  # what the first had read
    assert not first.outputs
    check(second)


def test_a_continuation_is_found_with_its_prompt() -> None:
    """The second turn of a conversation finds the first one with its answer."""
    batch = make_batch()
    first = arrival(stem(0)[:20], config={"max_new_tokens": 30, "min_new_tokens": 30})
    Run(batch, [first]).finish()
    second = arrival(first.request.prompt + first.tokens[0] + [9, 8])
    Run(batch, [second]).finish()
    assert second.started is not None
    assert second.started.num_cached_tokens == (20 + 29) // BLOCK_TOKENS * BLOCK_TOKENS
    check(second)


def test_the_cache_leaves_room_for_running_requests() -> None:
    batch = make_batch(num_blocks=10)
    for number in range(4):
        Run(batch, [arrival(stem(number)[:50])]).finish()
        assert len(batch._cache) <= 10
    large = arrival(stem(5)[:60], config={"strategy": Sampling(), "num_return_sequences": 2, "max_new_tokens": 20})
    run = Run(batch, [large])
    batch.add(0, large.request, b"")
    run.step()
    assert len(batch._cache) == 0 and batch.kv_usage == 1
    batch.cancel(0)
    assert batch.kv_usage == 0 and batch.is_empty


def test_a_failed_step_ends_what_it_concerned_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(num_rows=1)
    running, waiting = arrival(stem(0)[:20]), arrival(stem(1)[:20])
    run = Run(batch, [running, waiting])
    for number, item in enumerate(run.arrivals):
        batch.add(number, item.request, b"")
    run.step()
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    def fail(reads: Any) -> Any:
        raise error

    monkeypatch.setattr(batch._session, "step", fail)
    with pytest.raises(RuntimeError):
        batch.step()
    batch.restart(error)
    while not batch.is_empty:
        run.step()
    assert running.ended is not None and isinstance(running.ended.error, ServingError)
    assert "ran out of memory" in str(running.ended.error)
    check(waiting)
