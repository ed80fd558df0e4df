"""A checked body -> what the engine is to do, and how the answer is shown."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bloomlm.errors import DataError
from bloomlm.generation.config import GenerationConfig
from bloomlm.serving.engine import Engine
from bloomlm.serving.http.choices import token_names
from bloomlm.serving.http.errors import bad_request
from bloomlm.serving.http.fields import DEFAULT_MAX_TOKENS
from bloomlm.serving.http.formats import AnswerFormat, ChatFormat
from bloomlm.serving.http.service import Service
from bloomlm.serving.request import GenerationRequest

# Options that choose among tokens at random; a temperature of 0 takes the likeliest whatever they say.
_SAMPLING = ("top_p", "min_p")
_SAME_NAMES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "stop_token_ids", "ignore_eos", "stop")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One HTTP request, ready for the engine."""

    requests: Sequence[GenerationRequest]
    """One for each prompt."""
    format: AnswerFormat
    """How the answer is shown."""
    model: str
    """The name that the answer repeats."""
    num_choices: int
    """Choices of each prompt in the answer; the likeliest of num_return_sequences."""
    echo: bool = False
    """Whether each choice begins with its prompt."""
    is_stream: bool = False
    """Whether the answer is sent in pieces."""
    has_usage: bool = False
    """Whether a stream ends with an event that counts tokens."""


def plan_completion(body: Mapping[str, Any], service: Service) -> Plan:
    """The plan of a body of /v1/completions.

    Raises:
        ApiError: 400 for fields that do not go together, 404 for an unknown model.
        GenerationError: options that cannot be served.
    """
    echo, num_log_probs = body.get("echo", False), body.get("logprobs")
    max_tokens, count = body.get("max_tokens", DEFAULT_MAX_TOKENS), body.get("n", 1)
    best_of = body.get("best_of", count)
    if best_of < count:
        raise bad_request(f"best_of is {best_of}; expected at least n ({count}), which it chooses from", "best_of")
    if body.get("stream") and best_of > count:
        raise bad_request(
            "best_of chooses when all is generated, so it cannot be streamed; leave out stream", "best_of"
        )
    if not max_tokens and best_of > count:
        raise bad_request(
            "best_of chooses among generated answers, and max_tokens 0 generates none; leave it out", "best_of"
        )
    if not max_tokens and not echo:
        raise bad_request("max_tokens is 0; that is possible with echo only, to score the prompt", "max_tokens")
    # The order of best_of is that of log-probabilities.
    wanted = 0 if num_log_probs is None and best_of > count else num_log_probs
    prompts = _read_prompts(body["prompt"], service.engine)
    config = _config(body, max_new_tokens=max(1, max_tokens), num_log_probs=wanted, num=best_of)
    adapter = service.adapter_of(body.get("model"))
    requests = [
        GenerationRequest(
            prompt=prompt,
            config=config,
            adapter=adapter,
            prompt_log_probs=num_log_probs if echo else None,
            score_only=not max_tokens,
            first_sequence=place * best_of,
        )
        for place, prompt in enumerate(prompts)
    ]
    shown = AnswerFormat(has_log_probs=num_log_probs is not None, **_format_options(body, service.engine))
    return _plan(body, service, requests, shown, num_choices=count, echo=echo)


def plan_chat(body: Mapping[str, Any], service: Service) -> Plan:
    """The plan of a body of /v1/chat/completions.

    Raises:
        ApiError: 400 for fields that do not go together or a model without a chat template, 404 for an unknown model.
        GenerationError: options that cannot be served.
    """
    engine = service.engine
    if "top_logprobs" in body and not body.get("logprobs"):
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    limits = {body[name] for name in ("max_completion_tokens", "max_tokens") if name in body}
    if len(limits) > 1:
        raise bad_request("max_tokens is the older name of max_completion_tokens; give one of them", "max_tokens")
    prompt = engine.tokenizer.encode(_prompt_of(body, service))
    room = engine.options.max_model_len - len(prompt)
    config = _config(
        body,
        max_new_tokens=limits.pop() if limits else max(1, room),
        num_log_probs=body.get("top_logprobs", 0) if body.get("logprobs") else None,
        num=body.get("n", 1),
    )
    request = GenerationRequest(prompt=prompt, config=config, adapter=service.adapter_of(body.get("model")))
    shown = ChatFormat(has_log_probs=body.get("logprobs", False), **_format_options(body, engine))
    return _plan(body, service, [request], shown, num_choices=body.get("n", 1))


