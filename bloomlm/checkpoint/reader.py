"""From a name to a model: find it, read config.json, check every tensor's name and shape, read them one by one.

Nothing is allocated before the check. Then one tensor at a time is read in the requested precision, so that the peak
of memory is one copy of the model and one tensor of the file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from bloomlm.checkpoint import huggingface
from bloomlm.checkpoint.formats import FOREIGN_VERSION_KEY, MODEL_FORMATS, config_of_export, find_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.checkpoint.tensor_reader import TensorReader, check_entries, empty_model
from bloomlm.errors import CheckpointError, ConfigError, name_some
from bloomlm.files.json_text import read_object
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.embedding import WordEmbedding
from bloomlm.model.linear import Linear
from bloomlm.model.quantized import Quantization
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.layout import holding, is_of_base, own_bounds, whole_shape
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model

ADAPTER_CONFIG_FILES = ("adapter_config.json", "lora_config.json", "prefix_config.json")


def read_config(directory: Path) -> BloomConfig:
    """Read a checkpoint's config.json.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: the directory has no config.json.
        ConfigError: config.json is not JSON, or does not describe a BLOOM model.
    """
    path = directory / "config.json"
    if not path.is_file():
        if (exported := config_of_export(directory)) is not None:
            return exported
        hint = ""
        if any((directory / name).is_file() for name in ADAPTER_CONFIG_FILES):
            hint = "; it holds an adapter: give its base model as --model_name_or_path, and this as --adapter_path"
        elif find_model(directory):
            hint = "; it holds weights: put the config.json of their model beside them"
        raise CheckpointError(f"{directory} has no config.json, so it is not a model{hint}")
    try:
        values = read_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    values.pop(FOREIGN_VERSION_KEY, None)
    try:
        return BloomConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def open_reader(directory: Path, config: BloomConfig) -> TensorReader:
    """Open a checkpoint's tensors in any of the formats.

    Args:
        directory: the checkpoint.
        config: its configuration.

    Raises:
        CheckpointError: the directory holds no weights, or damaged ones.
    """
    for is_there, open_format in MODEL_FORMATS:
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
    quantization: Quantization | None = None,
    mesh: Mesh = ALONE,
    install_adapter: Callable[[BloomForCausalLM], None] | None = None,
    reshard_after_forward: bool = True,
    linear_dtype: torch.dtype | None = None,
) -> BloomForCausalLM:
    """Load a model, in eval mode.

    Args:
        name_or_path: builtin:NAME, a directory or a hub name.
        dtype: precision of the parameters; None: the precision in which the checkpoint stores its embedding.
        device: device of the parameters.
        revision: branch, tag or commit of a hub repository.
        memory_map: on the CPU and in the stored precision, let parameters be private mappings of the file, which are
            read when first used. Changing them never changes the file; but if another program truncates the file, the
            process dies. Long training runs pass False.
        quantization: how matrices are quantised as they are read (model/quantized.py), for training with LoRA only.
        mesh: the ranks to divide the model among (parallel/__init__.py); each reads its own parts only.
        install_adapter: on several ranks, called with the cut model on the meta device to add an adapter with weights.
        reshard_after_forward: as in shard_model.
        linear_dtype: precision of the weights of linear layers, where it differs from dtype.

    Raises:
        CheckpointError: the checkpoint cannot be found, is damaged, or does not fit its config.json.
        ConfigError: its config.json cannot be used.
    """
    directory = resolve_source(str(name_or_path), revision).directory
    config = read_config(directory)
    reader = open_reader(directory, config)
    model = empty_model(config, dtype or _stored_dtype(reader), linear_dtype)
    if quantization is not None and not mesh.is_alone:
        raise ConfigError("quantised weights need a single process; leave out the quantisation or the other processes")
    if not mesh.is_alone:
        _divide(model, mesh, install_adapter, reshard_after_forward=reshard_after_forward)
    try:
        return read_into_model(
            model, reader, device=device, memory_map=memory_map, quantization=quantization, mesh=mesh
        )
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _stored_dtype(reader: TensorReader) -> torch.dtype:
    """That of the embedding; any, where it is missing or holds integers, which is an error later."""
    entry = reader.entries.get(huggingface.EMBEDDING)
    return entry.dtype if entry is not None and entry.dtype.is_floating_point else torch.float32


def _divide(
    model: BloomForCausalLM,
    mesh: Mesh,
    install_adapter: Callable[[BloomForCausalLM], None] | None,
    *,
    reshard_after_forward: bool,
) -> None:
    """Keep this rank's parts of a model on the meta device, with the adapter that install_adapter adds."""
    cut_model(model, mesh)
    if install_adapter is not None:
        install_adapter(model)
    cut_adapter(model, mesh)
    shard_model(model, mesh, reshard_after_forward=reshard_after_forward)


def read_into_model(
    model: BloomForCausalLM,
    reader: TensorReader,
    *,
    device: torch.device | str = "cpu",
    memory_map: bool = True,
    quantization: Quantization | None = None,
    mesh: Mesh = ALONE,
) -> BloomForCausalLM:
    """Give a model on the meta device the tensors of a checkpoint.

    Args:
        model: created under torch.device("meta"), in the precisions that it shall have; changed in place and returned
            in eval mode.
        reader: the checkpoint.
        device, memory_map, quantization: as in load_model.
        mesh: the ranks among which it is divided already; an adapter in it keeps its weights.

    Raises:
        CheckpointError: tensors are missing or unknown, have another shape, or hold integers.
    """
    expected = {name: parameter for name, parameter in model.named_parameters() if is_of_base(name)}
    check_entries({name: whole_shape(name, p, mesh) for name, p in expected.items()}, reader.entries)
    device, dtype = torch.device(device), model.transformer.dtype
    if not mesh.is_alone:
        read_own_parts(expected, reader, model, mesh, device)
        expected = {}
    for name, parameter in expected.items():
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        if quantization is not None and attribute == "weight" and isinstance(module, (Linear, WordEmbedding)):
            rows = quantization.linear if isinstance(module, Linear) else quantization.embedding
            tensor, module.weight_scale = rows.quantize(reader.read(name), name, device)
        else:
            tensor = _own(reader.read(name), parameter.dtype, device, memory_map)
        setattr(module, attribute, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
    model.config = model.transformer.config = dataclasses.replace(model.config, dtype=str(dtype).removeprefix("torch."))
    return model.eval()


def read_own_parts(
    parameters: Mapping[str, Tensor],
    reader: TensorReader,
    model: BloomForCausalLM,
    mesh: Mesh,
    device: torch.device,
) -> None:
    """Read this rank's parts of a divided model's parameters, one after another; other parts are not read.

    Args:
        parameters: name -> the parameter of the model, perhaps on the meta device, with the precision of the new one.
        reader: the checkpoint.
        model: changed in place.
        mesh: the ranks.
        device: device of the new parameters.
    """
    parts = {}
    for name, parameter in parameters.items():
        box = reader.read_box(name, own_bounds(name, parameter, mesh))
        parts[name] = holding(parameter, torch.empty(box.shape, dtype=parameter.dtype, device=device).copy_(box))
    # assigned by PyTorch, because FSDP keeps parameters in more than one place
    problems = model.load_state_dict(parts, strict=False, assign=True)
    assert not problems.unexpected_keys


def _own(tensor: Tensor, dtype: torch.dtype, device: torch.device, memory_map: bool) -> Tensor:
    if memory_map and tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous():
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
