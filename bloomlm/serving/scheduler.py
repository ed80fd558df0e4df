"""Which requests run, and what each step computes. Without torch, threads and clocks.

Requests are served in the order of their arrival. One is admitted when there are free rows and free blocks of keys and
values for all that it may ever need: its prompt and max_new_tokens, for each of its sequences. So a running request
never runs out of memory and is never stopped for another one.

A step computes at most max_step_tokens tokens. Sequences that are being continued come first. The rest of the step
reads prompts in the order of arrival; a prompt that is longer than the rest is read in several steps.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

BLOCK_TOKENS = 16
"""Tokens of a block, the unit in which memory for keys and values is counted and prefixes are shared."""


def num_blocks_of(num_tokens: int) -> int:
    """The number of blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


@dataclass(eq=False, kw_only=True)
class Slot:
    """What a request needs, as far as the scheduler knows it."""

    num_rows: int
    """Its sequences: samples or beams; fewer when some have ended."""
    blocks_per_row: int
    """Blocks that each of them needs at its greatest length."""
    guesses_per_row: int = 0
    """Most tokens that each of them guesses in a step once the prompt is read."""
    num_unread: int = 1
    """Tokens of its prompt that are still to be read; 0: it is being continued."""

    @property
    def num_blocks(self) -> int:
        """All blocks that are reserved for it."""
        return self.num_rows * self.blocks_per_row


S = TypeVar("S", bound=Slot)


class Scheduler(Generic[S]):
    """The waiting and the running requests.

    Args:
        max_rows: sequences that run at once.
        max_step_tokens: most tokens that a step computes. It exceeds what max_rows sequences compute while they are
            continued, so that every step can also read a prompt.
        num_blocks: blocks of keys and values that there is memory for.
        max_guesses: most tokens that all sequences together guess in a step.
    """

    def __init__(self, *, max_rows: int, max_step_tokens: int, num_blocks: int, max_guesses: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_reserved = 0
        """Blocks that are reserved for running requests."""
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens
        self._max_guesses = max_guesses
        self._num_rows = 0
        self._waiting: deque[S] = deque()
        self._running: list[S] = []

    @property
    def num_waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that are admitted."""
        return len(self._running)

    @property
    def is_empty(self) -> bool:
        """Whether there is no request."""
        return not self._waiting and not self._running

    @property
    def num_decoding_tokens(self) -> int:
        """Most tokens that the requests whose prompts are read compute in the next step."""
        decoding = [slot for slot in self._running if not slot.num_unread]
        guesses = sum(slot.num_rows * slot.guesses_per_row for slot in decoding)
        return sum(slot.num_rows for slot in decoding) + min(guesses, self._max_guesses)

    def add(self, slot: S) -> None:
        """Let a request wait for its turn; alone, it must fit into the rows and blocks that there are."""
        assert slot.num_rows <= self._max_rows and slot.num_blocks <= self.num_blocks
        self._waiting.append(slot)

    def admit(self) -> list[S]:
        """Admit waiting requests in the order of arrival, up to the first one that does not fit beside the others."""
        admitted = []
        while self._waiting:
            slot = self._waiting[0]
            if self._num_rows + slot.num_rows > self._max_rows or self.num_reserved + slot.num_blocks > self.num_blocks:
                break
            admitted.append(self._waiting.popleft())
            self._reserve(slot, slot.num_rows)
        self._running += admitted
        return admitted

    def release(self, slot: S, num_rows: int) -> None:
        """Take back rows of a running request whose sequences have ended; without rows, the request has left."""
        self._reserve(slot, -num_rows)
        slot.num_rows -= num_rows
        if slot.num_rows == 0:
            self._running.remove(slot)

    def remove(self, slot: S) -> None:
        """Let a request leave, waiting or running."""
        if slot in self._waiting:
            self._waiting.remove(slot)
        else:
            self.release(slot, slot.num_rows)

    def plan(self, readable: Callable[[S], int]) -> dict[S, int]:
        """How many prompt tokens the next step reads for each request; requests that read nothing are left out.

        Args:
            readable: how many prompt tokens a request can read now; 0 while it waits for another request's prefix. It
                is asked about requests with unread tokens, as long as the step has room.
        """
        room = self._max_step_tokens - self.num_decoding_tokens
        reads: dict[S, int] = {}
        for slot in list(self._running):  # a request that cannot start leaves while it is asked
            if room <= 0:
                break
            if slot.num_unread and (count := min(room, readable(slot))):
                reads[slot] = count
                room -= count
        return reads

    def _reserve(self, slot: S, num_rows: int) -> None:
        self._num_rows += num_rows
        self.num_reserved += num_rows * slot.blocks_per_row
