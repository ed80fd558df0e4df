"""The server on a real port: clients that leave, time limits, closing, and a real engine behind it."""

import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

import bloomlm
from bloomlm.cli.main import main
from bloomlm.cli.serve import ServeConfig, _show_banner
from bloomlm.errors import ConfigError
from bloomlm.serving.engine import Engine
from bloomlm.serving.http import gate
from bloomlm.serving.http import server as http_server
from bloomlm.serving.http.app import create_app
from bloomlm.serving.http.server import HttpServer
from bloomlm.serving.http.service import ServerOptions, Service
from bloomlm.serving.options import EngineOptions
from tests.fake_engine import FakeEngine

WAIT_SECONDS = 20.0


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def slow() -> FakeEngine:
    engine = FakeEngine()
    engine.delay_seconds = 0.05
    engine.continuation = lambda request, index: [5] * request.config.max_new_tokens
    return engine


def serve(engine: Any, stop_seconds: float | None = None, **options: Any) -> HttpServer:
    service = Service(ServerOptions(model_name="bloom", **options))
    service.open(engine)
    server = HttpServer(create_app(service), host="127.0.0.1", port=0, stop_seconds=stop_seconds)
    server.start()
    return server


def start_request(server: HttpServer, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    connection.sendall(head.encode() + b"\r\n\r\n" + content)
    return connection


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_place(slow: FakeEngine, stream: bool) -> None:
    server = serve(slow)
    connection = start_request(server, {"prompt": ["a", "b"], "max_tokens": 1000, "stream": stream})
    wait_for(lambda: len(slow.handles) == 2 and all(handle._num_read > 1 for handle in slow.handles))
    connection.close()
    wait_for(lambda: all(handle.cancelled_after is not None for handle in slow.handles))
    assert max(handle.cancelled_after or 0 for handle in slow.handles) < 1000
    server.stop()


def test_a_request_that_takes_too_long(slow: FakeEngine) -> None:
    server = serve(slow, request_timeout_seconds=0.5)
    body = {"prompt": "a", "max_tokens": 1000}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    assert "--request_timeout" in response.json()["error"]["message"]
    stream = httpx.post(f"{server.url}/v1/completions", json={**body, "stream": True})
    assert stream.status_code == 200
    last = stream.text.strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert [handle.cancelled_after is not None for handle in slow.handles] == [True, True]
    server.stop()


def test_a_body_that_does_not_come_is_not_waited_for(slow: FakeEngine) -> None:
    server = serve(slow, request_timeout_seconds=0.3)
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    connection.sendall(head)
    connection.settimeout(WAIT_SECONDS)
    assert connection.recv(1000).startswith(b"HTTP/1.1 504")
    connection.close()
    server.stop()


@pytest.mark.parametrize("begun", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"], ids=["nothing", "a head"])
def test_a_connection_without_a_request_is_closed(
    slow: FakeEngine, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "KEEP_ALIVE_SECONDS", 0.3)
    server = serve(slow)
    with start_request(server, {"prompt": "a", "max_tokens": 20, "stream": True}) as asked, socket.socket() as silent:
        silent.connect(asked.getpeername())
        silent.sendall(begun)
        silent.settimeout(WAIT_SECONDS)
        assert silent.recv(1) == b""
        answer = b""  # of 20 tokens, which come for longer
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            received = asked.recv(4096)
            assert received, answer
            answer += received
        assert answer.count(b"data: {") == 20
        asked.sendall(begun)  # the next head is waited for as long
        assert asked.recv(1) == b""
    server.stop()


def test_a_large_body_gets_its_answer_while_it_is_sent(slow: FakeEngine) -> None:
    server = serve(slow, max_body_bytes=1000)
    response = httpx.post(f"{server.url}/tokenize", json={"prompt": "a" * 5_000_000})
    assert response.status_code == 413
    server.stop()


def test_closing_finishes_what_is_there(slow: FakeEngine) -> None:
    server = serve(slow)
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 20}))

    client = threading.Thread(target=ask)
    client.start()
    wait_for(lambda: bool(slow.handles))
    server.stop()
    client.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 20
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_ports_and_hosts_that_cannot_be_had(slow: FakeEngine) -> None:
    server = serve(slow)
    app, port = create_app(Service(ServerOptions(model_name="bloom"))), int(server.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="choose another --port"):
        HttpServer(app, host="127.0.0.1", port=port)
    with pytest.raises(ConfigError, match=r"cannot listen on --host 192\.0\.2\.1"):
        HttpServer(app, host="192.0.2.1", port=0)
    server.stop()


def test_adapters_that_wait_for_requests_take_no_threads_from_texts(slow: FakeEngine) -> None:
    goes_on = threading.Event()
    slow.unload_adapter = lambda name: bool(goes_on.wait(WAIT_SECONDS))  # type: ignore[method-assign]
    server = serve(slow, allow_adapter_loading=True)
    with ThreadPoolExecutor(40) as pool:
        url = f"{server.url}/v1/unload_lora_adapter"
        changes = [pool.submit(httpx.post, url, json={"lora_name": "dates"}, timeout=60) for _ in range(40)]
        wait_for(lambda: len(server._server.server_state.tasks) == 40)
        assert httpx.post(f"{server.url}/tokenize", json={"prompt": "a"}, timeout=WAIT_SECONDS / 2).status_code == 200
        goes_on.set()
        assert {change.result().status_code for change in changes} == {200}
    server.stop()


@pytest.fixture(scope="module")
def real() -> Iterator[tuple[HttpServer, Engine]]:
    engine = Engine(bloomlm.load("builtin:tiny", dtype="float32"), EngineOptions(max_num_seqs=8, max_step_tokens=64))
    engine.start()
    server = serve(engine)
    yield server, engine
    server.stop()
    engine.close(drain=True)


