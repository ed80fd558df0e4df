"""An engine without a model: its tokens and log-probabilities are a fixed function of the request."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import GenerationError
from bloomlm.generation.config import Sampling
from bloomlm.generation.log_probs import TokenScore
from bloomlm.generation.sequences import stop_test
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, Output, RequestTimes, TokenOutput

TINY = Path(__file__).parents[1] / "bloomlm" / "assets" / "tiny"
WORDS = " the history of bread and of salt"


def log_prob_of(token: int) -> float:
    return -((token * 7919) % 1000) / 100


def top_of(token: int, count: int | None) -> tuple[tuple[int, float], ...]:
    """Alternatives, the likeliest first; the token itself is the second one."""
    own = log_prob_of(token)
    return ((token + 1, own + 0.5), (token, own), (token + 2, own - 1.0))[:count]


@dataclass
class FakeHandle:
    request: GenerationRequest
    results: Sequence[Output]
    error: Exception | None = None
    delay_seconds: float = 0.0
    cancelled_after: int | None = None
    """Outputs that were read before the cancel; None: not cancelled, or finished before."""

    def __post_init__(self) -> None:
        now = time.monotonic()
        self.times = RequestTimes(submitted=now, started=now, first_token=now, last_token=now)
        self._num_read = 0

    async def outputs(self) -> AsyncIterator[Output]:
        for output in self.results:
            await asyncio.sleep(self.delay_seconds)
            self._num_read += 1
            yield output
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        if self._num_read < len(self.results) and self.cancelled_after is None:
            self.cancelled_after = self._num_read


class FakeEngine:
    """Continues every prompt with WORDS, or with the tokens that it is told."""

    def __init__(self, **options: Any) -> None:
        self.tokenizer = Tokenizer.from_directory(TINY)
        self.options = EngineOptions(**options)
        self.vocab_size = self.tokenizer.vocab_size
        self.adapters = [SimpleNamespace(name="dates", path="demo", chat_template=None)]
        self.is_alive = True
        self.kv_cache_bytes = 1_000_000
        self.continuation: Callable[[GenerationRequest, int], list[int]] = lambda request, index: self.tokenizer.encode(
            WORDS
        )
        self.handles: list[FakeHandle] = []
        self.delay_seconds = 0.0
        self.refusal: Exception | None = None
        self.failure: Exception | None = None

    def submit(self, request: GenerationRequest) -> FakeHandle:
        if self.refusal is not None:
            raise self.refusal
        if len(request.prompt) + request.config.max_new_tokens > self.options.max_model_len:
            raise GenerationError("the prompt is too long")
        handle = FakeHandle(request, self._results(request), self.failure, self.delay_seconds)
        self.handles.append(handle)
        return handle

    def load_adapter(self, name: str, path: str) -> None:
        self.adapters.append(SimpleNamespace(name=name, path=path, chat_template=None))

    def unload_adapter(self, name: str) -> None:
        self.adapters = [adapter for adapter in self.adapters if adapter.name != name]

    def stats(self) -> Any:
        return SimpleNamespace(
            num_running=3,
            num_waiting=2,
            kv_usage=0.25,
            prompt_tokens=11,
            generated_tokens=7,
            prefix_queries=10,
            prefix_hits=4,
        )

    def _results(self, request: GenerationRequest) -> list[Output]:
        results: list[Output] = []
        if request.prompt_log_probs is not None:
            scores = [TokenScore(log_prob_of(t), top_of(t, request.prompt_log_probs)) for t in request.prompt[1:]]
            results.append([None, *scores])
        if request.score_only:
            return results
        sequences = [self._sequence(request, index) for index in range(request.config.num_return_sequences)]
        for place in range(max(map(len, sequences))):
            results += [outputs[place] for outputs in sequences if place < len(outputs)]
        return results

    def _sequence(self, request: GenerationRequest, index: int) -> list[TokenOutput]:
        config = request.config
        has_stop, outputs = stop_test(config.stop, self.tokenizer.decode, config.min_new_tokens), []
        tokens = self.continuation(request, index)[: config.max_new_tokens]
        if isinstance(config.strategy, Sampling):  # so that samples differ
            tokens = tokens[: max(1, len(tokens) - index)]
        for place, token in enumerate(tokens):
            reason = "length" if place == len(tokens) - 1 else None
            if token == self.tokenizer.eos_token_id:
                reason = "eos"
            elif has_stop(tokens[: place + 1]):
                reason = "stop"
            wanted = config.num_log_probs
            scored = (None, None) if wanted is None else (log_prob_of(token), top_of(token, wanted))
            outputs.append(
                TokenOutput(index=index, token=token, log_prob=scored[0], top_log_probs=scored[1], finish_reason=reason)
            )
            if reason is not None:
                break
        return outputs
