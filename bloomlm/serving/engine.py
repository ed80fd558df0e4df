"""The engine: callers submit prompts from any thread, one thread continues all of them, step by step.

    engine = Engine(bloomlm.load("builtin:tiny"), EngineOptions())
    engine.start()
    handle = engine.submit(GenerationRequest(prompt=ids))
    async for output in handle.outputs():
        ...
    engine.close(drain=True)

With tensor parallelism every rank makes an Engine; rank 0 starts its own, and the others follow it.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from bloomlm.api import LoadedModel
from bloomlm.errors import AdapterError, ClosingError, ConfigError, QueueFullError, ServingError, first_line
from bloomlm.generation.language_model import LanguageModel
from bloomlm.openmp import end_workers
from bloomlm.parallel.mesh import ALONE
from bloomlm.runtime.program import Program
from bloomlm.serving.adapters import AdapterInfo, ServedAdapters
from bloomlm.serving.batch import Batch
from bloomlm.serving.commands import Cancel, Command, CommandQueue, Stop, Submit
from bloomlm.serving.job import Ended, News, Started
from bloomlm.serving.limits import Limits, supported_options
from bloomlm.serving.memory import find_budget
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, RequestHandle
from bloomlm.serving.scheduler import BLOCK_TOKENS

_LOG = logging.getLogger(__name__)

_RECENT = 32
"""Number of the last finished requests that tell how fast the queue moves."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """What an engine is doing, and what it has done since its start."""

    num_running: int
    """Requests that are read or continued."""
    num_waiting: int
    """Requests that have not started."""
    kv_usage: float
    """Part of the memory for keys and values that is reserved for running requests, from 0 to 1."""
    prefix_queries: int
    """Prompt tokens of all started requests that may share prefixes."""
    prefix_hits: int
    """How many of them were found in the prefix cache."""
    prompt_tokens: int
    """Prompt tokens of all started requests."""
    generated_tokens: int
    """New tokens of all requests."""
    num_finished: int
    """Requests that ended by themselves."""


class Engine:
    """Continues the requests of many callers together.

    Args:
        generator: a loaded model, divided among ranks or not, or an opened program.
        options: how much it computes at once, and how much it keeps.

    Raises:
        ConfigError: the memory holds not even one sequence, or ranks have copies of the model instead of parts.
    """

    def __init__(self, generator: LoadedModel | Program, options: EngineOptions) -> None:
        model: LanguageModel = generator.model
        mesh = generator.mesh if isinstance(generator, LoadedModel) else ALONE
        if mesh.degrees.dp > 1:
            raise ConfigError(
                f"{mesh.degrees} have copies of the model; serve with all processes as --tensor_parallel_degree, or "
                "start a server for each copy"
            )
        self.tokenizer = generator.tokenizer
        self.options = options = supported_options(options, model)
        self.vocab_size = model.vocab_size
        self._commands = CommandQueue(mesh)
        self._adapters = ServedAdapters(generator, self._commands.put)
        budget = find_budget(generator, options, mesh)
        self.kv_cache_bytes = budget.num_blocks * BLOCK_TOKENS * model.bytes_per_token
        """Memory that keys and values may take on this rank."""
        self._limits = Limits(vocab_size=model.vocab_size, features=model.features, options=options, budget=budget)
        self._batch = Batch(model, self.tokenizer.decode, options, budget)
        self._is_alone = mesh.is_alone
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._lock = threading.Lock()
        """Guards what submit, unload_adapter and close share: the closing, numbers, the count of waiting requests."""
        self._is_closing = False
        self._num_submitted = self._num_waiting = 0
        self._handles: dict[int, RequestHandle] = {}
        self._ended_at: deque[float] = deque(maxlen=_RECENT)
        self._prompt_tokens = self._generated_tokens = self._num_finished = 0

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs: it was started, and has neither been closed nor failed."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread that runs the steps; on rank 0."""
        end_workers()  # of the thread that has loaded the model
        self._thread.start()

    def follow(self) -> None:
        """Take part in the steps of rank 0 until it closes; on every other rank, whose errors joined_ranks reports."""
        self._run_steps()

    def close(self, *, drain: bool) -> None:
        """Take no more requests, and end the thread.

        Args:
            drain: first finish the requests that are there; otherwise they end with ClosingError.
        """
        with self._lock:
            self._is_closing = True
            self._commands.put(Stop(drains=drain))
        if self._thread.ident is None:
            self._end_all(ClosingError("the server closed before it had started"))
        else:
            self._thread.join()

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Add a request. Thread-safe.

        Raises:
            GenerationError: the request can never be served: too long, an id outside of the vocabulary, ...
            AdapterError: there is no adapter of this name.
            QueueFullError: as many requests wait as may.
            ClosingError: the engine closes.
        """
        num_virtual_tokens = self._adapters.num_virtual_tokens(request.adapter)
        self._limits.check(request, num_virtual_tokens)
        with self._lock:
            if self._is_closing:
                raise ClosingError("the server is closing and takes no more requests")
            if self._num_waiting >= self.options.max_queue:
                seconds = self._retry_after()
                raise QueueFullError(
                    f"{self._num_waiting} requests wait already, which is the limit; try again in {seconds} s", seconds
                )
            if self._adapters.num_virtual_tokens(request.adapter) != num_virtual_tokens:
                raise AdapterError(
                    f"the adapter {request.adapter!r} was replaced in this moment; send the request again"
                )
            self._num_waiting += 1
            number = self._num_submitted = self._num_submitted + 1
            handle = RequestHandle(request, lambda: self._commands.put(Cancel(number)))
            self._handles[number] = handle
            self._commands.put(Submit(number, request, num_virtual_tokens))
        return handle

    @property
    def adapters(self) -> list[AdapterInfo]:
        """The adapters that requests can name. Thread-safe."""
        return self._adapters.infos

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load an adapter while the engine runs; see ServedAdapters.load. Thread-safe, and blocks its thread."""
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter once no request uses it; see ServedAdapters.unload. Thread-safe, and blocks its thread."""
        with self._lock:  # a request is submitted before, and keeps its adapter, or finds it gone
            unloaded = self._adapters.unload(name)
        unloaded.result()

    def stats(self) -> EngineStats:
        """What the engine does now. Thread-safe."""
        batch = self._batch
        return EngineStats(
            num_running=batch.num_running,
            num_waiting=self._num_waiting,
            kv_usage=batch.kv_usage,
            prefix_queries=batch.prefix_queries,
            prefix_hits=batch.prefix_hits,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            num_finished=self._num_finished,
        )

    def _run(self) -> None:
        """Run steps until the engine is closed."""
        try:
            self._run_steps()
        except Exception as error:
            _LOG.exception("the engine stopped")
            self._end_all(ServingError(f"the engine stopped: {first_line(error)}"))
        else:
            self._end_all(ClosingError("the server closed before this request was finished"))

    def _run_steps(self) -> None:
        stop: Stop | None = None
        while stop is None or (stop.drains and not self._batch.is_empty):
            self._adapters.unload_unused(self._batch.uses_adapter)
            for command in self._commands.take(waits=self._batch.is_empty and stop is None):
                stop = command if isinstance(command, Stop) else stop
                self._obey(command)
            if self._batch.is_empty or (stop is not None and not stop.drains):
                self._tell(self._batch.take_news())
                continue
            began = time.monotonic()
            try:
                self._batch.step()
            except Exception as error:
                if not self._is_alone:  # the ranks are out of step
                    raise
                _LOG.exception("a step failed; its requests end, and a new session is opened")
                self._batch.restart(error)
            self._tell(self._batch.take_news(), began)

    def _obey(self, command: Command) -> None:
        if isinstance(command, Submit):
            origin = self._adapters.origin(command.request.adapter)
            self._batch.add(command.number, command.request, origin, command.num_virtual_tokens)
        elif isinstance(command, Cancel):
            self._batch.cancel(command.number)
        elif not isinstance(command, Stop):
            self._adapters.obey(command)

    def _tell(self, news: list[News], step_began: float | None = None) -> None:
        """Pass on to the callers what happened, in a step or between steps, and wake each event loop once."""
        now = time.monotonic()
        woken: dict[asyncio.AbstractEventLoop, set[RequestHandle]] = {}
        for number, item in news:
            handle = self._handles.get(number)
            if handle is None:  # on ranks that have no callers
                continue
            if isinstance(item, Started):
                self._count_started()
                handle.times.started = step_began
                handle.times.num_cached_tokens = item.num_cached_tokens
                self._prompt_tokens += len(handle.request.prompt)
            elif isinstance(item, Ended):
                self._end(number, handle, item, now)
            else:
                self._generated_tokens += handle.put(item, now)
            if handle.loop is not None:
                woken.setdefault(handle.loop, set()).add(handle)
        for loop, handles in woken.items():
            try:
                loop.call_soon_threadsafe(_wake, handles)
            except RuntimeError:  # the loop is closed
                for handle in handles:
                    handle.cancel()

    def _end(self, number: int, handle: RequestHandle, item: Ended, now: float) -> None:
        if handle.times.started is None:
            self._count_started()
        elif item.error is None and not handle.is_done:
            self._ended_at.append(now)
            self._num_finished += 1
        del self._handles[number]
        handle.finish(item.error)

    def _end_all(self, error: ServingError) -> None:
        with self._lock:
            self._is_closing = True
        self._tell([(number, Ended(error=error)) for number in self._handles])
        self._adapters.end_all(error)

    def _count_started(self) -> None:
        with self._lock:
            self._num_waiting -= 1

    def _retry_after(self) -> int:
        """Seconds until about half of the waiting requests will have started."""
        if len(self._ended_at) < 2:
            return 1
        each = (time.monotonic() - self._ended_at[0]) / len(self._ended_at)
        return min(60, max(1, ceil(each * self._num_waiting / 2)))


def _wake(handles: set[RequestHandle]) -> None:
    for handle in handles:
        handle.wake()
