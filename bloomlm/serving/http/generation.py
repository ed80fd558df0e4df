"""Runs the engine's requests of one HTTP request, and makes one answer, or a stream of events, of their tokens."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bloomlm.generation.log_probs import PromptScores
from bloomlm.serving.http.choices import Choice, Piece
from bloomlm.serving.http.gate import EventStream, facts_of
from bloomlm.serving.http.requests import Plan
from bloomlm.serving.http.service import Service
from bloomlm.serving.request import Output, RequestHandle, TokenOutput
from bloomlm.version import __version__


async def answer(plan: Plan, service: Service, request: Request) -> Response:
    """Run a plan and answer with its result.

    Raises:
        ServingError, GenerationError: the engine does not take or cannot finish the requests.
    """
    run = Run(plan, service, facts_of(request))
    if plan.is_stream:
        return EventStream(run.events())
    return JSONResponse(await run.whole())


class Run:
    """The requests of a plan in the engine.

    Args:
        plan: what to run.
        service: has the engine.
        facts: gets what the log line says about the run.

    Raises:
        ServingError, GenerationError: the engine does not take a request; those that it has taken are cancelled.
    """

    def __init__(self, plan: Plan, service: Service, facts: dict[str, Any]) -> None:
        self._plan = plan
        self._service = service
        self._facts = facts
        self._id = f"{plan.format.id_prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._num_generated = 0
        self._finish_reasons: list[str] = []
        self._handles: list[RequestHandle] = []
        try:
            for request in plan.requests:
                self._handles.append(service.submit(request))
        except BaseException:
            self._close()
            raise

    async def whole(self) -> dict[str, Any]:
        """The whole answer."""
        pieces: dict[int, list[Piece]] = {}
        async with aclosing(self._pieces()) as coming:
            async for piece in coming:
                pieces.setdefault(piece.index, []).append(piece)
        ordered = [pieces[index] for index in sorted(pieces)]
        per_prompt = len(ordered) // len(self._handles)
        groups = [ordered[start : start + per_prompt] for start in range(0, len(ordered), per_prompt)]
        chosen = [choice for group in groups for choice in _likeliest(group, self._plan.num_choices)]
        choices = [{**self._plan.format.answer(choice), "index": index} for index, choice in enumerate(chosen)]
        return {**self._head(self._plan.format.answer_object), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        """The events of a stream, as JSON; OpenAI's mark of the end is the last one."""
        shown, head = self._plan.format, self._head(self._plan.format.chunk_object)
        # Written once, because every token has an event.
        beginning = _to_json(head | ({"usage": None} if self._plan.has_usage else {})).removesuffix("}")
        async with aclosing(self._pieces()) as coming:
            async for piece in coming:
                if shown.has_news(piece):
                    yield f'{beginning},"choices":[{_to_json(shown.chunk(piece))}]}}'
        if self._plan.has_usage:
            yield _to_json({**head, "choices": [], "usage": self._usage()})
        yield "[DONE]"

    async def _pieces(self) -> AsyncGenerator[Piece]:
        """The pieces of all choices, as they come. The requests end with the reading of the pieces."""
        try:
            choices = [self._choices_of(place) for place in range(len(self._handles))]
            for place, request in enumerate(self._plan.requests):
                if request.prompt_log_probs is None:
                    for piece in self._first_pieces(place, choices[place], None):
                        yield piece
            async with aclosing(_merged(self._handles)) as outputs:
                async for place, output in outputs:
                    if isinstance(output, TokenOutput):
                        yield self._next_piece(choices[place][output.index], output)
                    else:
                        for piece in self._first_pieces(place, choices[place], output):
                            yield piece
        finally:
            self._close()

    def _choices_of(self, place: int) -> list[Choice]:
        config = self._plan.requests[place].config
        count, tokenizer = config.num_return_sequences, self._service.engine.tokenizer
        first, stop = place * count, config.stop
        return [Choice(first + index, tokenizer, stop, config.min_new_tokens) for index in range(count)]

    def _first_pieces(self, place: int, choices: Iterable[Choice], scores: PromptScores | None) -> Iterable[Piece]:
        request = self._plan.requests[place]
        for choice in choices:
            piece = choice.start(request.prompt, echo=self._plan.echo, scores=scores)
            if request.score_only:
                piece.finish_reason = "length"
                self._finish_reasons.append("length")
            yield piece

    def _next_piece(self, choice: Choice, output: TokenOutput) -> Piece:
        piece = choice.push(output)
        self._num_generated += 1
        self._service.metrics.count_token(choice)
        if piece.finish_reason is not None:
            self._finish_reasons.append(piece.finish_reason)
        return piece

    def _head(self, kind: str) -> dict[str, Any]:
        """The fields with which an answer or an event begins."""
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._plan.model,
            "system_fingerprint": f"bloomlm-{__version__}",
        }

    def _usage(self) -> dict[str, Any]:
        num_prompt = sum(len(request.prompt) for request in self._plan.requests)
        num_cached = sum(handle.times.num_cached_tokens for handle in self._handles)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_generated,
            "total_tokens": num_prompt + self._num_generated,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }

    def _close(self) -> None:
        """Drop what still runs, and say what was done."""
        for handle in self._handles:
            handle.cancel()
        self._service.metrics.count_run(self._handles, self._finish_reasons)
        usage = self._usage()
        times = self._handles[0].times if self._handles else None
        self._facts |= {
            "model": self._plan.model,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "completion_tokens": usage["completion_tokens"],
            "finish_reasons": self._finish_reasons,
            "queue_ms": times and _milliseconds(times.submitted, times.started),
            "first_token_ms": times and _milliseconds(times.submitted, times.first_token),
        }


async def _merged(handles: Sequence[RequestHandle]) -> AsyncGenerator[tuple[int, Output]]:
    """The outputs of all requests with the number of the request, in the order in which they come."""
    if len(handles) == 1:
        async for output in handles[0].outputs():
            yield 0, output
        return
    queue: asyncio.Queue[tuple[int, Output | None]] = asyncio.Queue()

    async def read(place: int) -> None:
        try:
            async for output in handles[place].outputs():
                queue.put_nowait((place, output))
        finally:
            queue.put_nowait((place, None))

    readers = [asyncio.create_task(read(place)) for place in range(len(handles))]
    num_open = len(readers)
    try:
        while num_open:
            place, found = await queue.get()
            if found is None:
                await readers[place]  # raises the error of a request that failed
                num_open -= 1
            else:
                yield place, found
    finally:
        for reader in readers:
            reader.cancel()


def _likeliest(choices: Sequence[list[Piece]], count: int) -> Sequence[list[Piece]]:
    """The choices with the highest mean log-probability of a generated token, the likeliest first."""
    if len(choices) == count:
        return choices

    def mean(pieces: Sequence[Piece]) -> float:
        found = [entry.log_prob or 0.0 for piece in pieces if piece.prompt_ids is None for entry in piece.entries]
        return sum(found) / len(found)

    return sorted(choices, key=mean, reverse=True)[:count]


def _milliseconds(start: float, end: float | None) -> float | None:
    return None if end is None else round(1000 * (end - start), 1)


def _to_json(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
