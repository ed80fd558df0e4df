"""An engine on two tensor-parallel ranks serves what one process serves."""

import asyncio
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest

from bloomlm.adapters.lora import LoraConfig
from bloomlm.api import load
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from bloomlm.serving import commands
from bloomlm.serving.engine import Engine
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, Output, RequestHandle, TokenOutput
from tests.distributed.pool import RankPool
from tests.tiny_bloom import write_adapter, write_bloom

OPTIONS = EngineOptions(max_num_seqs=4, max_step_tokens=24, max_model_len=100, kv_cache_gb=0.01)


@pytest.fixture(scope="module")
def bloom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("served") / "bloom")


@pytest.fixture(scope="module")
def adapter(bloom: Path) -> Path:
    return write_adapter(bloom.parent / "adapter", bloom, LoraConfig(r=2))


def requests() -> list[GenerationRequest]:
    prefix = list(range(4, 54))
    strategies = [{}, {"strategy": Sampling(seed=3), "num_return_sequences": 2}, {"strategy": BeamSearch(num_beams=2)}]
    return [
        GenerationRequest(
            prompt=[*prefix[: 10 + 9 * (number % 5)], 5 + number],
            config=GenerationConfig(max_new_tokens=20, **strategies[number % 3]),  # type: ignore[arg-type]
            adapter="lora" if number % 4 == 1 else None,
            prompt_log_probs=1 if number == 6 else None,
        )
        for number in range(10)
    ]


async def collect(handle: RequestHandle) -> list[Output]:
    return [output async for output in handle.outputs()]


async def call(engine: Engine, adapter: Path) -> list[list[Output]]:
    loop = asyncio.get_running_loop()
    with pytest.raises(AdapterError):
        await loop.run_in_executor(None, engine.load_adapter, "none", adapter.parent / "bloom")
    await loop.run_in_executor(None, engine.load_adapter, "lora", adapter)
    cancelled = engine.submit(replace(requests()[0], config=GenerationConfig(max_new_tokens=80, min_new_tokens=80)))
    handles = [engine.submit(request) for request in requests()]
    cancelled.cancel()
    results = [await collect(handle) for handle in handles]
    time.sleep(0.3)  # several heartbeats
    again = await collect(engine.submit(requests()[0]))
    assert again == results[0]
    return results


def serve(bloom: Path, adapter: Path, degrees: Degrees) -> list[list[Output]] | None:
    mesh = ALONE if degrees.world_size == 1 else Mesh.over_all_ranks(degrees, "cpu")
    engine = Engine(load(bloom, mesh=mesh), OPTIONS)
    if not mesh.is_main:
        engine.follow()
        return None
    engine.start()
    with patch.object(commands, "_HEARTBEAT_SECONDS", 0.05):
        results = asyncio.run(asyncio.wait_for(call(engine, adapter), 100))
    engine.close(drain=True)
    return results


def test_two_ranks_serve_what_one_process_serves(ranks: RankPool, bloom: Path, adapter: Path) -> None:
    expected = serve(bloom, adapter, Degrees())
    found, nothing = ranks.run(2, serve, bloom, adapter, Degrees(tp=2))
    assert nothing is None and expected is not None
    for one, other in zip(found, expected, strict=True):
        assert [o for o in one if isinstance(o, TokenOutput)] == [o for o in other if isinstance(o, TokenOutput)]
    [scores], [expected_scores] = (
        [o for o in outputs[6] if not isinstance(o, TokenOutput)] for outputs in (found, expected)
    )
    assert scores[0] is None and len(scores) == len(requests()[6].prompt)
    for score, other in zip(scores[1:], expected_scores[1:], strict=True):
        assert score.log_prob == pytest.approx(other.log_prob, abs=1e-5)


def refused(bloom: Path) -> str:
    with pytest.raises(ConfigError) as error:
        Engine(load(bloom, mesh=Mesh.over_all_ranks(Degrees(dp_replicate=2), "cpu")), OPTIONS)
    return str(error.value)


def test_copies_of_a_model_are_refused(ranks: RankPool, bloom: Path) -> None:
    assert "have copies of the model" in ranks.run(2, refused, bloom)[0]


@pytest.mark.parametrize("num_signals", [1, 2])
def test_a_signal_to_the_launcher_ends_a_server(num_signals: int) -> None:
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", "builtin:tiny", "--port", "0"]
    command += ["--device", "cpu", "--num_processes", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        url = launcher.stderr.readline().split()[2].rstrip(",")
        while not launcher.stderr.readline().startswith("  try "):
            pass
        length = {1: 60, 2: 2000}[num_signals]
        body = {"prompt": "a", "max_tokens": length, "ignore_eos": True, "temperature": 0, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            events = response.iter_lines()
            next(events)
            launcher.send_signal(signal.SIGTERM)
            while not launcher.stderr.readline().startswith("closing"):
                pass
            if num_signals == 1:
                assert [event for event in events if event][-1] == "data: [DONE]"
            else:
                launcher.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.RemoteProtocolError):
                    list(events)
        _, rest = launcher.communicate(timeout=60)
    assert "Traceback" not in rest
    assert launcher.returncode == {1: 0, 2: 128 + signal.SIGTERM}[num_signals]
