"""Prefix tuning: trained keys and values of virtual tokens that stand before every sequence.

Source: Li and Liang, https://arxiv.org/abs/2101.00190; parameter names and the layout of the flat embedding
[P, L, 2, H, K] are PEFT's, so that its files need no renaming.

Shapes: P virtual tokens, L blocks, D hidden, H heads, K head_dim, G width of the projection.
"""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from bloomlm.adapters.base import Adapter, AdapterModule, PeftForm, refuse_other_keys
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.model.attention import VirtualTokens
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.linear import Linear

PREFIX = "transformer.prefix."
"""The beginning of the names of the encoder's parameters in a model."""
PROMPT_EMBEDDINGS = "prompt_embeddings"
MOST_PREFIX_TOKENS = 2**20
PEFT_KEYS = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(Adapter):
    """The number of virtual tokens, and whether an MLP computes their keys and values."""

    kind = "prefix"
    path_flag = "prefix_path"
    training_flag = "prefix_tuning"
    cannot_merge = "its virtual tokens are no weights; save it as it is"
    own_file = "prefix_projection.safetensors"

    num_prefix_tokens: int = 10
    """Virtual tokens before every sequence (P)."""
    prefix_projection: bool = False
    """Learn an embedding [P, D] and an MLP instead of the keys and values themselves."""
    prefix_projection_hidden_size: int | None = None
    """Width of the MLP (G); None: hidden_size."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_prefix_tokens <= MOST_PREFIX_TOKENS:
            raise ConfigError(
                f"num_prefix_tokens is {self.num_prefix_tokens}; expected a number from 1 to {MOST_PREFIX_TOKENS}"
            )
        width = self.prefix_projection_hidden_size
        if width is not None and width < 1:
            raise ConfigError(f"prefix_projection_hidden_size is {width}; expected at least 1")

    @property
    def num_virtual_tokens(self) -> int:
        """The same as num_prefix_tokens."""
        return self.num_prefix_tokens

    def describe(self) -> str:
        """Number of tokens, and whether there is a projection."""
        return f"prefix of {self.num_prefix_tokens} tokens{' and their projection' if self.prefix_projection else ''}"

    def install(self, model: BloomForCausalLM, generator: torch.Generator | None, device: torch.device | None) -> None:
        """Put an encoder before the blocks."""
        embedding = model.transformer.word_embeddings.weight
        with torch.device("meta"):
            encoder = PrefixEncoder(self, model.config)
        encoder.to_empty(device=device or embedding.device).to(embedding.dtype)
        encoder.init_weights(model.config.initializer_range, generator)
        model.transformer.prefix = encoder.train(model.training)

    def parameter_names(self, model: BloomForCausalLM) -> list[str]:
        """The parameters of the encoder."""
        return [PREFIX + name for name, _ in self._encoder(model).named_parameters()]

    def plain(self, model: BloomForCausalLM, tensors: Mapping[str, Tensor]) -> tuple[Adapter, Mapping[str, Tensor]]:
        """The configuration and parameters of a PrefixEncoder without a subclass."""
        config, own = self._encoder(model).plain({name.removeprefix(PREFIX): tensors[name] for name in tensors})
        return config, {PREFIX + name: tensor for name, tensor in own.items()}

    def peft_keys(self, model: BloomForCausalLM) -> dict[str, str]:
        """PEFT stores keys and values only, which are the parameter of an encoder without projection."""
        return {f"{PREFIX}embedding.weight": PROMPT_EMBEDDINGS}

    def to_peft(self, model: BloomForCausalLM) -> PeftForm:
        """The configuration, the keys and values, and, with a projection, the trained parameters in own_file."""
        encoder = self._encoder(model)
        with torch.no_grad():
            given = encoder.flat()
        config, parameters = encoder.plain(dict(encoder.named_parameters()))
        values = {
            "peft_type": "PREFIX_TUNING",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "num_virtual_tokens": config.num_prefix_tokens,
            **_sizes(model.config),
            "encoder_hidden_size": config.prefix_projection_hidden_size or model.config.hidden_size,
            # false even with a projection: true would make PEFT build an MLP for training, whose weights the file lacks
            "prefix_projection": False,
            "revision": None,
        }
        own_tensors = parameters if config.prefix_projection else {}
        return PeftForm(values=values, tensors={PROMPT_EMBEDDINGS: given}, own_tensors=own_tensors)

    @classmethod
    def from_peft(cls, values: Mapping[str, Any], keys: Collection[str], model: BloomForCausalLM) -> Self:
        """The configuration, without projection, because PEFT stores the projection's result."""
        refuse_other_keys(values, PEFT_KEYS)
        for key, value in _sizes(model.config).items():
            if values.get(key, value) not in (value, None):
                raise AdapterError(f"{key} is {values[key]}; the model needs {value}, so it was made for another one")
        num_tokens = values.get("num_virtual_tokens")
        if not isinstance(num_tokens, int):
            raise AdapterError(f"num_virtual_tokens is {num_tokens!r}; expected a whole number")
        return cls(num_prefix_tokens=num_tokens)

    def with_own_tensors(
        self, own_tensors: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model_config: BloomConfig
    ) -> tuple[Adapter, Mapping[str, Tensor]]:
        """The configuration with projection, and the parameters that compute the keys and values."""
        first = own_tensors.get("transform.0.weight")
        width = None if first is None else len(first)
        config = dataclasses.replace(self, prefix_projection=True, prefix_projection_hidden_size=width)
        with torch.device("meta"):
            encoder = PrefixEncoder(config, model_config)
        expected = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in own_tensors.items()}
        if found != expected:
            raise AdapterError(f"{self.own_file} holds tensors of the shapes {found}; expected {expected}")
        encoder.load_state_dict({name: tensor.float() for name, tensor in own_tensors.items()}, assign=True)
        with torch.no_grad():
            given = encoder.flat()
        flat = tensors[f"{PREFIX}embedding.weight"]
        # rounding to the files' precision may change the results of two matrix products by this much
        dtypes = (tensor.dtype for tensor in (flat, *own_tensors.values()))
        tolerance = 32 * torch.finfo(min(dtypes, key=lambda dtype: dtype.itemsize)).eps
        largest = float(given.abs().max())
        if not largest < torch.inf or not torch.allclose(given, flat.float(), rtol=tolerance, atol=tolerance * largest):
            raise AdapterError(
                f"{self.own_file} does not give the {PROMPT_EMBEDDINGS} of PEFT's file: they belong to two adapters; "
                f"remove {self.own_file} to use and train the embeddings as they are"
            )
        return config, {PREFIX + name: tensor for name, tensor in own_tensors.items()}

    def _encoder(self, model: BloomForCausalLM) -> "PrefixEncoder":
        encoder = model.transformer.prefix
        assert isinstance(encoder, PrefixEncoder)
        return encoder


