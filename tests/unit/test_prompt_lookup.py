"""Prompt lookup decoding: fewer steps, and the greedy tokens, stop texts and log-probabilities of one token a step."""

import random
from typing import Any

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import GenerationError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.generate import generate
from bloomlm.generation.lookup import PromptLookup, accept, can_be_guessed
from bloomlm.generation.reading import Prompt
from bloomlm.generation.sequences import Event, Sample
from bloomlm.generation.session import DecodeSession
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig


def slow_guess(tokens: list[int], count: int) -> list[int]:
    """By looking at every place, the newest first."""
    for size in (3, 2):
        for stop in range(len(tokens) - 1, size - 1, -1):
            if tokens[stop - size : stop] == tokens[-size:]:
                period = tokens[stop:]
                return [period[place % len(period)] for place in range(count)]
    return []


def test_guesses_are_those_of_a_search_through_the_text() -> None:
    draw = random.Random(0)
    num_found = 0
    for _ in range(300):
        tokens = [draw.randrange(draw.choice((2, 4, 9))) for _ in range(draw.randint(1, 30))]
        lookup = PromptLookup(tokens[:5])
        for token in tokens[5:]:
            lookup.append(token)
        count = draw.randint(1, 8)
        assert lookup.guess(count) == slow_guess(tokens, count)
        num_found += bool(slow_guess(tokens, count))
    assert 60 < num_found < 240


def test_guesses_are_accepted_up_to_the_first_wrong_one() -> None:
    assert accept([], [7]) == [7]
    assert accept([4, 5, 6], [4, 5, 6, 8]) == [4, 5, 6, 8]
    assert accept([4, 5, 6], [4, 9, 6, 8]) == [4, 9]
    assert accept([4, 5, 6], [3, 5, 6, 8]) == [3]


def test_the_number_of_guesses_follows_those_that_were_right() -> None:
    loop = [3, 4, 5] * 4
    [sample] = Prompt(
        tokens=loop,
        handles=range(1),
        config=GenerationConfig(max_new_tokens=30, min_new_tokens=1),
        first_sequence=0,
        num_top=None,
        num_read=len(loop),
        rows=[0],
    ).start(None, None, torch.device("cpu"), looks_up=True)
    assert isinstance(sample, Sample) and sample.guess(9) == []  # before min_new_tokens
    list(sample.extend([3], None, None))
    assert sample.guess(9) == [4, 5, 3, 4]
    assert sample.accept([4, 5, 3, 4], [4, 5, 3, 4, 5]) == [4, 5, 3, 4, 5]
    list(sample.extend([4, 5, 3, 4, 5], None, None))
    assert sample.guess(9) == [3, 4, 5, 3, 4, 5, 3, 4, 5] and len(sample.guess(20)) == 10
    assert sample.accept([3, 4, 5], [7, 8, 9, 10]) == [7]
    assert len(sample.guess(9)) == 2
    list(sample.extend([4] * 22, None, None))  # 28 of 30: one guess and the token after it
    assert sample.guess(9) == [4]


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 3},
        {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1},
        {"strategy": Sampling()},
        {"strategy": BeamSearch()},
    ],
)
def test_only_greedy_sequences_without_penalties_are_guessed(options: dict[str, Any]) -> None:
    assert can_be_guessed(GenerationConfig(logit_bias=((3, 1.0),), min_new_tokens=4, stop=("x",)))
    assert not can_be_guessed(GenerationConfig(**options))


def text_of(ids: list[int]) -> str:
    return "".join(f"<{token}>" for token in ids)


def looping_model(*, with_prefix: bool) -> BloomForCausalLM:
    """A random model whose greedy continuations soon repeat themselves, but not exactly."""
    config = BloomConfig(vocab_size=31, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.3)
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(3))
    if with_prefix:
        apply_adapter(model, PrefixConfig(num_prefix_tokens=4), torch.Generator().manual_seed(1))
    return model.eval()


CONFIGS = [
    GenerationConfig(max_new_tokens=40, num_log_probs=2),
    GenerationConfig(max_new_tokens=25, ignore_eos=True),
    GenerationConfig(max_new_tokens=30, min_new_tokens=12, num_log_probs=0),
    GenerationConfig(max_new_tokens=40, stop=("<9><", "1><2"), stop_token_ids=(17,)),
    GenerationConfig(max_new_tokens=40, logit_bias=((5, 2.0), (2, -9.0))),
    GenerationConfig(max_new_tokens=20, repetition_penalty=1.2),
    GenerationConfig(max_new_tokens=20, strategy=Sampling(seed=2, temperature=0.4), num_return_sequences=2),
    GenerationConfig(max_new_tokens=10, strategy=BeamSearch(num_beams=2)),
]


