"""Prefill, decode steps and generate against the model without a cache, and against themselves in other batches."""

from typing import Any

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

PROMPTS = [[5, 17, 9], [44, 8, 21, 60, 33, 7, 12], [90], [13, 14]]


def tiny_model(seed: int = 0, eos_scale: float = 1.0, **options: Any) -> BloomForCausalLM:
    config = BloomConfig(vocab_size=101, hidden_size=24, n_layer=2, n_head=3, initializer_range=0.5, **options)
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.transformer.word_embeddings.weight[2] *= eos_scale
    return model.eval()


def uncached_logits(model: BloomForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[V] of the token after these, by the whole sequence without cache or pads."""
    return model(torch.tensor([tokens]))[0, -1]


@pytest.mark.parametrize("with_prefix", [False, True])
@torch.no_grad()
def test_prefill_and_decode_step_give_the_uncached_logits(with_prefix: bool) -> None:
    model = tiny_model()
    if with_prefix:
        apply_adapter(model, PrefixConfig(num_prefix_tokens=4), torch.Generator().manual_seed(1))
    rows = model.open_rows(len(PROMPTS), max(map(len, PROMPTS)) + 2)
    logits = rows.prefill(range(len(PROMPTS)), PROMPTS)
    sequences = [list(prompt) for prompt in PROMPTS]
    for new in ([7, 8, 9, 10], [50, 51, 52, 53], None):
        expected = torch.stack([uncached_logits(model, tokens) for tokens in sequences])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        if new is not None:
            sequences = [[*tokens, token] for tokens, token in zip(sequences, new, strict=True)]
            logits = rows.decode_step(range(len(PROMPTS)), torch.tensor(new))
    assert max(rows.cache.lengths) == rows.cache.keys.shape[3]  # allocated once, exactly for prompt and new tokens


def test_greedy_follows_the_argmax_of_the_uncached_model() -> None:
    for seed in range(3):
        model = tiny_model(seed)
        results = generate(model, PROMPTS, GenerationConfig(max_new_tokens=8))
        for prompt, result in zip(PROMPTS, results, strict=True):
            tokens = list(prompt)
            for found in result.tokens:
                assert found == int(uncached_logits(model, tokens).argmax())
                tokens.append(found)


STRATEGIES = [
    GenerationConfig(max_new_tokens=16),
    GenerationConfig(max_new_tokens=16, repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3),
    GenerationConfig(max_new_tokens=16, strategy=Sampling(seed=3, temperature=0.7, top_k=20, top_p=0.9)),
    GenerationConfig(max_new_tokens=16, strategy=Sampling(seed=3, temperature=2.0), num_return_sequences=3),
    GenerationConfig(max_new_tokens=16, strategy=BeamSearch(num_beams=3), num_return_sequences=2),
    GenerationConfig(max_new_tokens=16, strategy=BeamSearch(num_beams=4, length_penalty=0.2), repetition_penalty=1.2),
]


@pytest.mark.parametrize("config", STRATEGIES)
def test_batched_equals_single(config: GenerationConfig) -> None:
    lengths = set()
    for seed in range(5):
        model = tiny_model(seed, eos_scale=2.5)
        together = generate(model, PROMPTS, config)
        alone = []
        for index, prompt in enumerate(PROMPTS):
            alone += generate(model, [prompt], config, first_sequence=index * config.num_return_sequences)
        assert together == alone
        lengths |= {len(result.tokens) for result in together}
    assert len(lengths) > 2  # rows finished at different times


def test_samples_depend_on_seed_and_sequence() -> None:
    model = tiny_model()
    config = GenerationConfig(max_new_tokens=6, strategy=Sampling(temperature=3.0), num_return_sequences=3)
    first = generate(model, [PROMPTS[0], PROMPTS[0]], config)
    assert first == generate(model, [PROMPTS[0], PROMPTS[0]], config)
    assert len({tuple(result.tokens) for result in first}) == 6
    other = GenerationConfig(max_new_tokens=6, strategy=Sampling(temperature=3.0, seed=21), num_return_sequences=3)
    assert first != generate(model, [PROMPTS[0], PROMPTS[0]], other)


def test_eos_ends_a_row_and_min_new_tokens_delays_it() -> None:
    model = tiny_model(7, eos_scale=4.0)
    plain = generate(model, PROMPTS, GenerationConfig(max_new_tokens=10))
    ended = [result for result in plain if result.finish_reason == "eos"]
    assert ended
    for result in ended:
        assert result.tokens[-1] == 2 and 2 not in result.tokens[:-1]
    shortest = min(len(result.tokens) for result in ended)
    later = generate(model, PROMPTS, GenerationConfig(max_new_tokens=10, min_new_tokens=shortest))
    assert all(2 not in result.tokens[:shortest] for result in later)
    for result in plain:
        if result.finish_reason == "length":
            assert len(result.tokens) == 10


def text_of(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


@pytest.mark.parametrize("strategy", [Greedy(), BeamSearch(num_beams=3)])
def test_stop_texts_end_a_row(strategy: Greedy | BeamSearch) -> None:
    model = tiny_model(1)
    full = generate(model, PROMPTS, GenerationConfig(strategy=strategy, max_new_tokens=12))
    stop = text_of(full[1].tokens[4:7])  # three tokens' text
    config = GenerationConfig(strategy=strategy, max_new_tokens=12, stop=("never", stop))
    found = generate(model, PROMPTS, config, decode_text=text_of)
    assert found[1].finish_reason == "stop"
    assert text_of(found[1].tokens).endswith(stop)
    assert text_of(found[1].tokens).count(stop) == 1
    if isinstance(strategy, Greedy):
        assert found[1].tokens == full[1].tokens[: len(found[1].tokens)]
        for one, other in zip(found, full, strict=True):
            assert one == other or one.finish_reason == "stop"


def test_on_token_sees_each_sequence_in_order() -> None:
    model = tiny_model(7, eos_scale=4.0)
    seen: dict[int, list[int]] = {index: [] for index in range(len(PROMPTS))}
    results = generate(
        model, PROMPTS, GenerationConfig(max_new_tokens=10), on_token=lambda i, token: seen[i].append(token)
    )
    assert [result.tokens for result in results] == list(seen.values())
    assert len({len(result.tokens) for result in results}) > 1


def test_dropout_is_off_and_the_mode_is_put_back() -> None:
    model = tiny_model(hidden_dropout=0.5)
    expected = generate(model, PROMPTS)
    model.train()
    assert generate(model, PROMPTS) == expected
    assert model.training


def test_no_prompts_and_a_model_without_eos() -> None:
    model = tiny_model(7, eos_scale=4.0, eos_token_id=None)
    assert generate(model, []) == []
    for strategy in (Greedy(), BeamSearch(num_beams=2)):
        config = GenerationConfig(strategy=strategy, max_new_tokens=5, min_new_tokens=2)
        assert [result.finish_reason for result in generate(model, PROMPTS, config)] == ["length"] * 4


def test_refusals_name_what_is_wrong() -> None:
    model = tiny_model()
    with pytest.raises(GenerationError, match=r"prompt 1: the prompt has no tokens.*<s>"):
        generate(model, [[5], []])
    with pytest.raises(GenerationError, match="prompt 0: the prompt contains id 101, but the model has ids 0 to 100"):
        generate(model, [[5, 101]])
    with pytest.raises(GenerationError, match="decode_text"):
        generate(model, [[5]], GenerationConfig(stop=("x",)))
    with pytest.raises(GenerationError, match="beam search has no token to show"):
        generate(model, [[5]], GenerationConfig(strategy=BeamSearch()), on_token=print)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.9}, "top_p has no effect with decode_strategy greedy.*choose decode_strategy sampling"),
        ({"decode_strategy": "beam_search", "seed": 1}, "seed has no effect with decode_strategy beam_search"),
        ({"decode_strategy": "sampling", "num_beams": 2}, "num_beams has no effect.*beam_search"),
        ({"decode_strategy": "beams"}, "decode_strategy is 'beams'; it can be greedy, sampling, beam_search"),
        ({"top_q": 1}, "unknown generation option 'top_q'; known: .*top_p"),
        ({"decode_strategy": "sampling", "temperature": 0.0}, "temperature is 0.0; it must be a number above 0"),
        ({"decode_strategy": "sampling", "top_p": 0.0}, "top_p is 0.0"),
        ({"decode_strategy": "sampling", "top_k": -1}, "top_k is -1"),
        ({"decode_strategy": "beam_search", "num_beams": 2, "num_return_sequences": 3}, "from 1 to num_beams .2."),
        ({"num_return_sequences": 2}, "1 with greedy decoding, which has one answer"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "from 0 to max_new_tokens .3."),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": [""]}, "not empty"),
        ({"decode_strategy": "sampling", "min_p": 1.5}, "min_p is 1.5; it must be a number from 0"),
        ({"min_p": 0.1}, "min_p has no effect with decode_strategy greedy"),
        ({"logit_bias": [(3, 1.0), (3, 2.0)]}, "logit_bias is .*different ids"),
        ({"num_log_probs": -1}, "num_log_probs is -1"),
        ({"decode_strategy": "beam_search", "num_log_probs": 0}, "num_log_probs is 0.*with a beam search only None"),
    ],
)
def test_options_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError, match=message):
        GenerationConfig.from_options(**options)


def test_from_options_builds_the_strategy() -> None:
    config = GenerationConfig.from_options(
        decode_strategy="sampling", top_p=0.9, top_k=None, stop="x", max_new_tokens=4
    )
    assert config == GenerationConfig(strategy=Sampling(top_p=0.9), stop=("x",), max_new_tokens=4)
    config = GenerationConfig.from_options(logit_bias={7: -1.0, 3: 2.0}, stop_token_ids=[4, 5], ignore_eos=True)
    assert config == GenerationConfig(logit_bias=((3, 2.0), (7, -1.0)), stop_token_ids=(4, 5), ignore_eos=True)