class PrefixEncoder(VirtualTokens, AdapterModule):
    """The virtual tokens' keys and values, learned directly or through embedding -> linear -> tanh -> linear."""

    def __init__(self, config: PrefixConfig, model_config: BloomConfig) -> None:
        super().__init__(config.num_prefix_tokens, range(model_config.n_head))
        self.config: PrefixConfig = config
        self.head_shape = (model_config.n_layer, 2, model_config.n_head, model_config.head_dim)
        hidden_size = model_config.hidden_size
        flat_size = 2 * model_config.n_layer * hidden_size
        self.transform: nn.Sequential | None = None
        if config.prefix_projection:
            width = config.prefix_projection_hidden_size or hidden_size
            self.embedding = nn.Embedding(config.num_prefix_tokens, hidden_size)
            self.transform = nn.Sequential(Linear(hidden_size, width), nn.Tanh(), Linear(width, flat_size))
        else:
            self.embedding = nn.Embedding(config.num_prefix_tokens, flat_size)

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the embedding and matrices from N(0, std); biases 0."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    module.weight.normal_(0.0, std, generator=generator)
                if isinstance(module, nn.Linear):
                    module.bias.zero_()

    def flat(self) -> Tensor:
        """[P, 2 * L * D]: what PEFT stores as prompt_embeddings."""
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[PrefixConfig, dict[str, Tensor]]:
        """The configuration and parameters of a PrefixEncoder that computes the same; for subclasses to override.

        Args:
            tensors: the whole parameters of this encoder by name.
        """
        return self.config, dict(tensors)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """For each block the keys and values, [H, P, K] each, of the heads that are needed here."""
        flat = self.partition.enter(self.flat()).unflatten(1, self.head_shape)
        blocks = flat[:, :, :, self.heads.start : self.heads.stop].permute(1, 2, 3, 0, 4)
        return [(block[0], block[1]) for block in blocks.unbind(0)]


def _sizes(model_config: BloomConfig) -> dict[str, int]:
    """The sizes of the base model in PEFT's configuration."""
    return {
        "num_layers": model_config.n_layer,
        "num_attention_heads": model_config.n_head,
        "token_dim": model_config.hidden_size,
        "num_transformer_submodules": 1,
    }
