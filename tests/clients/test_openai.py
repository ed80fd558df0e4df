"""OpenAI's own client, in both its forms: every field of a body, streams, errors."""

import asyncio
import inspect
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the tests drive the server with openai's client")

from openai.resources.chat.completions import Completions as ChatCompletions  # noqa: E402
from openai.resources.completions import Completions  # noqa: E402

from tests.clients.conftest import ADAPTERS, MODEL, Alone  # noqa: E402
from tests.clients.server import Server, wait_for  # noqa: E402

PROMPT = "The default value of the"
CHINESE = "\u4ece\u524d\uff0c\u5728\u4e00\u5ea7\u5c71\u4e0a"
SAMPLING = {"decode_strategy": "sampling", "seed": 5}
_TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}

# Field of a body -> value, and the options of `bloomlm predict` that mean the same.
COMPLETION_FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "best_of": (1, {}),
    "echo": (False, {}),
    "frequency_penalty": (1.5, {"frequency_penalty": 1.5}),
    "logit_bias": ({"300": 100}, {"logit_bias": ((300, 100.0),)}),
    "logprobs": (2, {}),
    "max_tokens": (7, {"max_new_tokens": 7}),
    "n": (3, {**SAMPLING, "num_return_sequences": 3}),
    "presence_penalty": (1.25, {"presence_penalty": 1.25}),
    "seed": (5, SAMPLING),
    "stop": ([" is", "the"], {"stop": (" is", "the")}),
    "suffix": ("", {}),
    "temperature": (0.7, {**SAMPLING, "temperature": 0.7}),
    "top_p": (0.6, {**SAMPLING, "top_p": 0.6}),
    "user": ("someone", {}),
}
EXTRA_FIELDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "top_k": (4, {**SAMPLING, "top_k": 4}),
    "min_p": (0.2, {**SAMPLING, "min_p": 0.2}),
    "repetition_penalty": (1.4, {"repetition_penalty": 1.4}),
    "min_tokens": (12, {"min_new_tokens": 12}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "stop_token_ids": ([15], {"stop_token_ids": (15,)}),
}


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def common_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The fields under which a field's own effect shows."""
    return {"seed": 5, "temperature": 1} if options.get("decode_strategy") else {"temperature": 0}


@pytest.mark.parametrize("field", COMPLETION_FIELDS)
def test_fields_mean_what_they_mean_in_predict(client: Any, alone: Alone, field: str) -> None:
    value, options = COMPLETION_FIELDS[field]
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 16, **common_fields(options), field: value}
    found = client.completions.create(**body)
    assert [choice.text for choice in found.choices] == alone.texts(PROMPT, **{"max_new_tokens": 16, **options})


@pytest.mark.parametrize("field", EXTRA_FIELDS)
def test_extra_fields_mean_what_they_mean_in_predict(client: Any, alone: Alone, field: str) -> None:
    value, options = EXTRA_FIELDS[field]
    found = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=16, extra_body={field: value}, **common_fields(options)
    )
    assert [choice.text for choice in found.choices] == alone.texts(PROMPT, **{"max_new_tokens": 16, **options})


def test_no_field_of_the_client_is_left_out() -> None:
    of_client = set(inspect.signature(Completions.create).parameters) - _TRANSPORT
    assert of_client == {"model", "prompt", "stream", "stream_options", *COMPLETION_FIELDS}


def test_prompts_in_all_forms(client: Any, alone: Alone) -> None:
    texts = [PROMPT, CHINESE]
    ids = alone.model(MODEL).tokenizer.encode_batch(texts)
    expected = alone.texts(texts, max_new_tokens=6)
    for prompt, count in ((texts, 2), (ids, 2), (texts[0], 1), (ids[0], 1)):
        found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in found.choices] == expected[:count]
    assert found.usage.completion_tokens == 6


def test_echo_scores_the_prompt(client: Any, alone: Alone) -> None:
    ids = alone.model(MODEL).tokenizer.encode(PROMPT)
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert found.text == PROMPT
    assert len(found.logprobs.token_logprobs) == len(ids)
    assert found.logprobs.token_logprobs[0] is None
    rows = alone.model(MODEL).model.open_rows(1, len(ids))
    logits = rows.prefill([0], [ids], num_logits=[len(ids)]).log_softmax(-1)
    expected = [logits[place, token].item() for place, token in enumerate(ids[1:])]
    assert found.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    likeliest = logits[:-1].max(dim=-1).values.tolist()
    assert [max(top.values()) for top in found.logprobs.top_logprobs[1:]] == pytest.approx(likeliest, abs=1e-5)


def test_best_of_returns_the_likeliest(client: Any) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "seed": 3, "logprobs": 0}
    drawn = client.completions.create(**body, n=5).choices
    best = client.completions.create(**body, best_of=5).choices
    means = [sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs) for choice in drawn]
    assert [choice.text for choice in best] == [drawn[means.index(max(means))].text]


def test_a_stream_is_the_whole_answer(client: Any, alone: Alone) -> None:
    body = {"model": MODEL, "prompt": [PROMPT, CHINESE], "max_tokens": 24, "temperature": 0}
    texts = ["", ""]
    usages = []
    for event in client.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usages.append(event.usage)
        for choice in event.choices:
            assert "\ufffd" not in choice.text or choice.finish_reason
            texts[choice.index] += choice.text
    assert texts == alone.texts(body["prompt"], max_new_tokens=24)
    generated = alone.model(MODEL).generate(body["prompt"], max_new_tokens=24)
    assert usages[-1].completion_tokens == sum(len(found.tokens) for found in generated)
    assert set(usages[:-1]) == {None}


