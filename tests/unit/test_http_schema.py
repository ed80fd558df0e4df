"""Bodies are checked by tables that know every field of OpenAI's client."""

import json
from typing import Any, get_args

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from bloomlm.serving.http.errors import ApiError
from bloomlm.serving.http.fields import CHAT, COMPLETION, TOKENIZE
from bloomlm.serving.http.schema import Fields, check, parse_body


def fields_of(union: Any) -> set[str]:
    return {name for variant in get_args(union) for name in variant.__annotations__} | {
        name for variant in get_args(union) for base in variant.__orig_bases__ for name in base.__annotations__
    }


@pytest.mark.parametrize(
    ("union", "fields"),
    [(completion_create_params.CompletionCreateParams, COMPLETION), (chat_create_params.CompletionCreateParams, CHAT)],
    ids=["completions", "chat"],
)
def test_every_field_of_the_client_is_known(union: Any, fields: Fields) -> None:
    names = fields_of(union)
    assert {"model", "stream", "seed"} <= names
    assert names - set(fields) == set()


def refused(body: Any, fields: Fields = COMPLETION) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_body(body, fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"prompt": 5}, "prompt", "prompt is 5; expected a text or a list"),
        ({"prompt": []}, "prompt", "prompt is []"),
        ({"prompt": [1, "a"]}, "prompt", "prompt is [1, "),
        ({"prompt": [-1]}, "prompt", "prompt is [-1]"),
        ({"prompt": [True]}, "prompt", "prompt is [true]"),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({}, "prompt", "prompt is missing; expected a text"),
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": "a", "temperature": "hot"}, "temperature", 'temperature is "hot"; expected 0 or a number'),
        ({"prompt": "a", "temperature": 3}, "temperature", "temperature is 3"),
        ({"prompt": "a", "temperature": 0.001}, "temperature", "temperature is 0.001"),
        ({"prompt": "a", "temperature": False}, "temperature", "temperature is false"),
        ({"prompt": "a", "temperature": float("inf")}, "temperature", "temperature is Infinity"),
        ({"prompt": "a", "top_p": 0}, "top_p", "expected a number above 0 and at most 1"),
        (
            {"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}},
            "logit_bias",
            "logit_bias has 1025 entries; expected at most 1024",
        ),
        ({"prompt": "a", "n": 0}, "n", "n is 0; expected a whole number at least 1"),
        ({"prompt": "a", "n": 1.5}, "n", "n is 1.5"),
        ({"prompt": "a", "n": 10**400}, "n", "at most 128"),
        ({"prompt": "a", "top_p": 10**400}, "top_p", "expected a number above 0 and at most 1"),
        ({"prompt": "a", "n": True}, "n", "n is true"),
        ({"prompt": "a", "echo": 1}, "echo", "echo is 1; expected true or false"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs is true; expected a whole number"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop[1]", 'stop[1] is ""; expected a text that is not empty'),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5 is 101; expected a number"),
        ({"prompt": "a", "stream_options": {"usage": True}}, "stream_options", 'unknown field "usage"'),
        ({"prompt": "a", "suffix": "b"}, "suffix", "suffix is not supported: BLOOM continues texts"),
        ({"prompt": "a", "temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"prompt": "a", "x" * 500: 1}, "x" * 60, "known fields: "),
        (["prompt"], None, "expected a JSON object"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_by_name(given: Any, param: str | None, words: str) -> None:
    error = refused(given)
    assert error.param == param
    assert words in error.message
    json.dumps(error.body())


def test_messages_are_checked_in_depth() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    assert parse_body({"messages": [message]}, CHAT)["messages"] == [message]
    assert refused({"messages": [{"role": "robot", "content": "a"}]}, CHAT).param == "messages[0].role"
    assert "messages[0].content is missing" in refused({"messages": [{"role": "user"}]}, CHAT).message
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert (
        'messages[0].content[0].type is "image_url"; expected "text"'
        in refused({"messages": [{"role": "user", "content": [{"text": "a", **image}]}]}, CHAT).message
    )


@pytest.mark.parametrize(
    ("name", "neutral", "acting"),
    [
        ("tools", [], [{"type": "function"}]),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("store", False, True),
        ("parallel_tool_calls", True, "yes"),
        ("service_tier", "auto", "flex"),
    ],
)
def test_unsupported_fields_are_refused_where_they_would_act(name: str, neutral: Any, acting: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]}
    assert name not in parse_body({**body, name: neutral}, CHAT)
    assert name not in parse_body({**body, name: None}, CHAT)
    error = refused({**body, name: acting}, CHAT)
    assert error.param == name
    assert "not supported" in error.message


def test_whole_numbers_may_be_written_as_floats() -> None:
    checked = parse_body({"prompt": [1.0, 2], "n": 2.0, "max_tokens": None}, COMPLETION)
    assert checked == {"prompt": [1, 2], "n": 2}
    assert [type(token) for token in checked["prompt"]] == [int, int]


def test_a_list_of_many_ids_is_checked_at_its_extremes() -> None:
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}}
    assert check([0, 9, 3], schema, "ids") == [0, 9, 3]
    for wrong in ([0, 10], [-1, 3]):
        with pytest.raises(ApiError):
            check(wrong, schema, "ids")


def test_unknown_field_of_a_small_body() -> None:
    assert "known fields: add_special_tokens, model, prompt" in refused({"prompt": "a", "zzz": 1}, TOKENIZE).message
