"""bloomlm.load takes PaddleNLP's directories wherever it takes a path: model, tokenizer and adapters."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bloomlm
from bloomlm.errors import AdapterError, CheckpointError, ConfigError
from tests.paddle_fixtures import FIXTURES

MODEL = FIXTURES / "models" / "bloom_h64_l3_a4"
REFERENCE = FIXTURES / "ref" / "bloom_h64_l3_a4"
TOLERANCE = 5e-5


def logits(loaded: bloomlm.LoadedModel) -> np.ndarray:
    with torch.inference_mode():
        return loaded.model(torch.from_numpy(np.load(REFERENCE / "ids.npy"))).numpy()


def test_model_and_tokenizer() -> None:
    loaded = bloomlm.load(MODEL)
    expected = np.load(REFERENCE / "A_logits_nomask.npy")
    assert np.abs(logits(loaded) - expected).max() < TOLERANCE
    assert loaded.generate("the dog", max_new_tokens=3)[0].prompt == "the dog"


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("lora", "A_qkv_TFT", {}),
        ("lora", "M_qkv_TFT_headdim", {}),
        ("lora", "B_qkv", {}),
        ("prefix", "A_proj", {}),
        ("prefix", "B_noproj", {}),
        ("prefix", "p261_noproj", {"prefix_layout": "new"}),
    ],
)
def test_adapters(kind: str, name: str, options: dict) -> None:
    directory = FIXTURES / kind / "bloom_h64_l3_a4" / name
    loaded = bloomlm.load(MODEL, **{f"{kind}_path": directory}, **options)
    assert np.abs(logits(loaded) - np.load(directory / "ref_logits_nomask.npy")).max() < TOLERANCE


def test_a_layout_that_the_files_leave_open_is_asked_for() -> None:
    with pytest.raises(AdapterError, match="prefix_layout"):
        bloomlm.load(MODEL, prefix_path=FIXTURES / "prefix" / "bloom_h64_l3_a4" / "p261_noproj")


def test_how_to_read_paddle_files_is_refused_for_others(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="which says how texts are split"):
        bloomlm.load("builtin:tiny", paddle_tokenization=True)
    with pytest.raises(AdapterError, match="trained_tensor_parallel_degree"):
        bloomlm.load("builtin:tiny", lora_path=tmp_path, trained_tensor_parallel_degree=2)
    for option in ({"prefix_layout": "old"}, {"trained_tensor_parallel_degree": 2}):
        with pytest.raises(ConfigError, match=rf"{next(iter(option))} says how to read an adapter; give adapter_path"):
            bloomlm.load("builtin:tiny", **option)
