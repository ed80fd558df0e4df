"""The endpoints, in front of an engine whose tokens and log-probabilities are known."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from bloomlm.errors import AdapterError, ClosingError, ConfigError, GenerationError, QueueFullError, ServingError
from bloomlm.serving.http.app import ENDPOINTS, create_app
from bloomlm.serving.http.gate import REQUESTS_LOG
from bloomlm.serving.http.service import ServerOptions, Service
from tests.fake_engine import WORDS, FakeEngine, log_prob_of, top_of

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def client_of(engine: FakeEngine | None, host: str = "localhost", **options: Any) -> TestClient:
    service = Service(ServerOptions(model_name="bloom", **options))
    if engine is not None:
        service.open(engine)
    return TestClient(create_app(service), base_url=f"http://{host}:8000", raise_server_exceptions=False)


@pytest.fixture
def client(engine: FakeEngine) -> TestClient:
    return client_of(engine)


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json={"model": "bloom", "prompt": "bread", **body})
    assert response.status_code == 200, response.text
    return response.json()


def events_of(client: TestClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    prompt = {"prompt": "bread"} if path == "/v1/completions" else {}
    response = client.post(path, json={**prompt, **body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_completion(client: TestClient, engine: FakeEngine) -> None:
    tokens, prompt = engine.tokenizer.encode(WORDS), engine.tokenizer.encode("bread")
    answer = complete(client, temperature=0, max_tokens=50)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "bloom"
    assert answer["choices"] == [{"index": 0, "text": WORDS, "logprobs": None, "finish_reason": "length"}]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), len(tokens))
    assert usage["total_tokens"] == len(prompt) + len(tokens)
    assert engine.handles[0].request.prompt == prompt
    assert engine.handles[0].cancelled_after is None


def test_options_reach_the_engine(client: TestClient, engine: FakeEngine) -> None:
    complete(
        client,
        model="dates",
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-3,
        n=2,
        stop=["x", "y"],
        logit_bias={"7": -100, "9": 2.5},
        frequency_penalty=0.5,
        presence_penalty=-1,
        repetition_penalty=1.2,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=[5],
        logprobs=4,
    )
    request = engine.handles[0].request
    config, strategy = request.config, request.config.strategy
    assert request.adapter == "dates"
    assert (strategy.temperature, strategy.top_p, strategy.top_k, strategy.min_p) == (0.5, 0.9, 0, 0.1)
    assert strategy.seed == 2**64 - 3
    assert (config.max_new_tokens, config.min_new_tokens, config.num_return_sequences) == (9, 3, 2)
    assert config.stop == ("x", "y")
    assert config.logit_bias == ((7, -100.0), (9, 2.5))
    assert (config.frequency_penalty, config.presence_penalty, config.repetition_penalty) == (0.5, -1, 1.2)
    assert config.ignore_eos
    assert config.stop_token_ids == (5,)
    assert config.num_log_probs == 4


def test_defaults_are_those_of_openai(client: TestClient, engine: FakeEngine) -> None:
    complete(client)
    complete(client)
    first, second = (handle.request.config for handle in engine.handles)
    assert first.max_new_tokens == 16
    assert (first.strategy.temperature, first.strategy.top_p) == (1.0, 1.0)
    assert first.num_log_probs is None
    assert first.strategy.seed != second.strategy.seed


def test_temperature_0_is_greedy_with_any_sampling_options(client: TestClient, engine: FakeEngine) -> None:
    complete(client, temperature=0.0, top_p=0.5, top_k=3, min_p=0.2, seed=1)
    assert type(engine.handles[0].request.config.strategy).__name__ == "Greedy"
    response = client.post("/v1/completions", json={"prompt": "a", "temperature": 0, "n": 2})
    assert error_of(response, 400)["param"] == "n"


def test_prompts_of_every_form(client: TestClient, engine: FakeEngine) -> None:
    ids = engine.tokenizer.encode("bread")
    for prompt, expected in (
        (["bread", "salt"], [ids, engine.tokenizer.encode("salt")]),
        (ids, [ids]),
        ([[1, 2], ids], [[1, 2], ids]),
    ):
        engine.handles.clear()
        answer = complete(client, prompt=prompt, n=2, max_tokens=2)
        assert [handle.request.prompt for handle in engine.handles] == expected
        assert [handle.request.first_sequence for handle in engine.handles] == [0, 2][: len(expected)]
        assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(expected)))


def test_log_probabilities(client: TestClient, engine: FakeEngine) -> None:
    tokens = engine.tokenizer.encode(WORDS)
    shown = complete(client, logprobs=2, max_tokens=50, temperature=0)["choices"][0]["logprobs"]
    assert "".join(shown["tokens"]) == WORDS
    assert shown["token_logprobs"] == [log_prob_of(token) for token in tokens]
    assert [max(top.values()) for top in shown["top_logprobs"]] == [log_prob_of(token) + 0.5 for token in tokens]
    starts = [WORDS[: len("".join(shown["tokens"][:place]))] for place in range(len(tokens))]
    assert shown["text_offset"] == list(map(len, starts))
    only_chosen = complete(client, logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    assert [list(top.values()) for top in only_chosen["top_logprobs"]] == [[log_prob_of(t)] for t in tokens[:2]]


def test_echo_scores_the_prompt_with_null_first(client: TestClient, engine: FakeEngine) -> None:
    prompt = engine.tokenizer.encode("bread and salt")
    answer = complete(client, prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
    choice = answer["choices"][0]
    shown = choice["logprobs"]
    first = engine.tokenizer.encode(WORDS)[0]
    assert choice["text"] == "bread and salt" + engine.tokenizer.decode([first])
    assert {len(values) for values in shown.values()} == {len(prompt) + 1}
    assert shown["token_logprobs"] == [None, *(log_prob_of(token) for token in [*prompt[1:], first])]
    assert shown["top_logprobs"][0] is None
    assert len(shown["top_logprobs"][1]) == 2  # the likeliest, and the token itself
    assert shown["text_offset"][-1] == len("bread and salt")


def test_prompt_is_scored_without_a_new_token(client: TestClient, engine: FakeEngine) -> None:
    prompt = engine.tokenizer.encode("bread")
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("bread", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *map(log_prob_of, prompt[1:])]
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.handles[0].request.score_only
    assert complete(client, echo=True, max_tokens=0)["choices"][0]["text"] == "bread"
    assert error_of(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 0}), 400)["param"] == "max_tokens"


def test_echo_writes_special_tokens_out(client: TestClient) -> None:
    answer = complete(client, prompt="</s>bread", echo=True, max_tokens=1, temperature=0)
    assert answer["choices"][0]["text"].startswith("</s>bread")


def test_ids_on_request(client: TestClient, engine: FakeEngine) -> None:
    tokens, prompt = engine.tokenizer.encode(WORDS)[:3], engine.tokenizer.encode("bread")
    choice = complete(client, return_token_ids=True, max_tokens=3, echo=True, logprobs=1)["choices"][0]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (tokens, prompt)
    content = choice["logprobs"]["content"]
    assert [entry["id"] for entry in content] == prompt + tokens
    assert content[-1]["top_logprobs"][0]["id"] == tokens[-1] + 1
    named = complete(client, return_tokens_as_token_ids=True, logprobs=0, max_tokens=3)["choices"][0]["logprobs"]
    assert named["tokens"] == [f"token_id:{token}" for token in tokens]


def test_bytes_that_are_no_text_are_named_and_told_apart(client: TestClient, engine: FakeEngine) -> None:
    text = "\u0f40\U0001f600"
    ids = engine.tokenizer.encode(text)
    engine.continuation = lambda request, index: ids
    choice = complete(client, logprobs=0, temperature=0)["choices"][0]
    names = choice["logprobs"]["tokens"]
    assert choice["text"] == text
    assert len(ids) > len(text)
    assert any(name.startswith("bytes:\\x") for name in names)
    joined = b"".join(engine.tokenizer.token_bytes(token) for token in ids)
    spelled = "".join(n.removeprefix("bytes:") for n in names)
    assert spelled == "".join(f"\\x{byte:02x}" for byte in joined)
    assert choice["logprobs"]["text_offset"][-1] == 1


def test_stop_texts_cut_the_text_and_not_the_tokens(client: TestClient, engine: FakeEngine) -> None:
    choice = complete(client, stop=" and", logprobs=0, max_tokens=50, temperature=0)["choices"][0]
    assert choice["text"] == " the history of bread"
    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]).startswith(" the history of bread and")


def test_end_of_sequence_is_a_stop(client: TestClient, engine: FakeEngine) -> None:
    end = engine.tokenizer.eos_token_id
    engine.continuation = lambda request, index: [*engine.tokenizer.encode(" salt"), end, 9]
    choice = complete(client, temperature=0, logprobs=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" salt", "stop")
    assert choice["logprobs"]["tokens"][-1] == "</s>"


def test_best_of_returns_the_likeliest_by_mean(client: TestClient, engine: FakeEngine) -> None:
    by_score = sorted(range(1, 400), key=log_prob_of)
    unlikely, medium, likely = by_score[0], by_score[200], by_score[-1]
    engine.continuation = lambda request, index: [[unlikely] * 9, [medium] * 9, [likely] * 9][index]
    answer = complete(client, n=2, best_of=3, max_tokens=9, return_token_ids=True)
    assert [(choice["index"], choice["token_ids"][0]) for choice in answer["choices"]] == [(0, likely), (1, medium)]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 9 + 8 + 7
    too_few = client.post("/v1/completions", json={"prompt": "a", "n": 3, "best_of": 2})
    assert error_of(too_few, 400)["param"] == "best_of"
    scored = client.post("/v1/completions", json={"prompt": "a", "best_of": 2, "max_tokens": 0, "echo": True})
    assert error_of(scored, 400)["param"] == "best_of"
    streamed = client.post("/v1/completions", json={"prompt": "a", "best_of": 2, "stream": True})
    assert error_of(streamed, 400)["param"] == "best_of"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"echo": True, "logprobs": 3},
        {"n": 3, "prompt": ["bread", "salt"], "logprobs": 0, "echo": True},
        {"stop": [" and", "history of salt"]},
        {"return_token_ids": True},
        {"echo": True, "max_tokens": 0, "logprobs": 2},
    ],
    ids=str,
)
def test_a_stream_says_the_same_as_a_whole_answer(client: TestClient, body: dict[str, Any]) -> None:
    body = {"max_tokens": 40, "seed": 1, **body}
    whole = complete(client, **body)
    events = events_of(client, **body, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    assert len({event["id"] for event in events}) == 1
    joined: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        (choice,) = event["choices"]
        before = joined.setdefault(choice["index"], {**choice, "text": "", "logprobs": None, "token_ids": []})
        before["text"] += choice["text"]
        before["finish_reason"] = choice["finish_reason"]
        before["token_ids"] += choice.get("token_ids", [])
        if choice["logprobs"] is not None:
            lists = before["logprobs"] or {name: [] for name in choice["logprobs"]}
            before["logprobs"] = {name: lists[name] + values for name, values in choice["logprobs"].items()}
    if not body.get("return_token_ids"):
        joined = {index: {k: v for k, v in choice.items() if k != "token_ids"} for index, choice in joined.items()}
    assert [joined[index] for index in sorted(joined)] == whole["choices"]


def test_a_stream_without_tokens_has_no_empty_events(client: TestClient, engine: FakeEngine) -> None:
    engine.continuation = lambda request, index: engine.tokenizer.encode("\U0001f600") + engine.tokenizer.encode("a")
    texts = [event["choices"][0]["text"] for event in events_of(client, temperature=0)]
    assert texts == ["\U0001f600", "a"]
    shown = [event["choices"][0]["text"] for event in events_of(client, temperature=0, logprobs=0)]
    assert shown.count("") == len(engine.tokenizer.encode("\U0001f600")) - 1


def test_chat(engine: FakeEngine) -> None:
    client = client_of(engine, chat_template=TEMPLATE)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]},
    ]
    body = {"model": "bloom", "messages": messages, "temperature": 0, "max_completion_tokens": 30}
    answer = client.post("/v1/chat/completions", json=body).json()
    prompt = "<system>Be brief.</s><user>Who?</s><assistant>"
    assert engine.handles[0].request.prompt == engine.tokenizer.encode(prompt)
    assert answer["object"] == "chat.completion"
    message = {"role": "assistant", "content": WORDS, "refusal": None}
    assert answer["choices"] == [{"message": message, "index": 0, "logprobs": None, "finish_reason": "length"}]
    events = events_of(client, "/v1/chat/completions", **body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas) == WORDS
    assert [event["choices"][0]["finish_reason"] for event in events][-1] == "length"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_chat_takes_all_the_room_by_default(engine: FakeEngine) -> None:
    client = client_of(engine, chat_template=TEMPLATE)
    client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Who?"}]})
    request = engine.handles[0].request
    assert len(request.prompt) + request.config.max_new_tokens == engine.options.max_model_len


def test_chat_log_probabilities(engine: FakeEngine) -> None:
    client = client_of(engine, chat_template=TEMPLATE)
    body = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4}
    answer = client.post("/v1/chat/completions", json={**body, "logprobs": True, "top_logprobs": 1}).json()
    tokens = engine.tokenizer.encode(WORDS)[:4]
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == list(map(log_prob_of, tokens))
    assert [bytes(entry["bytes"]) for entry in content] == [engine.tokenizer.token_bytes(t) for t in tokens]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [
        [top_of(t, 1)[0][1]] for t in tokens
    ]
    assert "id" not in content[0]
    lone = client.post("/v1/chat/completions", json={**body, "top_logprobs": 1})
    assert error_of(lone, 400)["param"] == "top_logprobs"


CHAT_BODY = {"messages": [{"role": "user", "content": "Who?"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("completions", {"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most max_tokens (4)"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "possible with echo only"),
        ("completions", {"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias", "the key 'a'; expected ids of tokens"),
        ("completions", {"prompt": "a", "stream_options": {}}, "stream_options", "needs stream: true"),
        ("completions", {"prompt": ["a"] * 257}, "prompt", "257 prompts in one request; send at most 256"),
        ("chat/completions", {**CHAT_BODY, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "older name"),
        ("unload_lora_adapter", {"lora_name": "bloom"}, "lora_name", "the name of the model, which stays"),
        ("load_lora_adapter", {"lora_name": "bloom", "lora_path": "a"}, "lora_name", "choose another one"),
    ],
)
def test_fields_that_do_not_go_together(
    engine: FakeEngine, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    client = client_of(engine, chat_template=TEMPLATE, allow_adapter_loading=True)
    error = error_of(client.post(f"/v1/{path}", json=body), 400)
    assert error["param"] == param and words in error["message"]
    assert not engine.handles


def test_a_chat_may_name_its_limit_twice(engine: FakeEngine) -> None:
    client = client_of(engine, chat_template=TEMPLATE)
    for limits in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert client.post("/v1/chat/completions", json={**CHAT_BODY, **limits}).status_code == 200
        assert engine.handles[-1].request.config.max_new_tokens == 3


def test_a_template_that_is_none_is_told_before_there_is_a_model() -> None:
    with pytest.raises(ConfigError, match="the chat template is no Jinja template"):
        Service(ServerOptions(model_name="bloom", chat_template="{% if messages %}"))


def test_an_adapter_brings_the_template_of_its_conversations(engine: FakeEngine) -> None:
    engine.adapters[0].chat_template = "[{{ messages[0].content }}]"
    body = {"model": "dates", "messages": [{"role": "user", "content": "Who?"}]}
    assert client_of(engine).post("/v1/chat/completions", json=body).status_code == 200
    assert engine.handles[-1].request.prompt == engine.tokenizer.encode("[Who?]")
    # the server's own comes first, and the model itself has none
    client_of(engine, chat_template=TEMPLATE).post("/v1/chat/completions", json=body)
    assert engine.handles[-1].request.prompt == engine.tokenizer.encode("<user>Who?</s><assistant>")
    error_of(client_of(engine).post("/v1/chat/completions", json=body | {"model": "bloom"}), 400)


def test_chat_without_a_template_says_how_to_give_one(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "Who?"}]}
    error = error_of(client.post("/v1/chat/completions", json=body), 400)
    assert "--chat_template FILE" in error["message"]
    assert error["code"] == "no_chat_template"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
    ],
)
def test_a_template_that_fails_is_the_fault_of_the_messages(engine: FakeEngine, template: str) -> None:
    client = client_of(engine, chat_template=template)
    response = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Who?"}]})
    assert error_of(response, 400)["param"] == "messages"
    assert engine.handles == []


def test_models(client: TestClient) -> None:
    base, adapter = client.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == ("bloom", None, 2048)
    assert (adapter["id"], adapter["parent"], adapter["root"]) == ("dates", "bloom", "demo")
    assert client.get("/v1/models/dates").json() == adapter
    error = error_of(client.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "bloom, dates" in error["message"]
    assert error_of(client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"


def test_adapters_are_loaded_only_where_it_is_allowed(engine: FakeEngine) -> None:
    body = {"lora_name": "poems", "lora_path": "/poems"}
    error = error_of(client_of(engine).post("/v1/load_lora_adapter", json=body), 403)
    assert "--allow_adapter_loading" in error["message"]
    client = client_of(engine, allow_adapter_loading=True)
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert complete(client, model="poems")["model"] == "poems"
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "poems"}).status_code == 200
    assert error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": "poems"}), 404)["param"] == "model"
    assert (
        error_of(client.post("/v1/load_lora_adapter", json={**body, "lora_name": "bloom"}), 400)["param"] == "lora_name"
    )


def test_tokenizer_endpoints(client: TestClient, engine: FakeEngine) -> None:
    text = "</s>bread \u4e2d"
    answer = client.post(
        "/tokenize", json={"prompt": text, "add_special_tokens": False, "return_token_strs": True}
    ).json()
    assert answer["tokens"] == engine.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert answer["token_strs"][0] == "</s>"
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert error_of(client.post("/detokenize", json={"tokens": [10**6]}), 400)["param"] == "tokens"
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<s>", "</s>", None)


def test_loading(engine: FakeEngine) -> None:
    client = client_of(None)
    assert client.get("/health").status_code == 503
    for response in (client.get("/v1/models"), client.post("/v1/completions", json={"prompt": "a"})):
        assert error_of(response, 503)["code"] == "model_loading"
        assert int(response.headers["retry-after"]) > 0
    assert client.get("/version").status_code == 200
    assert client_of(engine).get("/health").status_code == 200
    engine.is_alive = False
    assert client_of(engine).get("/health").status_code == 503


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (GenerationError("too long"), 400, "invalid_value"),
        (AdapterError("no adapter 'dates'"), 404, "model_not_found"),
        (QueueFullError("256 requests wait", 7), 429, "queue_full"),
        (ClosingError("closing"), 503, "closing"),
        (ServingError("out of memory"), 500, "engine_error"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
def test_errors_of_the_engine(
    engine: FakeEngine, client: TestClient, raised: Exception, status: int, code: str
) -> None:
    engine.refusal = raised
    response = client.post("/v1/completions", json={"prompt": "a"})
    error = error_of(response, status)
    assert error["code"] == code
    assert "secret" not in error["message"]
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)
    if status == 429:
        assert error["type"] == "rate_limit_error"


def test_a_failure_in_the_middle(engine: FakeEngine, client: TestClient) -> None:
    engine.failure = ServingError("out of memory")
    engine.continuation = lambda request, index: engine.tokenizer.encode(WORDS)
    assert error_of(client.post("/v1/completions", json={"prompt": "a"}), 500)["message"] == "out of memory"
    response = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    events = response.text.strip().split("\n\n")
    assert len(events) > 2
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "out of memory"
    assert "[DONE]" not in response.text


def test_one_prompt_of_many_that_is_refused_cancels_the_others(engine: FakeEngine, client: TestClient) -> None:
    long = [5] * 2048
    error_of(client.post("/v1/completions", json={"prompt": [[1], [2], long]}), 400)
    assert [handle.cancelled_after for handle in engine.handles] == [0, 0]
    many = client.post("/v1/completions", json={"prompt": [[1]] * 257})
    assert "at most 256" in error_of(many, 400)["message"]


def test_key(engine: FakeEngine) -> None:
    client = client_of(engine, api_key="s3cret \u00e9")
    for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret"}):
        error = error_of(client.post("/v1/completions", json={"prompt": "a"}, headers=given), 401)
        assert (error["code"], error["type"]) == ("invalid_api_key", "authentication_error")
    for right in (b"Bearer s3cret \xc3\xa9", b"bearer s3cret \xc3\xa9"):  # UTF-8; the scheme's case has no meaning
        assert client.get("/metrics", headers={"authorization": right}).status_code == 200
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace("{name:path}", "bloom")
        status = client.request(endpoint.method, path, json={} if endpoint.body else None).status_code
        assert (status == 401) != endpoint.is_open, path
    assert {endpoint.path for endpoint in ENDPOINTS if endpoint.is_open} == {"/health", "/version"}
    client = client_of(engine, api_key="s3cret")
    right = client.get("/v1/models", headers={"authorization": "Bearer s3cret"})
    assert right.status_code == 200


def test_bodies_that_are_no_json_objects(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    for content in (b"", b"{", b"\xff", b'{"prompt": NaN}', b"[" * 100_000, b"1" * 5000):
        assert error_of(client.post("/v1/completions", content=content, headers=headers), 400)["param"] is None
    form = client.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert "application/json" in error_of(form, 415)["message"]


def test_limit_of_bodies(engine: FakeEngine) -> None:
    client = client_of(engine, max_body_bytes=1000)
    exact = {"prompt": "a" * (1000 - len(json.dumps({"prompt": ""}, separators=(",", ":"))))}
    assert client.post("/tokenize", json=exact).status_code == 200
    longer = {"prompt": exact["prompt"] + "a"}
    assert error_of(client.post("/tokenize", json=longer), 413)["code"] == "body_too_large"
    chunks = client.post(
        "/tokenize", content=iter([b'{"prompt": "', b"a" * 2000, b'"}']), headers={"content-type": "application/json"}
    )
    assert error_of(chunks, 413)["code"] == "body_too_large"


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert "/openapi.json" in error_of(client.get("/v1/nothing"), 404)["message"]
    assert "GET" in error_of(client.get("/v1/completions"), 405)["message"]


def test_page(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert client.get("/", headers={"if-none-match": page.headers["etag"]}).status_code == 304
    assert client.post("/").status_code == 405
    for path in ("/../http/app.py", "/%2e%2e/http/app.py", "/nothing.js"):
        assert client.get(path).status_code == 404


def test_only_known_hosts_on_loopback(engine: FakeEngine) -> None:
    allowed = ("localhost", "127.0.0.1", "::1")
    for host in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"):
        assert client_of(engine, host, allowed_hosts=allowed).get("/health").status_code == 200
    error = error_of(client_of(engine, "evil.example", allowed_hosts=allowed).get("/health"), 403)
    assert "--allowed_hosts" in error["message"]
    assert client_of(engine, "evil.example").get("/health").status_code == 200


def test_pages_of_others_need_permission(engine: FakeEngine) -> None:
    origin = {"origin": "https://example.org"}
    asking = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    plain = client_of(engine)
    assert "access-control-allow-origin" not in plain.get("/v1/models", headers=origin).headers
    assert "access-control-allow-origin" not in plain.options("/v1/completions", headers=asking).headers
    allowed = client_of(engine, allowed_origins=("https://example.org",), api_key="k")
    assert allowed.options("/v1/completions", headers=asking).status_code == 200
    refused = allowed.get("/v1/models", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://example.org"


def test_metrics_have_the_names_of_vllm(client: TestClient, engine: FakeEngine) -> None:
    complete(client, n=2, max_tokens=5)
    text = client.get("/metrics").text
    for line in (
        'vllm:num_requests_running{model_name="bloom"} 3.0',
        'vllm:num_requests_waiting{model_name="bloom"} 2.0',
        'vllm:kv_cache_usage_perc{model_name="bloom"} 0.25',
        'vllm:prompt_tokens_total{model_name="bloom"} 11.0',
        'vllm:generation_tokens_total{model_name="bloom"} 7.0',
        'vllm:prefix_cache_hits_total{model_name="bloom"} 4.0',
        'vllm:request_success_total{finished_reason="length",model_name="bloom"} 2.0',
        'vllm:time_to_first_token_seconds_count{model_name="bloom"} 1.0',
        'vllm:inter_token_latency_seconds_count{model_name="bloom"} 7.0',
    ):
        assert line in text.splitlines()


@pytest.fixture
def log_lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(json.loads(record.getMessage()))  # type: ignore[method-assign]
    log = logging.getLogger(REQUESTS_LOG)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)


def test_one_log_line_a_request(client: TestClient, log_lines: list[dict[str, Any]]) -> None:
    response = client.post(
        "/v1/completions", json={"prompt": "private words", "user": "ada"}, headers={"x-request-id": "abc-1"}
    )
    client.post("/v1/completions", json={"prompt": 5})
    client.get("/health")
    assert response.headers["x-request-id"] == "abc-1"
    good, bad = log_lines
    assert (good["request_id"], good["status"], good["path"], good["user"]) == ("abc-1", 200, "/v1/completions", "ada")
    assert good["completion_tokens"] == response.json()["usage"]["completion_tokens"]
    assert good["prompt_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert good["finish_reasons"] == ["length"]
    assert "private" not in json.dumps(log_lines)
    assert (bad["status"], len(bad["request_id"])) == (400, 32)


def test_prompts_are_logged_on_request(engine: FakeEngine, log_lines: list[dict[str, Any]]) -> None:
    complete(client_of(engine, log_prompts=True), prompt="private words")
    assert log_lines[0]["prompt"] == "private words"


def test_runs(engine: FakeEngine, tmp_path: Path) -> None:
    for name, text in (("a/b", "1\n2\n"), ("c", "1\n2\n3")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    (tmp_path / "d").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.write_text("secret\n")
    (tmp_path / "d" / "metrics.jsonl").symlink_to(outside)
    client = client_of(engine, runs_dir=tmp_path)
    assert {run["name"]: run["size"] for run in client.get("/runs").json()["runs"]} == {"a/b": 4, "c": 5}
    whole = client.get("/runs/a/b/metrics.jsonl")
    assert (whole.text, whole.headers["x-next-offset"]) == ("1\n2\n", "4")
    rest = client.get("/runs/c/metrics.jsonl?offset=2")
    assert (rest.text, rest.headers["x-next-offset"]) == ("2\n", "4")  # the last line is not whole yet
    assert client.get("/runs/c/metrics.jsonl?offset=99").text == ""
    for name in ("d", "..", "%2e%2e", "%2e%2e%2f%2e%2e", "a/b/..", "nothing"):
        assert client.get(f"/runs/{name}/metrics.jsonl").status_code == 404
    assert error_of(client.get("/runs/c/metrics.jsonl?offset=-1"), 400)["param"] == "offset"
    assert "--runs DIR" in error_of(client_of(engine).get("/runs"), 404)["message"]


def test_openapi_describes_every_endpoint(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    found = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert found == {(endpoint.method, endpoint.path.replace(":path", "")) for endpoint in ENDPOINTS}
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"]
    assert body["properties"]["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
