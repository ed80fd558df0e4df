"""Calibrated int4: a model's tensors for a program, rounded one block after another on the tokens of some text.

The hidden states of all tokens are kept twice, as they are in the model and as they are in the program. Each of a
block's four layers is rounded (gptq.py) for the inputs that it has in the program; then the tokens pass through it.
Layers that write into the residual stream are to bring it back to the model's. So memory holds the hidden states, two
copies of one block in fp32, and the moments of one layer; the rest of the model stays in its mapped file.

Shapes: W windows of T tokens, N = W T tokens, D hidden, n outputs of a layer.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import groupby, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from bloomlm.checkpoint.merge import merged_parameters
from bloomlm.data.corpus import find_corpus
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError
from bloomlm.export.gptq import DAMPING, Moments, add_damping, cholesky, round_linear, round_matrix
from bloomlm.export.graph import look_up
from bloomlm.export.weight_formats import Int4, Parts
from bloomlm.export.weights import FREQUENT, FREQUENT_PLACES, SLOPES, layer_of, stored_name
from bloomlm.model.alibi import Alibi, fused_columns, head_slopes, query_columns
from bloomlm.model.bloom import BloomBlock, BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents
from bloomlm.model.linear import Linear

WINDOW_TOKENS = 512
MOST_WINDOWS = 128
"""Windows that are used of a longer text."""
FEWEST_WINDOWS = 16
"""Windows that a text must have; with fewer, its accidents outweigh what it says."""
_CHUNK_TOKENS = 2048
"""Tokens that are computed at a time."""
_FREQUENT_SHARE = 0.95
"""Share of a text that its frequent tokens make up, if they are not too many."""
_PIECES = 64


def calibration_windows(path: str, tokenizer: Tokenizer) -> Tensor:
    """The first tokens of texts, [W, T] int64; documents follow one another, closed by </s>.

    Args:
        path: a file or a directory, as data.corpus reads it.
        tokenizer: of the model.

    Raises:
        DataError: the texts cannot be read, or have too few tokens.
    """
    tokens: list[int] = []
    pieces = find_corpus([path]).pieces()
    while len(tokens) < MOST_WINDOWS * WINDOW_TOKENS and (batch := list(islice(pieces, _PIECES))):
        for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
            tokens += [*ids, tokenizer.eos_token_id] if piece.ends_document else ids
    windows = min(len(tokens) // WINDOW_TOKENS, MOST_WINDOWS)
    if windows < FEWEST_WINDOWS:
        raise DataError(
            f"--calibration_file {path}: {len(tokens):,} tokens, expected at least {FEWEST_WINDOWS * WINDOW_TOKENS:,}, "
            f"and better {MOST_WINDOWS * WINDOW_TOKENS:,}; give more text"
        )
    return torch.tensor(tokens[: windows * WINDOW_TOKENS]).view(windows, WINDOW_TOKENS)


def frequent_tokens(windows: Tensor, vocab_size: int) -> Tensor:
    """The ids [F], in order, of the tokens whose rows have more bits when looked up, at most an eighth of all.

    A row that is looked up stands alone, so no other weight makes up for its error; and few tokens are most of a text.
    """
    counts, tokens = torch.bincount(windows.flatten(), minlength=vocab_size).sort(descending=True, stable=True)
    wanted = int((counts.cumsum(0) < _FREQUENT_SHARE * windows.numel()).sum()) + 1
    most = min(max(1, vocab_size // 8), torch.iinfo(torch.int16).max)
    return tokens[: min(wanted, most)].sort().values


@torch.no_grad()
def calibrated_tensors(
    model: BloomForCausalLM, windows: Tensor, on_share: Callable[[float], None] = lambda share: None
) -> Iterator[tuple[str, Tensor]]:
    """As export.weights.named_tensors in int4, with weights and biases chosen on text.

    Args:
        model: in eval mode, with or without an adapter.
        windows: [W, T] int64.
        on_share: called with the share of the work that is done.

    Raises:
        CheckpointError: a weight or a hidden state is not finite.
    """
    num_stages = 1 + model.config.n_layer
    calibration = _Calibration(model, windows)
    yield SLOPES, torch.tensor(head_slopes(model.config.n_head))
    for layer, group in groupby(merged_parameters(model, torch.float32), key=lambda item: layer_of(item[0])):
        if layer is not None:
            yield from calibration.block(layer, dict(group))
            on_share((layer + 2) / num_stages)
            continue
        for name, parameter in group:
            if parameter.dim() == 2:
                on_share(0.0)
                yield from calibration.embedding(parameter, name).items()
                on_share(1 / num_stages)
            else:
                yield stored_name(name), parameter


class _Calibration:
    """The hidden states of all tokens in the model and in the program, up to the block that is rounded next."""

    def __init__(self, model: BloomForCausalLM, windows: Tensor) -> None:
        self._model, self._config = model, model.config
        self._tokens = windows.flatten()
        count, length = windows.shape
        per_chunk = max(1, _CHUNK_TOKENS // length)
        self._chunks = [
            (slice(start * length, stop * length), Documents.equal(stop - start, length))
            for start in range(0, count, per_chunk)
            for stop in [min(start + per_chunk, count)]
        ]
        prefix = model.transformer.prefix
        self._virtual = None if prefix is None else [(key.float(), value.float()) for key, value in prefix()]
        self._wanted = self._found = torch.empty(0)  # until the embedding is rounded

    def embedding(self, matrix: Tensor, name: str) -> dict[str, Tensor]:
        """Round the embedding for the hidden states that the head multiplies, and look the tokens up in it."""
        squares = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
        for rows, documents in self._chunks:
            hidden = self._model.transformer(self._tokens[rows], documents).float()
            squares += hidden.t() @ hidden
        squares /= len(self._tokens)
        add_damping(squares, DAMPING)
        parts = round_matrix(matrix, cholesky(squares, name), name)
        stored = {stored_name(name, suffix): part for suffix, part in parts.items()}
        stored.update(_frequent_rows(matrix, parts, frequent_tokens(self._tokens, len(matrix)), name))
        norm = self._model.transformer.word_embeddings_layernorm
        self._wanted, self._found = (
            F.layer_norm(rows, norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
            for rows in (matrix[self._tokens].float(), look_up(self._tokens, stored, Int4()))
        )
        return stored

    def block(self, layer: int, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Round the layers of a block, and take the tokens through it.

        Args:
            layer: number of the block.
            parameters: its parameters by their published names, in fp32.
        """
        beginning = f"transformer.h.{layer}."
        own = {name.removeprefix(beginning): parameter.detach().float() for name, parameter in parameters.items()}
        virtual = None if self._virtual is None else self._virtual[layer]
        block = _RoundedBlock(self._config, own, virtual, wanted=self._wanted, found=self._found)
        for name, linear, look in block.stages():
            moments = Moments(linear.in_features, linear.out_features)
            for rows, documents in self._chunks:
                moments.add(*look(rows, documents))
            weight = f"{beginning}{name}.weight"
            for suffix, part in round_linear(linear, moments, weight).items():
                yield stored_name(weight, suffix), part
            yield stored_name(f"{beginning}{name}.bias"), linear.bias.data
        for rows, _ in self._chunks:
            block.finish(rows)
        yield from ((stored_name(name), value) for name, value in parameters.items() if "layernorm" in name)


