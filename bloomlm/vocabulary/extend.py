"""A model with more tokens: new rows of its embedding, which is the head too, and a tokenizer that uses them.

A new row is the mean of the rows of the old tokens that the new one replaces. So the model reads it as something like
them, and whatever the hidden state, its logit is the mean of theirs: not above the largest, so that greedy decoding
does not write it before it has been trained. Added rows without a token hold the mean of all tokens' rows for the same
reason.

New ids follow the last token. Rows that a model has beyond its tokens (BLOOM has 250,880 rows and 250,680 tokens) are
used first, and those that are not needed stay as they are. Every other row, every other tensor and every old id are the
old model's.

Shapes: V rows of the old embedding, N new tokens, D hidden.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.checkpoint.convert import ModelConversion
from bloomlm.checkpoint.huggingface import EMBEDDING
from bloomlm.checkpoint.output import Report, no_report
from bloomlm.checkpoint.tensor_reader import Rows
from bloomlm.checkpoint.writer import DEFAULT_SHARD_SIZE_BYTES
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.model.config import BloomConfig
from bloomlm.vocabulary.embedding import mean_row, write_with_embedding
from bloomlm.vocabulary.merges import NewToken, extended_json
from bloomlm.vocabulary.new_tokens import write_new_tokens
from bloomlm.vocabulary.selection import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What a model is extended by."""

    tokens: range
    """Ids of the new tokens."""
    new: tuple[NewToken, ...]
    """The tokens, in the order of their ids."""
    config: BloomConfig
    """Of the extended model."""
    tokenizer: Tokenizer
    """Of old and new tokens."""

    def rows(self, embedding: Tensor) -> Rows:
        """The extended embedding of an old one [V, D], some rows at a time."""
        first, last = self.tokens.start, self.tokens.stop
        new = new_rows(embedding, self.new)
        padding = mean_row(embedding, torch.arange(first))

        def read_rows(start: int, stop: int) -> Tensor:
            num_padding = max(0, stop - max(start, last, len(embedding)))
            parts = (
                embedding[start : min(stop, first)],
                new[max(0, start - first) : max(0, stop - first)],
                embedding[max(start, last) : stop],
                padding.expand(num_padding, -1),
            )
            return torch.cat([part for part in parts if len(part)])

        return Rows((self.config.vocab_size, embedding.shape[1]), embedding.dtype, read_rows)


def plan_extension(
    vocabulary: Vocabulary,
    new: tuple[NewToken, ...],
    config: BloomConfig,
    tokenizer: Tokenizer,
    pad_to_multiple_of: int = 1,
) -> Extension:
    """The extended model's configuration and tokenizer.

    Args:
        vocabulary: of the old tokenizer.
        new: the tokens to add.
        config: of the old model.
        tokenizer: of the old model.
        pad_to_multiple_of: of the number of rows.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has rows.
    """
    if vocabulary.num_ids > config.vocab_size:
        raise ConfigError(
            f"{tokenizer.name}: its tokenizer has ids up to {vocabulary.num_ids - 1}, its embedding "
            f"{config.vocab_size} rows; they belong to different models"
        )
    tokens = range(vocabulary.num_ids, vocabulary.num_ids + len(new))
    num_rows = max(tokens.stop, config.vocab_size)
    num_rows = -(-num_rows // pad_to_multiple_of) * pad_to_multiple_of
    return Extension(
        tokens=tokens,
        new=new,
        config=dataclasses.replace(config, vocab_size=num_rows),
        tokenizer=tokenizer.with_json(extended_json(vocabulary.content, tokens.start, new)),
    )


def new_rows(embedding: Tensor, new: tuple[NewToken, ...]) -> Tensor:
    """[N, D] for each new token the mean of the rows of its pieces, added up in fp32 and rounded once.

    Args:
        embedding: [V, D].
        new: the tokens.
    """
    device = embedding.device
    owners = torch.tensor([number for number, token in enumerate(new) for _ in token.pieces], device=device)
    pieces = torch.tensor([piece for token in new for piece in token.pieces], device=device)
    counts = torch.tensor([[len(token.pieces)] for token in new], device=device)
    sums = torch.zeros(len(new), embedding.shape[1], device=device)
    return (sums.index_add_(0, owners, embedding[pieces].float()) / counts).to(embedding.dtype)


def write_extended(
    directory: Path,
    source: ModelConversion,
    extension: Extension,
    *,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    report: Report = no_report,
) -> None:
    """Write the extended model, its tokenizer and the record of its new tokens into an existing directory.

    Args:
        directory: to write into; use output_directory around it.
        source: the old model.
        extension: what it is extended by.
        max_shard_size_bytes, report: as in write_model.
    """
    rows = extension.rows(source.reader.read(EMBEDDING))
    write_with_embedding(directory, source, extension.config, rows, max_shard_size_bytes, report)
    extension.tokenizer.save(directory)
    write_new_tokens(directory, extension.tokens)
