"""The requests, the scheduler, the prefix cache and the session in step. Every rank has one, and all do the same.

Nothing here depends on time or on other threads, so ranks that get the same requests and cancellations before the same
steps stay equal, as their models compute together.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bloomlm.errors import BloomlmError, ServingError, first_line
from bloomlm.generation.config import BeamSearch, Greedy
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText, Event
from bloomlm.generation.session import DecodeSession
from bloomlm.serving.job import Ended, Job, News, Started, blocks_per_row
from bloomlm.serving.memory import KvBudget
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.prefix_cache import PrefixCache, block_names
from bloomlm.serving.request import GenerationRequest, TokenOutput
from bloomlm.serving.scheduler import BLOCK_TOKENS, Scheduler

_LOG = logging.getLogger(__name__)


class Batch:
    """The requests of an engine.

    Args:
        model: computes the logits.
        decode_text: ids to text, for stop texts.
        options: the engine's options, without those that the model cannot follow.
        budget: rows and blocks.
    """

    def __init__(self, model: LanguageModel, decode_text: DecodeText, options: EngineOptions, budget: KvBudget) -> None:
        self._model = model
        self._decode_text = decode_text
        self._options = options
        self._budget = budget
        self._scheduler: Scheduler[Job] = Scheduler(
            max_rows=budget.num_rows,
            max_step_tokens=options.max_step_tokens,
            num_blocks=budget.num_blocks,
            max_guesses=options.max_guesses,
        )
        self._cache: PrefixCache[Tensor] = PrefixCache()
        self._session = self._open_session()
        self._jobs: dict[int, Job] = {}
        self._owners: dict[int, Job] = {}
        """Handle of a sequence in the session -> its request."""
        self._readers: dict[bytes, Job] = {}
        """Name of a block -> the running request that will read and save it."""
        self._news: list[News] = []
        self.num_running = 0
        """Requests that have started and not ended."""
        self.prefix_queries = self.prefix_hits = 0
        """Prompt tokens of all requests that share prefixes, and how many of them were found in the cache."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no request."""
        return self._scheduler.is_empty

    @property
    def kv_usage(self) -> float:
        """Blocks of running requests, from 0 to 1 of all."""
        return self._scheduler.num_reserved / self._budget.num_blocks

    def uses_adapter(self, name: str) -> bool:
        """Whether a request uses an adapter."""
        return any(job.request.adapter == name for job in self._jobs.values())

    def add(self, number: int, request: GenerationRequest, origin: bytes, num_virtual_tokens: int = 0) -> None:
        """Take a request.

        Args:
            number: names it in the news.
            request: the request, which fits into the budget.
            origin: names its adapter, with another name whenever an adapter of that name was loaded.
            num_virtual_tokens: virtual tokens before each of its sequences.
        """
        config = request.config
        guesses = self._options.prompt_lookup if isinstance(config.strategy, Greedy) else 0
        shares = self._options.prefix_caching and request.prompt_log_probs is None
        job = Job(
            number=number,
            request=request,
            origin=origin,
            num_rows=config.num_rows,
            blocks_per_row=blocks_per_row(request, num_virtual_tokens),
            guesses_per_row=guesses,
            num_unread=len(request.prompt),
            names=block_names(request.prompt, origin=origin) if shares else [],
        )
        self._jobs[number] = job
        self._scheduler.add(job)

    def cancel(self, number: int) -> None:
        """Let a request leave; its rows are free at once. Without effect on one that has left."""
        job = self._jobs.get(number)
        if job is not None:
            self._save_continuation(job)
            self._remove(job)

    def step(self) -> None:
        """Compute one step of all requests that fit.

        Raises:
            Exception: of the model or the session, which must not be used any more then; see restart.
        """
        self._scheduler.admit()
        self._cache.shrink(self._most_cached)
        plan = self._scheduler.plan(self._readable)
        events = self._session.step({job.handles[0]: count for job, count in plan.items()})
        for job, count in plan.items():
            self._count_read(job, count)
        ended = [job for job in map(self._take, events) if job is not None]
        for job in ended:  # the session forgets all ended sequences when the first of them is removed
            self._save_continuation(job)
        for job in ended:
            self._remove(job)

    def restart(self, error: Exception) -> None:
        """After a failed step: end the requests that it concerned, and open a new session for the others.

        Raises:
            Exception: there is no memory for a new session.
        """
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "memory" in str(error)
        what = "ran out of memory" if is_memory else f"failed ({type(error).__name__}: {first_line(error)})"
        concerned = [job for job in self._jobs.values() if job.handles]
        failure = ServingError(
            f"the step that computed this request and {len(concerned) - 1} others {what}; send it again"
            + ("; if this repeats, lower --kv_cache_gb, --max_num_seqs or --max_step_tokens" if is_memory else "")
        )
        self._owners = {}
        for job in concerned:
            self._remove(job, failure)
        self._cache.clear()
        del self._session  # its memory is needed for the new one
        self._session = self._open_session()

    def take_news(self) -> list[News]:
        """What has happened since the last call, in order."""
        news, self._news = self._news, []
        return news

    @property
    def _most_cached(self) -> int:
        """Blocks that the prefix cache may hold beside the running requests."""
        return self._budget.num_blocks - (self._budget.num_allocated or self._scheduler.num_reserved)

    def _open_session(self) -> DecodeSession:
        return DecodeSession(
            self._model,
            max_rows=self._budget.num_rows,
            max_tokens=self._options.max_model_len + 1,  # a prompt of max_model_len tokens can be scored
            decode_text=self._decode_text,
            prompt_lookup=self._options.prompt_lookup,
        )

    def _readable(self, job: Job) -> int:
        """How much of its prompt a request can read now; it starts where nothing keeps it from doing so."""
        if not job.handles:
            found = self._cache.find(job.names[: (len(job.request.prompt) - 1) // BLOCK_TOKENS])
            unread = job.names[len(found) :]
            if unread and unread[0] in self._readers:
                return 0  # another request is reading the same: once it has, this one finds more
            self._start(job, found)
        return job.num_unread

    def _start(self, job: Job, blocks: Sequence[Tensor]) -> None:
        request = job.request
        config = replace(request.config, max_new_tokens=1, min_new_tokens=0) if request.score_only else request.config
        try:
            job.handles = self._session.open(
                request.prompt,
                config,
                adapter=request.adapter,
                first_sequence=request.first_sequence,
                prompt_log_probs=request.prompt_log_probs,
                blocks=blocks,
            )
        except BloomlmError as error:  # what the engine has not checked; the session is as it was
            job.num_unread = 0
            self._remove(job, ServingError(str(error)))
            return
        job.num_open = len(job.handles)
        job.num_saved = len(blocks)
        job.num_unread = self._session.num_unread(job.handles[0])
        self._owners |= dict.fromkeys(job.handles, job)
        for name in job.names[job.num_saved :]:
            self._readers.setdefault(name, job)
        self.num_running += 1
        num_cached = len(request.prompt) - job.num_unread
        if self._options.prefix_caching and request.prompt_log_probs is None:
            self.prefix_queries += len(request.prompt)
            self.prefix_hits += num_cached
        self._news.append((job.number, Started(num_cached_tokens=num_cached)))

    def _count_read(self, job: Job, count: int) -> None:
        """Take in that a request has read so many tokens of its prompt."""
        job.num_unread -= count
        if job.names:
            names = job.names[: (len(job.request.prompt) - job.num_unread) // BLOCK_TOKENS]
            self._save(job, names)
            self._let_read(names[job.num_saved :], job)
            job.num_saved = len(names)
        if job.num_unread == 0 and job.request.prompt_log_probs is not None:
            self._news.append((job.number, self._session.prompt_scores(job.handles[0])))

    def _take(self, event: Event) -> Job | None:
        """Pass on a token; returns the request if it ends with it."""
        job = self._owners[event.handle]
        if not job.request.score_only:
            output = TokenOutput(
                index=event.handle - job.handles[0],
                token=event.token,
                log_prob=event.log_prob,
                top_log_probs=event.top_log_probs,
                finish_reason=event.finish_reason,
            )
            self._news.append((job.number, output))
        if job.names and len(job.handles) == 1:
            job.tokens.append(event.token)
        if event.finish_reason is None:
            return None
        job.num_open -= 1
        if job.num_open == 0:
            return job
        if not isinstance(job.request.config.strategy, BeamSearch):  # the beams of a search leave together
            self._scheduler.release(job, 1)
        return None

    def _remove(self, job: Job, error: ServingError | None = None) -> None:
        """Let a request leave the session, where it is in it, the scheduler and the lists here."""
        if self._owners.keys() >= set(job.handles):
            self._session.evict(job.handles)
        for handle in job.handles:
            self._owners.pop(handle, None)
        self.num_running -= bool(job.handles)
        self._let_read(job.names, job)
        self._scheduler.remove(job)
        del self._jobs[job.number]
        self._news.append((job.number, Ended(error=error)))

    def _let_read(self, names: Sequence[bytes], job: Job) -> None:
        """Note that a request will not read these blocks any more."""
        for name in names:
            if self._readers.get(name) is job:
                del self._readers[name]

    def _save(self, job: Job, names: list[bytes]) -> None:
        handle = job.handles[0]

        def read(number: int) -> Tensor:
            return self._session.read_block(handle, number * BLOCK_TOKENS, (number + 1) * BLOCK_TOKENS)

        self._cache.save(names, job.num_saved, read, most=self._most_cached)

    def _save_continuation(self, job: Job) -> None:
        """Save what a leaving request has generated, for one that goes on from there."""
        if job.tokens:
            tokens = (job.request.prompt + job.tokens)[: self._session.num_read(job.handles[0])]
            self._save(job, block_names(tokens, origin=job.origin, before=job.names))
