"""transformers opens what we write and we open what it writes, to equal logits."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from tests.parity.conftest import make_pair

IDS = torch.arange(3, 17).view(2, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """[real tokens, V] fp32, from either implementation."""
    with torch.no_grad():
        output = model(IDS, attention_mask=MASK)
    return getattr(output, "logits", output)[MASK.bool()].float()


def assert_equal_logits(one: torch.nn.Module, other: torch.nn.Module, dtype: torch.dtype = torch.float32) -> None:
    expected = logits_of(other)
    error = (logits_of(one) - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n_head", "post_layernorm", "shard_size_bytes"), [(4, False, 10**9), (6, True, 20_000)])
def test_transformers_opens_what_we_write(
    tmp_path: Path, dtype: torch.dtype, n_head: int, post_layernorm: bool, shard_size_bytes: int
) -> None:
    theirs, ours = make_pair(n_head, post_layernorm, dtype)
    merge_to_directory(ours, tmp_path / "model", max_shard_size_bytes=shard_size_bytes)
    assert (tmp_path / "model" / "model.safetensors.index.json").exists() == (shard_size_bytes < 10**9)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert opened.dtype == dtype
    for name, parameter in theirs.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter), name
    torch.testing.assert_close(logits_of(opened), logits_of(theirs), rtol=0, atol=0)
    assert_equal_logits(ours, opened, dtype)
    generation = opened.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_head", "post_layernorm", "max_shard_size"), [(4, False, "5GB"), (6, True, "20KB")])
def test_we_open_what_transformers_writes(
    tmp_path: Path, dtype: torch.dtype, n_head: int, post_layernorm: bool, max_shard_size: str
) -> None:
    theirs, _ = make_pair(n_head, post_layernorm, dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size != "5GB")
    opened = load_model(tmp_path)
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(name)), name
    assert_equal_logits(opened, theirs, dtype)


@pytest.mark.parametrize("with_head", [False, True])
def test_we_open_a_bin_of_the_bare_or_the_whole_model(tmp_path: Path, with_head: bool) -> None:
    theirs, _ = make_pair()
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict() if with_head else theirs.transformer.state_dict()
    assert ("lm_head.weight" in state) == with_head  # stored once: it is the embedding
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_equal_logits(load_model(tmp_path), theirs)


def test_asked_precision_is_theirs(tmp_path: Path) -> None:
    theirs, ours = make_pair()
    merge_to_directory(ours, tmp_path / "model")
    opened = load_model(tmp_path / "model", dtype=torch.bfloat16)
    cast = theirs.to(torch.bfloat16)
    assert all(torch.equal(p, cast.get_parameter(name)) for name, p in opened.named_parameters())


def test_config_survives_the_round_trip(tmp_path: Path) -> None:
    theirs, _ = make_pair()
    theirs.config.slow_but_exact = True
    theirs.save_pretrained(tmp_path / "theirs")
    merge_to_directory(load_model(tmp_path / "theirs"), tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.to_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.to_dict()
    differing = {k for k in before.keys() | again.keys() if before.get(k) != again.get(k)}
    assert differing <= {"_name_or_path", "unk_token_id"}
