"""Requests with different adapters in one engine get what the model with their adapter gives alone."""

import asyncio
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bloomlm.adapters.base import Adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.errors import AdapterError, CheckpointError, ClosingError, GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.serving import adapters
from bloomlm.serving.engine import Engine
from bloomlm.serving.limits import Limits
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, Output, RequestHandle, TokenOutput
from tests.serving import Alone, NumberTokenizer
from tests.tiny_bloom import write_adapter, write_adapters

ADAPTERS: dict[str, Adapter] = {
    "lora": LoraConfig(r=3),
    "dora": DoraConfig(r=2, target_modules=BLOCK_LINEARS),
    "prefix": PrefixConfig(num_prefix_tokens=5),
}
OPTIONS = EngineOptions(max_num_seqs=5, max_step_tokens=24, max_model_len=100, kv_cache_gb=0.01)


@pytest.fixture(scope="module")
def paths(base: Path) -> dict[str, Path]:
    return write_adapters(base, ADAPTERS)


@pytest.fixture(scope="module")
def alone(base: Path, paths: dict[str, Path]) -> dict[str | None, Alone]:
    found: dict[str | None, Alone] = {None: Alone(loaded(base))}
    for name, path in paths.items():
        model = loaded(base)
        load_adapter(model.model, path)
        found[name] = Alone(model)
    return found


def loaded(base: Path) -> LoadedModel:
    tokenizer: Any = NumberTokenizer()
    return LoadedModel(load_model(base).eval(), tokenizer)


@pytest.fixture
def engine(base: Path, paths: dict[str, Path]) -> Iterator[Engine]:
    made = Engine(loaded(base), OPTIONS)
    made.start()
    for name, path in paths.items():
        made.load_adapter(name, path)
    yield made
    made.close(drain=False)


async def collect(handle: RequestHandle) -> list[Output]:
    return [output async for output in handle.outputs()]


def serve(engine: Engine, requests: list[GenerationRequest]) -> list[list[Output]]:
    async def main() -> list[list[Output]]:
        return await asyncio.gather(*[collect(engine.submit(request)) for request in requests])

    return asyncio.run(asyncio.wait_for(main(), 60))


def check(request: GenerationRequest, outputs: list[Output], alone: Alone) -> None:
    for index, (tokens, _) in enumerate(alone.results(request)):
        own = [output for output in outputs if isinstance(output, TokenOutput) and output.index == index]
        assert [output.token for output in own] == tokens
        if request.config.num_log_probs is not None:
            rows = alone.log_probs(request.prompt + tokens)[len(request.prompt) - 1 :]
            expected = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
            assert [output.log_prob for output in own] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_each_request_has_its_own_adapter(engine: Engine, alone: dict[str | None, Alone], seed: int) -> None:
    """All begin with the same text, of which no adapter may find another one's keys and values."""
    draw = random.Random(seed)
    prefix = [draw.randrange(4, 101) for _ in range(40)]
    requests = []
    for _ in range(24):
        strategy = draw.choice([Greedy(), Greedy(), Sampling(seed=2), BeamSearch(num_beams=2)])
        scored = None if isinstance(strategy, BeamSearch) else 0
        prompt = prefix[: draw.randint(1, 40)] + [draw.randrange(4, 101) for _ in range(3)]
        requests.append(
            GenerationRequest(
                prompt=prompt,
                adapter=draw.choice([None, *ADAPTERS]),
                config=GenerationConfig(strategy=strategy, max_new_tokens=draw.randint(1, 25), num_log_probs=scored),
            )
        )
    for request, outputs in zip(requests, serve(engine, requests), strict=True):
        check(request, outputs, alone[request.adapter])
    assert engine.stats().prefix_hits > 0


def test_adapters_come_and_go_while_others_are_used(
    engine: Engine, alone: dict[str | None, Alone], paths: dict[str, Path]
) -> None:
    long = GenerationConfig(max_new_tokens=60, min_new_tokens=60)
    request = GenerationRequest(prompt=list(range(4, 24)), config=long, adapter="lora")
    assert [info.name for info in engine.adapters] == list(ADAPTERS)

    async def main() -> None:
        running = [engine.submit(replace(request, adapter=name)) for name in ("lora", "dora", "dora")]
        streams = [handle.outputs() for handle in running]
        first = [[await anext(stream)] for stream in streams]
        loop = asyncio.get_running_loop()
        unloading = loop.run_in_executor(None, engine.unload_adapter, "lora")
        while len(engine.adapters) == 3:
            await asyncio.sleep(0.001)
        with pytest.raises(AdapterError, match="no adapter 'lora'; the loaded ones are dora, prefix"):
            engine.submit(request)
        for name, outputs, stream in zip(("lora", "dora", "dora"), first, streams, strict=True):
            outputs += [output async for output in stream]
            check(replace(request, adapter=name), outputs, alone[name])
        await unloading
        # the name gets other weights, and must not find the keys and values of the old ones
        await loop.run_in_executor(None, engine.load_adapter, "lora", paths["prefix"])
        check(request, await collect(engine.submit(request)), alone["prefix"])

    asyncio.run(asyncio.wait_for(main(), 60))


