"""A server under many clients for a while, some of them rude: nothing lost, nothing wrong, nothing leaked.

    python benchmarks/soak.py --minutes 10

64 clients send requests of random kinds one after another: greedy completions, whole or streamed, on the model and on
two LoRAs; streams that are left after a few tokens; slow readers; bodies that are no JSON, wrong, or too large;
connections that end in the middle of a body. Beside them, processes with a running stream are killed. Every answer must
have the status that its kind has; each whole text must be that of the model alone. Afterwards nothing may be running or
waiting in the server, and it may hold no more file descriptors than before, and in a run of 5 minutes or more at most
2 % more memory than at half time. A request that the full queue turns away is sent again. Prints a report; exits with 1
on a violation.
"""

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from common import record
from serve_client import Answer, connect, read_events, status_of
from serve_sides import Server, adapters, serving

WORDS = "the a value of field list \u4e2d\u6587 caf\u00e9 return default is in and to with 1987"
NUM_PROMPTS = 16
NEW_TOKENS = (1, 30)
MAX_BODY_MB = 0.2
NUM_PARTS = 10
REST_SECONDS = 10
"""Most time in which the server notices that the last clients have left."""
MOST_GROWTH = 0.02
"""Growth of memory in the second half that is called flat."""
LONG_MINUTES = 5
"""From here on the prefix cache is full and the allocator has seen all sizes when the second half begins."""
KILLED_CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
body = b'{"prompt": "a", "max_tokens": 1500, "ignore_eos": true, "stream": true}'
connection.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
                   b"Content-Length: %d\\r\\n\\r\\n%s" % (len(body), body))
while connection.recv(100):
    print(flush=True)
