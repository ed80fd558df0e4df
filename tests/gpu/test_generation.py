"""Tokens on the GPU against the CPU's, sequences together against alone, evaluation, all in fp32."""

from pathlib import Path

import pytest
import torch

import bloomlm
from bloomlm.adapters.base import Adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.generation.generate import generate
from bloomlm.generation.session import DecodeSession
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.kv_cache import KVCache
from tests.gpu.models import CONFIG, GPU, on_gpu, random_model

STRATEGIES = [
    GenerationConfig(max_new_tokens=24),
    GenerationConfig(max_new_tokens=24, repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=5),
    GenerationConfig(max_new_tokens=24, strategy=Sampling(seed=4), num_return_sequences=2),
    GenerationConfig(max_new_tokens=24, strategy=Sampling(seed=4, top_k=20, top_p=0.9, temperature=1.5)),
    GenerationConfig(max_new_tokens=12, strategy=BeamSearch(num_beams=4), num_return_sequences=2),
]


def prompts(*lengths: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(7)
    return [torch.randint(4, CONFIG.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def tokens(model: BloomForCausalLM, texts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    return [list(result.tokens) for result in generate(model, texts, config)]


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=3), PrefixConfig()], ids=["base", "lora", "prefix"])
@pytest.mark.parametrize("config", STRATEGIES, ids=["greedy", "penalties", "sampling", "top", "beams"])
def test_tokens_equal_the_cpus(config: GenerationConfig, adapter: Adapter | None) -> None:
    model, texts = random_model(adapter), prompts(5, 40, 1, 17)
    assert tokens(on_gpu(model), texts, config) == tokens(model, texts, config)


def test_the_cache_equals_a_pass_without_it() -> None:
    model = on_gpu(random_model(PrefixConfig()))
    ids = torch.tensor(prompts(30, 30), device=GPU)
    cache = KVCache(CONFIG, 2, 30, dtype=torch.float32, device=GPU, num_virtual=model.transformer.num_virtual_tokens)
    with torch.no_grad():
        expected = model(ids)
        pieces = [model(ids[:, start:stop], kv_cache=cache) for start, stop in ((0, 11), (11, 12), (12, 29), (29, 30))]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_session_gives_each_sequence_what_it_has_alone() -> None:
    model = on_gpu(random_model())
    arrivals = list(zip(prompts(5, 40, 3, 17, 9, 25), [*STRATEGIES, STRATEGIES[0]], strict=True))
    expected = [tokens(model, [prompt], config) for prompt, config in arrivals]
    session = DecodeSession(model, max_rows=12, max_tokens=80)
    handles: list[list[int]] = []
    found: dict[int, list[int]] = {}
    reading: set[int] = set()
    waiting = list(arrivals)
    while waiting or not session.is_empty:
        if waiting:
            prompt, config = waiting.pop(0)
            handles.append(session.open(prompt, config))
            found |= {handle: [] for handle in handles[-1]}
            reading.add(handles[-1][0])
        # prompts are read in chunks, beside sequences that go on
        reads = {handle: min(8, session.num_unread(handle)) for handle in reading}
        reading = {handle for handle in reading if session.num_unread(handle) > reads[handle]}
        for event in session.step(reads):
            found[event.handle].append(event.token)
    assert [[found[handle] for handle in own] for own in handles] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_generate(dtype: str) -> None:
    bloom = bloomlm.load("builtin:tiny", device="cuda", dtype=dtype)
    config = GenerationConfig(max_new_tokens=20, strategy=Greedy())
    texts = bloom.tokenizer.encode_batch(["Date: 14 juillet 1989\nISO:", "The"])
    found = tokens(bloom.model, texts, config)
    with torch.inference_mode():
        for prompt, answer in zip(texts, found, strict=True):
            logits = bloom.model(torch.tensor([prompt + answer], device=GPU))[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(answer, device=GPU)[:, None]).squeeze(1)
            # the likeliest token, or within 16 bits' rounding of it
            assert (logits.amax(1) - chosen < 0.05 * logits.std(1)).all()


@pytest.mark.parametrize("protocol", ["lm_eval", "gptq"])
def test_evaluation_equals_the_cpus(tmp_path: Path, protocol: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(
            f"In {year} it rained on {year % 28 + 1} days, and then the sun came back." for year in range(1900, 1960)
        )
    )
    reports = {
        device: bloomlm.evaluate(
            bloomlm.load("builtin:tiny", device=device, dtype="float32"),
            eval_path=str(text),
            protocol=protocol,
            seq_length=256,
        )
        for device in ("cpu", "cuda")
    }
    for name, metric in reports["cpu"].metrics.items():
        assert reports["cuda"].metrics[name].value == pytest.approx(metric.value, rel=1e-5), name
