"""LoRA and prefix adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

PEFT keeps a prefix that was learned through a projection only as what the projection gives (prompt_embeddings), which
cannot be trained further as it was. We write the same, so that PEFT opens it, and keep the projection itself beside it
in prefix_projection.safetensors, from which our own training resumes.

Source: the files that peft 0.21 writes and its reading of them (LoraModel, PrefixEncoder, PeftModel.get_prompt).
Shapes: R lora rank, P virtual tokens, L blocks, D hidden.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bloomlm.adapters.apply import adapter_config, apply_adapter
from bloomlm.adapters.lora import LoraConfig, LoRALinear
from bloomlm.adapters.prefix import PrefixConfig, PrefixEncoder
from bloomlm.checkpoint.huggingface import TensorFile, TorchFile
from bloomlm.checkpoint.peft_config import (
    lora_config_from_peft,
    lora_config_to_peft,
    prefix_config_from_peft,
    prefix_config_to_peft,
)
from bloomlm.checkpoint.reader import check_entries
from bloomlm.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from bloomlm.errors import AdapterError, CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.gather import whole_tensor
from bloomlm.parallel.layout import PREFIX
from bloomlm.parallel.mesh import Mesh
from bloomlm.parallel.tensor_parallel import is_adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
OLD_WEIGHTS_FILE = "adapter_model.bin"
PROJECTION_FILE = "prefix_projection.safetensors"
KEY_PREFIX = "base_model.model."
PROMPT_EMBEDDINGS = "prompt_embeddings"


def save_adapter(model: BloomForCausalLM, directory: Path, base_model_name_or_path: str | None) -> None:
    """Write a model's adapter into an existing directory; use atomic_directory around it.

    Args:
        model: with LoRA or a prefix.
        directory: where to.
        base_model_name_or_path: what the adapter belongs to, as PEFT's users shall load it.

    Raises:
        AdapterError: the model has no adapter, or one that PEFT's files cannot hold.
        CheckpointError: the files cannot be written.
    """
    config = adapter_config(model)
    if isinstance(config, LoraConfig):
        values = lora_config_to_peft(config)
        tensors = {_key(name): tensor for name, tensor in _lora_tensors(model).items()}
        tensors |= {_bias_key(name, config): model.get_parameter(name) for name in config.replaced_names}
    elif isinstance(config, PrefixConfig):
        encoder = model.transformer.prefix
        assert isinstance(encoder, PrefixEncoder)
        with torch.no_grad():
            tensors = {PROMPT_EMBEDDINGS: encoder.flat()}
        config, parameters = encoder.plain(dict(encoder.named_parameters()))
        values = prefix_config_to_peft(config, model.config)
        if config.prefix_projection:
            write_safetensors(directory / PROJECTION_FILE, parameters, {"format": "pt"})
    else:
        raise AdapterError("the model has no adapter to save; write the model itself instead")
    write_safetensors(directory / WEIGHTS_FILE, tensors, {"format": "pt"})
    values["base_model_name_or_path"] = base_model_name_or_path
    text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
    try:
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE} cannot be written: {error}") from error


def gather_adapter(model: BloomForCausalLM, mesh: Mesh) -> BloomForCausalLM:
    """A divided model's adapter, whole, in a model on the meta device, from which save_adapter writes it.

    Args:
        model: with LoRA or a prefix.
        mesh: the ranks, all of which must come here, and all of which get it.

    Raises:
        AdapterError: the model has no adapter.
    """
    config = adapter_config(model)
    if config is None:
        raise AdapterError("the model has no adapter to save; write the model itself instead")
    replaced = config.replaced_names if isinstance(config, LoraConfig) else ()
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name) or name in replaced:
            whole = whole_tensor(name, parameter, mesh)
            assert whole is not None
            tensors[name.removeprefix(PREFIX)] = whole
    if isinstance(model.transformer.prefix, PrefixEncoder):
        config, tensors = model.transformer.prefix.plain(tensors)
    with torch.device("meta"):
        holder = BloomForCausalLM(model.config)
    hold_adapter(holder, PlainAdapter(config=config, tensors=tensors))
    return holder


def load_adapter(model: BloomForCausalLM, directory: Path) -> None:
    """Install an adapter from PEFT's files or from ours; its parameters can be trained further.

    Args:
        model: the base model, without an adapter; unchanged after an error.
        directory: holds adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        AdapterError: files are missing, damaged or do not fit the model, or hold what bloomlm cannot do.
    """
    install_adapter(model, read_peft_adapter(model, directory))


@dataclass(frozen=True, kw_only=True)
class PlainAdapter:
    """An adapter apart from its model."""

    config: LoraConfig | PrefixConfig
    """What it is."""
    tensors: Mapping[str, Tensor]
    """LoRA: under the names in the model (NAME.lora_A [R, in], NAME.lora_B [out, R], replaced parameters); a prefix:
    under those in PrefixEncoder."""


def read_peft_adapter(model: BloomForCausalLM, directory: Path) -> PlainAdapter:
    """Read an adapter from PEFT's files or from ours.

    Args:
        model: the base model; one on the meta device will do.
        directory: holds adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        AdapterError: files are missing, damaged or do not fit the model, or hold what bloomlm cannot do.
    """
    values = read_peft_config(directory)
    kind = values.get("peft_type")
    try:
        file = open_peft_weights(directory)
        if kind == "LORA":
            return _read_lora(model, values, file)
        if kind == "PREFIX_TUNING":
            return _read_prefix(model, values, file, directory / PROJECTION_FILE)
        raise AdapterError(f"its peft_type is {kind!r}; bloomlm reads LORA and PREFIX_TUNING")
    except (CheckpointError, ConfigError) as error:
        raise AdapterError(f"the adapter in {directory}: {error}") from error


def install_adapter(model: BloomForCausalLM, adapter: PlainAdapter) -> None:
    """Put an adapter into a model, to run or to be trained further.

    Its tensors stay in their precision where the model's is lower, except for replaced parameters of the model itself.

    Args:
        model: the base model, without an adapter.
        adapter: one of that model.

    Raises:
        AdapterError: the model has an adapter already.
    """
    apply_adapter(model, adapter.config, _private_generator(model))
    holder = _holder(model, adapter)
    for name, tensor in adapter.tensors.items():
        parameter = holder.get_parameter(name)
        is_models_own = isinstance(adapter.config, LoraConfig) and name in adapter.config.replaced_names
        dtype = parameter.dtype if is_models_own else torch.promote_types(parameter.dtype, tensor.dtype)
        owned = torch.empty(tensor.shape, dtype=dtype, device=parameter.device).copy_(tensor)
        _set_parameter(holder, name, owned, requires_grad=parameter.requires_grad)


def hold_adapter(model: BloomForCausalLM, adapter: PlainAdapter) -> None:
    """Put an adapter, as it is, into a model on the meta device, to be saved from there.

    Args:
        model: on the meta device, without an adapter.
        adapter: one of that model.
    """
    apply_adapter(model, adapter.config, torch.Generator(), torch.device("cpu"))
    holder = _holder(model, adapter)
    for name, tensor in adapter.tensors.items():
        _set_parameter(holder, name, tensor, requires_grad=False)


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Read adapter_config.json.

    Args:
        directory: the adapter.

    Raises:
        AdapterError: it is missing or no JSON object.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise AdapterError(f"{path.parent} has no {path.name}, so it holds no adapter in PEFT's files")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds {type(values).__name__}; expected a JSON object")
    return values


def open_peft_weights(directory: Path) -> TensorFile:
    """Open the tensors of an adapter in PEFT's files.

    Args:
        directory: the adapter.

    Raises:
        CheckpointError: they are missing or damaged.
    """
    if (directory / WEIGHTS_FILE).is_file():
        return SafetensorsFile(directory / WEIGHTS_FILE)
    if (directory / OLD_WEIGHTS_FILE).is_file():
        return TorchFile(directory / OLD_WEIGHTS_FILE)
    raise AdapterError(f"there is neither {WEIGHTS_FILE} nor {OLD_WEIGHTS_FILE}")


def _read_lora(model: BloomForCausalLM, values: Mapping[str, Any], file: TensorFile) -> PlainAdapter:
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = lora_config_from_peft(values, [name for name, _ in model.named_modules() if name], list(linears))
    expected: dict[str, tuple[int, ...]] = {}
    for name, linear in linears.items():
        if name.rpartition(".")[2] in config.target_modules:
            lora_rank = config.rank_of(name)
            expected[f"{name}.lora_A"] = (lora_rank, linear.in_features)
            expected[f"{name}.lora_B"] = (linear.out_features, lora_rank)
    keys = {name: _key(name) for name in expected}
    if values.get("bias", "none") != "none":
        for name, parameter in model.named_parameters():
            key = _bias_key(name, config)
            if name.endswith(".bias") and key in file.entries:
                keys[name], expected[name] = key, tuple(parameter.shape)
        replaced_names = tuple(name for name in keys if name.endswith(".bias"))
        if not replaced_names:
            raise AdapterError(f"bias is {values['bias']!r}, and its weights hold no biases; save it again with PEFT")
        config = dataclasses.replace(config, replaced_names=replaced_names)
    check_entries({keys[name]: shape for name, shape in expected.items()}, file.entries)
    return PlainAdapter(config=config, tensors={name: file.read(key) for name, key in keys.items()})


def _read_prefix(
    model: BloomForCausalLM, values: Mapping[str, Any], file: TensorFile, projection: Path
) -> PlainAdapter:
    config = prefix_config_from_peft(values, model.config)
    flat_shape = (config.num_prefix_tokens, 2 * model.config.n_layer * model.config.hidden_size)
    check_entries({PROMPT_EMBEDDINGS: flat_shape}, file.entries)
    flat = file.read(PROMPT_EMBEDDINGS)
    tensors = {"embedding.weight": flat}
    if projection.is_file():
        config, tensors = _read_projection(projection, config, model, flat)
    return PlainAdapter(config=config, tensors=tensors)


def _read_projection(
    path: Path, config: PrefixConfig, model: BloomForCausalLM, flat: Tensor
) -> tuple[PrefixConfig, dict[str, Tensor]]:
    """The embedding and the MLP that gave the flat [P, 2 * L * D] prefix."""
    file = SafetensorsFile(path)
    width = file.entries["transform.0.weight"].shape[0] if "transform.0.weight" in file.entries else None
    config = dataclasses.replace(config, prefix_projection=True, prefix_projection_hidden_size=width)
    with torch.device("meta"):
        encoder = PrefixEncoder(config, model.config)
    check_entries({name: tuple(p.shape) for name, p in encoder.named_parameters()}, file.entries)
    tensors = {name: file.read(name) for name in file.entries}
    with torch.no_grad():
        for name, tensor in tensors.items():
            _set_parameter(encoder, name, tensor.float(), requires_grad=False)
        given = encoder.flat()
    # what rounding to the file's precision may change: the values have been through two matrix products
    tolerance = 32 * torch.finfo(min((t.dtype for t in (flat, *tensors.values())), key=lambda d: d.itemsize)).eps
    if not torch.allclose(given, flat.float(), rtol=tolerance, atol=tolerance * float(given.abs().max())):
        raise AdapterError(
            f"{path.name} does not give the prompt_embeddings of {WEIGHTS_FILE}: they belong to two adapters; "
            f"remove {path.name} to use and train the embeddings as they are"
        )
    return config, tensors


def _key(name: str) -> str:
    return f"{KEY_PREFIX}{name}.weight"


def _bias_key(name: str, config: LoraConfig) -> str:
    """What PEFT calls a bias of the base model, which in a layer with an update lies one module deeper."""
    module, _, kind = name.rpartition(".")
    deeper = ".base_layer" if module.rpartition(".")[2] in config.target_modules else ""
    return f"{KEY_PREFIX}{module}{deeper}.{kind}"


def _lora_tensors(model: BloomForCausalLM) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            tensors[f"{name}.lora_A"] = module.lora_A
            tensors[f"{name}.lora_B"] = module.lora_B
    return tensors


def _holder(model: BloomForCausalLM, adapter: PlainAdapter) -> nn.Module:
    """The part of a model at which the names of an installed adapter's tensors begin."""
    holder = model if isinstance(adapter.config, LoraConfig) else model.transformer.prefix
    assert holder is not None
    return holder


def _private_generator(model: BloomForCausalLM) -> torch.Generator:
    """Fresh weights are drawn only to be replaced: the program's own randomness shall not notice."""
    return torch.Generator(model.transformer.word_embeddings.weight.device)


def _set_parameter(module: nn.Module, name: str, tensor: Tensor, requires_grad: bool) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=requires_grad))
