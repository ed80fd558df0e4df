"""BloomForCausalLM with the parameter names and shapes of the published checkpoints.

Everything between the embedding and the head works on packed tokens [N, D]: a padded batch is packed first, so pads
cost no arithmetic. Source: the BLOOM paper (https://arxiv.org/abs/2211.05100) and transformers' modeling_bloom, to
which the tests compare logits and gradients.

Shapes: B batch, T new tokens, N packed tokens, D hidden, H heads, K head_dim, F ffn, V vocabulary, P virtual tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bloomlm.model.alibi import COLUMNS, Alibi, fused_columns, head_slopes, query_columns
from bloomlm.model.attention import Virtual, VirtualTokens, attend, virtual_with_columns, with_columns
from bloomlm.model.causal import causal_attention, takes_causal
from bloomlm.model.config import BloomConfig
from bloomlm.model.decoding import BloomRows, RowAdapters
from bloomlm.model.documents import Documents
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.kv_cache import Extension, KVCache
from bloomlm.model.linear import Linear, autocast_dtype
from bloomlm.model.noise import embedding_noise
from bloomlm.model.products import ROWS_UNIT, takes_multiples
from bloomlm.model.remade import LayerNorm, gelu
from bloomlm.row_memory import RowFeatures, is_paged


class SelfAttention(nn.Module):
    """Multi-head attention over a fused query_key_value whose rows are (head, 3, head_dim)."""

    attend = staticmethod(attend)

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        self.query_key_value = Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: Tensor,
        alibi: Alibi,
        documents: Documents,
        virtual: Virtual,
        layer: int,
        extension: Extension | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[N, D] -> [N, D], or [M, D] for the given rows [M]."""
        context = self.context(x, alibi, documents, virtual, layer, extension)
        return self.dense(context if rows is None else context[rows])

    def context(
        self, x: Tensor, alibi: Alibi, documents: Documents, virtual: Virtual, layer: int, extension: Extension | None
    ) -> Tensor:
        """[N, D] -> [N, D]: the weighted values of all heads, which dense takes."""
        fused = self.query_key_value(x).unflatten(-1, (-1, 3, self.head_dim))
        dropout = self.attention_dropout if self.training else 0.0
        if extension is None and takes_causal(fused, dropout):
            return causal_attention(fused, documents.lengths, alibi.slopes, virtual)
        with self.dense.partition.input_randomness() if dropout else nullcontext():
            fused = with_columns(fused, alibi.columns)
            own = None if virtual is None else virtual_with_columns(*(v.to(fused.dtype) for v in virtual))
            return self.attend(
                fused, documents, head_dim=self.head_dim, virtual=own, layer=layer, extension=extension, dropout=dropout
            )


