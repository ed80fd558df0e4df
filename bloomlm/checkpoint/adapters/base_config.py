"""The shape of an adapter's base model, as far as the adapter's own files record it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bloomlm.adapters.trained_rows import tokens_in_peft
from bloomlm.checkpoint.adapters.peft import CONFIG_FILE, open_peft_weights, read_adapter_config
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.model.config import MOST_TOKENS, BloomConfig

# Matches the name of a lora_A in any program's files; its groups are the block and the kind of layer.
LORA_A = re.compile(
    r"(?:^|\.)h\.(\d+)\.(?:self_attention|mlp)"
    r"\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.lora_A(?:\.weight)?$"
)
CUT_BY_INPUTS = ("dense", "dense_4h_to_h")
MAX_BLOCKS = 1000  # BLOOM has at most 70; a damaged name must not cause a model of millions


def peft_base_config(directory: Path) -> BloomConfig:
    """A configuration with the sizes that an adapter depends on; other sizes are 1, such as the heads for a LoRA.

    Args:
        directory: the adapter, in PEFT's files.

    Raises:
        AdapterError: files are missing or damaged, or do not record the sizes.
    """
    values = read_adapter_config(directory / CONFIG_FILE)
    if "num_virtual_tokens" in values:
        return base_config(directory, values, "num_layers", "token_dim", "num_attention_heads")
    entries = open_peft_weights(directory).entries
    inputs = {name: entry.shape[-1] for name, entry in entries.items() if entry.shape}
    config = lora_base_config(directory, inputs, num_ranks=1)
    try:
        tokens = tokens_in_peft(values.get("trainable_token_indices"), MOST_TOKENS)
        return replace(config, vocab_size=max(config.vocab_size, *(token + 1 for token in tokens), 1))
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"{directory}: {error}") from error


def base_config(directory: Path, values: Mapping[str, Any], n_layer: str, hidden_size: str, n_head: str) -> BloomConfig:
    """The configuration from an adapter's own, in which the given keys hold the sizes.

    Raises:
        AdapterError: a size is missing or invalid.
    """
    try:
        return BloomConfig(
            vocab_size=1,
            n_layer=whole_number(values, n_layer, directory),
            hidden_size=whole_number(values, hidden_size, directory),
            n_head=whole_number(values, n_head, directory),
        )
    except ConfigError as error:
        raise AdapterError(f"{directory}: {error}") from error


def lora_base_config(directory: Path, inputs: Mapping[str, int], *, num_ranks: int) -> BloomConfig:
    """The configuration from a LoRA's tensors, whose last block with an update is taken as the model's last.

    Args:
        directory: the adapter.
        inputs: name of a tensor -> width of its inputs, a rank's share where the layer is cut by inputs.
        num_ranks: number of ranks that the adapter is cut for.

    Raises:
        AdapterError: the tensors are not those of a LoRA of BLOOM.
    """
    n_layer = hidden_size = 0
    vocab_size = 1
    for name, width in inputs.items():
        if match := LORA_A.search(name):
            n_layer = max(n_layer, int(match[1]) + 1)
            whole = width * num_ranks if match[2] in CUT_BY_INPUTS else width
            hidden_size = whole // 4 if match[2] == "dense_4h_to_h" else whole
        elif name.endswith("word_embeddings.weight"):  # trained too
            vocab_size = width * num_ranks
    if not 0 < n_layer <= MAX_BLOCKS or not hidden_size:
        raise AdapterError(f"{directory} holds no LoRA of BLOOM's linear layers; is it another model's?")
    return BloomConfig(vocab_size=vocab_size, n_layer=n_layer, hidden_size=hidden_size, n_head=1)


def whole_number(values: Mapping[str, Any], key: str, place: Path) -> int:
    """A whole number of at least 1 from a configuration.

    Raises:
        AdapterError: the value is missing or is anything else.
    """
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{place}: its configuration says {key} {value!r}; expected a whole number of at least 1")
    return value