def _plan(
    body: Mapping[str, Any],
    service: Service,
    requests: Sequence[GenerationRequest],
    shown: AnswerFormat,
    *,
    num_choices: int,
    echo: bool = False,
) -> Plan:
    is_stream = body.get("stream", False)
    if "stream_options" in body and not is_stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    most = service.engine.options.max_queue
    if len(requests) > most:
        raise bad_request(
            f"{len(requests)} prompts in one request; send at most {most}, which the queue holds", "prompt"
        )
    return Plan(
        requests=requests,
        format=shown,
        model=body.get("model", service.options.model_name),
        num_choices=num_choices,
        echo=echo,
        is_stream=is_stream,
        has_usage=body.get("stream_options", {}).get("include_usage", False),
    )


def _read_prompts(prompt: Any, engine: Engine) -> list[list[int]]:
    """The ids of each prompt: a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    prompts = engine.tokenizer.encode_batch(prompt) if isinstance(prompt[0], str) else prompt
    for place, ids in enumerate(prompts):
        if not ids:
            which = "the prompt" if len(prompts) == 1 else f"prompt {place} of {len(prompts)}"
            raise bad_request(f"{which} is empty; to write from nothing, send '<s>', BLOOM's first token", "prompt")
    return prompts


def _prompt_of(body: Mapping[str, Any], service: Service) -> str:
    """The text after which the model is to answer; a content in parts becomes one text."""
    plain = [{**message, "content": _joined(message["content"])} for message in body["messages"]]
    try:
        return service.chat_template_of(service.adapter_of(body.get("model"))).render(plain, add_generation_prompt=True)
    except DataError as error:
        raise bad_request(str(error), "messages") from error


def _joined(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _config(body: Mapping[str, Any], *, max_new_tokens: int, num_log_probs: int | None, num: int) -> GenerationConfig:
    options = {name: body[name] for name in _SAME_NAMES if name in body}
    if body.get("temperature", 1.0):
        options |= {name: body[name] for name in _SAMPLING if name in body}
        # OpenAI's seed may be negative; without one every request has random numbers of its own.
        seed = body["seed"] % 2**64 if "seed" in body else secrets.randbits(63)
        options |= {"decode_strategy": "sampling", "temperature": body.get("temperature", 1.0), "seed": seed}
        options |= {"top_k": max(0, body.get("top_k", 0))}
    elif num > 1:
        raise bad_request(f"{num} choices with temperature 0, which has one answer; ask for one, or raise it", "n")
    min_tokens = body.get("min_tokens", 0)
    if min_tokens > max_new_tokens:
        raise bad_request(f"min_tokens is {min_tokens}; expected at most max_tokens ({max_new_tokens})", "min_tokens")
    bias = tuple((_token_id(name), float(value)) for name, value in body.get("logit_bias", {}).items())
    return GenerationConfig.from_options(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_tokens,
        num_return_sequences=num,
        num_log_probs=num_log_probs,
        logit_bias=bias,
        **options,
    )


def _token_id(name: str) -> int:
    """The id that a key of logit_bias names."""
    if not (name.isascii() and name.isdigit() and len(name) < 10):
        raise bad_request(f"logit_bias has the key {name[:60]!r}; expected ids of tokens", "logit_bias")
    return int(name)


def _format_options(body: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    return {
        "tokenizer": engine.tokenizer,
        "name": token_names(engine.tokenizer, as_ids=body.get("return_tokens_as_token_ids", False)),
        "has_ids": body.get("return_token_ids", False),
    }
