"""config.json in every spelling, and the exact sizes of the published models."""

import pytest
import torch

from bloomlm.errors import ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES, BloomConfig

# As on the hub in 2022.
OLD = {
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.1,
    "attention_softmax_in_fp32": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "bloom",
    "n_embed": 64,
    "n_inner": None,
    "n_layer": 3,
    "num_attention_heads": 4,
    "pretraining_tp": 4,
    "slow_but_exact": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 512,
}
NEW = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "n_head": 4,
    "vocab_size": 512,
    "dtype": "bfloat16",
    "attention_dropout": 0.1,
    "hidden_dropout": 0.2,
}


@pytest.mark.parametrize("values", [OLD, NEW])
def test_spellings_read_alike(values: dict) -> None:
    config = BloomConfig.from_dict(values)
    assert (config.hidden_size, config.n_layer, config.n_head, config.vocab_size) == (64, 3, 4, 512)
    assert (config.hidden_dropout, config.attention_dropout, config.dtype) == (0.2, 0.1, "bfloat16")
    assert (config.unk_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2, 3)


def test_writing_back_loses_nothing() -> None:
    written = BloomConfig.from_dict(OLD).to_dict()
    kept = {k: v for k, v in OLD.items() if k not in ("n_embed", "num_attention_heads", "torch_dtype")}
    assert kept.items() <= written.items()
    assert (written["hidden_size"], written["n_head"], written["dtype"]) == (64, 4, "bfloat16")
    assert BloomConfig.from_dict(written).to_dict() == written


def test_no_such_token_stays_null() -> None:
    assert BloomConfig.from_dict({**NEW, "pad_token_id": None}).pad_token_id is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"n_head": 5}, "not divisible"),
        ({"n_embed": 128}, "twice"),
        ({"n_inner": 100}, "n_inner"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "n_layer is 1000000000; expected at most 1000"),
        ({"hidden_dropout": 1.5}, "hidden_dropout"),
    ],
)
def test_impossible_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BloomConfig.from_dict({**NEW, **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="n_layer or num_hidden_layers"):
        BloomConfig.from_dict({"vocab_size": 5, "hidden_size": 8, "n_head": 2})


# Sums of the tensors in the published safetensors files.
EXACT = {
    "560m": 559_214_592,
    "1b1": 1_065_314_304,
    "1b7": 1_722_408_960,
    "3b": 3_002_557_440,
    "7b1": 7_069_016_064,
    "176b": 176_247_271_424,
}


@pytest.mark.parametrize("size", EXACT)
def test_published_sizes(size: str) -> None:
    config = PUBLISHED_SIZES[size]
    assert config.num_parameters == EXACT[size]
    with torch.device("meta"):
        model = BloomForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == EXACT[size]
