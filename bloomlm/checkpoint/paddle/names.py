"""PaddleNLP's names and layouts of BLOOM's parameters, and how tensor parallelism cuts them.

Structured names ("bloom.h.0.mlp.dense_h_to_4h.weight") differ from the published ones by their prefix, which files of
the bare model leave out. Variable names ("linear_2.w_0") are counted in the order in which the layers were built.
A linear's weight is stored (in, out).

Shapes: D hidden, V vocabulary.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bloomlm.checkpoint.paddle.array import LazyTensor, Transposed
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
    """A parameter as published, and along which of its dimensions ranks hold pieces (None: each holds all)."""

    shape: tuple[int, ...]
    dim: int | None

    def piece_shape(self, tp_degree: int) -> tuple[int, ...]:
        """The shape of one rank's piece."""
        return tuple(size // tp_degree if dim == self.dim else size for dim, size in enumerate(self.shape))


def model_cuts(config: BloomConfig) -> dict[str, Cut]:
    """Every parameter of a model.

    Args:
        config: its shape.

    Returns:
        Published name -> its shape and cut: PaddleNLP's ranks cut as ours do.
    """
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
    """A structured name, with or without PaddleNLP's prefix, as a published one."""
    return MODEL_PREFIX + stored_name.removeprefix(PADDLE_PREFIX).removeprefix(MODEL_PREFIX)


def stored_name(name: str) -> str:
    """A published name as a structured one, with PaddleNLP's prefix."""
    return PADDLE_PREFIX + name.removeprefix(MODEL_PREFIX)


def is_linear_weight(name: str) -> bool:
    """Whether a parameter, under whichever name, is the weight of a linear layer and so stored (in, out)."""
    return any(name.endswith(f"{linear}.weight") for linear in LINEARS)


def published_tensors(tensors: Mapping[str, LazyTensor], source: str) -> dict[str, LazyTensor]:
    """A state dict's tensors under published names and in the published orientation.

    Args:
        tensors: under structured names or variable names, as stored.
        source: what error messages call the file.

    Raises:
        CheckpointError: two tensors of one name, a linear's weight that is no matrix, or variable names that are
            not those of a BLOOM.
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
            tensor = Transposed(tensor)
        published[name] = tensor
    if EMBEDDING not in published and heads:  # exported programs name the one matrix after the head
        published[EMBEDDING] = heads[0]
    return published


def structured_by_variable(variables: Iterable[str], source: str) -> dict[str, str]:
    """Name the variables of a BLOOM by the order of their numbers, from whichever number they start.

    Args:
        variables: "embedding_0.w_0", "linear_4.b_0", ...: all of a model's.
        source: what error messages call the file.

    Returns:
        Variable name -> published name.

    Raises:
        CheckpointError: the numbers of layers do not fit together.
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
    blocks = [f"transformer.h.{layer}." for layer in range(n_layer)]
    modules = {
        "embedding": ["transformer.word_embeddings"],
        "layer_norm": [
            "transformer.word_embeddings_layernorm",
            *(block + norm for block in blocks for norm in BLOCK_NORMS),
            "transformer.ln_f",
        ],
        "linear": [block + linear for block in blocks for linear in LINEARS],
    }
    module_of = {
        (kind, number): module
        for kind, of_kind in numbers.items()
        for number, module in zip(sorted(of_kind), modules[kind], strict=True)
    }
    parts = {"w": "weight", "b": "bias"}
    return {m[0]: f"{module_of[m[1], int(m[2])]}.{parts[m[3]]}" for m in found}
