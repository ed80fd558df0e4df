"""The memory that a rank of a job will use, computed before anything is loaded.

The model with its adapter is created on the meta device, and its parameters are cut by the table in layout.py. What
autograd saves is in workload.py. All numbers describe the first rank, which uses the most.

Memory is largest either when the loss is computed (all activations, few gradients) or at the end of the backward pass
(all gradients, few activations). Not counted are the memory of the libraries and memory that an allocator leaves
unused.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.kv_cache import KVCache
from bloomlm.parallel.layout import dealt_rows, tp_part
from bloomlm.parallel.mesh import Degrees
from bloomlm.parallel.workload import Workload, activation_bytes, block_bytes, block_linears

GRADIENT_BYTES = 4
"""Gradients are accumulated in fp32, whatever the dtype of the weights (training/precision.py)."""
MOMENTS_BYTES = 8
"""AdamW's two moments of an element, in fp32."""
STEP_BYTES = 4
"""AdamW's count of steps, one for each tensor."""
_FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory of a rank in training, in bytes."""

    weights: int
    """All parameters."""
    gradients: int
    """Gradients of the parameters that learn, in fp32; with a fused update the largest of a block's."""
    optimizer: int
    """AdamW's moments, and fp32 copies of half-precision weights."""
    activations: int
    """Tensors that the forward pass saves for the backward pass, and the working memory of one block."""
    rounded: int
    """16-bit copy of a weight for its product (O1), which is made anew in the backward pass."""
    gathered: int
    """The most weights that FSDP has gathered from other ranks at once."""
    loss: int
    """A chunk of logits, and the gradient of the head, or factors of it."""
    at_loss: int
    """Total while the loss or the gradients of the last block are computed."""
    at_end_of_backward: int
    """Total at the end of the backward pass."""

    @property
    def peak(self) -> int:
        """The largest total at any moment."""
        return max(self.at_loss, self.at_end_of_backward)


@dataclass(frozen=True, kw_only=True)
class PredictionMemory:
    """Memory of a rank during generation, in bytes."""

    weights: int
    """All parameters."""
    kv_cache: int
    """Keys and values of all sequences."""
    activations: int
    """Activations of one block for all prompts, and the logits of one token of each."""

    @property
    def peak(self) -> int:
        """The total."""
        return self.weights + self.kv_cache + self.activations


def rank_numel(name: str, parameter: nn.Parameter, degrees: Degrees) -> int:
    """Number of elements of a whole parameter that the first rank holds."""
    shape = list(tp_part(name, 0, degrees.tp).shape(tuple(parameter.shape)))
    shape[0] = dealt_rows(shape[0], 0, degrees.dp_shard)[1]
    return torch.Size(shape).numel()


