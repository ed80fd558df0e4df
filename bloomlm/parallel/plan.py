"""The memory that a rank of a job will use, computed before anything is loaded.

The model with its adapter is created on the meta device, and its parameters are cut by the table in layout.py. What
autograd saves of a block is listed here operation by operation; tests compare it with what autograd really saves. All
numbers describe the first rank, which uses the most.

Memory is largest either when the loss is computed (all activations, few gradients) or at the end of the backward pass
(all gradients, few activations). Not counted are the memory of the libraries and memory that an allocator leaves
unused.

Letters: N packed tokens, M supervised tokens, R lora rank.
"""

from dataclasses import dataclass

import torch
from torch import nn

from bloomlm.model.alibi import COLUMNS
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.kv_cache import KVCache
from bloomlm.model.linear import Linear
from bloomlm.parallel.layout import dealt_rows, tp_dim, tp_part
from bloomlm.parallel.mesh import Degrees

GRADIENT_BYTES = 4
"""Gradients are accumulated in fp32, whatever the dtype of the weights (training/precision.py)."""
MOMENTS_BYTES = 8
"""AdamW's two moments of an element, in fp32."""
STEP_BYTES = 4
"""AdamW's count of steps, one for each tensor."""
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
    reshards: bool = True
    """Whether FSDP frees a block's gathered weights between its forward and backward pass (stage 3)."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory of a rank in training, in bytes."""

    weights: int
    """All parameters."""
    gradients: int
    """Gradients of the parameters that learn, in fp32."""
    optimizer: int
    """AdamW's moments, and fp32 copies of half-precision weights."""
    activations: int
    """Tensors that the forward pass saves for the backward pass, and the working memory of one block."""
    half_copies: int
    """16-bit copies of weights that autocast makes (O1) and keeps until the backward pass."""
    gathered: int
    """The most weights that FSDP has gathered from other ranks at once."""
    loss: int
    """A chunk of logits, and the gradient of the head."""
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
    heads, width = config.n_head // tp_degree, config.head_dim + COLUMNS
    half, stream = load.compute_dtype.itemsize, model.transformer.dtype.itemsize
    norm = hidden * stream + _STATISTICS
    # queries, keys, values, results, and in fp32 the logarithm of the sum of each softmax
    attended = load.num_tokens + load.num_documents * model.transformer.num_virtual_tokens
    attention = attended * heads * (4 * width * half + _FP32)
    inputs = {"query_key_value": hidden, "dense": part, "dense_h_to_4h": hidden, "dense_4h_to_h": 4 * part}
    sizes = []
    for block in block_linears(model):
        needs = {linear.kind: linear.needs_input_gradient for linear in block}
        per_token = norm * (needs["query_key_value"] + needs["dense_h_to_4h"])
        per_token += 4 * part * half * needs["dense_4h_to_h"]  # GELU's input
        for linear in block:
            if linear.layer.weight.requires_grad or linear.lora_rank:
                per_token += (inputs[linear.kind] + linear.lora_rank) * half
        sizes.append(per_token * load.num_tokens + attention * needs["dense"])
    return sizes


def activation_bytes(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes that autograd saves of all blocks, the outer layer norms, the position columns and the loss's input."""
    config = model.config
    blocks = block_bytes(model, tp_degree, load)
    stream = config.hidden_size * model.transformer.dtype.itemsize
    kept = len(blocks) * load.num_tokens * stream if load.recompute else sum(blocks)
    outer_norms = 1 + model.transformer.word_embeddings.learns
    around = outer_norms * (stream + _STATISTICS) + 3 * COLUMNS * config.n_head // tp_degree * _FP32
    return kept + load.num_tokens * around + load.num_supervised_tokens * config.hidden_size * _FP32


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
    half_copies, chunk = _half_copies(model, degrees.tp, load), _loss_chunk_bytes(model, degrees.tp, load)
    embedding = model.transformer.word_embeddings.weight
    head_gradient = embedding.numel() // degrees.tp * GRADIENT_BYTES * embedding.requires_grad
    # with weights in half precision, autograd adds the gradients of embedding and head out of place
    tied_sum = embedding.nbytes // degrees.tp * (embedding.requires_grad and embedding.dtype is not torch.float32)
    # until the end of the backward pass every FSDP rank holds the gradients outside the blocks whole
    gradients_then = gradients - root_gradient // degrees.dp_shard + root_gradient
    fixed = weights + optimizer + gathered
    earlier = gradients if load.accumulation > 1 else 0
    return TrainingMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=kept + block,
        half_copies=half_copies,
        gathered=gathered,
        loss=chunk + head_gradient,
        at_loss=fixed + earlier + kept + half_copies + head_gradient + max(chunk, block),
        at_end_of_backward=fixed + gradients_then + max(block, block_gradients, tied_sum),
    )


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
    per_token = (3 * config.hidden_size + 8 * config.hidden_size // tp_degree) * dtype.itemsize
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


def _half_copies(model: BloomForCausalLM, tp_degree: int, load: Workload) -> int:
    """Bytes of 16-bit copies of the blocks' matrices: autocast keeps those that learn, autograd those it needs."""
    half, degrees = load.compute_dtype.itemsize, Degrees(tp=tp_degree)
    if half == model.transformer.dtype.itemsize:
        return 0
    numel = 0
    for linear in (linear for block in block_linears(model) for linear in block):
        needed = linear.needs_input_gradient and not load.recompute
        # a column-parallel product makes its copy outside the cache of autocast
        cached = linear.layer.weight.requires_grad and not (load.recompute and linear.is_column and tp_degree > 1)
        # the input of an update's second matrix depends on the first matrix, which learns
        second = linear.layer.update_matrices[1:]
        for kind, parameter in linear.layer.named_parameters():
            is_copied = parameter.dim() == 2 and parameter.is_floating_point() and (cached or needed)
            if is_copied or any(parameter is matrix for matrix in second):
                numel += rank_numel(f"{linear.name}.{kind}", parameter, degrees)
    return numel * half


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