class MLP(nn.Module):
    """dense_h_to_4h, GELU in its tanh form, dense_4h_to_h."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.ffn_size)
        self.dense_4h_to_h = Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        if torch.is_grad_enabled():
            return self.dense_4h_to_h(gelu(self.dense_h_to_4h(x)))
        return self.dense_4h_to_h(self.dense_h_to_4h.gelu(x))


class BloomBlock(nn.Module):
    """Attention and MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.post_layernorm_residual = config.apply_residual_connection_post_layernorm
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        alibi: Alibi,
        documents: Documents,
        virtual: Virtual = None,
        layer: int = 0,
        extension: Extension | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[N, D] -> [N, D], or [M, D] for the given rows [M]."""
        normed = self.input_layernorm(x)
        attended = self.self_attention(normed, alibi, documents, virtual, layer, extension, rows)
        residual = normed if self.post_layernorm_residual else x
        x = self._add(residual if rows is None else residual[rows], attended)
        normed = self.post_attention_layernorm(x)
        return self._add(normed if self.post_layernorm_residual else x, self.mlp(normed))

    def compile_around_attention(self, backend: str | Callable[..., Any]) -> None:
        """Let torch.compile fuse the operations between the products.

        Attention stays outside, because the lengths of the documents would become constants of the graph, and every
        batch would be compiled anew.
        """
        self.self_attention.attend = torch.compiler.disable(attend)
        self.compile(backend=backend)

    def _add(self, residual: Tensor, update: Tensor) -> Tensor:
        return residual + (F.dropout(update, self.hidden_dropout) if self.training else update)


class BloomModel(nn.Module):
    """Embedding, blocks and last layer norm: tokens to hidden states."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = WordEmbedding(config.vocab_size, config.hidden_size)
        self.word_embeddings_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.h = nn.ModuleList(BloomBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.prefix: VirtualTokens | None = None
        self.heads = range(config.n_head)
        """The heads that are computed here."""
        self.recompute = False
        """Compute each block's activations again in the backward pass instead of keeping them."""
        self.noise_alpha = 0.0
        """Size of the noise on the embeddings in training (model/noise.py); 0: none."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of computations without autocast, which floating-point weights have too."""
        return self.ln_f.weight.dtype

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens of the prefix (P); 0 without one."""
        return 0 if self.prefix is None else self.prefix.num_tokens

    @property
    def is_quantized(self) -> bool:
        """Whether the weights of the linear layers and the embedding are quantised (see quantized.py)."""
        return self.word_embeddings.weight_scale is not None

    def forward(
        self, tokens: Tensor, documents: Documents, extension: Extension | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Run the blocks over packed tokens.

        Args:
            tokens: [N] int64 ids.
            documents: the lengths of the documents that they form.
            extension: the rows of a cache that the documents continue and that receive the new keys and values.
            rows: [M] int64, the tokens whose hidden states are returned; None: all. The last block computes no other
                token's MLP.

        Returns:
            [N, D] hidden states after the last layer norm, or [M, D].
        """
        virtual: Sequence[Virtual] = [None] * len(self.h)
        if self.prefix is not None and (extension is None or extension.free_rows):
            virtual = self.prefix()
        x = self.word_embeddings(tokens).to(self.dtype)
        if self.training and self.noise_alpha:
            x = x + embedding_noise(x, documents, self.noise_alpha)
        x = self.word_embeddings_layernorm(x)
        if extension is None and takes_multiples(x):
            documents = documents.in_multiples(ROWS_UNIT)
            x = F.pad(x, (0, 0, 0, sum(documents.lengths) - len(x)))
        positions = documents.positions(tokens.device) if extension is None else extension.positions
        alibi = self.alibi(positions, extension)
        for layer, block in enumerate(self.h):
            block_rows = rows if layer == len(self.h) - 1 else None
            if self.recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, alibi, documents, virtual[layer], rows=block_rows, use_reentrant=False)
            else:
                x = block(x, alibi, documents, virtual[layer], layer, extension, block_rows)
        if extension is not None:
            extension.commit()
        return self.ln_f(x if rows is not None else x[: len(tokens)])

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Let torch.compile fuse the small operations of every block; to be called after the adapter is installed."""
        for block in self.h:
            assert isinstance(block, BloomBlock)
            block.compile_around_attention(backend)

    def alibi(self, positions: Tensor, extension: Extension | None = None) -> Alibi:
        """What attention needs of the positions [N] of new tokens."""
        kind = positions.device.type
        if extension is None:
            all_slopes = head_slopes(self.config.n_head)
            here = [all_slopes[head] for head in self.heads]
            slopes = torch.tensor(here, dtype=torch.float32, device=positions.device)
            query = query_columns(slopes, self.config.head_dim)
        else:
            slopes, query = extension.cache.slopes, extension.cache.query_columns
        # in the precision of queries and keys at once, not in every block
        return Alibi(slopes, fused_columns(positions, query).to(autocast_dtype(kind) or self.dtype))


class BloomForCausalLM(nn.Module):
    """BLOOM with its language-model head, which is the word embedding (tied)."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = BloomModel(config)
        self.adapters: RowAdapters | None = None
        """Adapters with names, of which each row of a cache may use another one."""

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: matrices from N(0, initializer_range), biases 0, layer norms 1 and 0."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                if isinstance(module, (nn.Linear, nn.LayerNorm)):
                    module.bias.zero_()

    @property
    def vocab_size(self) -> int:
        """Number of ids (V)."""
        return self.config.vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a continuation."""
        return self.config.eos_token_id

    @property
    def features(self) -> RowFeatures:
        """What the rows of this model can do."""
        return RowFeatures(
            scores_chunks=True,
            truncates=True,
            blocks=True,
            adapters=self.adapters is not None,
            paged=is_paged(self.transformer.word_embeddings.weight.device),
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all blocks, for the heads that are computed here."""
        config, dtype = self.config, self.transformer.dtype
        width = config.head_dim + COLUMNS
        return 2 * config.n_layer * len(self.transformer.heads) * width * dtype.itemsize

    def open_rows(self, num_rows: int, num_tokens: int) -> BloomRows:
        """Room for num_rows sequences of at most num_tokens tokens each, which this model reads and continues."""
        return BloomRows(self, num_rows, num_tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] hidden states -> [..., V] logits."""
        return self.transformer.word_embeddings.logits(hidden)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kv_cache: KVCache | None = None
    ) -> Tensor:
        """Logits of a padded batch.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], nonzero at real tokens, with pads on either side; None: no pads.
            kv_cache: a cache of B rows, which the batch continues and which receives the new keys and values.

        Returns:
            [B, T, V]; rows of pads hold zeros.
        """
        if attention_mask is None:
            documents = Documents.equal(*input_ids.shape)
        else:
            documents = Documents.from_mask(attention_mask)
        extension = None if kv_cache is None else kv_cache.extend(range(len(input_ids)), documents.lengths)
        hidden = self.transformer(documents.pack(input_ids), documents, extension)
        return self.logits(documents.unpack(hidden))
