"""BloomConfig, read from every spelling of config.json, and the table of the published sizes."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bloomlm.errors import ConfigError

# Field -> the keys under which config.json files hold it; the first is the key that we write. BLOOM's own files of 2022
# say n_embed and num_attention_heads, transformers has used both spellings of each, and other programs say hidden_size.
SPELLINGS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embed", "n_embd"),
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "layer_norm_epsilon": ("layer_norm_epsilon",),
    "initializer_range": ("initializer_range",),
    "apply_residual_connection_post_layernorm": ("apply_residual_connection_post_layernorm",),
    "hidden_dropout": ("hidden_dropout",),
    "attention_dropout": ("attention_dropout",),
    "unk_token_id": ("unk_token_id",),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
    "pad_token_id": ("pad_token_id",),
    "dtype": ("dtype", "torch_dtype"),
}
REQUIRED = ("vocab_size", "hidden_size", "n_layer", "n_head")
# Far more than any model has; larger numbers are mistakes, and would take long to fail or overflow.
MOST_BLOCKS = 1000
MOST_COLUMNS = 2**20
MOST_TOKENS = 2**31
NON_NEGATIVE = ("layer_norm_epsilon", "initializer_range")
PROBABILITIES = ("hidden_dropout", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class BloomConfig:
    """The shape of a BLOOM model and the other settings in its config.json.

    Source: the config.json of bigscience/bloom and transformers' BloomConfig.
    """

    vocab_size: int
    """Rows of the word embedding (V)."""
    hidden_size: int
    """Width of the residual stream (D)."""
    n_layer: int
    """Number of blocks (L)."""
    n_head: int
    """Attention heads of a block (H); divides hidden_size."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every layer norm."""
    initializer_range: float = 0.02
    """Standard deviation of freshly drawn matrices."""
    apply_residual_connection_post_layernorm: bool = False
    """Take a block's residual after its layer norm instead of before."""
    hidden_dropout: float = 0.0
    """Dropout probability on what attention and MLP add to the residual stream."""
    attention_dropout: float = 0.0
    """Dropout probability on the attention weights."""
    unk_token_id: int | None = 0
    """Id of <unk>."""
    bos_token_id: int | None = 1
    """Id of <s>."""
    eos_token_id: int | None = 2
    """Id of </s>."""
    pad_token_id: int | None = 3
    """Id of <pad>."""
    dtype: str | None = None
    """Precision of the stored weights, as config.json names it (float32, float16, bfloat16)."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Every other key of config.json, kept so that writing it back loses nothing."""

    def __post_init__(self) -> None:
        for name in REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"BLOOM config: {name} is {value!r}; expected a whole number of at least 1")
        for name, most, largest in (
            ("n_layer", MOST_BLOCKS, "70"),
            ("hidden_size", MOST_COLUMNS, "14,336"),
            ("vocab_size", MOST_TOKENS, "250,880"),
        ):
            if getattr(self, name) > most:
                raise ConfigError(
                    f"BLOOM config: {name} is {getattr(self, name)}; expected at most {most} (BLOOM 176B has {largest})"
                )
        for name in NON_NEGATIVE:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
                raise ConfigError(f"BLOOM config: {name} is {value!r}; expected a number of at least 0")
        for name in PROBABILITIES:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
                raise ConfigError(f"BLOOM config: {name} is {value!r}; expected a number from 0 to below 1")
        if self.hidden_size % self.n_head:
            raise ConfigError(
                f"BLOOM config: hidden_size {self.hidden_size} is not divisible by n_head {self.n_head}; "
                "each head takes hidden_size / n_head columns"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BloomConfig":
        """Read the contents of a config.json.

        Args:
            values: the parsed JSON object, in any of the known spellings.

        Raises:
            ConfigError: another model's config, a missing key, or two spellings that disagree.
        """
        model_type = values.get("model_type", "bloom")
        if model_type != "bloom":
            raise ConfigError(f"config.json says model_type {model_type!r}; bloomlm runs BLOOM ('bloom') only")
        rest = dict(values)
        known: dict[str, Any] = {}
        for name, keys in SPELLINGS.items():
            found = {key: rest.pop(key) for key in keys if key in rest}
            given = {key: value for key, value in found.items() if value is not None}
            if len(set(map(repr, given.values()))) > 1:
                raise ConfigError(f"config.json gives {name} twice with different values: {given}")
            if given:
                known[name] = next(iter(given.values()))
            elif found and name.endswith("_token_id"):
                known[name] = None  # an explicit null: the tokenizer has no such token
        missing = [" or ".join(SPELLINGS[name]) for name in REQUIRED if name not in known]
        if missing:
            raise ConfigError(f"config.json lacks {', '.join(missing)}; is it the config.json of a BLOOM model?")
        if isinstance(known.get("dtype"), str):
            known["dtype"] = known["dtype"].removeprefix("torch.")
        config = cls(**known, extra=rest)
        n_inner = rest.get("n_inner")
        if n_inner is not None and n_inner != config.ffn_size:
            raise ConfigError(
                f"config.json says n_inner {n_inner}; BLOOM's MLP is 4 x hidden_size = {config.ffn_size} wide"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a config.json that transformers and bloomlm read back to the same model."""
        known = {keys[0]: getattr(self, name) for name, keys in SPELLINGS.items()}
        if self.dtype is None:
            del known["dtype"]
        return {"architectures": ["BloomForCausalLM"], "model_type": "bloom", **self.extra, **known}

    @property
    def head_dim(self) -> int:
        """Width of a head (K)."""
        return self.hidden_size // self.n_head

    @property
    def ffn_size(self) -> int:
        """Width of the MLP's hidden layer (F)."""
        return 4 * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Exact number of parameters; the head is tied to the embedding and counts once.

        V D (embedding) + 4 D (two outer layer norms) + L (12 D^2 + 13 D) (blocks: four linears with bias, two norms).
        """
        d = self.hidden_size
        return self.vocab_size * d + 4 * d + self.n_layer * (12 * d * d + 13 * d)


def _published(hidden_size: int, n_layer: int, n_head: int) -> BloomConfig:
    return BloomConfig(vocab_size=250_880, hidden_size=hidden_size, n_layer=n_layer, n_head=n_head)


# Sizes of bigscience/bloom-560m ... bigscience/bloom (176b); BLOOMZ's are the same. Source: BLOOM paper, table 3
# (https://arxiv.org/abs/2211.05100), and the hub's config.json files.
PUBLISHED_SIZES: dict[str, BloomConfig] = {
    "560m": _published(1024, 24, 16),
    "1b1": _published(1536, 24, 16),
    "1b7": _published(2048, 24, 16),
    "3b": _published(2560, 30, 32),
    "7b1": _published(4096, 30, 32),
    "176b": _published(14336, 70, 112),
}


def published_config(name: str) -> BloomConfig | None:
    """The shape of a published model, by its name on the hub.

    Args:
        name: bigscience/bloom, bigscience/bloomz-7b1-mt, bloom-560m, ...: with or without the owner.

    Returns:
        None for any other name.
    """
    match = re.fullmatch(r"(?:bigscience/)?bloom(z?)(?:-(\w+?))??(-mt|-p3)?", name)
    if match is None or (match[3] and not match[1]):
        return None
    return PUBLISHED_SIZES.get(match[2] or "176b")
