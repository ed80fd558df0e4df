"""What a rank computes in a training step, and what autograd saves of it, operation by operation.

Tests compare it with what autograd really saves.

Letters: N packed tokens, M supervised tokens, R lora rank.
"""

from dataclasses import dataclass

import torch

from bloomlm.model.alibi import COLUMNS
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.linear import Linear
from bloomlm.parallel.layout import tp_dim

_FP32, _STATISTICS = 4, 8  # bytes; a layer norm saves the mean and 1 / deviation of each token


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a rank computes in a training step."""

    num_documents: int
    """Number of examples of a microbatch, all of the same length."""
    num_tokens: int
    """Number of tokens of a microbatch (N)."""
    num_supervised_tokens: int
    """Number of its tokens that have a label (M)."""
    compute_dtype: torch.dtype
    """Dtype of the matrix products, which may differ from that of the weights."""
    max_chunk_bytes: int
    """Largest size of a chunk of logits in the loss."""
    recompute: bool = False
    """Whether the backward pass computes the activations of blocks again."""
    accumulation: int = 1
    """Number of microbatches of a step."""
    uses_operator: bool = False
    """Whether attention is the operator for CPUs (model/causal.py) and not PyTorch's kernel."""
    reshards: bool = True
    """Whether FSDP frees a block's gathered weights between its forward and backward pass (stage 3)."""
    fuses_update: bool = False
    """Whether weights are updated within the backward pass, which frees each gradient (training/update.py)."""
    factors_head: bool = False
    """Whether the head's gradient is kept in two factors while they are smaller (vocabulary_loss.py)."""


@dataclass(frozen=True)
class PlannedLinear:
    """A linear layer of a block."""

    name: str
    """Full name in the model."""
    layer: Linear
    needs_input_gradient: bool
    """Whether a parameter before the layer learns."""

    @property
    def kind(self) -> str:
        """Name of the layer within its block."""
        return self.name.rpartition(".")[2]

    @property
    def is_column(self) -> bool:
        """Whether tensor-parallel ranks cut it by outputs, and so sum the gradient of its input."""
        return tp_dim(f"{self.name}.weight") == 0

    @property
    def lora_rank(self) -> int:
        """Rank of its LoRA update (R); 0 if it has none."""
        matrices = self.layer.update_matrices
        return len(matrices[0]) if matrices else 0


def block_linears(model: BloomForCausalLM) -> list[list[PlannedLinear]]:
    """The linear layers of each block, in the order in which they are computed."""
    needs_gradient = model.transformer.word_embeddings.learns
    blocks: list[list[PlannedLinear]] = [[] for _ in model.transformer.h]
    for name, module in model.transformer.h.named_modules():
        if isinstance(module, Linear):
            blocks[int(name.partition(".")[0])].append(PlannedLinear(f"transformer.h.{name}", module, needs_gradient))
            learns = any(parameter.requires_grad for parameter in module.parameters())
            needs_gradient = needs_gradient or learns or model.transformer.prefix is not None
    return blocks


def block_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> list[int]:
    """Bytes that autograd saves of each block besides weights, without recomputation and without dropout."""
    config = model.config
    hidden, part = config.hidden_size, config.hidden_size // tp_degree
    half, stream = load.compute_dtype.itemsize, model.transformer.dtype.itemsize
    norm = hidden * stream + _STATISTICS
    attention = _attention_bytes(model, tp_degree, load)
    inputs = {"query_key_value": hidden, "dense": part, "dense_h_to_4h": hidden, "dense_4h_to_h": 4 * part}
    sizes = []
    for block in block_linears(model):
        needs = {linear.kind: linear.needs_input_gradient for linear in block}
        per_token = norm * (needs["query_key_value"] + needs["dense_h_to_4h"])
        per_token += 4 * part * half * needs["dense_4h_to_h"]  # GELU's input
        for linear in block:
            # results of layer norms and GELU are made again (model/remade.py), unless ranks share the input's gradient
            is_made = linear.needs_input_gradient and linear.kind != "dense"
            is_kept_whole = linear.layer.weight.requires_grad and linear.is_column and tp_degree > 1
            learns = linear.layer.weight.requires_grad or linear.lora_rank
            if is_kept_whole or (learns and not is_made):
                # the operator keeps its results, which are the input of this layer
                is_kept = load.uses_operator and linear.kind == "dense" and needs["dense"]
                per_token += inputs[linear.kind] * (not is_kept) * half
            per_token += linear.lora_rank * half
        sizes.append(per_token * load.num_tokens + attention * needs["dense"])
    return sizes


def _attention_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes of queries, keys, values, results, and in fp32 the logarithm of the sum of each softmax."""
    heads, num_virtual = model.config.n_head // tp_degree, model.transformer.num_virtual_tokens
    half, head_dim = load.compute_dtype.itemsize, model.config.head_dim
    if load.uses_operator:
        virtual = 2 * heads * num_virtual * head_dim * _FP32
        return load.num_tokens * heads * (4 * head_dim * half + _FP32) + virtual
    attended = load.num_tokens + load.num_documents * num_virtual
    return attended * heads * (4 * (head_dim + COLUMNS) * half + _FP32)


def activation_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes that autograd saves of all blocks, the outer layer norms, the position columns and the loss's input."""
    config = model.config
    blocks = block_bytes(model, tp_degree, load)
    stream = config.hidden_size * model.transformer.dtype.itemsize
    kept = len(blocks) * load.num_tokens * stream if load.recompute else sum(blocks)
    outer_norms = 1 + model.transformer.word_embeddings.learns
    columns = 0 if load.uses_operator else 3 * COLUMNS * config.n_head // tp_degree * _FP32
    around = outer_norms * (stream + _STATISTICS) + columns
    return kept + load.num_tokens * around + load.num_supervised_tokens * config.hidden_size * _FP32
