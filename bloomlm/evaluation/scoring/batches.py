"""Shares work among the copies of a model, and computes it in batches that are halved when memory runs out."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from bloomlm.errors import ConfigError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Generation, generate
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText
from bloomlm.parallel.mesh import ALONE, Mesh

_LOG = logging.getLogger(__name__)

P = TypeVar("P")
R = TypeVar("R")


def own_share(pieces: Sequence[P], mesh: Mesh) -> list[P]:
    """The pieces that this rank's copy computes: every n-th one, so that sorted pieces give equal amounts of work."""
    return list(pieces[mesh.dp_rank :: mesh.degrees.dp])


def join_shares(own: dict[int, R], mesh: Mesh) -> dict[int, R]:
    """The results of all copies by number; every rank must make this call."""
    return {number: result for share in mesh.gather_copies(own) for number, result in share.items()}


@dataclass(kw_only=True)
class BatchLimit:
    """The size of a batch, and the words of the messages about it."""

    size: int
    """The largest size. It becomes smaller when memory runs out."""
    unit: str
    """What the size counts, e.g. "tokens"."""
    single: str
    """The name of one piece of work in messages; {size} stands for its size."""
    advice: str
    """The flags that make one piece smaller."""
    mesh: Mesh = ALONE
    """Ranks that share a model (tensor parallelism) compute every batch together."""

    def batches(
        self,
        pieces: Sequence[P],
        compute: Callable[[list[P]], R],
        size_of: Callable[[Sequence[P]], int],
        *,
        most: int | None = None,
        halves: Callable[[P], Sequence[P]] = lambda piece: (piece,),
    ) -> Iterator[tuple[list[P], R]]:
        """Compute pieces of work in their order, as many at once as fit; a piece above the limit is computed alone.

        Args:
            pieces: the largest first, so that memory that is too small shows early.
            compute: computes the results of a batch.
            size_of: computes the size of a batch.
            most: a second limit, which does not change.
            halves: splits a piece that does not fit into memory, or returns it alone if it cannot be split.

        Yields:
            Each batch with its results.

        Raises:
            ConfigError: memory ran out on a single piece, or on ranks that share a model.
        """
        waiting = list(pieces)
        while waiting:
            limit = self.size if most is None else min(self.size, most)
            count = 1
            while count < len(waiting) and size_of(waiting[: count + 1]) <= limit:
                count += 1
            batch = waiting[:count]
            try:
                results = compute(batch)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                parts = halves(batch[0]) if count == 1 else batch
                self._halve(size_of(batch), error, is_single=len(parts) == 1)
                waiting[:count] = parts
                continue
            del waiting[:count]
            yield batch, results

    def _halve(self, size: int, error: Exception, *, is_single: bool) -> None:
        if self.mesh.degrees.tp > 1:  # the other ranks are in the middle of the same batch
            raise ConfigError(
                f"memory ran out on a batch of {size} {self.unit}. Ranks that share a model cannot make batches "
                f"smaller while they run; give a smaller --batch_size ({error})"
            ) from error
        if is_single:
            raise ConfigError(
                f"memory ran out on a single {self.single.format(size=size)}; give a smaller {self.advice}, or a "
                f"device with more memory ({error})"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = size // 2
        _LOG.warning("memory ran out on a batch of %d %s; continuing with %d", size, self.unit, self.size)


def generate_batches(
    model: LanguageModel,
    prompts: Mapping[int, Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    decode_text: DecodeText | None = None,
    mesh: Mesh = ALONE,
) -> Iterator[dict[int, Generation]]:
    """Continue this copy's share of the prompts, the longest first, fewer at once when memory runs out.

    Args:
        model: generates the continuations.
        prompts: number -> at least one id; the same on all ranks.
        config: how to decode; samples depend on the number of copies.
        batch_size: prompts at once.
        decode_text: decodes ids, which stop texts need.
        mesh: the ranks.

    Yields:
        Number -> continuation, batch by batch.

    Raises:
        ConfigError: a single prompt does not fit into memory, or a batch on ranks that share a model.
    """
    num_done = 0

    def compute(numbers: list[int]) -> list[Generation]:
        chosen = [prompts[number] for number in numbers]
        return generate(model, chosen, config, decode_text=decode_text, first_sequence=num_done)

    order = own_share(sorted(prompts, key=lambda number: len(prompts[number]), reverse=True), mesh)
    limit = BatchLimit(
        size=batch_size, unit="prompts", single="prompt", advice="--src_length or --tgt_length", mesh=mesh
    )
    for numbers, results in limit.batches(order, compute, len):
        num_done += len(numbers)
        yield dict(zip(numbers, results, strict=True))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # PyTorch's CPU allocator raises plain RuntimeErrors.
    message = str(error).lower()
    return any(words in message for words in ("not enough memory", "can't allocate memory", "out of memory"))