def test_adapters_that_cannot_be_loaded_disturb_nothing(
    engine: Engine, alone: dict[str | None, Alone], paths: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="there is an adapter 'dora' already"):
        engine.load_adapter("dora", paths["lora"])
    with pytest.raises(CheckpointError):
        engine.load_adapter("nothing", tmp_path)
    with pytest.raises(AdapterError, match="no adapter 'nothing'"):
        engine.unload_adapter("nothing")
    request = GenerationRequest(prompt=list(range(4, 24)), config=GenerationConfig(max_new_tokens=9), adapter="dora")
    check(request, serve(engine, [request])[0], alone["dora"])


def test_a_closed_engine_loads_nothing(base: Path, paths: dict[str, Path]) -> None:
    engine = Engine(loaded(base), OPTIONS)
    engine.start()
    engine.close(drain=True)
    errors: list[Exception] = []

    def load() -> None:
        try:
            engine.load_adapter("lora", paths["lora"])
        except ClosingError as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(30)
    assert len(errors) == 1


def test_a_model_with_an_adapter_takes_no_others(
    base: Path, paths: dict[str, Path], alone: dict[str | None, Alone]
) -> None:
    model = loaded(base)
    load_adapter(model.model, paths["lora"])
    engine = Engine(model, OPTIONS)
    engine.start()
    with pytest.raises(AdapterError, match="has an adapter already"):
        engine.load_adapter("dora", paths["dora"])
    request = GenerationRequest(prompt=list(range(4, 24)), config=GenerationConfig(max_new_tokens=9))
    check(request, serve(engine, [request])[0], alone["lora"])
    engine.close(drain=True)


def test_an_adapter_that_cannot_be_loaded_for_any_reason_disturbs_nothing(
    engine: Engine, alone: dict[str | None, Alone], paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise MemoryError("17 GB are not free")

    monkeypatch.setattr(adapters, "load_named_adapter", fail)
    with pytest.raises(AdapterError, match=r"'more' could not be loaded .MemoryError: 17 GB are not free"):
        engine.load_adapter("more", paths["lora"])
    request = GenerationRequest(prompt=list(range(4, 24)), config=GenerationConfig(max_new_tokens=9), adapter="dora")
    check(request, serve(engine, [request])[0], alone["dora"])


def test_of_two_callers_one_unloads_an_adapter(engine: Engine) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(engine.unload_adapter, "lora") for _ in range(2))
    assert [type(error) for error in (first.exception(), second.exception()) if error] == [AdapterError]
    assert engine.is_alive and [info.name for info in engine.adapters] == ["dora", "prefix"]


def test_an_adapter_that_leaves_while_a_request_is_checked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*arguments: Any) -> None:
        engine.unload_adapter("lora")

    monkeypatch.setattr(Limits, "check", check)
    with pytest.raises(AdapterError, match="no adapter 'lora'; the loaded ones are dora, prefix"):
        engine.submit(GenerationRequest(prompt=[5], adapter="lora"))


def test_virtual_tokens_take_places_for_keys_and_values(base: Path, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "prefix", base, PrefixConfig(num_prefix_tokens=20))
    model = loaded(base)
    places = 112  # as many as 100 tokens need in blocks of 16
    gigabytes = (places + 0.5) * model.model.bytes_per_token / 1e9
    engine = Engine(model, replace(OPTIONS, max_model_len=100, kv_cache_gb=gigabytes))
    engine.start()
    engine.load_adapter("prefix", path)
    request = GenerationRequest(prompt=list(range(4, 84)), config=GenerationConfig(max_new_tokens=20))
    serve(engine, [request, replace(request, prompt=request.prompt[:72], adapter="prefix")])
    with pytest.raises(GenerationError, match="1 sequences of 100 tokens and 20 virtual ones need 128 places"):
        engine.submit(replace(request, adapter="prefix"))
    engine.close(drain=True)
