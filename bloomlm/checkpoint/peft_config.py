"""adapter_config.json of PEFT <-> LoraConfig and PrefixConfig. What we cannot do is refused by its key."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.tensor_reader import name_some
from bloomlm.errors import AdapterError
from bloomlm.model.config import BloomConfig

# Keys that do not change what an adapter computes once its weights are there.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_hidden_size",  # prompt_embeddings are stored after the projection
    "ensure_weight_tying",  # of layers that we refuse
    "fan_in_fan_out",  # PEFT itself turns it off for linear layers
    "inference_mode",
    "init_weights",
    "layers_pattern",  # acts with layers_to_transform
    "megatron_core",  # acts with megatron_config
    "peft_type",
    "peft_version",
    "prefix_projection",  # the same
    "qalora_group_size",  # acts with use_qalora
    "revision",
    "runtime_config",
    "task_type",
}
LORA_KEYS = {
    "alpha_pattern",
    "bias",
    "init_lora_weights",
    "lora_alpha",
    "lora_dropout",
    "r",
    "rank_pattern",
    "target_modules",
    "use_rslora",
}
PREFIX_KEYS = {"num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "token_dim"}
BIASES = ("none", "all", "lora_only")
# Ways to draw the first weights that leave the base model's weights alone; the others (pissa, olora, ...) do not.
PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def lora_config_from_peft(
    values: Mapping[str, Any], module_names: Sequence[str], linear_names: Sequence[str]
) -> LoraConfig:
    """Read a LoRA adapter's configuration; which biases it brings along stands in its weights.

    Args:
        values: the contents of adapter_config.json.
        module_names: full names of the base model's modules, which target_modules chooses from.
        linear_names: those of its linear layers.

    Raises:
        AdapterError: a key asks for what bloomlm does not do; it is named.
    """
    _refuse_others(values, LORA_KEYS)
    if values.get("bias", "none") not in BIASES:
        raise AdapterError(f"bias is {values['bias']!r}; expected one of {', '.join(BIASES)}")
    if values.get("init_lora_weights") not in PLAIN_INITIALISATIONS:
        raise AdapterError(
            f"init_lora_weights is {values['init_lora_weights']!r}, which changes the base model too; convert the "
            "adapter with PEFT (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    try:
        for pattern in (*(values.get("rank_pattern") or {}), *(values.get("alpha_pattern") or {})):
            re.compile(pattern)
        return LoraConfig(
            r=int(values["r"]),
            lora_alpha=float(values["lora_alpha"]),
            lora_dropout=float(values.get("lora_dropout") or 0.0),
            target_modules=_targets(values.get("target_modules"), module_names, linear_names),
            use_rslora=bool(values.get("use_rslora")),
            rank_pattern={str(k): int(v) for k, v in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (values.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, AttributeError, re.error) as error:
        raise AdapterError(f"its configuration lacks a value, or has one of another kind: {error!r}") from error


def lora_config_to_peft(config: LoraConfig) -> dict[str, Any]:
    """The contents of adapter_config.json for a LoRA adapter.

    Raises:
        AdapterError: it brings along other parameters than biases.
    """
    if others := [name for name in config.replaced_names if not name.endswith(".bias")]:
        raise AdapterError(
            f"PEFT's files cannot hold {name_some(others)}, which this adapter trained beside its updates; merge it "
            "into its base model instead"
        )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.target_modules),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": {pattern: _whole(alpha) for pattern, alpha in config.alpha_pattern.items()},
        "bias": "all" if config.replaced_names else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "revision": None,
    }


def prefix_config_from_peft(values: Mapping[str, Any], model_config: BloomConfig) -> PrefixConfig:
    """Read a prefix adapter's configuration, as one without projection: PEFT stores what the projection gave.

    Args:
        values: the contents of adapter_config.json.
        model_config: the base model's, which it must fit.

    Raises:
        AdapterError: it was made for another shape of model, or asks for what bloomlm does not do.
    """
    _refuse_others(values, PREFIX_KEYS)
    expected = {
        "num_layers": model_config.n_layer,
        "num_attention_heads": model_config.n_head,
        "token_dim": model_config.hidden_size,
        "num_transformer_submodules": 1,
    }
    for key, value in expected.items():
        if values.get(key, value) not in (value, None):
            raise AdapterError(f"{key} is {values[key]}; the model needs {value}, so it was made for another one")
    num_tokens = values.get("num_virtual_tokens")
    if not isinstance(num_tokens, int):
        raise AdapterError(f"num_virtual_tokens is {num_tokens!r}; expected a whole number")
    return PrefixConfig(num_prefix_tokens=num_tokens)


def prefix_config_to_peft(config: PrefixConfig, model_config: BloomConfig) -> dict[str, Any]:
    """The contents of adapter_config.json for a prefix adapter."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": config.num_prefix_tokens,
        "num_layers": model_config.n_layer,
        "num_attention_heads": model_config.n_head,
        "token_dim": model_config.hidden_size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.prefix_projection_hidden_size or model_config.hidden_size,
        # false even where we learn through one: for training, true lets PEFT build an MLP that the file has not
        "prefix_projection": False,
        "revision": None,
    }


def _targets(target_modules: object, module_names: Sequence[str], linear_names: Sequence[str]) -> tuple[str, ...]:
    """The block linears that PEFT's target_modules chooses: names' ends, a regular expression, or "all-linear"."""
    if isinstance(target_modules, str):
        pattern = target_modules
        if pattern.lower() == "all-linear":
            chosen = set(linear_names)
        else:
            chosen = {name for name in (*module_names, "lm_head") if re.fullmatch(pattern, name)}
    elif isinstance(target_modules, list) and target_modules:
        ends = tuple(f".{name}" for name in target_modules)
        chosen = {name for name in (*module_names, "lm_head") if f".{name}".endswith(ends)}
    else:
        raise AdapterError(f"target_modules is {target_modules!r}; expected a list of names or an expression")
    if others := sorted(chosen - set(linear_names)):
        raise AdapterError(
            f"target_modules {target_modules!r} chooses {name_some(others)}; bloomlm's LoRA covers the linear layers "
            f"of the blocks only ({', '.join(BLOCK_LINEARS)})"
        )
    targets = tuple(end for end in BLOCK_LINEARS if any(name.rpartition(".")[2] == end for name in chosen))
    if not targets:
        raise AdapterError(f"target_modules {target_modules!r} chooses no layer of the model")
    if left_out := [name for name in linear_names if name.rpartition(".")[2] in targets and name not in chosen]:
        raise AdapterError(
            f"target_modules {target_modules!r} leaves out {name_some(left_out)}; bloomlm's LoRA covers a kind of "
            "layer in all blocks or in none"
        )
    return targets


def _refuse_others(values: Mapping[str, Any], known: set[str]) -> None:
    for key, value in values.items():
        if key not in known | WITHOUT_EFFECT and value not in (None, False, "", [], {}):
            raise AdapterError(f"{key} is {value!r}, which bloomlm does not do; expected it to be unset")


def _whole(number: float) -> int | float:
    """3.0 -> 3, as PEFT types its alphas."""
    return int(number) if float(number).is_integer() else number
