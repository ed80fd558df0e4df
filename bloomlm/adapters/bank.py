"""Adapters of one base model that are used side by side: every row of a batch chooses its own by name.

An adapter is loaded into a model of its own, which shares the base model's weights (`AdapterBank.base_model`). The bank
takes from it what differs from the base model and lets the base model's layers compute it for the tokens that ask for
it (banked.py). The adapters stay unmerged and the base model can be used as before.

Shapes: H heads, P virtual tokens, K head_dim.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bloomlm.adapters.banked import BankedEmbedding, BankedLayerNorm, BankedLinear, Update
from bloomlm.adapters.base import Adapter, AdapterModule, adapter_of
from bloomlm.adapters.lora_linear import LoRALinear
from bloomlm.adapters.prefix import PrefixEncoder
from bloomlm.adapters.selection import Selection
from bloomlm.adapters.trained_rows import TrainedRowsEmbedding
from bloomlm.errors import AdapterError, name_some
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear


class AdapterBank:
    """The adapters that rows of a batch can choose, beside the base model itself.

    If ranks divide the model, all of them must make every call.

    Args:
        model: a model without an adapter, which is changed in place: its layers are replaced by layers that adapters
            share, and its weights stop learning. It computes the same as before where no adapter is selected.
        most_virtual: most virtual tokens (P) of an adapter, for which every row of a cache has room.

    Raises:
        AdapterError: the model has an adapter already.
    """

    def __init__(self, model: BloomForCausalLM, *, most_virtual: int = 128) -> None:
        if (installed := adapter_of(model)) is not None:
            raise AdapterError(
                f"the model has an adapter already ({installed.describe()}); load the base model without it, and it by "
                "a name like the others"
            )
        self.most_virtual = most_virtual
        self._device = model.transformer.word_embeddings.weight.device
        self._base = _sharing_weights(model.requires_grad_(False))
        self._models: dict[str, BloomForCausalLM] = {}
        self._virtual: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._tokens, self._kept = Selection(), Selection()
        """The groups of all tokens of a call, and of those that go on behind the attention of the last block."""
        self._linears, self._norms = _install_layers(model, self._tokens, self._kept)
        self._embedding = BankedEmbedding(model.transformer.word_embeddings, self._tokens, self._kept)
        model.transformer.word_embeddings = self._embedding
        model.adapters = self

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order of loading."""
        return list(self._models)

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name.

        Raises:
            AdapterError: there is none.
        """
        found = adapter_of(self.alone(name))
        assert found is not None
        return found

    def alone(self, name: str) -> BloomForCausalLM:
        """A model with this adapter only, which shares the base model's weights.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        if name not in self._models:
            known = f"the loaded ones are {name_some(self.names)}" if self._models else "none is loaded"
            raise AdapterError(f"there is no adapter {name!r}; {known}")
        return self._models[name]

    def size_bytes(self, name: str) -> int:
        """Memory of an adapter's own parameters on this rank.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        shared = set(self._base.parameters())
        return sum(parameter.nbytes for parameter in self.alone(name).parameters() if parameter not in shared)

    def base_model(self) -> BloomForCausalLM:
        """A new model that shares the base model's weights, to load an adapter into."""
        return _sharing_weights(self._base)

    @torch.no_grad()
    def load(self, name: str, model: BloomForCausalLM) -> None:
        """Add an adapter; rows that use others are not disturbed.

        Args:
            name: what rows choose it by.
            model: a model from base_model in which the adapter has been installed; it stops learning.

        Raises:
            AdapterError: the name is taken, or the adapter cannot be used beside others.
        """
        biases = self._check(name, model)
        model.requires_grad_(False).eval()
        for path, layer in model.named_modules():
            if isinstance(layer, LoRALinear):
                self._linears[path].updates[name] = Update.of(layer)
        for path, bias in biases.items():
            changed = (self._linears | self._norms)[path.removesuffix(".bias")]
            changed.bias_changes.of[name] = bias - self._base.get_parameter(path)
        embedding, prefix = model.transformer.word_embeddings, model.transformer.prefix
        if isinstance(embedding, TrainedRowsEmbedding):
            self._embedding.trained_rows[name] = embedding
        if prefix is not None:
            self._virtual[name] = prefix()
        self._models[name] = model

    def unload(self, name: str) -> None:
        """Remove an adapter. No row may use it any more; rows that use others are not disturbed.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        self.alone(name)
        for linear in self._linears.values():
            linear.remove(name)
        for norm in self._norms.values():
            norm.bias_changes.remove(name)
        self._embedding.trained_rows.pop(name, None)
        self._virtual.pop(name, None)
        for selection in (self._tokens, self._kept):
            selection.forget_sets()
        del self._models[name]

    def virtual(self, name: str | None) -> list[tuple[Tensor, Tensor]] | None:
        """For each block the keys and values [H, P, K] of an adapter's virtual tokens; None where it has none.

        Raises:
            AdapterError: there is no adapter of this name.
        """
        if name is not None:
            self.alone(name)
        return None if name is None else self._virtual.get(name)

    @contextmanager
    def selected(self, names: Sequence[str | None], lengths: Sequence[int], num_kept: Sequence[int]) -> Iterator[None]:
        """Let the model use an adapter for each document while the context is open; see RowAdapters.

        Raises:
            AdapterError: there is no adapter of a name.
        """
        for name in set(names) - {None}:
            self.alone(str(name))
        self._tokens.select(names, lengths, self._device)
        self._kept.select(names, num_kept, self._device)
        try:
            yield
        finally:
            self._tokens.clear()
            self._kept.clear()

    def _check(self, name: str, model: BloomForCausalLM) -> dict[str, Tensor]:
        """The biases that an adapter replaces, if it can be loaded."""
        if name in self._models:
            raise AdapterError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        adapter = adapter_of(model)
        if adapter is None or adapter.trains_base:
            raise AdapterError(f"the model for {name!r} has no adapter; install one in a model from base_model")
        known = (LoRALinear, TrainedRowsEmbedding, PrefixEncoder)
        if any(isinstance(module, AdapterModule) and not isinstance(module, known) for module in model.modules()):
            raise AdapterError(
                f"the adapter {name!r} is of the kind {adapter.kind}, which cannot be used beside others; merge it "
                "into its base model and use that"
            )
        if adapter.num_virtual_tokens > self.most_virtual:
            raise AdapterError(
                f"the adapter {name!r} has {adapter.num_virtual_tokens} virtual tokens; there is room for "
                f"{self.most_virtual}"
            )
        own: dict[str, Tensor] = {path: model.get_parameter(path) for path, _ in self._base.named_parameters()}
        replaced = {path: tensor for path, tensor in own.items() if tensor is not self._base.get_parameter(path)}
        if len(replaced) == len(own):
            raise AdapterError(
                f"the model for {name!r} shares no weights with the bank's base model; make it with base_model"
            )
        if others := [path for path in replaced if not path.endswith(".bias")]:
            raise AdapterError(
                f"the adapter {name!r} replaces {name_some(others)} of the base model, which rows with other adapters "
                "need; merge it into its base model and use that"
            )
        return replaced


def bank_of(model: BloomForCausalLM) -> AdapterBank:
    """The bank of a model, which is made where the model has none.

    Raises:
        AdapterError: the model has an adapter of its own.
    """
    return model.adapters if isinstance(model.adapters, AdapterBank) else AdapterBank(model)


def _sharing_weights(model: BloomForCausalLM) -> BloomForCausalLM:
    """A copy of a model's modules that shares its weights."""
    shared = {*model.parameters(), *model.buffers()}
    partitions = {module.partition for module in model.modules() if isinstance(module, (Linear, WordEmbedding))}
    return copy.deepcopy(model, {id(item): item for item in (*shared, *partitions)})


def _install_layers(
    model: BloomForCausalLM, tokens: Selection, kept: Selection
) -> tuple[dict[str, BankedLinear], dict[str, BankedLayerNorm]]:
    """Replace the linear layers and layer norms of a model; the result has them by their names."""
    linears: dict[str, BankedLinear] = {}
    norms: dict[str, BankedLayerNorm] = {}
    attention = f"transformer.h.{len(model.transformer.h) - 1}.self_attention"
    is_behind = False
    for path, module in list(model.named_modules()):
        is_behind = is_behind or path == f"{attention}.dense"
        selection = kept if is_behind else tokens
        parent, _, attribute = path.rpartition(".")
        if isinstance(module, Linear):
            linears[path] = BankedLinear(module, selection)
            setattr(model.get_submodule(parent), attribute, linears[path])
        elif isinstance(module, nn.LayerNorm):
            norms[path] = BankedLayerNorm(module, selection)
            setattr(model.get_submodule(parent), attribute, norms[path])
    return linears, norms