def _frequent_rows(matrix: Tensor, parts: Parts, tokens: Tensor, name: str) -> dict[str, Tensor]:
    """What rounding [V, D] took from the rows of some tokens, and their places among these."""
    places = torch.full((len(matrix),), -1, dtype=torch.int16)
    places[tokens] = torch.arange(len(tokens), dtype=torch.int16)
    rest = matrix[tokens].float() - Int4().decode({suffix: part[tokens] for suffix, part in parts.items()})
    encoded = Int4().encode(rest, name)
    return {FREQUENT_PLACES: places, **{f"{FREQUENT}.{suffix}": part for suffix, part in encoded.items()}}


Look = Callable[[slice, Documents], tuple[Tensor, Tensor]]
"""From a chunk of tokens to the inputs [N, D] of a layer in the program and the outputs [N, n] that it should have."""


class _RoundedBlock:
    """A block in the model and in the program, and the hidden states on both sides, which pass through it.

    Args:
        config: the model's shape.
        parameters: of the block, by their names in it, in fp32.
        virtual: keys and values that stand before every document.
        wanted: [N, D] hidden states before the block in the model; afterwards those behind it.
        found: [N, D] those in the program.
    """

    def __init__(
        self,
        config: BloomConfig,
        parameters: Mapping[str, Tensor],
        virtual: tuple[Tensor, Tensor] | None,
        *,
        wanted: Tensor,
        found: Tensor,
    ) -> None:
        self._model, self._program = _block(config, parameters), _block(config, parameters)
        self._virtual = virtual
        self._slopes = torch.tensor(head_slopes(config.n_head))
        self._query_columns = query_columns(self._slopes, config.head_dim)
        self._wanted, self._found, self._context = wanted, found, torch.empty_like(found)

    def stages(self) -> tuple[tuple[str, Linear, Look], ...]:
        """Name, layer and tokens of each layer; all chunks are looked at and the layer is rounded before the next."""
        attention, mlp = self._program.self_attention, self._program.mlp
        return (
            ("self_attention.query_key_value", attention.query_key_value, self._before_attention),
            ("self_attention.dense", attention.dense, self._behind_attention),
            ("mlp.dense_h_to_4h", mlp.dense_h_to_4h, self._before_mlp),
            ("mlp.dense_4h_to_h", mlp.dense_4h_to_h, self._in_mlp),
        )

    def finish(self, rows: slice) -> None:
        """Take a chunk of the program's tokens through the rounded MLP."""
        residual, normed = _normed(self._program, "post_attention_layernorm", self._found[rows])
        self._found[rows] = residual + self._program.mlp(normed)

    def _before_attention(self, rows: slice, documents: Documents) -> tuple[Tensor, Tensor]:
        normed = self._model.input_layernorm(self._wanted[rows])
        return self._program.input_layernorm(self._found[rows]), self._model.self_attention.query_key_value(normed)

    def _behind_attention(self, rows: slice, documents: Documents) -> tuple[Tensor, Tensor]:
        positions = documents.positions(self._found.device)
        alibi = Alibi(self._slopes, fused_columns(positions, self._query_columns))
        residual, normed = _normed(self._model, "input_layernorm", self._wanted[rows])
        self._wanted[rows] = residual + self._model.self_attention(normed, alibi, documents, self._virtual, 0, None)
        residual, normed = _normed(self._program, "input_layernorm", self._found[rows])
        self._context[rows] = self._program.self_attention.context(normed, alibi, documents, self._virtual, 0, None)
        return self._context[rows], self._wanted[rows] - residual

    def _before_mlp(self, rows: slice, documents: Documents) -> tuple[Tensor, Tensor]:
        residual, _ = _normed(self._program, "input_layernorm", self._found[rows])
        self._found[rows] = residual + self._program.self_attention.dense(self._context[rows])
        normed = self._model.post_attention_layernorm(self._wanted[rows])
        return self._program.post_attention_layernorm(self._found[rows]), self._model.mlp.dense_h_to_4h(normed)

    def _in_mlp(self, rows: slice, documents: Documents) -> tuple[Tensor, Tensor]:
        residual, normed = _normed(self._model, "post_attention_layernorm", self._wanted[rows])
        self._wanted[rows] = residual + self._model.mlp(normed)
        residual, normed = _normed(self._program, "post_attention_layernorm", self._found[rows])
        return self._program.mlp.dense_h_to_4h.gelu(normed), self._wanted[rows] - residual


def _block(config: BloomConfig, parameters: Mapping[str, Tensor]) -> BloomBlock:
    with torch.device("meta"):
        block = BloomBlock(config)
    block.load_state_dict(dict(parameters), assign=True)
    return block.eval()


def _normed(block: BloomBlock, norm: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The residual of hidden states before a layer norm, and what the norm makes of them."""
    normed = getattr(block, norm)(hidden)
    return normed if block.post_layernorm_residual else hidden, normed
