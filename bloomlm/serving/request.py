"""What callers give to the engine and get from it: token ids, not texts."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.log_probs import PromptScores
from bloomlm.generation.sequences import FinishReason


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt and how to continue it."""

    prompt: list[int]
    """Token ids, at least one."""
    config: GenerationConfig = field(default_factory=GenerationConfig)
    """How to continue it, num_return_sequences times."""
    adapter: str | None = None
    """Name of a loaded adapter; None: the base model."""
    prompt_log_probs: int | None = None
    """Number of the likeliest alternatives whose log-probabilities are wanted for each prompt token, beside its own;
    None: no log-probabilities of the prompt."""
    score_only: bool = False
    """Whether the prompt is only read, without a new token; max_new_tokens has no effect then."""
    first_sequence: int = 0
    """Number of the first result within the caller's run; with the seed it decides the random numbers."""


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """One new token of one sequence."""

    index: int
    """Number of the sequence among the request's num_return_sequences."""
    token: int
    """Its id."""
    log_prob: float | None
    """Its log-probability, where config.num_log_probs asks for it."""
    top_log_probs: tuple[tuple[int, float], ...] | None
    """(id, log-probability) of the likeliest tokens at its place, where config.num_log_probs asks for them."""
    finish_reason: FinishReason | None
    """Why the sequence ends with this token; None where it goes on."""


Output = PromptScores | TokenOutput


@dataclass(kw_only=True)
class RequestTimes:
    """When things happened to a request, in seconds of time.monotonic, and its numbers of tokens."""

    submitted: float = field(default_factory=time.monotonic)
    """It came."""
    started: float | None = None
    """Its prompt began to be read; None: it waits."""
    first_token: float | None = None
    """Its first token was there."""
    last_token: float | None = None
    """Its last token was there."""
    num_cached_tokens: int = 0
    """Tokens of its prompt that were not read, because their keys and values were saved."""
    num_generated_tokens: int = 0
    """New tokens of all its sequences."""


class RequestHandle:
    """A request in the engine: its outputs as they come.

    Args:
        request: the request.
        cancel: asks the engine to drop it; called at most once.
    """

    def __init__(self, request: GenerationRequest, cancel: Callable[[], None]) -> None:
        self.request = request
        self.times = RequestTimes()
        self._cancel = cancel
        self._outputs: deque[Output] = deque()
        self._is_done = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready = asyncio.Event()

    async def outputs(self) -> AsyncIterator[Output]:
        """The outputs in order: PromptScores, where they were asked for, then the tokens of all sequences.

        A consumer that stops early, or whose task is cancelled, cancels the request.

        Raises:
            ServingError: the engine could not continue the request.
        """
        # From here on the engine's thread wakes this loop; what it has put before is found by looking.
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                self._ready.clear()
                is_done = self._is_done  # read first: nothing is put after it has been set
                while self._outputs:
                    yield self._outputs.popleft()
                if is_done:
                    break
                await self._ready.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Drop the request; its rows are free before the next step. Without effect on a finished one. Thread-safe."""
        if not self._is_done:
            self._is_done = True
            self._cancel()

    @property
    def is_done(self) -> bool:
        """Whether it has finished, failed or been cancelled."""
        return self._is_done

    def put(self, output: Output, now: float) -> int:
        """Add an output, from the engine's thread; `wake` shows it. Returns the number of its new tokens."""
        self._outputs.append(output)
        if not isinstance(output, TokenOutput):
            return 0
        times = self.times
        times.first_token = times.first_token or now
        times.last_token = now
        times.num_generated_tokens += 1
        return 1

    def finish(self, error: BaseException | None = None) -> None:
        """End the outputs, with an error where there is one, from the engine's thread; `wake` shows it."""
        self._error = error
        self._is_done = True

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop of the consumer; None before it has asked for outputs."""
        return self._loop

    def wake(self) -> None:
        """Let the consumer look for outputs; called in its event loop."""
        self._ready.set()
