"""A client that costs little beside the servers that it measures: HTTP/1.1 and server-sent events on bare sockets."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np


@dataclass
class Answer:
    """One streamed answer. Times are in seconds of time.perf_counter."""

    sent: float
    """The request was on its way."""
    events: list[float] = field(default_factory=list)
    """Each event with text came."""
    ended: float = 0.0
    """The connection was closed."""
    num_tokens: int = 0
    """New tokens, as the server counts them; events, where it does not."""
    text: str = ""
    """The joined text."""

    @property
    def first(self) -> float:
        """Seconds to the first event."""
        return self.events[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events."""
        return [after - before for before, after in zip(self.events, self.events[1:], strict=False)]


async def connect(
    url: str, content: bytes, path: str = "/v1/completions"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a POST request with that body on a connection of its own."""
    where = urlsplit(url)
    head = f"POST {path} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 24)
    writer.write(head.encode() + content)
    return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of an answer."""
    return int((await reader.readline()).split()[1])


async def stream(url: str, body: dict[str, Any], delay_seconds: float = 0.0) -> Answer:
    """Send a request after a while and read its stream to the end.

    Raises:
        RuntimeError: another status than 200, or an error in the stream.
    """
    await asyncio.sleep(delay_seconds)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    answer = Answer(time.perf_counter())
    reader, writer = await connect(url, content)
    try:
        status = await status_of(reader)
        if status != 200:
            raise RuntimeError(f"status {status}: {(await reader.read()).decode()[-2000:]}")
        await read_events(reader, answer)
    finally:
        writer.close()
    answer.ended = time.perf_counter()
    answer.num_tokens = answer.num_tokens or len(answer.events)
    return answer


async def read_events(
    reader: asyncio.StreamReader, answer: Answer, most: float = float("inf"), pause_seconds: float = 0.0
) -> None:
    """Read the events of a stream to its end, or until there are so many with text; pause after each."""
    while line := await reader.readline():
        # Lines with the size of a chunk are between the events, each of which is one line.
        if line.startswith(b"data: {"):
            _take(answer, json.loads(line[6:]), time.perf_counter())
            if len(answer.events) >= most:
                return
            if pause_seconds:
                await asyncio.sleep(pause_seconds)


def _take(answer: Answer, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        raise RuntimeError(f"an error in the stream: {event['error']}")
    if event.get("usage"):
        answer.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        text = choice.get("text") or choice.get("delta", {}).get("content")
        if text:
            answer.text += text
            answer.events.append(now)


def stream_all(url: str, bodies: Sequence[dict[str, Any]], delays_seconds: Sequence[float] = ()) -> list[Answer]:
    """Send requests at once, or each after its delay."""

    async def main() -> list[Answer]:
        delays = delays_seconds or [0.0] * len(bodies)
        asked = [stream(url, body, delay) for body, delay in zip(bodies, delays, strict=True)]
        return list(await asyncio.gather(*asked))

    return asyncio.run(main())


def rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Output tokens per second of requests that were sent at once, and milliseconds of the waits of their readers."""
    seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    first = [answer.first for answer in answers]
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "tokens_per_second": sum(answer.num_tokens for answer in answers) / seconds,
        **{f"first_p{percent}_ms": 1000 * float(np.percentile(first, percent)) for percent in (50, 99)},
        **{f"between_p{percent}_ms": 1000 * float(np.percentile(gaps, percent)) for percent in (50, 99)},
    }
