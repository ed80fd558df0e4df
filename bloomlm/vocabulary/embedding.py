"""A model with another embedding, which is the head too: in memory, or written; everything else stays.

Shapes: V rows, D hidden.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from bloomlm.checkpoint.convert import ModelConversion
from bloomlm.checkpoint.huggingface import EMBEDDING
from bloomlm.checkpoint.output import Report
from bloomlm.checkpoint.tensor_reader import Rows
from bloomlm.checkpoint.writer import write_model
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

_BLOCK_ROWS = 4096


def mean_row(embedding: Tensor, kept: Tensor) -> Tensor:
    """[1, D] mean of the kept rows, added up in fp64."""
    total = torch.zeros(1, embedding.shape[1], dtype=torch.float64, device=embedding.device)
    for ids in kept.split(_BLOCK_ROWS):
        total += embedding[ids].double().sum(0, keepdim=True)
    return (total / len(kept)).to(embedding.dtype)


class EmbeddingChange(Protocol):
    """What trims or extends a vocabulary."""

    @property
    def config(self) -> BloomConfig:
        """Of the changed model."""
        ...

    def rows(self, embedding: Tensor) -> Rows:
        """The changed embedding of the old one [V, D], some rows at a time."""
        ...


def changed_model(model: BloomForCausalLM, change: EmbeddingChange) -> BloomForCausalLM:
    """The changed model in memory, in eval mode; it shares every parameter but the embedding with the old one.

    Args:
        model: without an adapter.
        change: of its vocabulary.
    """
    embedding = change.rows(model.transformer.word_embeddings.weight.detach())
    with torch.device("meta"):
        changed = BloomForCausalLM(change.config)
    state = {**model.state_dict(), EMBEDDING: embedding.read_rows(0, change.config.vocab_size)}
    changed.load_state_dict(state, assign=True)
    return changed.eval()


def write_with_embedding(
    directory: Path,
    source: ModelConversion,
    config: BloomConfig,
    embedding: Rows,
    max_shard_size_bytes: int,
    report: Report,
) -> None:
    """Write a model with another embedding into an existing directory, one tensor at a time.

    Args:
        directory: to write into; use output_directory around it.
        source: the model.
        config: its configuration with V.
        embedding: the new one.
        max_shard_size_bytes, report: as in write_model.
    """

    def stream() -> Iterator[tuple[str, Tensor | Rows]]:
        with torch.device("meta"):
            names = [name for name, _ in BloomForCausalLM(config).named_parameters()]
        for name in names:
            yield name, embedding if name == EMBEDDING else source.reader.open(name)

    write_model(
        directory,
        config,
        stream(),
        dtype=source.dtype,
        max_shard_size_bytes=max_shard_size_bytes,
        report=report,
    )
