"""The thread that listens and answers."""

import asyncio
import errno
import socket
import sys
import threading
from math import ceil

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from bloomlm.errors import ConfigError

KEEP_ALIVE_SECONDS = 75
"""How long a connection stays open without the head of a request: longer than proxies and clients keep idle ones, so
that they close first."""
_BACKLOG = 2048


class HttpServer:
    """An application behind a port, which is open from the construction on.

    Args:
        app: what answers.
        host: name or address of the interface to listen on.
        port: the port; 0 takes a free one.
        stop_seconds: longest time that `stop` waits for answers; then their connections are dropped. On Linux it is
            also the longest time that a client may read nothing of what was sent to it.

    Raises:
        ConfigError: the port is taken, or the host is not an address of this machine.
    """

    def __init__(self, app: ASGIApp, *, host: str, port: int, stop_seconds: float | None = None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except (OSError, OverflowError) as error:
            hint = "; another program listens there, choose another --port" if _is_taken(error) else ""
            raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}{hint}") from error
        if sys.platform == "linux" and stop_seconds is not None:
            # Connections inherit it. Without it, one whose client never reads would stay open behind its closed
            # request, because uvicorn waits until all is sent (TCP_USER_TIMEOUT in tcp(7)).
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, ceil(1000 * stop_seconds))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}"
        """The address at which clients find it."""
        config = uvicorn.Config(
            app,
            http=_Connection,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=None if stop_seconds is None else ceil(stop_seconds),
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more connections, and wait until every request has its answer, for at most stop_seconds."""
        self._server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


class _Connection(H11Protocol):
    """A connection that is closed when the head of a request does not come in time.

    uvicorn waits without a limit for the first request, and for the rest of a head that has begun. Bodies have the
    time of their request.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        last_request, timer = self.cycle, self.timeout_keep_alive_task
        self.timeout_keep_alive_task = None  # uvicorn cancels it at the first byte
        super().data_received(data)
        if timer is not None and self.cycle is last_request and not self.transport.is_closing():
            self.timeout_keep_alive_task = timer
        elif timer is not None:
            timer.cancel()


def _is_taken(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EADDRINUSE
