"""Files as PaddleNLP writes them, made with numpy and Python's own pickler."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bloomlm.checkpoint.adapters.peft import install_adapter
from bloomlm.checkpoint.paddle.importer import ForeignReading, open_adapter
from bloomlm.checkpoint.paddle.lora import PaddleLora
from bloomlm.checkpoint.paddle.prefix import PaddlePrefix
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from tests.tiny_checkpoint import random_model

# 6 heads of 4, a vocabulary and a width that 2 and 3 ranks divide, 2 blocks: sizes unlike any fixture's.
CONFIG = BloomConfig(vocab_size=66, hidden_size=24, n_layer=2, n_head=6)
LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
State = dict[str, np.ndarray]


def make_model(config: BloomConfig = CONFIG) -> BloomForCausalLM:
    return random_model(config)


def is_linear_weight(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in LINEARS


def paddle_state(model: BloomForCausalLM) -> State:
    """Structured name -> array, linears [in, out], as model_state.pdparams holds them."""
    state = {}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        state[name.replace("transformer.", "bloom.", 1)] = array.T.copy() if is_linear_weight(name) else array
    return state


def variable_names(config: BloomConfig, start: Mapping[str, int] | None = None) -> dict[str, str]:
    """Structured name -> variable name, as layers are counted when the model is built."""
    counters = {"embedding": 0, "layer_norm": 0, "linear": 0} | dict(start or {})
    names: dict[str, str] = {}

    def add(kind: str, module: str, parts: Mapping[str, str]) -> None:
        for part, letter in parts.items():
            names[f"bloom.{module}.{part}"] = f"{kind}_{counters[kind]}.{letter}_0"
        counters[kind] += 1

    both = {"weight": "w", "bias": "b"}
    add("embedding", "word_embeddings", {"weight": "w"})
    add("layer_norm", "word_embeddings_layernorm", both)
    for layer in range(config.n_layer):
        add("layer_norm", f"h.{layer}.input_layernorm", both)
        add("linear", f"h.{layer}.self_attention.query_key_value", both)
        add("linear", f"h.{layer}.self_attention.dense", both)
        add("layer_norm", f"h.{layer}.post_attention_layernorm", both)
        add("linear", f"h.{layer}.mlp.dense_h_to_4h", both)
        add("linear", f"h.{layer}.mlp.dense_4h_to_h", both)
    add("layer_norm", "ln_f", both)
    return names


def cut(state: State, degree: int, tp_rank: int) -> State:
    """One tensor-parallel rank's part of a state dict."""
    part = {}
    for name, array in state.items():
        if name.endswith(("query_key_value.weight", "query_key_value.bias", "h_to_4h.weight", "h_to_4h.bias")):
            array = np.split(array, degree, axis=-1)[tp_rank]
        elif name.endswith(("word_embeddings.weight", "attention.dense.weight", "4h_to_h.weight")):
            array = np.split(array, degree, axis=0)[tp_rank]
        part[name] = array.copy()
    return part


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_config(directory: Path, config: BloomConfig = CONFIG, **more: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_dict() | more))
    return directory


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def random_arrays(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> State:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def read_paddle_adapter(directory: Path, config: BloomConfig, **options: Any) -> PaddleLora | PaddlePrefix:
    """Open an adapter; options are fields of ForeignReading."""
    return open_adapter(directory, config, ForeignReading(**options))


def install_paddle_adapter(model: BloomForCausalLM, adapter: PaddleLora | PaddlePrefix) -> None:
    """Put an adapter in as the ordinary one that computes the same."""
    install_adapter(model, adapter.plain())


def resume_paddle_adapter(model: BloomForCausalLM, adapter: PaddleLora | PaddlePrefix) -> None:
    """Put an adapter in as it learns on; it counts in the precision of the model."""
    adapter.recorded.install(model)
    with torch.no_grad():
        for name, value in adapter.weights().items():
            model.get_parameter(name).copy_(value.read())


def logits(model: BloomForCausalLM, change: Callable[[BloomForCausalLM], None] | None = None) -> torch.Tensor:
    """Of a fixed batch."""
    if change is not None:
        change(model)
    ids = torch.arange(14).view(2, 7) * 3 % model.config.vocab_size
    with torch.no_grad():
        return model.eval()(ids)
