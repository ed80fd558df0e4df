"""A model with some rows of its embedding, which is the head too, and a tokenizer of their tokens; and the way back.

Nothing but the embedding, the ids in config.json and the tokenizer changes, so hidden states of the same tokens are the
same. One tensor at a time is read and written, the embedding some rows at a time.

Padding rows, which have no token, hold the mean of the other rows. Whatever the hidden state, their logit is then the
mean of the tokens' logits: never above the largest, so greedy decoding does not take them, and their probability is at
most one over the number of tokens (the exponential of a mean is at most the mean of the exponentials), in practice many
orders of magnitude less. Zeros would have the logit 0, which can be the largest.

Shapes: V rows of the whole embedding, K kept tokens, P rows of the trimmed one (K and padding), D hidden.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.checkpoint.convert import ModelConversion
from bloomlm.checkpoint.huggingface import EMBEDDING
from bloomlm.checkpoint.output import Report, no_report
from bloomlm.checkpoint.tensor_reader import Rows
from bloomlm.checkpoint.writer import DEFAULT_SHARD_SIZE_BYTES
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import read_json
from bloomlm.model.config import BloomConfig
from bloomlm.vocabulary.embedding import mean_row, write_with_embedding
from bloomlm.vocabulary.selection import Ids, Vocabulary, read_vocabulary, trim_json

MAP_FILE = "vocabulary_map.json"
_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Trim:
    """Which rows a trimmed model has."""

    kept: Ids
    """[K] ids of the whole vocabulary, ascending; a token's new id is its place."""
    config: BloomConfig
    """Of the trimmed model; vocab_size is P."""
    tokenizer: Tokenizer
    """Of the kept tokens."""

    @property
    def num_padding_rows(self) -> int:
        """Rows without a token (P - K)."""
        return self.config.vocab_size - len(self.kept)

    def rows(self, embedding: Tensor) -> Rows:
        """The trimmed embedding [P, D] of a whole one [V, D], some rows at a time."""
        kept = torch.from_numpy(self.kept)
        padding = mean_row(embedding, kept) if self.num_padding_rows else embedding[:0]

        def read_rows(start: int, stop: int) -> Tensor:
            num_padding = max(0, stop - max(start, len(kept)))
            return torch.cat([embedding[kept[start:stop]], padding.expand(num_padding, -1)])

        return Rows((self.config.vocab_size, embedding.shape[1]), embedding.dtype, read_rows)


