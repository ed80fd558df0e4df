"""bloomlm.load, bloomlm.generate: texts in, texts out."""

import logging
from pathlib import Path

import pytest
import torch

import bloomlm
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import AdapterError, CheckpointError, ConfigError, GenerationError
from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.decode import generate as generate_tokens
from tests.tiny_bloom import write_adapter, write_bloom

PROMPTS = ["the end", "and 中文 here", "a", "one in the other", "é"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("api") / "model", eos_scale=3.0)


def test_generate_is_encode_generate_decode(base: Path) -> None:
    bloom = bloomlm.load(base)
    found = bloom.generate(PROMPTS, max_new_tokens=12)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        [expected] = generate_tokens(bloom.model, [bloom.tokenizer.encode(prompt)], GenerationConfig(max_new_tokens=12))
        assert completion.prompt == prompt
        assert (completion.tokens, completion.finish_reason) == (expected.tokens, expected.finish_reason)
        assert completion.completion == bloom.tokenizer.decode(expected.tokens)
    assert bloomlm.generate(base, PROMPTS[1], max_new_tokens=12) == found[1:2]
    assert bloomlm.generate(bloom, PROMPTS, max_new_tokens=12) == found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(base: Path, batch_size: int) -> None:
    bloom = bloomlm.load(base)
    options = {"decode_strategy": "sampling", "temperature": 2.0, "num_return_sequences": 2, "max_new_tokens": 8}
    expected = bloom.generate(PROMPTS, batch_size=3, **options)
    assert bloom.generate(PROMPTS, batch_size=batch_size, **options) == expected
    assert [completion.prompt for completion in expected] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_num_done_leaves_out_the_beginning_only(base: Path) -> None:
    bloom = bloomlm.load(base)
    config = GenerationConfig(strategy=Sampling(temperature=2.0), num_return_sequences=2, max_new_tokens=8)
    seen: list[tuple[int, int]] = []
    rest = list(
        bloom.completions(PROMPTS, config, batch_size=2, num_done=2, on_token=lambda i, token: seen.append((i, token)))
    )
    assert rest == list(bloom.completions(PROMPTS, config, batch_size=2))[4:]
    for index, completion in enumerate(rest, start=4):
        assert [token for i, token in seen if i == index] == completion.tokens


def test_stop_texts_are_cut_off(base: Path) -> None:
    bloom = bloomlm.load(base)
    [full] = bloom.generate("the end", max_new_tokens=20, min_new_tokens=20)
    stop = full.completion[5:8]
    [found] = bloom.generate("the end", max_new_tokens=20, min_new_tokens=20, stop=["never", stop])
    assert found.finish_reason == "stop"
    assert found.completion == full.completion[: full.completion.index(stop)]
    assert stop in bloom.tokenizer.decode(found.tokens)


def test_src_length_keeps_the_beginning_and_warns(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    bloom = bloomlm.load(base)
    ids = bloom.tokenizer.encode(PROMPTS[3])
    assert len(ids) > 4 and all(len(bloom.tokenizer.encode(PROMPTS[i])) <= 4 for i in (2, 4))
    prompts = [PROMPTS[2], PROMPTS[3], PROMPTS[4]]
    with caplog.at_level(logging.WARNING):
        found = bloom.generate(prompts, src_length=4, max_new_tokens=6)
    assert "1 of 3 prompts" in caplog.text and f"the longest has {len(ids)}" in caplog.text
    [expected] = generate_tokens(bloom.model, [ids[:4]], GenerationConfig(max_new_tokens=6))
    assert found[1].tokens == expected.tokens
    assert found[1].prompt == PROMPTS[3]
    caplog.clear()
    bloom.generate(prompts, src_length=len(ids), max_new_tokens=1)
    assert not caplog.records


@pytest.mark.parametrize("adapter", [LoraConfig(r=2), PrefixConfig(num_prefix_tokens=3)])
def test_adapters_change_the_completions(base: Path, tmp_path: Path, adapter: LoraConfig | PrefixConfig) -> None:
    path = write_adapter(tmp_path / "adapter", base, adapter)
    right, wrong = ("lora_path", "prefix_path") if isinstance(adapter, LoraConfig) else ("prefix_path", "lora_path")
    adapted = bloomlm.load(base, **{right: path}).generate(PROMPTS, max_new_tokens=12)
    assert adapted != bloomlm.load(base).generate(PROMPTS, max_new_tokens=12)
    with pytest.raises(AdapterError, match=f"give it as {right}"):
        bloomlm.load(base, **{wrong: path})
    with pytest.raises(ConfigError, match="one adapter"):
        bloomlm.load(base, lora_path=path, prefix_path=path)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(base: Path, dtype: str | torch.dtype) -> None:
    bloom = bloomlm.load(base, dtype=dtype)
    assert {parameter.dtype for parameter in bloom.model.parameters()} == {torch.bfloat16}
    assert bloom.generate("the", max_new_tokens=3)[0].tokens


def test_refusals(base: Path, tmp_path: Path) -> None:
    bloom = bloomlm.load(base)
    with pytest.raises(GenerationError, match=r"prompt 2 of 2 is empty.*'<s>'"):
        bloom.generate(["a", ""])
    assert bloom.generate("<s>", max_new_tokens=2)[0].prompt == "<s>"
    with pytest.raises(GenerationError, match="top_p has no effect"):
        bloom.generate("a", top_p=0.5)
    with pytest.raises(GenerationError, match="batch_size is 0"):
        bloom.generate("a", batch_size=0)
    with pytest.raises(GenerationError, match="src_length is 0"):
        bloom.generate("a", src_length=0)
    with pytest.raises(ConfigError, match="dtype is 'fp32'; it can be float32"):
        bloomlm.load(base, dtype="fp32")
    with pytest.raises(CheckpointError):
        bloomlm.load(tmp_path / "nothing")


def test_finetune_names_unknown_and_missing_options() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'no_such_flag'.*learning_rate"):
        bloomlm.finetune(no_such_flag=1)
    with pytest.raises(ConfigError, match="needs output_dir"):
        bloomlm.finetune(do_train=True)
