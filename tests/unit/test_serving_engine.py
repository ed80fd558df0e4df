"""The engine's thread and its callers: outputs as they come, cancels, limits, closing, errors."""

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.errors import ClosingError, ConfigError, GenerationError, QueueFullError, ServingError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.serving.engine import Engine
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, Output, RequestHandle, TokenOutput
from tests.serving import Alone, small_model
from tests.unit.test_http_server import wait_for

ALONE = Alone(small_model())
OPTIONS = EngineOptions(max_num_seqs=4, max_step_tokens=16, max_model_len=120, kv_cache_gb=0.01, max_queue=30)


def request(start: int, length: int = 12, **options: Any) -> GenerationRequest:
    config = GenerationConfig(**({"max_new_tokens": 10} | options))
    return GenerationRequest(prompt=[4 + (start * 7 + place * place) % 90 for place in range(length)], config=config)


ENDLESS = {"max_new_tokens": 100, "min_new_tokens": 100}


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(small_model(), OPTIONS)
    made.start()
    yield made
    made.close(drain=False)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(main, 60))


async def collect(handle: RequestHandle) -> list[Output]:
    return [output async for output in handle.outputs()]


def check(asked: GenerationRequest, outputs: list[Output]) -> None:
    expected = ALONE.results(asked)
    tokens = [[o.token for o in outputs if isinstance(o, TokenOutput) and o.index == i] for i in range(len(expected))]
    reasons = [o.finish_reason for o in outputs if isinstance(o, TokenOutput) and o.finish_reason]
    assert tokens == [ids for ids, _ in expected]
    assert sorted(reasons) == sorted(reason for _, reason in expected)


def test_many_callers_get_their_own(engine: Engine) -> None:
    """Asyncio tasks of two event loops in two threads."""
    asked = [request(number, 5 + number % 9) for number in range(16)]
    asked[3] = request(3, strategy=Sampling(seed=4), num_return_sequences=3)
    asked[7] = request(7, strategy=BeamSearch(num_beams=3), num_return_sequences=2)

    async def callers(share: list[GenerationRequest]) -> None:
        handles = [engine.submit(item) for item in share]
        for item, outputs in zip(share, await asyncio.gather(*map(collect, handles)), strict=True):
            check(item, outputs)

    errors: list[BaseException] = []

    def thread(share: list[GenerationRequest]) -> None:
        try:
            run(callers(share))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=thread, args=(asked[part::2],)) for part in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert errors == []
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage, stats.num_finished) == (0, 0, 0, 16)
    assert stats.prompt_tokens == sum(len(item.prompt) for item in asked)
    assert stats.generated_tokens == sum(len(ids) for item in asked for ids, _ in ALONE.results(item))


def test_tokens_come_one_by_one(engine: Engine) -> None:
    """The first ones arrive while the request still runs."""

    async def main() -> None:
        handle = engine.submit(request(1, **ENDLESS))
        outputs = handle.outputs()
        await anext(outputs)
        assert not handle.is_done
        rest = [output async for output in outputs]
        assert len(rest) == 99
        times = handle.times
        assert times.started is not None and times.first_token is not None and times.last_token is not None
        assert times.submitted <= times.started <= times.first_token < times.last_token
        assert times.num_generated_tokens == 100

    run(main())


def test_outputs_are_kept_for_a_caller_who_asks_late(engine: Engine) -> None:
    async def main() -> None:
        item = request(2)
        handle = engine.submit(item)
        while not handle.is_done:
            await asyncio.sleep(0.01)
        check(item, await collect(handle))

    run(main())


@pytest.mark.parametrize("how", ["handle", "task", "break"])
def test_a_cancelled_request_leaves(engine: Engine, how: str) -> None:
    async def main() -> None:
        handle = engine.submit(request(1, **ENDLESS))
        outputs = handle.outputs()
        await anext(outputs)
        if how == "handle":
            handle.cancel()
            handle.cancel()
            assert len([output async for output in outputs]) < 99
        elif how == "task":
            rest = asyncio.ensure_future(collect(handle))
            await asyncio.sleep(0)
            rest.cancel()
            with pytest.raises(asyncio.CancelledError):
                await rest
        else:
            await outputs.aclose()
        while engine.stats().kv_usage:
            await asyncio.sleep(0.001)
        assert engine.stats().num_running == 0 and engine.stats().num_finished == 0
        check(request(5), await collect(engine.submit(request(5))))

    run(main())


def test_a_cancelled_waiting_request_never_starts(engine: Engine) -> None:
    async def main() -> None:
        running = [engine.submit(request(number, **ENDLESS)) for number in range(4)]
        waiting = engine.submit(request(9))
        waiting.cancel()
        assert await collect(waiting) == [] and waiting.times.started is None
        for handle in running:
            handle.cancel()
        while engine.stats().num_waiting:
            await asyncio.sleep(0.001)

    run(main())


def test_the_queue_has_an_end() -> None:
    engine = Engine(small_model(), replace(OPTIONS, max_queue=3))  # not started: all wait
    for number in range(3):
        engine.submit(request(number))
    with pytest.raises(QueueFullError, match="3 requests wait already") as refused:
        engine.submit(request(4))
    assert refused.value.retry_after_s >= 1
    engine.close(drain=True)


