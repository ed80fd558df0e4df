"""How PaddleNLP names, orients and cuts BLOOM's parameters, and how the pieces of its ranks are joined.

Structured names ("bloom.h.0.mlp.dense_h_to_4h.weight") differ from the published ones by their prefix, which files of
the bare model leave out. Variable names ("linear_2.w_0") are numbered in the order in which the layers were built.
A linear's weight is stored (in, out). Pieces are joined lazily: a slice reads only from the ranks that hold it.

Shapes: D hidden, V vocabulary.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from bloomlm.checkpoint.paddle.lazy import joined, replicated, transposed
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError, name_some
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import tp_dim

MODEL_PREFIX = "transformer."
PADDLE_PREFIX = "bloom."
EMBEDDING = "transformer.word_embeddings.weight"
# A second copy of the embedding. In files that PaddleNLP merged from t ranks it has only rank 0's V/t rows.
HEADS = ("lm_head.decoder_weight", "lm_head.weight")
LINEARS = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")
VARIABLE = re.compile(r"(embedding|layer_norm|linear)_(\d+)\.(w|b)_0")


@dataclass(frozen=True)
class Cut:
    """The published shape of a parameter, and the dimension that ranks divide (None: each rank holds the whole)."""

    shape: tuple[int, ...]
    dim: int | None

    def piece_shape(self, tp_degree: int) -> tuple[int, ...]:
        """The shape of one rank's piece."""
        return tuple(size // tp_degree if dim == self.dim else size for dim, size in enumerate(self.shape))


def model_cuts(config: BloomConfig) -> dict[str, Cut]:
    """Published name -> shape and cut of every parameter of a model; PaddleNLP cuts as bloomlm does."""
    d, ffn = config.hidden_size, config.ffn_size
    outputs_inputs = {
        "self_attention.query_key_value": (3 * d, d),
        "self_attention.dense": (d, d),
        "mlp.dense_h_to_4h": (ffn, d),
        "mlp.dense_4h_to_h": (d, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    norms = ["transformer.word_embeddings_layernorm", "transformer.ln_f"]
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}."
        norms += [block + norm for norm in BLOCK_NORMS]
        for linear, (outputs, inputs) in outputs_inputs.items():
            shapes[f"{block}{linear}.weight"] = (outputs, inputs)
            shapes[f"{block}{linear}.bias"] = (outputs,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (d,)
    return {name: Cut(shape, tp_dim(name)) for name, shape in shapes.items()}


def published_name(stored_name: str) -> str:
    """The published name for a structured name with or without PaddleNLP's prefix."""
    return MODEL_PREFIX + stored_name.removeprefix(PADDLE_PREFIX).removeprefix(MODEL_PREFIX)


def stored_name(name: str) -> str:
    """The structured name, with PaddleNLP's prefix, for a published name."""
    return PADDLE_PREFIX + name.removeprefix(MODEL_PREFIX)


def is_linear_weight(name: str) -> bool:
    """Whether a parameter, under any of its names, is the weight of a linear layer, which is stored (in, out)."""
    return any(name.endswith(f"{linear}.weight") for linear in LINEARS)


def published_tensors(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """A state dict's tensors under published names and in the published orientation.

    Args:
        tensors: under structured names or variable names, as stored.
        source: name of the file in error messages.

    Raises:
        CheckpointError: two tensors have one name, a linear's weight is not a matrix, or the variable names are not
            those of a BLOOM.
    """
    if tensors and all(VARIABLE.fullmatch(name) for name in tensors):
        names = structured_by_variable(tensors, source)
        tensors = {names[variable]: tensor for variable, tensor in tensors.items()}
    heads = [tensors[name] for name in HEADS if name in tensors]
    published: dict[str, LazyTensor] = {}
    for stored_name, tensor in tensors.items():
        name = published_name(stored_name)
        if stored_name in HEADS:
            continue
        if name in published:
            raise CheckpointError(f"{source} holds {name} twice, with and without a prefix; expected it once")
        if is_linear_weight(name):
            if len(tensor.shape) != 2:
                raise CheckpointError(f"{source}: {name} has shape {list(tensor.shape)}; expected a matrix")
            tensor = transposed(tensor)
        published[name] = tensor
    if EMBEDDING not in published and heads:  # exported programs name the one matrix after the head
        published[EMBEDDING] = heads[0]
    return published


def modules_by_kind(n_layer: int) -> dict[str, list[str]]:
    """Kind of layer -> published names of the modules, in the order in which PaddleNLP numbers their variables."""
    blocks = [f"transformer.h.{layer}." for layer in range(n_layer)]
    return {
        "embedding": ["transformer.word_embeddings"],
        "layer_norm": [
            "transformer.word_embeddings_layernorm",
            *(block + norm for block in blocks for norm in BLOCK_NORMS),
            "transformer.ln_f",
        ],
        "linear": [block + linear for block in blocks for linear in LINEARS],
    }


def structured_by_variable(variables: Iterable[str], source: str) -> dict[str, str]:
    """Find the parameters of a BLOOM's variables by the order of their numbers, which may start anywhere.

    Args:
        variables: all variables of a model: "embedding_0.w_0", "linear_4.b_0", ...
        source: name of the file in error messages.

    Returns:
        Variable name -> published name.

    Raises:
        CheckpointError: a BLOOM does not have these numbers of layers.
    """
    numbers: dict[str, set[int]] = {"embedding": set(), "layer_norm": set(), "linear": set()}
    found = [match for variable in variables if (match := VARIABLE.fullmatch(variable))]
    for match in found:
        numbers[match[1]].add(int(match[2]))
    n_layer, rest = divmod(len(numbers["linear"]), len(LINEARS))
    counts = {kind: len(of_kind) for kind, of_kind in numbers.items()}
    if rest or not n_layer or counts["embedding"] != 1 or counts["layer_norm"] != 2 * n_layer + 2:
        raise CheckpointError(
            f"{source} holds variables of {counts} layers; a BLOOM of L blocks has 1 embedding, 2 L + 2 layer_norm and "
            f"4 L linear. Found {name_some(sorted(m[0] for m in found))}"
        )
    modules = modules_by_kind(n_layer)
    module_of = {
        (kind, number): module
        for kind, of_kind in numbers.items()
        for number, module in zip(sorted(of_kind), modules[kind], strict=True)
    }
    parts = {"w": "weight", "b": "bias"}
    return {m[0]: f"{module_of[m[1], int(m[2])]}.{parts[m[3]]}" for m in found}


@dataclass(frozen=True)
class RankTensors:
    """The tensors that one tensor-parallel rank saved."""

    place: str
    """Name of its file in error messages."""
    tensors: Mapping[str, LazyTensor]
    """Name -> tensor; join_pieces expects published names and the published orientation of models."""


def check_ranks_complete(tp_ranks: list[int], source: str, tp_degree: int | None = None) -> None:
    """Raise unless the files of all tensor-parallel ranks were found.

    Args:
        tp_ranks: ranks whose files were found, sorted.
        source: name of the checkpoint in error messages.
        tp_degree: number of ranks in the configuration; None: unknown, so that missing last ranks go unnoticed.

    Raises:
        CheckpointError: some are missing, or there are too many.
    """
    count = tp_degree or tp_ranks[-1] + 1
    if missing := missing_numbers(tp_ranks, count):
        raise CheckpointError(
            f"{source}: of {count} tensor-parallel ranks the files of ranks {missing} are missing (found "
            f"{tp_ranks}); every rank holds a part of every matrix, fetch those files too"
        )
    if extra := [tp_rank for tp_rank in tp_ranks if tp_rank >= count]:
        raise CheckpointError(
            f"{source}: its configuration says tensor_parallel_degree {tp_degree}, and there are files of ranks "
            f"{extra} too: two runs in one directory? Remove the files of the other one"
        )


def missing_numbers(found: Collection[int], count: int) -> list[int]:
    """The first eight numbers below `count` that are not in `found`; `count` may be huge, from a damaged file."""
    num_missing = count - sum(number < count for number in set(found))
    candidates = (number for number in itertools.count() if number not in found)
    return list(itertools.islice(candidates, max(0, min(num_missing, 8))))


def join_ranks(ranks: list[RankTensors], config: BloomConfig, source: str) -> dict[str, LazyTensor]:
    """Join the tensors of a model.

    Args:
        ranks: tensors of all ranks, in order.
        config: configuration of the whole model.
        source: name of the checkpoint in error messages.

    Raises:
        CheckpointError: together the ranks do not hold the model that the configuration describes.
    """
    tp_degree = len(ranks)
    _check_degree(ranks, config, source)
    if config.vocab_size % tp_degree or config.n_head % tp_degree:
        raise CheckpointError(
            f"{source}: a vocabulary of {config.vocab_size} and {config.n_head} heads cannot be divided among "
            f"{tp_degree} tensor-parallel ranks, which hold equal parts; is its config.json another "
            "model's?"
        )
    return join_pieces(ranks, model_cuts(config))


def join_pieces(ranks: list[RankTensors], cuts: Mapping[str, Cut]) -> dict[str, LazyTensor]:
    """Join the ranks' pieces of tensors.

    Args:
        ranks: tensors of all ranks, in order.
        cuts: name -> whole shape, and the dimension along which the ranks divide it.

    Raises:
        CheckpointError: a rank lacks a tensor or has another one, or a piece has another shape than its share or
            another precision than the other pieces.
    """
    for rank in ranks:
        problems = []
        if missing := [name for name in cuts if name not in rank.tensors]:
            problems.append(f"lacks {name_some(missing)}")
        if extra := [name for name in rank.tensors if name not in cuts]:
            problems.append(f"has {name_some(extra)}, which does not belong to it")
        if problems:
            raise CheckpointError(f"{rank.place} {' and '.join(problems)}")
    return {name: _join_tensor(name, cut, ranks) for name, cut in cuts.items()}


def _join_tensor(name: str, cut: Cut, ranks: list[RankTensors]) -> LazyTensor:
    expected = cut.piece_shape(len(ranks))
    pieces = tuple(rank.tensors[name] for rank in ranks)
    for rank, piece in zip(ranks, pieces, strict=True):
        if piece.shape != expected:
            share = "the whole" if cut.dim is None else f"its share of {list(cut.shape)} among {len(ranks)} ranks"
            raise CheckpointError(
                f"{rank.place}: {name} has shape {list(piece.shape)}; expected {list(expected)}, {share}"
            )
        if piece.dtype != pieces[0].dtype:
            raise CheckpointError(
                f"{name} is {pieces[0].dtype} in {ranks[0].place} and {piece.dtype} in {rank.place}: the files belong "
                "to different runs; put those of one run together"
            )
    if len(pieces) == 1:
        return pieces[0]
    if cut.dim is None:
        return replicated(pieces, name, tuple(rank.place for rank in ranks))
    return joined(pieces, cut.dim)


def _check_degree(ranks: list[RankTensors], config: BloomConfig, source: str) -> None:
    """Compare the number of files with the number of ranks that the rows of one rank's embedding imply."""
    embedding = ranks[0].tensors.get(EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    if rows and config.vocab_size % rows == 0 and config.vocab_size // rows != len(ranks):
        raise CheckpointError(
            f"{source}: found the files of {len(ranks)} tensor-parallel ranks, but each holds {rows} of "
            f"{config.vocab_size} rows of the vocabulary, so there were "
            f"{config.vocab_size // rows}; fetch the missing files too"
        )