"""


class Soak:
    """The clients of one server.

    Args:
        server: the server.
        expected: (model, prompt, number of new tokens) -> text of the model alone.
    """

    def __init__(self, server: Server, expected: dict[tuple[str, str, int], str]) -> None:
        self.server = server
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self._expected = expected
        self._keys = list(expected)
        self._rude = [self.leave, self.read_slowly, self.send_no_json, self.send_wrong_type, self.send_too_much]
        self._rude += [self.break_off]

    async def run(self, num_clients: int, seconds: float) -> None:
        """Let all clients send requests for a while, and every request come to its end."""
        end = time.monotonic() + seconds
        clients = [self._client(random.Random(number), end) for number in range(num_clients)]
        await asyncio.gather(self._kill_clients(end), *clients)

    async def _client(self, draw: random.Random, end: float) -> None:
        while time.monotonic() < end:
            kind = draw.choice([self.complete, self.stream, self.stream, draw.choice(self._rude)])
            try:
                async with asyncio.timeout(120):
                    await kind(draw)
                self.counts[kind.__name__] += 1
            except Exception as error:
                self.violations.append(f"{kind.__name__}: {type(error).__name__} {error}")

    async def complete(self, draw: random.Random) -> None:
        """A completion in one piece."""
        key, body = self._request(draw)
        while True:
            reader, writer = await connect(self.server.url, json.dumps(body).encode())
            status = await status_of(reader)
            _, _, content = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            if status != 429:
                break
            self.counts["sent again"] += 1
            await asyncio.sleep(0.5)
        assert status == 200, f"status {status}: {content[:300]!r}"
        self._compare(key, json.loads(content)["choices"][0]["text"])

    async def stream(self, draw: random.Random, pause_seconds: float = 0.0) -> None:
        """A streamed completion."""
        key, body = self._request(draw)
        reader, writer = await self._open_stream(body)
        answer = Answer(time.perf_counter())
        await read_events(reader, answer, pause_seconds=pause_seconds)
        writer.close()
        self._compare(key, answer.text)

    async def read_slowly(self, draw: random.Random) -> None:
        """A streamed completion whose reader needs time for each event."""
        await self.stream(draw, pause_seconds=0.05)

    async def leave(self, draw: random.Random) -> None:
        """A long stream that is left after a few tokens."""
        body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True}
        reader, writer = await self._open_stream(body)
        await read_events(reader, Answer(time.perf_counter()), most=draw.randint(1, 8))
        writer.close()

    async def send_no_json(self, draw: random.Random) -> None:
        """A body that is cut off, or no text at all."""
        await self._expect(draw.choice([b'{"prompt": "a", ', bytes(range(256)), b"", b"[" * 100_000]), 400)

    async def send_wrong_type(self, draw: random.Random) -> None:
        """A body that is JSON with wrong fields."""
        wrong = [{"prompt": 7}, {"prompt": "a", "max_tokens": "many"}, {"prompt": [10**9]}, {"prompt": "a", "x": 1}]
        await self._expect(json.dumps(draw.choice(wrong)).encode(), 400)

    async def send_too_much(self, draw: random.Random) -> None:
        """A body above the limit, or a prompt above the model's length."""
        big, status = draw.choice([(300_000, 413), (50_000, 400)])
        await self._expect(json.dumps({"prompt": "a b " * (big // 4)}).encode(), status)

    async def break_off(self, draw: random.Random) -> None:
        """A connection that ends in the middle of a body."""
        where = re.sub("^http://", "", self.server.url).split(":")
        _, writer = await asyncio.open_connection(where[0], int(where[1]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        writer.close()

    async def _kill_clients(self, end: float) -> None:
        """Kill processes in the middle of their streams, one after another."""
        host, _, port = re.sub("^http://", "", self.server.url).partition(":")
        while time.monotonic() < end:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-S", "-c", KILLED_CLIENT, host, port, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            await process.stdout.readline()
            process.kill()
            await process.wait()
            self.counts["killed process"] += 1
            await asyncio.sleep(1)

    async def _open_stream(self, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while True:
            reader, writer = await connect(self.server.url, json.dumps({**body, "stream": True}).encode())
            status = await status_of(reader)
            if status == 200:
                return reader, writer
            content = await reader.read()
            writer.close()
            assert status == 429, f"status {status}: {content[-300:]!r}"
            self.counts["sent again"] += 1
            await asyncio.sleep(0.5)

    async def _expect(self, content: bytes, status: int) -> None:
        reader, writer = await connect(self.server.url, content)
        found = await status_of(reader)
        await reader.read()
        writer.close()
        assert found == status, f"expected the status {status}, found {found}, after {content[:60]!r}"

    def _request(self, draw: random.Random) -> tuple[tuple[str, str, int], dict[str, Any]]:
        key = draw.choice(self._keys)
        return key, {"model": key[0], "prompt": key[1], "max_tokens": key[2], "temperature": 0}

    def _compare(self, key: tuple[str, str, int], text: str) -> None:
        assert text == self._expected[key], f"{key}: expected {self._expected[key]!r}, found {text!r}"


def expected_texts(args: argparse.Namespace, paths: dict[str, Path]) -> dict[tuple[str, str, int], str]:
    """What the model and its adapters give where nothing else is computed."""
    from bloomlm.api import load

    draw = random.Random(0)
    words = WORDS.split()
    prompts = [" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(NUM_PROMPTS)]
    found = {}
    for name, path in {"builtin:tiny": None, **paths}.items():
        model = load("builtin:tiny", dtype="float32", adapter_path=path)
        for count in NEW_TOKENS:
            for prompt, result in zip(prompts, model.generate(prompts, max_new_tokens=count), strict=True):
                found[name, prompt, count] = result.completion
    return found


def memory_bytes(server: Server) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * sum(int(found) for found in re.findall(r"Rss(?:Anon|Shmem):\s+(\d+) kB", text))


def num_descriptors(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def busy(server: Server) -> float:
    """Requests that run or wait."""
    command = ["curl", "-sS", f"{server.url}/metrics"]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return sum(float(found) for found in re.findall(r"^vllm:num_requests_\w+\{.*\} (\S+)$", text, re.MULTILINE))


def soak(args: argparse.Namespace) -> list[str]:
    """Run all of it, print the report, and return the violations."""
    args.size, args.layers = "tiny", 0
    paths = adapters(args, 2)
    expected = expected_texts(args, paths)
    flags = [word for name, path in paths.items() for word in ("--lora", f"{name}={path}")]
    flags += ["--served_model_name", "builtin:tiny", "--max_body_mb", str(MAX_BODY_MB), "--max_num_seqs", "32"]
    flags += ["--kv_cache_gb", "0.08"]
    seconds = 60 * args.minutes
    with serving(args, "eager", *flags) as server:
        run = Soak(server, expected)
        before = num_descriptors(server)
        memory = []
        for _ in range(NUM_PARTS):
            asyncio.run(run.run(args.clients, seconds / NUM_PARTS))
            memory.append(memory_bytes(server))
        end = time.monotonic() + REST_SECONDS
        while (left := busy(server)) + ((after := num_descriptors(server)) > before) and time.monotonic() < end:
            time.sleep(0.2)
    violations = run.violations
    half = memory[NUM_PARTS // 2 - 1]
    if args.minutes >= LONG_MINUTES and memory[-1] > (1 + MOST_GROWTH) * half:
        violations.append(f"memory grew from {half / 1e6:.0f} to {memory[-1] / 1e6:.0f} MB in the second half")
    if after > before:
        violations.append(f"file descriptors grew from {before} to {after}")
    if left:
        violations.append(f"{left:.0f} requests run or wait, and nobody asked for them")
    print(f"{args.clients} clients, {args.minutes:g} minutes: {sum(run.counts.values())} requests")
    for kind, count in sorted(run.counts.items()):
        print(f"  {kind.replace('_', ' '):16} {count}")
    print(f"memory after each tenth: {', '.join(f'{each / 1e6:.0f}' for each in memory)} MB")
    print(f"file descriptors {before} before, {after} afterwards")
    numbers = {"requests": sum(run.counts.values()), "half_mb": half / 1e6, "end_mb": memory[-1] / 1e6}
    record({f"{args.clients} clients": [{**numbers, "violations": len(violations)}]})
    return violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    violations = soak(parser.parse_args())
    for violation in violations[:20]:
        print(f"VIOLATION: {violation}")
    print(f"{len(violations)} violations")
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
