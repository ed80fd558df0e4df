"""What every request passes: its host, its size, its client's disconnect, its time limit, its errors, its log line.

Plain ASGI, because a stream must pass piece by piece.
"""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bloomlm.errors import BloomlmError, ClosingError, QueueFullError, ServingError
from bloomlm.serving.http.errors import CLIENT_LEFT, ApiError
from bloomlm.serving.http.service import ServerOptions

REQUESTS_LOG = "bloomlm.serving.requests"
"""The logger that gets a line of JSON for each request."""

_LOG = logging.getLogger(__name__)
_REQUESTS = logging.getLogger(REQUESTS_LOG)
_FACTS = "bloomlm.facts"
_QUIET_PATHS = ("/health", "/metrics")  # asked every few seconds by monitors
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
# A client that is still sending sees the answer only when its body is read, within reason.
_MAX_DISCARDED_BYTES = 64_000_000
_GIVE_UP_SECONDS = 10.0


def facts_of(request: Request) -> dict[str, Any]:
    """What the log line of a request will say, to be filled in."""
    facts: dict[str, Any] = request.scope[_FACTS]
    return facts


class EventStream(Response):
    """Server-sent events. An error before the first event is an ordinary answer.

    Args:
        events: the data of the events, in one line each.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""
        async with aclosing(self._events) as events:
            has_started = False
            async for event in events:
                if not has_started:
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    has_started = True
                await send(_event(event, more=True))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Gate:
    """ASGI middleware around all endpoints.

    Args:
        app: the endpoints.
        options: limits.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._options = options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http":
            await _Exchange(scope, receive, send, self._options).run(self._app)
        else:
            await self._app(scope, receive, send)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, options: ServerOptions) -> None:
        self._scope, self._receive, self._send, self._options = scope, receive, send, options
        self._headers = Headers(scope=scope)
        given = self._headers.get("x-request-id", "")
        self._id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self._facts: dict[str, Any] = {}
        self._num_body_bytes = 0
        self._has_body = asyncio.Event()
        self._status: int | None = None
        self._is_stream = self._is_complete = False

    async def run(self, app: ASGIApp) -> None:
        started = time.monotonic()
        try:
            self._check_host()
            await self._run_app(app)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            self._status = CLIENT_LEFT
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            await self._fail(self._as_api_error(error))
        finally:
            self._log(time.monotonic() - started)

    async def _run_app(self, app: ASGIApp) -> None:
        """Run the endpoint until it has answered, its client has left or its time is over."""
        scope = {**self._scope, _FACTS: self._facts}
        work = asyncio.ensure_future(app(scope, self._receive_limited, self._send_noted))
        leaving = asyncio.create_task(self._client_leaves())
        limit = self._options.request_timeout_seconds
        try:
            await asyncio.wait({work, leaving}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if work.done() or self._is_complete:
                await work
            elif leaving.done():
                raise ClientDisconnect
            else:
                raise ApiError(
                    504,
                    f"the request took longer than {limit:g} s, the server's --request_timeout; ask for fewer tokens",
                    code="timeout",
                    headers={"x-should-retry": "false"},
                )
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)

    def _check_host(self) -> None:
        """Refuse names that a page of another site may have pointed at this machine (DNS rebinding)."""
        host = self._headers.get("host", "")
        name = host.removesuffix("]") if host.endswith("]") else host.rpartition(":")[0] or host
        allowed = self._options.allowed_hosts
        if allowed is not None and name.strip("[]").lower() not in allowed:
            raise ApiError(
                403,
                f"the Host header names {host[:100]!r}; this server listens on the loopback interface and answers to "
                f"{', '.join(allowed)}. Add the name with --allowed_hosts",
                code="host_not_allowed",
            )

    async def _receive_limited(self) -> Message:
        message = await self._receive_noted()
        if message["type"] == "http.request":
            most = self._options.max_body_bytes
            if max(self._num_body_bytes, int(self._headers.get("content-length", 0))) > most:
                raise ApiError(
                    413,
                    f"the body is larger than {most} bytes; send fewer prompts in a request, or start the server with "
                    "a larger --max_body_mb",
                    code="body_too_large",
                )
        return message

    async def _receive_noted(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_body_bytes += len(message.get("body", b""))
            if not message.get("more_body", False):
                self._has_body.set()
        return message

    async def _client_leaves(self) -> None:
        await self._has_body.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _send_noted(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            self._is_stream = headers.get("content-type", "").startswith("text/event-stream")
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_complete = True

    def _as_api_error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, QueueFullError):
            return ApiError(429, str(error), code="queue_full", headers={"retry-after": str(error.retry_after_s)})
        if isinstance(error, ClosingError):
            return ApiError(503, str(error), code="closing")
        if isinstance(error, BloomlmError) and not isinstance(error, ServingError):
            return ApiError(400, str(error), code="invalid_value")
        _LOG.error("request %s failed", self._id, exc_info=error)
        if isinstance(error, ServingError):
            return ApiError(500, str(error), code="engine_error")
        return ApiError(500, f"internal error; the server's log has it under {self._id}", code="internal_error")

    async def _fail(self, error: ApiError) -> None:
        """Answer with an error; a stream that has begun ends with it."""
        if self._status is None:
            if error.status == 413:
                await self._discard_body()
            await error.response()(self._scope, self._receive, self._send_noted)
        elif self._is_stream and not self._is_complete:
            self._facts["error"] = error.message
            with suppress(TimeoutError):  # a client that does not read has kept the stream from going on
                async with asyncio.timeout(_GIVE_UP_SECONDS):
                    await self._send(_event(json.dumps(error.body(), ensure_ascii=False), more=False))

    async def _discard_body(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                while not self._has_body.is_set() and self._num_body_bytes < _MAX_DISCARDED_BYTES:
                    if (await self._receive_noted())["type"] == "http.disconnect":
                        return

    def _log(self, seconds: float) -> None:
        path, status = self._scope["path"], self._status
        if path in _QUIET_PATHS and status in (200, 503):
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self._id,
            "method": self._scope["method"],
            "path": path,
            "status": status,
            "ms": round(1000 * seconds, 1),
            **self._facts,
        }
        _REQUESTS.info(json.dumps(line, ensure_ascii=False))


def _event(data: str, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more}
