"""Divides a model among ranks that compute it together, each with a part of every layer.

Every rank runs the same code of the model with smaller parameters, and a Partition of each layer exchanges what makes
its results whole. A block has two all-reduces of [N, D] forward (after dense and dense_4h_to_h) and two backward
(before query_key_value and dense_h_to_4h); LoRA adds one of [N, R] for each layer. Parameters are plain tensors, which
are as fast as on one device; layout.py says which part of a whole parameter each rank holds.

Shapes: N packed tokens, D hidden, V vocabulary, R lora rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain

import torch
from torch import Tensor, nn

from bloomlm.errors import ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.linear import Linear
from bloomlm.model.partition import Partition, Product, VocabularyPartition
from bloomlm.parallel.collectives import (
    TensorParallelGroup,
    column_product,
    copy_to_ranks,
    gather_last_dim,
    own_randomness,
    sum_over_ranks,
)
from bloomlm.parallel.layout import Part, is_of_base, tp_dim, tp_part
from bloomlm.parallel.mesh import Mesh, check_model_divides
from bloomlm.parallel.vocabulary_head import Head


class ColumnPartition(Partition):
    """Partition of a weight that is cut by outputs: the input is whole, the output is this rank's part."""

    def __init__(self, ranks: TensorParallelGroup) -> None:
        self.ranks = ranks

    def enter(self, x: Tensor) -> Tensor:
        """x itself; its gradient is summed over the ranks."""
        return copy_to_ranks(x, self.ranks)

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, product: Product
    ) -> Tensor:
        """The product; the input's gradient is summed over the ranks while the weight's is computed."""
        if scale is not None or not torch.is_grad_enabled():
            return super().multiply(x, weight, bias, scale, product)
        return column_product(x, weight, bias, self.ranks, product)

    def between(self, low_rank: Tensor) -> Tensor:
        """low_rank itself, because lora_A is whole; its gradient is summed, because lora_B is cut by rows."""
        return copy_to_ranks(low_rank, self.ranks)


class RowPartition(Partition):
    """Partition of a weight that is cut by inputs: outputs are summed over the ranks before the bias is added."""

    sums_inputs = True

    def __init__(self, ranks: TensorParallelGroup) -> None:
        self.ranks = ranks

    def between(self, low_rank: Tensor) -> Tensor:
        """The sum over the ranks, because lora_A is cut by inputs like the weight."""
        return sum_over_ranks(low_rank, self.ranks)

    def leave(self, y: Tensor) -> Tensor:
        """The sum over the ranks."""
        return sum_over_ranks(y, self.ranks)

    def input_randomness(self) -> AbstractContextManager[None]:
        """Different numbers on each rank, because each has different columns of the input."""
        return own_randomness(self.ranks.rank)


class CutVocabulary(VocabularyPartition):
    """Partition of an embedding whose rows are divided among the ranks.

    Args:
        ranks: the ranks that share the vocabulary.
        first_token: token of this rank's first row.
        num_tokens: number of this rank's rows.
    """

    def __init__(self, ranks: TensorParallelGroup, first_token: int, num_tokens: int) -> None:
        self.ranks = ranks
        self.first_token = first_token
        self.num_tokens = num_tokens

    def look_up(self, tokens: Tensor, lookup: Callable[[Tensor], Tensor]) -> Tensor:
        """[N] -> [N, D]: each rank looks up the tokens that it has, and the sum over the ranks has all of them."""
        rows = tokens - self.first_token
        elsewhere = (rows < 0) | (rows >= self.num_tokens)
        found = lookup(rows.masked_fill(elsewhere, 0))
        return sum_over_ranks(found.masked_fill(elsewhere.unsqueeze(-1), 0.0), self.ranks)

    def enter(self, x: Tensor) -> Tensor:
        """The hidden states before the head; their gradient is summed over the ranks."""
        return copy_to_ranks(x, self.ranks)

    def leave(self, y: Tensor) -> Tensor:
        """The logits of all ranks, [..., V]. Training does not call this, see vocabulary_loss.py."""
        return gather_last_dim(y, self.ranks)


def cut_model(model: BloomForCausalLM, mesh: Mesh) -> None:
    """Reduce every parameter to this rank's part, in place, and give every layer its Partition.

    The parameters of an adapter stay whole; cut_adapter divides them.

    Args:
        model: the whole model, with or without an adapter; may be on the meta device.
        mesh: the ranks; if its tp axis has one rank, nothing changes.

    Raises:
        ConfigError: the model cannot be divided among so many ranks.
    """
    degree = mesh.degrees.tp
    check_model_divides(model.config, degree)
    if degree == 1:
        return
    ranks = tp_group(mesh)
    heads, vocabulary = (Part(0, ranks.rank, degree).bounds(n) for n in (model.config.n_head, model.config.vocab_size))
    model.transformer.heads = range(*heads)
    model.transformer.word_embeddings.partition = CutVocabulary(ranks, vocabulary[0], vocabulary[1] - vocabulary[0])
    _cut(model, ranks, of_base=True)


def cut_adapter(model: BloomForCausalLM, mesh: Mesh) -> None:
    """Reduce the adapter of a model after cut_model, if it has one, to this rank's part.

    Raises:
        ConfigError: a layer of the adapter cannot be divided among so many ranks.
    """
    if mesh.degrees.tp == 1:
        return
    ranks = tp_group(mesh)
    if (prefix := model.transformer.prefix) is not None:
        prefix.heads = model.transformer.heads
        prefix.partition = ColumnPartition(ranks)
    _cut(model, ranks, of_base=False)


def tp_group(mesh: Mesh) -> TensorParallelGroup:
    """The ranks that compute one model together, this one included."""
    return TensorParallelGroup(mesh.group("tp"), mesh.tp_rank, mesh.degrees.tp)


def head_of(model: BloomForCausalLM) -> Head:
    """The head of a model, of which this rank has its part of the vocabulary if ranks divide the model."""
    embedding = model.transformer.word_embeddings
    return Head(
        embedding.weight,
        weight_scale=embedding.weight_scale,
        replaced=embedding.replaced_rows(),
        ranks=embedding.partition.ranks if isinstance(embedding.partition, CutVocabulary) else None,
    )


def _cut(model: nn.Module, ranks: TensorParallelGroup, *, of_base: bool) -> None:
    """Reduce the base model's or the adapter's layers to this rank's part."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and is_of_base(f"{name}.weight") is of_base:
            module.partition = ColumnPartition(ranks) if tp_dim(f"{name}.weight") == 0 else RowPartition(ranks)
    for name, tensor in list(chain(model.named_parameters(), model.named_buffers())):
        part = tp_part(name, ranks.rank, ranks.degree)
        if part.dim is None or is_of_base(name) is not of_base:
            continue
        if tensor.shape[part.dim] % ranks.degree:
            raise ConfigError(
                f"{name} of the adapter has the shape {list(tensor.shape)}, which cannot be divided among "
                f"{ranks.degree} tensor-parallel ranks; choose another width of its layers"
            )
        own = part.of(tensor.detach()).clone(memory_format=torch.contiguous_format)
        if isinstance(tensor, nn.Parameter):
            own = nn.Parameter(own, requires_grad=tensor.requires_grad)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, own)
