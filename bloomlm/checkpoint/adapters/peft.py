"""LoRA and prefix adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

Of a prefix that was trained through a projection PEFT keeps only the output of the projection (prompt_embeddings), from
which training cannot go on. The same is written here, so that PEFT opens it, and beside it the projection itself in
prefix_projection.safetensors, from which bloomlm's own training resumes.

Source: the files that peft 0.21 writes and its reading of them (LoraModel, PrefixEncoder, PeftModel.get_prompt).
Shapes: R lora rank, P virtual tokens, L blocks, D hidden.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomlm.adapters import kind_in_peft
from bloomlm.adapters.base import Adapter, adapter_of, apply_adapter, set_parameter
from bloomlm.checkpoint.huggingface import TensorFile, TorchFile
from bloomlm.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from bloomlm.checkpoint.tensor_reader import check_entries, empty_model
from bloomlm.errors import AdapterError, CheckpointError, ConfigError
from bloomlm.files.json_text import read_object
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import is_of_base, whole_tensor
from bloomlm.parallel.mesh import Mesh

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"


def save_adapter(model: BloomForCausalLM, directory: Path, base_model_name_or_path: str | None) -> None:
    """Write a model's adapter into an existing directory; use atomic_directory around it.

    Args:
        model: a model with an adapter.
        directory: the directory to write into.
        base_model_name_or_path: name of the base model, by which PEFT loads it; None: not recorded.

    Raises:
        AdapterError: the model has no adapter, or one that PEFT's files cannot hold.
        CheckpointError: the files cannot be written.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise AdapterError("the model has no adapter to save; write the model itself instead")
    form = adapter.to_peft(model)
    write_safetensors(directory / WEIGHTS_FILE, form.tensors, {"format": "pt"})
    if form.own_tensors:
        assert adapter.own_file is not None
        write_safetensors(directory / adapter.own_file, form.own_tensors, {"format": "pt"})
    values = {**form.values, "base_model_name_or_path": base_model_name_or_path}
    text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
    try:
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} cannot be written: {error}") from error


def gather_adapter(model: BloomForCausalLM, mesh: Mesh) -> BloomForCausalLM:
    """Gather the adapter of a divided model into a model on the meta device, from which save_adapter writes it.

    Args:
        model: a model with an adapter.
        mesh: the ranks; all of them must call this, and all get the adapter.

    Raises:
        AdapterError: the model has no adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise AdapterError("the model has no adapter to save; write the model itself instead")
    tensors: dict[str, Tensor] = {}
    for name in adapter.parameter_names(model):
        whole = whole_tensor(name, model.get_parameter(name), mesh)
        assert whole is not None
        tensors[name] = whole
    plain, tensors_of_plain = adapter.plain(model, tensors)
    holder = empty_model(model.config)
    hold_adapter(holder, PlainAdapter(config=plain, tensors=tensors_of_plain))
    return holder


@dataclass(frozen=True, kw_only=True)
class PlainAdapter:
    """An adapter that is not installed in a model."""

    config: Adapter
    """Its kind and options."""
    tensors: Mapping[str, Tensor]
    """Name in the model -> whole parameter."""


def read_peft_adapter(directory: Path, model_config: BloomConfig) -> PlainAdapter:
    """Read an adapter from PEFT's files, which bloomlm writes too.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors (or .bin).
        model_config: configuration of the base model.

    Raises:
        AdapterError: files are missing or damaged, do not fit the model, or hold an unsupported kind of adapter.
    """
    values = read_adapter_config(directory / CONFIG_FILE)
    try:
        return _read(directory, values, model_config)
    except (CheckpointError, ConfigError) as error:
        raise AdapterError(f"the adapter in {directory}: {error}") from error


def install_adapter(model: BloomForCausalLM, adapter: PlainAdapter) -> None:
    """Install an adapter with its trained values, to run it or to train it further.

    A tensor keeps its precision where the model's is lower. Parameters of the base model that the adapter brings
    (trained biases) take the model's precision.

    Args:
        model: the base model, without an adapter.
        adapter: made for that model.

    Raises:
        AdapterError: the model has an adapter already.
    """
    apply_adapter(model, adapter.config, private_generator(model))
    for name, tensor in adapter.tensors.items():
        parameter = model.get_parameter(name)
        dtype = parameter.dtype if is_of_base(name) else torch.promote_types(parameter.dtype, tensor.dtype)
        owned = torch.empty(tensor.shape, dtype=dtype, device=parameter.device).copy_(tensor)
        set_parameter(model, name, owned, requires_grad=parameter.requires_grad)


def hold_adapter(model: BloomForCausalLM, adapter: PlainAdapter) -> None:
    """Install an adapter with its tensors unchanged in a model on the meta device, from which it can be saved.

    Args:
        model: on the meta device, without an adapter.
        adapter: made for that model.
    """
    apply_adapter(model, adapter.config, torch.Generator(), torch.device("cpu"))
    for name, tensor in adapter.tensors.items():
        set_parameter(model, name, tensor, requires_grad=False)


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read the JSON configuration of an adapter, adapter_config.json or that of another program.

    Raises:
        AdapterError: the file is missing, or is not a JSON object.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent} has no {path.name}; expected the directory of an adapter")
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error


def open_peft_weights(directory: Path) -> TensorFile:
    """Open the tensors of an adapter in PEFT's files.

    Args:
        directory: the adapter.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return SafetensorsFile(directory / WEIGHTS_FILE)
    if (directory / OLD_WEIGHTS_FILE).is_file():
        return TorchFile(directory / OLD_WEIGHTS_FILE)
    raise AdapterError(f"there is neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE}")


def _read(directory: Path, values: Mapping[str, Any], model_config: BloomConfig) -> PlainAdapter:
    file = open_peft_weights(directory)
    model = empty_model(model_config)
    adapter: Adapter = kind_in_peft(values).from_peft(values, file.entries.keys(), model)
    apply_adapter(model, adapter)
    keys = adapter.peft_keys(model)
    check_entries({key: tuple(model.get_parameter(name).shape) for name, key in keys.items()}, file.entries)
    tensors: Mapping[str, Tensor] = {name: file.read(key) for name, key in keys.items()}
    if adapter.own_file is not None and (directory / adapter.own_file).is_file():
        own = SafetensorsFile(directory / adapter.own_file)
        own_tensors = {name: own.read(name) for name in own.entries}
        adapter, tensors = adapter.with_own_tensors(own_tensors, tensors, model_config)
    return PlainAdapter(config=adapter, tensors=tensors)


def private_generator(model: BloomForCausalLM, device: torch.device | None = None) -> torch.Generator:
    """A generator for initial values that are replaced at once, so that the program's own generator does not advance.

    Args:
        model: the model whose device is used if none is given.
        device: the device of the generator.
    """
    return torch.Generator(device or model.transformer.word_embeddings.weight.device)
