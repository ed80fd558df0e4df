"""PaddleNLP's adapters of either kind, and the plain ones that compute the same."""

from pathlib import Path

from bloomlm.adapters.prefix import PREFIX
from bloomlm.checkpoint.adapters.peft import PlainAdapter
from bloomlm.checkpoint.paddle.adapter_files import LORA_CONFIG_FILE, PREFIX_CONFIG_FILE
from bloomlm.checkpoint.paddle.lora import PaddleLora, read_paddle_lora
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix, PrefixLayout, read_paddle_prefix
from bloomlm.errors import AdapterError
from bloomlm.model.config import BloomConfig


def find_paddle_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter in PaddleNLP's files."""
    return any((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))


def read_paddle_adapter(
    directory: Path,
    model_config: BloomConfig,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> PaddleLora | PaddlePrefix:
    """Read an adapter of either kind.

    Args:
        directory: the adapter.
        model_config: of the base model.
        prefix_layout: of a prefix; None: as the files tell.
        trained_tensor_parallel_degree: ranks that trained it; None: as the files tell.

    Raises:
        AdapterError: there is none or one of each kind, its files are missing or damaged, do not fit the model, or
            leave open what they mean.
    """
    is_lora, is_prefix = ((directory / name).is_file() for name in (LORA_CONFIG_FILE, PREFIX_CONFIG_FILE))
    if is_lora == is_prefix:
        found = "both" if is_lora else "neither"
        raise AdapterError(f"{directory}: expected {LORA_CONFIG_FILE} or {PREFIX_CONFIG_FILE}, found {found}")
    if is_lora:
        if prefix_layout is not None:
            raise AdapterError(f"{directory} holds a LoRA adapter; a prefix_layout means nothing to it")
        return read_paddle_lora(directory, model_config, trained_tensor_parallel_degree=trained_tensor_parallel_degree)
    return read_paddle_prefix(
        directory,
        model_config,
        prefix_layout=prefix_layout,
        trained_tensor_parallel_degree=trained_tensor_parallel_degree,
    )


def plain_adapter(adapter: PaddleLora | PaddlePrefix, model_config: BloomConfig) -> PlainAdapter:
    """The ordinary LoRA or prefix that computes the same as an adapter, to be saved in PEFT's files.

    Args:
        adapter: what read_paddle_adapter gave.
        model_config: of the base model.
    """
    if isinstance(adapter, PaddleLora):
        return PlainAdapter(config=adapter.config, tensors=adapter.plain(adapter.stored))
    config, tensors = adapter.plain(model_config)
    return PlainAdapter(config=config, tensors={PREFIX + name: tensor for name, tensor in tensors.items()})