def test_completions_equal_predict(real: tuple[HttpServer, Engine]) -> None:
    server, _ = real
    texts = ["The history of bread", "Le pain", "\u0645\u0631\u062d\u0628\u0627"]
    body = {"prompt": texts, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    model = bloomlm.load("builtin:tiny", dtype="float32")
    expected = model.generate(texts, max_new_tokens=24)
    assert [choice["text"] for choice in answer["choices"]] == [completion.completion for completion in expected]
    samples = httpx.post(f"{server.url}/v1/completions", json={**body, "temperature": 0.8, "seed": 5, "n": 2}).json()
    options = {"decode_strategy": "sampling", "temperature": 0.8, "seed": 5, "num_return_sequences": 2}
    drawn = model.generate(texts, max_new_tokens=24, **options)
    assert [choice["text"] for choice in samples["choices"]] == [completion.completion for completion in drawn]


def test_a_client_that_leaves_frees_the_rows_of_a_real_engine(real: tuple[HttpServer, Engine]) -> None:
    server, engine = real
    connection = start_request(server, {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 8})
    wait_for(lambda: engine.stats().num_running == 1)
    connection.close()
    wait_for(lambda: engine.stats().num_running == 0)


@pytest.mark.parametrize(("host", "key"), [("127.0.0.1", None), ("0.0.0.0", None), ("0.0.0.0", "secret")])
def test_the_banner_says_who_can_use_the_server_and_reads_no_file_again(
    host: str, key: str | None, tmp_path: Path
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    config = ServeConfig(served_model_name="bloom", host=host, api_key=key, chat_template=str(template))
    service = Service(config.server_options())
    service.open(FakeEngine())
    template.unlink()
    console = Console(file=io.StringIO(), width=200)
    _show_banner(console, service, config.host, "http://here:8000", "a model")
    text = console.file.getvalue()
    assert "serving   bloom (a model)\n" in text and "adapters  dates\n" in text
    assert f"key       {'none' if key is None else 'needed'}\n" in text
    assert ("everyone who reaches 0.0.0.0 can use this server" in text) is (host == "0.0.0.0" and key is None)


def test_command_serves_and_drains() -> None:
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", "builtin:tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        url = first.split()[2].rstrip(",")
        assert first.startswith("listening on http://127.0.0.1:")
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        body = {"model": "builtin:tiny", "prompt": "a", "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120))
        )
        asking.start()
        wait_for(lambda: 'vllm:num_requests_running{model_name="builtin:tiny"} 1.0' in httpx.get(f"{url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        asking.join()
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert answers[0].json()["usage"]["completion_tokens"] == 1500
    (line,) = [json.loads(text) for text in out.splitlines() if "completions" in text]
    assert (line["status"], line["completion_tokens"]) == (200, 1500)
    assert f"{url}/v1" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "missing --model_name_or_path"),
        (["--model_name_or_path", "builtin:tiny", "--model_dir", "x"], "give one: an exported program or a model"),
        (["--model_name_or_path", "builtin:tiny", "--lora", "x"], "expected name=path"),
        (["--model_name_or_path", "builtin:tiny", "--model_prefix", "x"], "give its --model_dir too"),
        (["--model_name_or_path", "builtin:tiny", "--runs", "/nowhere"], "--runs /nowhere: no such directory"),
        (["--model_name_or_path", "builtin:tiny", "--chat_template", "/nowhere"], "--chat_template /nowhere"),
        (["--model_dir", "x", "--lora", "a=b"], "--lora with --model_dir"),
    ],
)
def test_flags_that_cannot_be_used(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_bad_chat_template_is_found_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if messages %}")
    with pytest.raises(SystemExit):
        main(["serve", "--model_name_or_path", "/nowhere", "--port", "0", "--chat_template", str(template)])
    assert "the chat template is no Jinja template" in capsys.readouterr().err


def test_a_signal_ends_a_server_that_is_loading() -> None:
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", "builtin:tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None and process.stderr.readline().startswith("listening")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_SECONDS) == 0


def test_a_second_signal_ends_at_once() -> None:
    command = [sys.executable, "-m", "bloomlm", "serve", "--model_name_or_path", "builtin:tiny", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        url = process.stderr.readline().split()[2].rstrip(",")
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "n": 64, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            next(response.iter_bytes())
            process.send_signal(signal.SIGTERM)
            while not process.stderr.readline().startswith("closing"):
                pass
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=WAIT_SECONDS) == 128 + signal.SIGTERM


@pytest.mark.parametrize("timeout", [3.0, 30.0], ids=["timeout", "closing"])
def test_a_client_that_does_not_read_is_given_up(
    slow: FakeEngine, timeout: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", gate.REQUESTS_LOG)
    monkeypatch.setattr(gate, "_GIVE_UP_SECONDS", 0.1)
    slow.delay_seconds = 0.0
    server = serve(slow, stop_seconds=min(timeout, 4.0), request_timeout_seconds=timeout)
    body = {"prompt": "a", "max_tokens": 2000, "stream": True, "logprobs": 20, "n": 8, "return_token_ids": True}
    connection = start_request(server, body, receive_bytes=4096)
    wait_for(lambda: bool(slow.handles))
    if timeout == 3:
        wait_for(lambda: bool(caplog.records))
        wait_for(lambda: not server._server.server_state.connections)  # although the client keeps its end
    server.stop()
    assert "/v1/completions" in caplog.text and slow.handles[0].cancelled_after is not None
    connection.close()
