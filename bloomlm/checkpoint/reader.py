"""From a name to a model: resolve, read config.json, check every tensor's name and shape, read them one by one.

Nothing is allocated before the check, and then one tensor at a time in the precision asked for: the peak is one copy
of the model and one tensor of the file.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bloomlm.checkpoint import huggingface
from bloomlm.checkpoint.paddle import model as paddle_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.tensor_reader import TensorEntry, TensorReader, name_some
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

__all__ = ["TensorEntry", "TensorReader", "load_model", "open_reader", "read_config", "read_into_model"]

# (is it there?, open it), asked in this order.
FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path, BloomConfig], TensorReader]], ...] = (
    (paddle_model.find_paddle, paddle_model.open_paddle),  # first: PaddleNLP wrote a model.safetensors of its own
    (huggingface.find_safetensors, huggingface.open_safetensors),
    (huggingface.find_torch, huggingface.open_torch),
)


def read_config(directory: Path) -> BloomConfig:
    """Read a checkpoint's config.json.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: there is none.
        ConfigError: it is not JSON, or not a BLOOM model's.
    """
    path = directory / "config.json"
    if not path.is_file():
        if next(directory.glob("*.pdiparams"), None) is not None:
            return paddle_model.exported_config(directory)
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = "; it holds an adapter: name its base model, and give this as --lora_path or --prefix_path"
        raise CheckpointError(f"{directory} has no config.json, so it is no model{hint}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected a JSON object")
    return BloomConfig.from_dict(values)


def open_reader(directory: Path, config: BloomConfig) -> TensorReader:
    """Open a checkpoint's tensors in whatever format they are.

    Args:
        directory: the checkpoint.
        config: its configuration.

    Raises:
        CheckpointError: no weights, or damaged ones.
    """
    for is_there, open_format in FORMATS:
        if is_there(directory):
            return open_format(directory, config)
    found = name_some(sorted(path.name for path in directory.iterdir())) or "nothing"
    raise CheckpointError(
        f"{directory} holds no weights that bloomlm reads; found {found}, expected model.safetensors, "
        "pytorch_model.bin or model_state.pdparams, or their shards"
    )


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    memory_map: bool = True,
) -> BloomForCausalLM:
    """Load a model, in eval mode.

    Args:
        name_or_path: builtin:NAME, a directory or a hub name.
        dtype: precision of the parameters; None: as the checkpoint stores its embedding.
        device: where they go.
        revision: of a hub repository.
        memory_map: on the CPU and in the stored precision, let parameters be private mappings of the file, read when
            first used. Changing them never changes the file, and bloomlm's own writers replace files instead of
            overwriting them; but another program that cuts the file short takes the memory away. Long training runs
            pass False and own their memory.

    Raises:
        CheckpointError: the checkpoint cannot be found, is damaged, or does not fit its config.json.
        ConfigError: its config.json cannot be used.
    """
    directory = resolve_source(str(name_or_path), revision).directory
    config = read_config(directory)
    reader = open_reader(directory, config)
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    try:
        return read_into_model(model, reader, dtype=dtype, device=device, memory_map=memory_map)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def read_into_model(
    model: BloomForCausalLM,
    reader: TensorReader,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    memory_map: bool = True,
) -> BloomForCausalLM:
    """Give a model on the meta device the tensors of a checkpoint.

    Args:
        model: created under torch.device("meta"); changed in place and returned in eval mode.
        reader: the checkpoint.
        dtype, device, memory_map: as in load_model.

    Raises:
        CheckpointError: tensors are missing, unknown, misshapen or no floating-point numbers.
    """
    expected = dict(model.named_parameters())
    check_entries({name: tuple(p.shape) for name, p in expected.items()}, reader.entries)
    dtype = dtype or reader.entries[huggingface.EMBEDDING].dtype
    device = torch.device(device)
    for name in expected:
        tensor = _own(reader.read(name), dtype, device, memory_map)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Parameter(tensor))
    model.config = model.transformer.config = dataclasses.replace(model.config, dtype=str(dtype).removeprefix("torch."))
    return model.eval()


def check_entries(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorEntry]) -> None:
    """Hold a file's tensors against what its configuration promises.

    Args:
        expected: name -> shape.
        found: what is there.

    Raises:
        CheckpointError: they differ; every kind of difference is named, five tensors of each.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} tensors are missing: {name_some(missing)}")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"{len(extra)} tensors do not belong to it: {name_some(extra)}")
    if misshapen := [
        f"{name} (found {list(found[name].shape)}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]:
        problems.append(f"{len(misshapen)} tensors have the wrong shape: {name_some(misshapen)}")
    if not_float := [f"{name} ({entry.dtype})" for name, entry in found.items() if not entry.dtype.is_floating_point]:
        problems.append(
            f"{len(not_float)} tensors are no floating-point numbers (a quantised checkpoint?): {name_some(not_float)}"
        )
    if problems:
        raise CheckpointError("the weights are not those of its configuration: " + "; ".join(problems))


def _own(tensor: Tensor, dtype: torch.dtype, device: torch.device, memory_map: bool) -> Tensor:
    if memory_map and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
