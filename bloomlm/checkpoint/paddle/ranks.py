"""Put the pieces of tensor-parallel ranks together, lazily: a slice reads from the ranks that hold it."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from bloomlm.checkpoint.paddle.array import Joined, LazyTensor, Replicated
from bloomlm.checkpoint.paddle.names import EMBEDDING, Cut, model_cuts
from bloomlm.errors import CheckpointError, name_some
from bloomlm.model.config import BloomConfig


@dataclass(frozen=True)
class RankTensors:
    """What one tensor-parallel rank saved."""

    place: str
    """What error messages call its file."""
    tensors: Mapping[str, LazyTensor]
    """Under published names, in the published orientation."""


def check_ranks_complete(tp_ranks: list[int], source: str, tp_degree: int | None = None) -> None:
    """Hold the ranks that were found against those that there were.

    Args:
        tp_ranks: found, sorted.
        source: what error messages call the checkpoint.
        tp_degree: what its configuration says; None: it does not say, and ranks are missing only between others.

    Raises:
        CheckpointError: some are missing, or there are too many.
    """
    count = tp_degree or tp_ranks[-1] + 1
    if missing := missing_numbers(tp_ranks, count):
        raise CheckpointError(
            f"{source}: of {count} tensor-parallel ranks the files of ranks {missing} are missing (found "
            f"{tp_ranks}); every rank holds a part of every matrix, fetch those files too"
        )
    if extra := [tp_rank for tp_rank in tp_ranks if tp_rank >= count]:
        raise CheckpointError(
            f"{source}: its configuration says tensor_parallel_degree {tp_degree}, and there are files of ranks "
            f"{extra} too: two runs in one directory? Remove the files of the other one"
        )


def missing_numbers(found: Collection[int], count: int) -> list[int]:
    """Of the numbers below count those that are not there, the first eight of them.

    Args:
        found: what is there.
        count: may be what a damaged file says, of any size.
    """
    num_missing = count - sum(number < count for number in set(found))
    candidates = (number for number in itertools.count() if number not in found)
    return list(itertools.islice(candidates, max(0, min(num_missing, 8))))


def join_ranks(ranks: list[RankTensors], config: BloomConfig, source: str) -> dict[str, LazyTensor]:
    """The whole tensors of a model.

    Args:
        ranks: all of them, in order.
        config: the whole model's shape.
        source: what error messages call the checkpoint.

    Raises:
        CheckpointError: the ranks do not make up the model that the configuration describes.
    """
    tp_degree = len(ranks)
    _check_degree(ranks, config, source)
    if config.vocab_size % tp_degree or config.n_head % tp_degree:
        raise CheckpointError(
            f"{source}: a vocabulary of {config.vocab_size} and {config.n_head} heads cannot be divided among "
            f"{tp_degree} tensor-parallel ranks, which hold equal parts; is its config.json another "
            "model's?"
        )
    cuts = model_cuts(config)
    _check_names(ranks, cuts)
    return {name: join_pieces(name, cut, ranks) for name, cut in cuts.items()}


def join_pieces(name: str, cut: Cut, ranks: list[RankTensors]) -> LazyTensor:
    """One tensor from the ranks' pieces.

    Args:
        name: published name, which every rank has.
        cut: its whole shape, and the dimension along which the ranks divide it.
        ranks: all of them, in order.

    Raises:
        CheckpointError: a piece has another shape than its share, or another precision than the others.
    """
    expected = cut.piece_shape(len(ranks))
    pieces = tuple(rank.tensors[name] for rank in ranks)
    for rank, piece in zip(ranks, pieces, strict=True):
        if piece.shape != expected:
            share = f"rank's share of {list(cut.shape)}" if cut.dim is not None else "whole on every rank"
            raise CheckpointError(
                f"{rank.place}: {name} has shape {list(piece.shape)}; expected {list(expected)}, {share} with "
                f"{len(ranks)} ranks"
            )
        if piece.dtype != pieces[0].dtype:
            raise CheckpointError(
                f"{name} is {pieces[0].dtype} in {ranks[0].place} and {piece.dtype} in {rank.place}: the files are of "
                "different runs"
            )
    if len(pieces) == 1:
        return pieces[0]
    if cut.dim is None:
        return Replicated(pieces, name, tuple(rank.place for rank in ranks))
    return Joined(pieces, cut.dim)


def _check_names(ranks: list[RankTensors], cuts: Mapping[str, Cut]) -> None:
    for rank in ranks:
        problems = []
        if missing := [name for name in cuts if name not in rank.tensors]:
            problems.append(f"lacks {name_some(missing)}")
        if extra := [name for name in rank.tensors if name not in cuts]:
            problems.append(f"has {name_some(extra)}, which no BLOOM of this configuration has")
        if problems:
            raise CheckpointError(f"{rank.place} {' and '.join(problems)}")


def _check_degree(ranks: list[RankTensors], config: BloomConfig, source: str) -> None:
    """What part of the vocabulary a rank holds tells how many ranks there were."""
    embedding = ranks[0].tensors.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    if rows and config.vocab_size % rows == 0 and config.vocab_size // rows != len(ranks):
        raise CheckpointError(
            f"{source}: found the files of {len(ranks)} tensor-parallel ranks, but each holds {rows} of "
            f"{config.vocab_size} rows of the vocabulary, so there were "
            f"{config.vocab_size // rows}; fetch the missing files too"
        )