def test_asynchronous_clients_at_once(server: Server, alone: Alone) -> None:
    prompts = [f"{PROMPT} {number}" for number in range(24)]

    async def ask(client: Any, prompt: str, is_stream: bool) -> str:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
        if not is_stream:
            return (await client.completions.create(**body)).choices[0].text
        stream = await client.completions.create(**body, stream=True)
        return "".join([event.choices[0].text async for event in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [ask(client, prompt, place % 2 == 0) for place, prompt in enumerate(prompts)]
            return list(await asyncio.gather(*asked))

    assert asyncio.run(main()) == alone.texts(prompts, max_new_tokens=12)


def test_adapters_at_once_equal_each_alone(server: Server, alone: Alone) -> None:
    models = [MODEL, *ADAPTERS]

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asked = [
                client.completions.create(model=name, prompt=f"{turn} {PROMPT}", max_tokens=16, temperature=0)
                for turn in range(3)
                for name in models
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    expected = [alone.texts(f"{turn} {PROMPT}", name, max_new_tokens=16)[0] for turn in range(3) for name in models]
    assert len(set(expected[: len(models)])) == len(models)
    assert asyncio.run(main()) == expected


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, *ADAPTERS]
    assert client.models.retrieve("dora").parent == MODEL


def test_a_stream_that_is_closed_frees_its_place(client: Any, server: Server) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="a", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.metric("vllm:num_requests_running") == 1
    stream.close()
    wait_for(lambda: server.metric("vllm:num_requests_running") == 0, "the place of a closed stream")


MESSAGES = [{"role": "user", "content": "The history of"}]
# Field of a chat's body -> value, and the options of `bloomlm predict` that mean the same; None: it is refused.
CHAT_FIELDS: dict[str, tuple[Any, dict[str, Any] | None]] = {
    **{name: found for name, found in COMPLETION_FIELDS.items() if name not in ("best_of", "echo", "suffix")},
    "logprobs": (True, {}),
    "max_completion_tokens": (7, {"max_new_tokens": 7}),
    "top_logprobs": (2, {}),
    "safety_identifier": ("someone", {}),
    "audio": ({"format": "mp3", "voice": "x"}, None),
    "modalities": (["audio"], None),
    "function_call": ("auto", None),
    "functions": ([{"name": "f"}], None),
    "parallel_tool_calls": (True, {}),
    "tool_choice": ("required", None),
    "tools": ([{"type": "function", "function": {"name": "f"}}], None),
    "web_search_options": ({}, None),
    "response_format": ({"type": "json_object"}, None),
    "prediction": ({"type": "content", "content": "x"}, None),
    "reasoning_effort": ("high", None),
    "verbosity": ("low", None),
    "moderation": ({}, None),
    "metadata": ({"a": "b"}, None),
    "store": (True, None),
    "prompt_cache_key": ("x", None),
    "prompt_cache_options": ({}, None),
    "prompt_cache_retention": ("24h", None),
    "service_tier": ("priority", None),
}


@pytest.mark.parametrize("field", CHAT_FIELDS)
def test_fields_of_chats(client: Any, alone: Alone, field: str) -> None:
    value, options = CHAT_FIELDS[field]
    length = {} if field in ("max_tokens", "max_completion_tokens") else {"max_completion_tokens": 16}
    with_log_probs = {"logprobs": True} if field == "top_logprobs" else {}
    body = {"model": MODEL, "messages": MESSAGES, **common_fields(options or {}), **length, **with_log_probs}
    body[field] = value
    if options is None:
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**body)
        assert raised.value.param == field
        return
    found = client.chat.completions.create(**body)
    expected = alone.texts("user: The history of\nassistant:", **{"max_new_tokens": 16, **options})
    assert [choice.message.content for choice in found.choices] == expected


def test_no_field_of_chats_is_left_out() -> None:
    of_client = set(inspect.signature(ChatCompletions.create).parameters) - _TRANSPORT
    assert of_client == {"model", "messages", "stream", "stream_options", *CHAT_FIELDS}


def test_chats_stream_and_give_log_probabilities(client: Any, alone: Alone) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 16, "logprobs": True}
    whole = client.chat.completions.create(**body, top_logprobs=2).choices[0]
    events = [event.choices[0] for event in client.chat.completions.create(**body, top_logprobs=2, stream=True)]
    assert events[0].delta.role == "assistant"
    assert "".join(event.delta.content or "" for event in events) == whole.message.content
    streamed = [entry for event in events if event.logprobs for entry in event.logprobs.content]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in whole.logprobs.content]
    assert len(streamed) == 16
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in streamed)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "this server has builtin:tiny"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, "nonsense"),
        ({"prompt": [999_999]}, openai.BadRequestError, "999999"),
        ({"prompt": "a " * 5000}, openai.BadRequestError, "2048"),
        ({"prompt": "a" * 9_000_000}, openai.APIStatusError, "--max_body_mb"),
    ],
)
def test_errors_become_the_exceptions_of_the_client(
    client: Any, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        client.completions.create(**{"model": MODEL, "prompt": PROMPT, **changes})
