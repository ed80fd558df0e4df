"""A small server with the wire format that the page reads, whose model says what a test tells it to.

Tokens are given as (bytes, probability, alternatives); a token's id stands for its bytes.
"""

import asyncio
import codecs
import json
import math
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

PAGE = Path(__file__).parents[2] / "bloomlm" / "serving" / "page"


@dataclass(frozen=True)
class Step:
    """A generated token with its probability and the other likely ones."""

    token: bytes
    probability: float = 0.9
    alternatives: tuple[tuple[bytes, float], ...] = ()


def steps_of(*tokens: str, probability: float = 0.9) -> list[Step]:
    """Steps without alternatives."""
    return [Step(token.encode(), probability) for token in tokens]


ENGLISH = [
    Step(b" the", 0.9, ((b" a", 0.06),)),
    Step(b" old", 0.3, ((b" young", 0.4), (b" tired", 0.1))),
    Step(b" king", 0.02, ((b" man", 0.6),)),
    Step(b".", 0.6),
]
"""A continuation with a token of each class of probability but one."""


@dataclass
class FakeServer:
    """What the server answers, and what it was asked."""

    models: Sequence[str] = ("bloom",)
    script: Callable[[str, bytes], list[Step]] = lambda model, prompt: steps_of(" and", " so", " on", ".")
    """From the model's name and the prompt's bytes to the continuation."""
    finish_reason: str = "length"
    cut_characters: int = 0
    """How much of the last token's text belongs to a stop text, which is in the tokens but not in the text."""
    seconds_per_token: float = 0.0
    refusals: list[Response] = field(default_factory=list)
    """Answers to the next completions, before one is served."""
    loading_answers: int = 0
    """How often /v1/models still says that the model is loading."""
    api_key: str | None = None
    breaks_after: int | None = None
    """Number of tokens after which the stream reports an error."""
    runs: Path | None = None
    url: str = ""
    completions: list[dict[str, Any]] = field(default_factory=list)
    """Bodies of the requests."""
    disconnects: int = 0
    vocabulary: list[bytes] = field(default_factory=list)

    def id_of(self, token: bytes) -> int:
        """The id of a token, which is new if the token is."""
        if token not in self.vocabulary:
            self.vocabulary.append(token)
        return self.vocabulary.index(token)

    def bytes_of(self, prompt: str | list[int]) -> bytes:
        """The bytes of a prompt."""
        return prompt.encode() if isinstance(prompt, str) else b"".join(self.vocabulary[token] for token in prompt)

    def ids_of(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt: words."""
        if not isinstance(prompt, str):
            return prompt
        return [self.id_of(word.encode()) for word in re.findall(r"\s?\S+|\s", prompt)]

    def entry(self, token: bytes, probability: float) -> dict[str, Any]:
        """A token as the API describes it."""
        text = token.decode(errors="replace")
        return {"id": self.id_of(token), "token": text, "bytes": list(token), "logprob": math.log(probability)}

    async def _models(self, request: Request) -> Response:
        if self.loading_answers:
            self.loading_answers -= 1
            return refusal(503, "the model is still loading")
        if denied := self._denied(request):
            return denied
        data = [{"id": name, "parent": self.models[0] if place else None} for place, name in enumerate(self.models)]
        return JSONResponse({"data": data})

    async def _tokenize(self, request: Request) -> Response:
        body = await request.json()
        ids = self.ids_of(body["prompt"])
        return JSONResponse({"count": len(ids), "max_model_len": 2048, "tokens": ids})

    async def _completions(self, request: Request) -> Response:
        if denied := self._denied(request):
            return denied
        body = await request.json()
        self.completions.append(body)
        if self.refusals:
            return self.refusals.pop(0)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    def _denied(self, request: Request) -> Response | None:
        if self.api_key is None or request.headers.get("authorization") == f"Bearer {self.api_key}":
            return None
        return refusal(401, "no key is given")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        steps = self.script(body["model"], self.bytes_of(body["prompt"]))[: body["max_tokens"]]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for number, step in enumerate(steps):
            if number == self.breaks_after:
                yield event({"error": {"message": "the server ran out of memory"}})
                return
            try:
                await asyncio.sleep(self.seconds_per_token)
            except asyncio.CancelledError:
                self.disconnects += 1
                raise
            top = [(step.token, step.probability), *step.alternatives]
            content = self.entry(step.token, step.probability) | {"top_logprobs": [self.entry(*other) for other in top]}
            choice: dict[str, Any] = {
                "index": 0,
                "text": decoder.decode(step.token),
                "logprobs": {"content": [content]},
            }
            choice |= {"token_ids": [content["id"]], "finish_reason": None}
            if number == 0:
                choice["prompt_token_ids"] = self.ids_of(body["prompt"])
            if number == len(steps) - 1:
                choice["finish_reason"] = self.finish_reason
                choice["text"] = choice["text"][: len(choice["text"]) - self.cut_characters]
            yield event({"choices": [choice]})
        yield "data: [DONE]\n\n"

    async def _runs(self, request: Request) -> Response:
        if self.runs is None:
            return refusal(404, "this server shows no training runs; start it with --runs DIR")
        files = sorted(self.runs.rglob("metrics.jsonl"))
        rows = [
            {
                "name": str(path.parent.relative_to(self.runs)),
                "size": path.stat().st_size,
                "modified": path.stat().st_mtime,
            }
            for path in files
        ]
        return JSONResponse({"runs": rows})

    async def _metrics(self, request: Request) -> Response:
        assert self.runs is not None
        data = (self.runs / request.path_params["name"] / "metrics.jsonl").read_bytes()
        offset = int(request.query_params["offset"])
        end = data.rfind(b"\n") + 1
        return PlainTextResponse(data[offset:end], headers={"X-Next-Offset": str(max(offset, end))})

    def app(self) -> Starlette:
        """The server's routes, with the page's files last."""
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/runs", self._runs),
                Route("/runs/{name:path}/metrics.jsonl", self._metrics),
                Mount("/", StaticFiles(directory=PAGE, html=True)),
            ]
        )


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def refusal(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message}}, status_code=status, headers=headers)


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    """Serve on a free port while the context is open."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uvicorn_server = uvicorn.Server(uvicorn.Config(server.app(), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
        thread.start()
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            yield server
        finally:
            uvicorn_server.should_exit = True
            thread.join()
