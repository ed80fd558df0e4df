"""langchain, litellm, and schemathesis, which sends what the OpenAPI description allows and what it forbids."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, Alone
from tests.clients.server import Server, running

PROMPT = "The history of"
CHAT_PROMPT = f"user: {PROMPT}\nassistant:"
NUM_PROCESSES = 4
"""Of schemathesis, each with one worker."""


def test_langchain(server: Server, alone: Alone) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    options = {"model": MODEL, "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    model = langchain.OpenAI(**options)
    expected = alone.texts(PROMPT, max_new_tokens=12)[0]
    assert model.invoke(PROMPT) == expected
    assert "".join(model.stream(PROMPT)) == expected
    assert model.batch([PROMPT] * 3) == [expected] * 3
    chat = langchain.ChatOpenAI(**options)
    assert chat.invoke(PROMPT).content == alone.texts(CHAT_PROMPT, max_new_tokens=12)[0]


def test_litellm(server: Server, alone: Alone) -> None:
    """litellm needs versions of other packages than requirements.lock has, so it lies in an environment of its own."""
    python = os.environ.get("LITELLM_PYTHON")
    if python is None:
        pytest.skip("LITELLM_PYTHON does not name the Python of an environment with litellm")
    script = f"""
import json, litellm
where = {{"api_base": "{server.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}}
text = litellm.text_completion(model="text-completion-openai/{MODEL}", prompt="{PROMPT}", **where)
messages = [{{"role": "user", "content": "{PROMPT}"}}]
chat = litellm.completion(model="openai/{MODEL}", messages=messages, **where)
stream = litellm.completion(model="openai/{MODEL}", messages=messages, stream=True, **where)
pieces = [event.choices[0].delta.content or "" for event in stream]
print(json.dumps([text.choices[0].text, chat.choices[0].message.content, "".join(pieces)]))
"""
    environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": os.environ["PATH"]}
    output = subprocess.run(
        [python, "-c", script], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    chat = alone.texts(CHAT_PROMPT, max_new_tokens=12)[0]
    assert json.loads(output.splitlines()[-1]) == [alone.texts(PROMPT, max_new_tokens=12)[0], chat, chat]


def test_schemathesis_finds_no_server_error(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    checks = "not_a_server_error,content_type_conformance,response_schema_conformance,unsupported_method"
    # Sequences are short, since it asks for as many choices and tokens as the description allows.
    flags = ["--model_name_or_path", MODEL, "--max_model_len", "40", "--allow_adapter_loading", "True"]
    with running([*flags, "--runs", str(tmp_path)]) as server:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
        command += ["--checks", checks, "--phases", "examples,coverage,fuzzing", "--max-examples", "10"]
        command += ["--max-time", "40", "--workers", "1", "--no-shrink", "--no-color", "--seed"]
        # Requests at the same time come from processes: with several workers, it parses Python in several threads,
        # which fails at random in CPython 3.11 ("AST constructor recursion depth mismatch", its issue 106905).
        with ThreadPoolExecutor(NUM_PROCESSES) as pool:
            results = pool.map(partial(_run, tmp_path), ([*command, str(seed)] for seed in range(NUM_PROCESSES)))
            for returncode, output in results:
                assert returncode == 0, output[-6000:]
        assert "Traceback" not in server.err
        assert server.stop() == 0


def _run(directory: Path, command: list[str]) -> tuple[int, str]:
    """Status and output of a program."""
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout
