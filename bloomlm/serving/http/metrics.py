"""The numbers of /metrics, under vLLM's names, so that its dashboards and autoscalers work here too.

Source of the names: https://docs.vllm.ai/en/latest/usage/metrics.html
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bloomlm.serving.engine import Engine, EngineStats
from bloomlm.serving.request import RequestHandle

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_LABEL = "model_name"

# Field of EngineStats -> name and description.
_GAUGES = {
    "num_running": ("vllm:num_requests_running", "Requests that are being read or continued"),
    "num_waiting": ("vllm:num_requests_waiting", "Requests that have not started"),
    "kv_usage": ("vllm:kv_cache_usage_perc", "Part of the memory for keys and values in use, from 0 to 1"),
}
_COUNTERS = {
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens of all started requests"),
    "generated_tokens": ("vllm:generation_tokens", "Generated tokens"),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache"),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens that were found in the prefix cache"),
}


class Timed(Protocol):
    """A choice that is being generated."""

    last_token_at: float | None
    """When its last token came, in seconds of time.monotonic."""


class Metrics:
    """What is counted beside the engine.

    Args:
        model_name: label of all numbers.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._finished = Counter(
            "vllm:request_success",
            "Choices that ended by themselves",
            [_LABEL, "finished_reason"],
            registry=self._registry,
        )
        self._first_token = self._histogram("time_to_first_token_seconds", "Time to the first token", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Time between tokens", _TOKEN_SECONDS)
        self._total = self._histogram("e2e_request_latency_seconds", "Time to the last token", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Time before the prompt is read", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._generated = self._histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)

    def observe(self, engine: Engine) -> None:
        """Add the numbers of an engine."""
        self._registry.register(_EngineNumbers(engine, self._model_name))

    def count_token(self, choice: Timed) -> None:
        """Count the time since the last token of a choice."""
        now = time.monotonic()
        if choice.last_token_at is not None:
            self._between.observe(now - choice.last_token_at)
        choice.last_token_at = now

    def count_run(self, handles: Iterable[RequestHandle], finish_reasons: Sequence[str]) -> None:
        """Count requests that have ended, by themselves or not.

        Args:
            handles: the requests.
            finish_reasons: OpenAI's reason of each choice that ended by itself.
        """
        for reason in finish_reasons:
            self._finished.labels(self._model_name, reason).inc()
        for handle in handles:
            times = handle.times
            if times.started is None:
                continue
            self._queue.observe(times.started - times.submitted)
            self._prompt.observe(len(handle.request.prompt))
            self._generated.observe(times.num_generated_tokens)
            if times.first_token is not None:
                self._first_token.observe(times.first_token - times.submitted)
            if times.last_token is not None:
                self._total.observe(times.last_token - times.submitted)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, description: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(f"vllm:{name}", description, [_LABEL], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)


class _EngineNumbers(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._labels = engine, [model_name]

    def collect(self) -> Iterator[Metric]:
        stats: EngineStats = self._engine.stats()
        for field, (name, description) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, description, labels=[_LABEL])
            gauge.add_metric(self._labels, getattr(stats, field))
            yield gauge
        for field, (name, description) in _COUNTERS.items():
            counter = CounterMetricFamily(name, description, labels=[_LABEL])
            counter.add_metric(self._labels, getattr(stats, field))
            yield counter
