"""Decoding steps whose blocks are one operator each (kernels/block.cpp).

Where each product, norm and sum is an operator of its own, a step of one sequence spends a tenth of its time between
products. The modules compute the same, and all that the operator does not: gradients, adapters, quantised weights,
parts of weights, hooks.

Shapes: B rows, D hidden.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bloomlm.kernels.compiled import operators
from bloomlm.model.attention import takes_attend
from bloomlm.model.kv_cache import Extension
from bloomlm.model.linear import Linear
from bloomlm.model.partition import WHOLE
from bloomlm.model.products import COLUMNS, PLAIN
from bloomlm.model.remade import LayerNorm

if TYPE_CHECKING:
    from bloomlm.model.bloom import BloomBlock, BloomForCausalLM, BloomModel


@dataclass(frozen=True)
class PlainBlocks:
    """The weights of blocks that consist of plain products and norms."""

    weights: list[list[Tensor]]
    """Of each block, in the order of its layers, weight and bias."""
    epsilon: float
    """Of the layer norms."""
    post_norm: bool
    """Whether the results of layer norms are the residual stream."""

    @classmethod
    def of(cls, model: "BloomForCausalLM") -> "PlainBlocks | None":
        """The blocks of a model as it is now; None if a module computes anything else, or has hooks."""
        transformer = model.transformer
        if model.adapters is not None or _has_hooks(transformer):
            return None
        weights, blocks = [], cast("list[BloomBlock]", transformer.h)
        for block in blocks:
            attention, mlp = block.self_attention, block.mlp
            layers = (
                *(block.input_layernorm, attention.query_key_value, attention.dense),
                *(block.post_attention_layernorm, mlp.dense_h_to_4h, mlp.dense_4h_to_h),
            )
            if not all(map(_is_plain, layers)) or any(map(_has_hooks, (block, attention, mlp, *layers))):
                return None
            weights.append([tensor for layer in layers for tensor in (layer.weight, layer.bias)])
        config = model.config
        return cls(weights, config.layer_norm_epsilon, config.apply_residual_connection_post_layernorm)

    def take(self, extension: Extension) -> bool:
        """Whether the operator computes new tokens of a cache."""
        return takes_attend(self.weights[0][0], extension) and not torch.is_autocast_enabled("cpu")

    def hidden_states(self, transformer: "BloomModel", tokens: Tensor, extension: Extension) -> Tensor:
        """What the transformer returns for one new token [B] of each row -> [B, D]; the cache receives them."""
        loaded = operators()
        assert loaded is not None
        cache, rows, slots = extension.cache.tensor, extension.token_rows, extension.slots
        alibi = transformer.alibi(extension.positions, extension)
        x = transformer.word_embeddings_layernorm(transformer.word_embeddings(tokens).to(transformer.dtype))
        for layer, weights in enumerate(self.weights):
            x = loaded.decode_block(
                x, *weights, cache, layer, alibi.columns, alibi.slopes, rows, slots, self.epsilon, self.post_norm
            )
        extension.commit()
        hidden: Tensor = transformer.ln_f(x)
        return hidden


def _is_plain(layer: Any) -> bool:
    if type(layer) is Linear:
        if layer.weight_scale is not None or layer.partition is not WHOLE or layer.in_features % COLUMNS:
            return False
    elif type(layer) is not LayerNorm:
        return False
    return all(type(tensor) in PLAIN and tensor.is_contiguous() for tensor in (layer.weight, layer.bias))


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
