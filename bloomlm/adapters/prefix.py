"""Prefix tuning: trained keys and values of virtual tokens that stand before every sequence.

Source: Li and Liang, https://arxiv.org/abs/2101.00190; parameter names and the layout of the flat embedding
[P, L, 2, H, K] are PEFT's, so that its files need no renaming.

Shapes: P virtual tokens, L blocks, D hidden, H heads, K head_dim, G width of the projection.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bloomlm.errors import ConfigError
from bloomlm.model.config import BloomConfig
from bloomlm.model.exchange import WHOLE, Exchange
from bloomlm.model.linear import Linear


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """How many virtual tokens, and whether an MLP makes their keys and values."""

    num_prefix_tokens: int = 10
    """Virtual tokens before every sequence (P)."""
    prefix_projection: bool = False
    """Learn an embedding [P, D] and an MLP instead of the keys and values themselves."""
    prefix_projection_hidden_size: int | None = None
    """Width of the MLP (G); None: hidden_size."""

    def __post_init__(self) -> None:
        if self.num_prefix_tokens < 1:
            raise ConfigError(f"num_prefix_tokens is {self.num_prefix_tokens}; expected at least 1")
        width = self.prefix_projection_hidden_size
        if width is not None and width < 1:
            raise ConfigError(f"prefix_projection_hidden_size is {width}; expected at least 1")


class PrefixEncoder(nn.Module):
    """The virtual tokens' keys and values, learned directly or through embedding -> linear -> tanh -> linear."""

    def __init__(self, config: PrefixConfig, model_config: BloomConfig) -> None:
        super().__init__()
        self.config = config
        self.head_shape = (model_config.n_layer, 2, model_config.n_head, model_config.head_dim)
        hidden_size = model_config.hidden_size
        flat_size = 2 * model_config.n_layer * hidden_size
        self.heads = range(model_config.n_head)
        """The heads whose keys and values are needed here."""
        self.exchange: Exchange = WHOLE
        """Of the virtual tokens, before the heads are chosen."""
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
        """What of a PrefixEncoder, no subclass of it, gives the same keys and values.

        Args:
            tensors: the whole parameters of this one, by name.

        Returns:
            Its configuration and its parameters.
        """
        return self.config, dict(tensors)

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """For each block the keys and values, [H, P, K] each, of the heads that are needed here."""
        flat = self.exchange.enter(self.flat()).unflatten(1, self.head_shape)
        blocks = flat[:, :, :, self.heads.start : self.heads.stop].permute(1, 2, 3, 0, 4)
        return [(block[0], block[1]) for block in blocks.unbind(0)]
