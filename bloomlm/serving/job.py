"""A request on its way through the batch, and what happens to it there."""

from dataclasses import dataclass, field

from bloomlm.errors import ServingError
from bloomlm.serving.request import GenerationRequest, Output
from bloomlm.serving.scheduler import Slot, num_blocks_of


@dataclass(frozen=True, kw_only=True)
class Started:
    """A request's prompt begins to be read."""

    num_cached_tokens: int
    """Tokens of the prompt that need not be read."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A request has left."""

    error: ServingError | None = None
    """Why it could not be finished; None where it was."""


News = tuple[int, Started | Output | Ended]
"""Number of a request, and what happened to it."""


@dataclass(eq=False, kw_only=True)
class Job(Slot):
    """A request in the batch."""

    number: int
    request: GenerationRequest
    origin: bytes
    """What its keys and values depend on beside its tokens."""
    names: list[bytes]
    """Names of its prompt's blocks; none where they are not shared."""
    handles: list[int] = field(default_factory=list)
    """Its sequences in the session; none before it starts."""
    num_open: int = 0
    """How many of them have not ended."""
    num_saved: int = 0
    """Blocks of its prompt that were in the cache or have been put there."""
    tokens: list[int] = field(default_factory=list)
    """New tokens of its only sequence, where they are worth saving."""


def blocks_per_row(request: GenerationRequest, num_virtual_tokens: int) -> int:
    """Blocks that each sequence of a request needs at its greatest length, behind so many virtual tokens."""
    num_new = 0 if request.score_only else request.config.max_new_tokens
    return num_blocks_of(num_virtual_tokens + len(request.prompt) + num_new)