def run(model: BloomForCausalLM, seed: int, prompt_lookup: int) -> tuple[dict[int, list[Event]], int]:
    """Events of random requests that arrive now and then, and the number of steps."""
    draw = random.Random(seed)
    session = DecodeSession(model, max_rows=5, max_tokens=70, decode_text=text_of, prompt_lookup=prompt_lookup)
    events: dict[int, list[Event]] = {}
    pending = [(draw.choices(range(3, 31), k=draw.randint(1, 12)) * 2, draw.choice(CONFIGS)) for _ in range(14)]
    num_steps = 0
    while pending or not session.is_empty:
        while pending and pending[0][1].num_rows <= session.num_free_rows:
            prompt, config = pending.pop(0)
            session.open(prompt, config, first_sequence=len(pending))
        for event in session.step():
            events.setdefault(event.handle, []).append(event)
        num_steps += 1
    return events, num_steps


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_tokens_and_log_probabilities_are_those_of_one_token_a_step(seed: int, with_prefix: bool) -> None:
    model = looping_model(with_prefix=with_prefix)
    expected, num_expected = run(model, seed, 0)
    for prompt_lookup in (1, 4, 10):
        found, num_steps = run(model, seed, prompt_lookup)
        assert found.keys() == expected.keys() and num_steps < num_expected
        for handle, events in found.items():
            assert [(event.token, event.finish_reason) for event in events] == [
                (event.token, event.finish_reason) for event in expected[handle]
            ]
            for event, other in zip(events, expected[handle], strict=True):
                assert event.log_prob == (other.log_prob and pytest.approx(other.log_prob, abs=1e-5))
                assert (event.top_log_probs is None) == (other.top_log_probs is None)
                for (token, value), (other_token, other_value) in zip(
                    event.top_log_probs or (), other.top_log_probs or (), strict=True
                ):
                    assert token == other_token and value == pytest.approx(other_value, abs=1e-5)


def test_wrong_guesses_leave_the_rows() -> None:
    model = looping_model(with_prefix=False)
    session = DecodeSession(model, max_rows=1, max_tokens=70, prompt_lookup=4)
    (handle,) = session.open([3, 4, 5, 3, 4], GenerationConfig(max_new_tokens=40, ignore_eos=True))
    rows: Any = session._rows.model
    tokens, counts = [3, 4, 5, 3, 4], set()
    while not session.is_empty:
        events = session.step()
        tokens += [event.token for event in events]
        counts.add(len(events))
        assert session.num_read(handle) == rows.cache.lengths[0] == len(tokens) - 1
    assert 1 in counts and 5 in counts
    with torch.inference_mode():
        fresh: Any = model.open_rows(1, 70)
        fresh.prefill([0], [tokens[:-1]])
        found, expected = (own.read_block(0, 0, len(tokens) - 1) for own in (rows, fresh))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_generate_looks_up_and_refuses_what_it_cannot_guess() -> None:
    model = looping_model(with_prefix=False)
    sizes: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    config, prompts = GenerationConfig(max_new_tokens=30), [[3, 4, 5, 3, 4], [9, 8]]
    expected = generate(model, prompts, config)
    num_passes = len(sizes)
    assert generate(model, prompts, config, prompt_lookup=5) == expected
    assert len(sizes) - num_passes < num_passes
    for refused in (GenerationConfig(strategy=Sampling()), GenerationConfig(presence_penalty=1.0)):
        with pytest.raises(GenerationError, match="prompt_lookup has no effect"):
            generate(model, prompts, refused, prompt_lookup=5)
    with pytest.raises(GenerationError, match="prompt_lookup is -1"):
        generate(model, prompts, config, prompt_lookup=-1)


def test_a_model_that_cannot_check_guesses_is_refused() -> None:
    class Plain:
        features = type("F", (), {"scores_chunks": False, "truncates": True})

    with pytest.raises(GenerationError, match="prompt_lookup needs"):
        DecodeSession(Plain(), max_rows=1, max_tokens=9, prompt_lookup=2)  # type: ignore[arg-type]