def plan_trim(
    vocabulary: Vocabulary, kept: Ids, config: BloomConfig, tokenizer: Tokenizer, pad_to_multiple_of: int = 1
) -> Trim:
    """The trimmed model's configuration and tokenizer.

    Args:
        vocabulary: of the tokenizer.
        kept: what select_tokens gives.
        config: of the whole model.
        tokenizer: of the whole model.
        pad_to_multiple_of: of the number of rows.
    """
    new_ids = {old: new for new, old in enumerate(kept.tolist())}
    num_rows = -(-len(kept) // pad_to_multiple_of) * pad_to_multiple_of
    extra = {
        key: _new_id(value, new_ids) if key.endswith("_token_id") and isinstance(value, int) else value
        for key, value in config.extra.items()
    }
    trimmed = dataclasses.replace(
        config,
        vocab_size=num_rows,
        unk_token_id=_new_id(config.unk_token_id, new_ids),
        bos_token_id=_new_id(config.bos_token_id, new_ids),
        eos_token_id=_new_id(config.eos_token_id, new_ids),
        pad_token_id=_new_id(config.pad_token_id, new_ids),
        extra=extra,
    )
    return Trim(kept=kept, config=trimmed, tokenizer=tokenizer.with_json(trim_json(vocabulary, kept)))


def _new_id(old: int | None, new_ids: Mapping[int, int]) -> int | None:
    return None if old is None else new_ids.get(old)


def write_trimmed(
    directory: Path,
    source: ModelConversion,
    trim: Trim,
    *,
    source_name: str,
    fingerprint: str,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    report: Report = no_report,
) -> None:
    """Write the trimmed model, its tokenizer and vocabulary_map.json into an existing directory.

    Args:
        directory: to write into; use output_directory around it.
        source: the whole model.
        trim: what stays.
        source_name: what the user calls the whole model.
        fingerprint: what source_fingerprint gives.
        max_shard_size_bytes, report: as in write_model.
    """
    rows = trim.rows(source.reader.read(EMBEDDING))
    write_with_embedding(directory, source, trim.config, rows, max_shard_size_bytes, report)
    trim.tokenizer.save(directory)
    values = {
        "source": source_name,
        "source_fingerprint": fingerprint,
        "source_vocab_size": source.config.vocab_size,
        "num_tokens": len(trim.kept),
        "num_rows": trim.config.vocab_size,
        "old_ids": trim.kept.tolist(),
    }
    (directory / MAP_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")


def source_fingerprint(source: ModelConversion, tokenizer: Tokenizer) -> str:
    """Hex digest of a model's tokenizer and of every number of its embedding."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for rows in source.reader.read(EMBEDDING).split(_BLOCK_ROWS):
        digest.update(rows.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def find_old_ids(trimmed: Tokenizer, whole: Tokenizer) -> Tensor:
    """[K] the id in the whole vocabulary of each of a trimmed one's tokens.

    The tokens themselves tell, so a trimmed model keeps its way back through training and conversions.

    Raises:
        CheckpointError: the trimmed tokenizer has a token that the whole one lacks.
    """
    new_ids, old_ids = read_vocabulary(trimmed).ids, read_vocabulary(whole).ids
    if unknown := [token for token in new_ids if token not in old_ids]:
        raise CheckpointError(
            f"{trimmed.name} has {len(unknown)} tokens that {whole.name} lacks, {unknown[0]!r} first; it is not "
            "trimmed from that model"
        )
    ids = torch.zeros(max(new_ids.values()) + 1, dtype=torch.int64)
    for token, new in new_ids.items():
        ids[new] = old_ids[token]
    return ids


def restored_rows(trimmed: Tensor, whole: Tensor, old_ids: Tensor) -> Rows:
    """The whole embedding [V, D] with the rows [P, D] of a trimmed one, in whose precision it is.

    Args:
        trimmed: the trimmed embedding; its padding rows are left out.
        whole: the embedding it was trimmed from.
        old_ids: what find_old_ids gives.
    """
    new_ids = torch.full((len(whole),), -1)
    new_ids[old_ids] = torch.arange(len(old_ids))

    def read_rows(start: int, stop: int) -> Tensor:
        rows = whole[start:stop].to(trimmed.dtype, copy=True)
        new = new_ids[start:stop]
        rows[new >= 0] = trimmed[new[new >= 0]]
        return rows

    return Rows(tuple(whole.shape), trimmed.dtype, read_rows)


def write_restored(
    directory: Path,
    trimmed: ModelConversion,
    whole: ModelConversion,
    tokenizers: tuple[Tokenizer, Tokenizer],
    *,
    max_shard_size_bytes: int = DEFAULT_SHARD_SIZE_BYTES,
    report: Report = no_report,
) -> BloomConfig:
    """Write the model with the whole vocabulary again into an existing directory; other weights are the trimmed one's.

    Args:
        directory: to write into; use output_directory around it.
        trimmed: the trimmed model, trained since or not.
        whole: the model it was trimmed from.
        tokenizers: of both.
        max_shard_size_bytes, report: as in write_model.

    Returns:
        Its configuration.

    Raises:
        CheckpointError: the one is not trimmed from the other.
    """
    config = restored_config(trimmed.config, whole.config)
    old_ids = find_old_ids(*tokenizers)
    if len(old_ids) > trimmed.config.vocab_size or int(old_ids.max()) >= whole.config.vocab_size:
        raise CheckpointError(f"{tokenizers[0].name} has more tokens than its embedding has rows")
    rows = restored_rows(trimmed.reader.read(EMBEDDING), whole.reader.read(EMBEDDING), old_ids)
    write_with_embedding(directory, trimmed, config, rows, max_shard_size_bytes, report)
    tokenizers[1].save(directory)
    return config


def restored_config(trimmed: BloomConfig, whole: BloomConfig) -> BloomConfig:
    """The whole model's configuration, which must differ from the trimmed one's in the vocabulary only.

    Raises:
        CheckpointError: the models have other shapes.
    """
    for name in ("hidden_size", "n_layer", "n_head"):
        if (found := getattr(trimmed, name)) != (expected := getattr(whole, name)):
            raise CheckpointError(
                f"the trimmed model has {name} {found}, the whole one {expected}; it is not trimmed from that model"
            )
    return whole


def check_fingerprint(directory: Path, fingerprint: str) -> None:
    """Compare a trimmed model's vocabulary_map.json, if it has one still, with the model that is named as its source.

    Raises:
        CheckpointError: it was trimmed from another model.
    """
    path = directory / MAP_FILE
    if not path.is_file():
        return  # written anew by training, for example
    try:
        values: Mapping[str, Any] = read_json(path)
        expected, source = values["source_fingerprint"], values["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as the map of a trimmed vocabulary: {error!r}") from error
    if expected != fingerprint:
        raise CheckpointError(
            f"{path} says that it was trimmed from {source}, whose embedding and tokenizer are other than those named"
        )