def parameter_bytes(model: BloomForCausalLM, degrees: Degrees) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state of the first rank, for the arguments of training_memory."""
    weights = gradients = optimizer = 0
    for name, parameter in model.named_parameters():
        numel = rank_numel(name, parameter, degrees)
        weights += numel * parameter.itemsize
        if parameter.requires_grad:
            gradients += numel * GRADIENT_BYTES
            optimizer += numel * (MOMENTS_BYTES + (parameter.itemsize < _FP32) * _FP32) + STEP_BYTES
    weights += sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("weight_scale"))
    return weights, gradients, optimizer


def training_memory(model: BloomForCausalLM, degrees: Degrees, load: Workload) -> TrainingMemory:
    """Memory of the first rank in training.

    Args:
        model: the whole model with its adapter, in the dtype that its weights will have; may be on the meta device.
        degrees: ranks along each axis, which must divide the model (mesh.check_model_divides).
        load: the work of one rank in a step.
    """
    weights, gradients, optimizer = parameter_bytes(model, degrees)
    kept, block = activation_bytes(model, degrees.tp, load), block_bytes(model, degrees.tp, load)[-1]
    gathered, root_gradient, block_gradients = _fsdp_bytes(model, degrees, load)
    rounded, chunk = _rounded_bytes(model, degrees.tp, load), _loss_chunk_bytes(model, degrees.tp, load)
    embedding = model.transformer.word_embeddings.weight
    head_gradient = _head_gradient_bytes(model, degrees.tp, load)
    factors_head = _factors_head(model, load)
    # autograd has the gradient of a head in half precision in half precision too, unless it is kept in factors
    is_rounded = embedding.requires_grad and embedding.dtype is not torch.float32 and not factors_head
    rounded_gradient = embedding.nbytes // degrees.tp * is_rounded
    # until the end of the backward pass every FSDP rank holds the gradients outside the blocks whole
    gradients_then = gradients - root_gradient // degrees.dp_shard + root_gradient
    if load.fuses_update:
        gradients = max(p.nbytes for p in model.transformer.h.parameters())
        gradients_then = gradients
    if load.fuses_update or factors_head:
        gradients_then += head_gradient
    fixed = weights + optimizer + gathered
    earlier = gradients if load.accumulation > 1 else 0
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + block,
        rounded=rounded,
        gathered=gathered,
        loss=chunk + head_gradient,
        at_loss=fixed + earlier + kept + head_gradient + max(chunk, block + rounded),
        at_end_of_backward=fixed + gradients_then + max(block + rounded, block_gradients, rounded_gradient),
    )


def scoring_memory(model: BloomForCausalLM, degrees: Degrees, load: Workload, num_tokens: int) -> int:
    """Memory of the first rank while it scores tokens without gradients, in bytes.

    Args:
        model: a model that does not learn; may be on the meta device.
        degrees: ranks along each axis.
        load: the work of a training step, of which dtype and chunks count.
        num_tokens: number of tokens of a batch, all of them with labels.
    """
    per_token = _forward_numel_per_token(model, degrees.tp) * load.compute_dtype.itemsize
    chunk = _loss_chunk_bytes(model, degrees.tp, replace(load, num_supervised_tokens=num_tokens))
    gathered = _fsdp_bytes(model, degrees, load)[0]
    return parameter_bytes(model, degrees)[0] + gathered + num_tokens * per_token + chunk


def _forward_numel_per_token(model: BloomForCausalLM, tp_degree: int) -> int:
    """Elements of the activations of one block that exist at once without gradients, for each token."""
    return 3 * model.config.hidden_size + 8 * model.config.hidden_size // tp_degree


def prediction_memory(model: BloomForCausalLM, tp_degree: int, batch_size: int, num_tokens: int) -> PredictionMemory:
    """Memory of the first rank during generation.

    Args:
        model: the whole model in the dtype that its weights will have; may be on the meta device.
        tp_degree: number of tensor-parallel ranks.
        batch_size: number of sequences at once.
        num_tokens: number of tokens of each sequence, prompt and generated tokens together.
    """
    config = model.config
    dtype = model.transformer.dtype
    slots = num_tokens + model.transformer.num_virtual_tokens
    heads = config.n_head // tp_degree
    cache = KVCache(config, batch_size, slots, dtype=dtype, device="meta", heads=range(heads))
    per_token = _forward_numel_per_token(model, tp_degree) * dtype.itemsize
    logits = batch_size * config.vocab_size * (dtype.itemsize + _FP32)
    return PredictionMemory(
        weights=parameter_bytes(model, Degrees(tp=tp_degree))[0],
        kv_cache=cache.keys.nbytes + cache.values.nbytes,
        activations=batch_size * num_tokens * per_token + logits,
    )


def _fsdp_bytes(model: BloomForCausalLM, degrees: Degrees, load: Workload) -> tuple[int, int, int]:
    """Bytes of the weights gathered at once, of gradients outside blocks, and of gradients and copies of two blocks."""
    if degrees.dp_shard == 1:
        return 0, 0, 0
    root, root_gradient, blocks, learned = 0, 0, 0, 0
    for name, parameter in model.named_parameters():
        numel = rank_numel(name, parameter, degrees) * degrees.dp_shard
        if name.startswith("transformer.h."):
            blocks += numel * parameter.itemsize
            learned += numel * (parameter.itemsize + GRADIENT_BYTES) * parameter.requires_grad
        else:
            root += numel * parameter.itemsize
            root_gradient += numel * GRADIENT_BYTES * parameter.requires_grad
    num_blocks = model.config.n_layer
    two = min(2, num_blocks)
    return root + (blocks * two // num_blocks if load.reshards else blocks), root_gradient, learned * two // num_blocks


def _rounded_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes of the largest weight of the blocks in 16 bits, where weights are rounded for each product."""
    half = load.compute_dtype.itemsize
    weights = [(f"{linear.name}.weight", linear.layer.get_parameter("weight")) for linear in block_linears(model)[0]]
    counts = [rank_numel(name, weight, Degrees(tp=tp_degree)) for name, weight in weights if weight.itemsize > half]
    return half * max(counts, default=0)


def _factors_head(model: BloomForCausalLM, load: Workload) -> bool:
    """Whether the head's gradient is kept in two factors, because they are smaller."""
    return load.factors_head and load.num_supervised_tokens <= model.config.hidden_size


def _head_gradient_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes of the gradient of the head, or of its larger factor where that is kept instead."""
    embedding = model.transformer.word_embeddings.weight
    if _factors_head(model, load):
        size = load.num_supervised_tokens * len(embedding) * load.compute_dtype.itemsize
    else:
        size = embedding.numel() * GRADIENT_BYTES
    return size // tp_degree * embedding.requires_grad


def _loss_chunk_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes of a chunk of logits in fp32, and of 16-bit copies of it and of the head if products are in 16 bits."""
    vocab_size = model.config.vocab_size // tp_degree
    most_rows = max(1, load.max_chunk_bytes // (vocab_size * _FP32))
    num_chunks = max(1, -(-load.num_supervised_tokens // most_rows))
    logits = -(-load.num_supervised_tokens // num_chunks) * vocab_size
    half = load.compute_dtype.itemsize
    if half == _FP32:
        return logits * _FP32
    embedding = model.transformer.word_embeddings.weight
    copies = (embedding.itemsize != half and embedding.is_floating_point()) + embedding.requires_grad
    return logits * (_FP32 + half) + embedding.numel() // tp_degree * half * copies
