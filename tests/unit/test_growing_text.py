"""Prompts that continue each other have the tokens that they have alone, and are read once."""

from dataclasses import replace
from typing import Any

import pytest

from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.generate import generate
from bloomlm.generation.growing import GrowingText
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.row_memory import RowFeatures
from tests.unit.test_session import eager_model

FIRST = [7, 8, 9, 10, 11, 12]


class Talk:
    """A growing text, and how many tokens of each prompt the model has read."""

    def __init__(self, model: BloomForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._model = model
        self._text = GrowingText(model, lambda ids: "".join(f"<{token}>" for token in ids))
        self._num_read = 0
        open_rows = model.open_rows

        def opened(num_rows: int, num_tokens: int) -> Any:
            rows = open_rows(num_rows, num_tokens)
            prefill = rows.prefill

            def counted(numbers: Any, prompts: Any, **options: Any) -> Any:
                self._num_read += sum(map(len, prompts))
                return prefill(numbers, prompts, **options)

            monkeypatch.setattr(rows, "prefill", counted)
            return rows

        monkeypatch.setattr(model, "open_rows", opened)

    def say(self, prompt: list[int], expected_num_read: int, **options: Any) -> list[int]:
        """The continuation, which is that of the prompt alone."""
        config = GenerationConfig(**({"max_new_tokens": 9} | options))
        tokens: list[int] = []
        self._num_read = 0
        reason = self._text.extend(prompt, config, tokens.append)
        assert self._num_read == expected_num_read
        (alone,) = generate(self._model, [prompt], config, decode_text=self._text._decode_text)
        assert (tokens, reason) == (alone.tokens, alone.finish_reason)
        return tokens

    def stop(self, prompt: list[int], after: int) -> None:
        """Stop a continuation after so many tokens."""
        tokens: list[int] = []

        def push(token: int) -> None:
            tokens.append(token)
            if len(tokens) == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self._text.extend(prompt, GenerationConfig(max_new_tokens=9), push)


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"strategy": Sampling(seed=3)}, {"stop": ("<5>", "<40>"), "min_new_tokens": 2}]
)
def test_each_turn_reads_what_is_new(
    with_prefix: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(eager_model(101, with_prefix=with_prefix), monkeypatch)
    prompt = FIRST
    answer = talk.say(prompt, len(prompt), **options)
    for turn in ([20, 21, 22], [23], [24, 25]):
        prompt = [*prompt, *answer, *turn]
        answer = talk.say(prompt, 1 + len(turn), **options)  # the last token of an answer was not read


def test_only_the_common_beginning_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(eager_model(101, with_prefix=False), monkeypatch)
    talk.say(FIRST, 6)
    talk.say([7, 8, 9, 50, 11, 12], 3)
    talk.say([7, 8], 1)
    talk.say([7, 8], 1)
    talk.say([60, 8], 2)


def test_a_stopped_turn_leaves_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(eager_model(101, with_prefix=False), monkeypatch)
    talk.stop(FIRST, after=3)
    answer = talk.say(FIRST, 6)
    talk.stop([*FIRST, *answer, 20], after=1)
    talk.say([*FIRST, *answer, 21], 2)


def test_a_model_without_blocks_reads_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = eager_model(101, with_prefix=False)
    features = replace(model.features, blocks=False)
    monkeypatch.setattr(BloomForCausalLM, "features", property(lambda self: features))
    assert isinstance(model.features, RowFeatures) and not model.features.blocks
    talk = Talk(model, monkeypatch)
    answer = talk.say(FIRST, 6)
    talk.say([*FIRST, *answer, 20], 7 + len(answer))