def test_closing_finishes_what_is_there() -> None:
    async def main() -> None:
        engine = Engine(small_model(), OPTIONS)
        engine.start()
        asked = [request(number, **ENDLESS) for number in range(6)]
        handles = [engine.submit(item) for item in asked]
        closing = asyncio.get_running_loop().run_in_executor(None, lambda: engine.close(drain=True))
        while True:  # refused as soon as the closing has begun
            try:
                engine.submit(request(0)).cancel()
            except ClosingError:
                break
        for item, handle in zip(asked, handles, strict=True):
            check(item, await collect(handle))
        await closing
        assert not engine.is_alive

    run(main())


def test_closing_at_once_ends_requests_with_an_error() -> None:
    async def main() -> None:
        engine = Engine(small_model(), OPTIONS)
        engine.start()
        handles = [engine.submit(request(number, **ENDLESS)) for number in range(6)]
        await asyncio.get_running_loop().run_in_executor(None, lambda: engine.close(drain=False))
        for handle in handles:
            with pytest.raises(ClosingError):
                await collect(handle)

    run(main())


def test_a_failed_step_is_an_error_of_its_requests_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        handle = engine.submit(request(1, **ENDLESS))
        outputs = handle.outputs()
        await anext(outputs)

        def fail(reads: Any) -> Any:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

        monkeypatch.setattr(engine._batch._session, "step", fail)
        with pytest.raises(ServingError, match="ran out of memory"):
            async for _ in outputs:
                pass
        check(request(5), await collect(engine.submit(request(5))))
        assert engine.is_alive

    run(main())


def test_an_engine_that_cannot_go_on_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        def fail() -> None:
            raise SystemError("no memory even for the error")

        monkeypatch.setattr(engine._batch._scheduler, "admit", fail)
        monkeypatch.setattr(engine._batch, "restart", lambda error: fail())
        with pytest.raises(ServingError, match="no memory even for the error"):
            await collect(engine.submit(request(1)))
        while engine.is_alive:
            await asyncio.sleep(0.001)
        with pytest.raises(ClosingError):
            engine.submit(request(1))

    run(main())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (GenerationRequest(prompt=[]), "no tokens"),
        (GenerationRequest(prompt=[5, 101]), "token id 101 is unknown: the model has ids 0 to 100"),
        (GenerationRequest(prompt=[-1]), "token id -1"),
        (request(1, max_new_tokens=109), "12 tokens and 109 new ones are asked for, but this server has room for 120"),
        (request(1, strategy=Sampling(), num_return_sequences=5), "5 sequences of one prompt.*at most 4"),
        (request(1, stop_token_ids=(300,)), "token id 300"),
    ],
)
def test_what_can_never_be_served_is_refused(engine: Engine, asked: GenerationRequest, message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        engine.submit(asked)
    assert engine.stats().num_waiting == 0


def test_more_blocks_than_there_are_is_refused() -> None:
    loaded = small_model()
    bytes_of_a_sequence = 128 * loaded.model.bytes_per_token
    engine = Engine(loaded, replace(OPTIONS, kv_cache_gb=1.5 * bytes_of_a_sequence / 1e9))
    with pytest.raises(
        GenerationError, match=r"2 sequences of 112 tokens need 224 places .* has 192 \(--kv_cache_gb\)"
    ):
        engine.submit(request(1, max_new_tokens=100, strategy=Sampling(), num_return_sequences=2))
    engine.close(drain=True)
    with pytest.raises(ConfigError, match=r"--max_model_len 120 tokens needs .* and --kv_cache_gb is"):
        Engine(loaded, replace(OPTIONS, kv_cache_gb=0.9 * bytes_of_a_sequence / 1e9))


def test_a_step_must_have_room_for_prompts() -> None:
    with pytest.raises(ConfigError, match="--max_step_tokens is 64; expected more than the 64 tokens"):
        EngineOptions(max_num_seqs=64, max_step_tokens=64)
    with pytest.raises(ConfigError, match=r"more than the 192 tokens .* and up to 128 guesses \(--prompt_lookup 8\)"):
        EngineOptions(max_num_seqs=64, max_step_tokens=150, prompt_lookup=8)


def test_an_idle_engine_waits_without_asking(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    take = engine._commands.take

    def counted(*, waits: bool) -> Any:
        calls.append(waits)
        return take(waits=waits)

    monkeypatch.setattr(engine._commands, "take", counted)
    run(collect(engine.submit(request(1))))
    while not calls[-1]:
        time.sleep(0.001)
    before = len(calls)
    time.sleep(0.05)
    assert len(calls) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads as Linux does")
def test_the_thread_that_loaded_the_model_keeps_no_workers() -> None:
    """They would make libgomp let the workers of the engine's thread sleep between operations."""
    made, threads, num_threads = Engine(small_model(), OPTIONS), Path("/proc/self/task"), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        torch.zeros(1 << 20).add_(1)
        with_workers = len(list(threads.iterdir()))
        made.start()
        made.close(drain=False)
        wait_for(lambda: len(list(threads.iterdir())) == with_workers - 2)  # Linux lists an ended thread for a moment
    finally:
        torch.set_num_threads(num_threads)


def test_a_follower_leaves_its_errors_to_the_ranks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the rank that failed first says why; the others have only lost their connection."""
    engine = Engine(small_model(), EngineOptions(max_num_seqs=1, kv_cache_gb=0.01, max_model_len=50))

    def lose_connection(**options: Any) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(engine._commands, "take", lose_connection)
    with pytest.raises(RuntimeError, match="reset by peer"):
        engine.follow()
    assert not caplog.records
