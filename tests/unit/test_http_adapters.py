"""Adapters through a server's port: requests with different ones at the same time, loaded and unloaded meanwhile."""

import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import bloomlm
from bloomlm.adapters.base import Adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel
from bloomlm.checkpoint.source import resolve_source
from tests.tiny_bloom import write_adapter
from tests.unit.test_http_server import wait_for

MODEL = "builtin:tiny"
ADAPTERS: dict[str, Adapter] = {
    "lora": LoraConfig(r=8, target_modules=BLOCK_LINEARS),
    "dora": DoraConfig(r=4),
    "rows": LoraConfig(r=2, trained_tokens=tuple(range(20, 120))),
    "prefix": PrefixConfig(num_prefix_tokens=6),
}
TEXTS = ["The history of bread", "Le pain", "\u0645\u0631\u062d\u0628\u0627", "a" * 40]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory, base = tmp_path_factory.mktemp("adapters"), resolve_source(MODEL).directory
    return {name: write_adapter(directory / name, base, adapter) for name, adapter in ADAPTERS.items()}


@pytest.fixture(scope="module")
def alone(paths: dict[str, Path]) -> dict[str, LoadedModel]:
    adapters = {MODEL: None, **paths}
    return {name: bloomlm.load(MODEL, dtype="float32", adapter_path=path) for name, path in adapters.items()}


@pytest.fixture(scope="module")
def url(paths: dict[str, Path]) -> Iterator[str]:
    """A server that has two of the adapters from its start.

    It computes in float32: in the file's float16, two tokens can be equally likely but for the batch's size.
    """
    given = [flag for name in ("lora", "prefix") for flag in ("--lora", f"{name}={paths[name]}")]
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", MODEL, "--port", "0"]
    command += [
        "--dtype",
        "float32",
        *given,
        "--allow_adapter_loading",
        "--max_num_seqs",
        "12",
        "--max_step_tokens",
        "40",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[2].rstrip(",")
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield url
        process.terminate()
        process.communicate(timeout=60)


def ask(url: str, model: str, text: str) -> str:
    body = {"model": model, "prompt": text, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["text"]
    return found


def change(url: str, what: str, body: dict[str, str]) -> httpx.Response:
    return httpx.post(f"{url}/v1/{what}_lora_adapter", json=body, timeout=120)


def test_four_adapters_at_once_equal_predict(url: str, paths: dict[str, Path], alone: dict[str, LoadedModel]) -> None:
    cases = [(model, text) for model in alone for text in TEXTS]
    random.Random(3).shuffle(cases)
    early = [case for case in cases if case[0] not in ("dora", "rows")]
    with ThreadPoolExecutor(16) as pool:
        answers = [(case, pool.submit(ask, url, *case)) for case in early]
        for name in ("dora", "rows"):  # while the others are answered
            loaded = change(url, "load", {"lora_name": name, "lora_path": str(paths[name])})
            assert loaded.status_code == 200, loaded.text
        answers += [(case, pool.submit(ask, url, *case)) for case in cases]
    models = httpx.get(f"{url}/v1/models").json()["data"]
    assert [model["id"] for model in models] == [MODEL, "lora", "prefix", "dora", "rows"]
    expected = {case: alone[case[0]].generate([case[1]], max_new_tokens=24)[0].completion for case in cases}
    assert len(set(expected.values())) > 15
    for case, answer in answers:
        assert answer.result() == expected[case], case


def test_loading_and_unloading(url: str, paths: dict[str, Path], alone: dict[str, LoadedModel]) -> None:
    expected = {name: alone[name].generate([TEXTS[0]], max_new_tokens=24)[0].completion for name in ("lora", "dora")}
    for kind in ("lora", "dora", "lora"):  # one name for several adapters, whose cached prompts must not be mixed up
        assert change(url, "load", {"lora_name": "x", "lora_path": str(paths[kind])}).status_code == 200
        assert ask(url, "x", TEXTS[0]) == expected[kind]
        taken = change(url, "load", {"lora_name": "x", "lora_path": str(paths["dora"])})
        assert taken.status_code == 400 and "an adapter 'x' already" in taken.json()["error"]["message"]
        assert change(url, "unload", {"lora_name": "x"}).status_code == 200
    assert change(url, "unload", {"lora_name": "x"}).status_code == 404
    gone = httpx.post(f"{url}/v1/completions", json={"model": "x", "prompt": "a"})
    assert gone.status_code == 404
    missing = change(url, "load", {"lora_name": "x", "lora_path": "/nowhere"})
    assert missing.status_code == 400 and "/nowhere" in missing.json()["error"]["message"]
