"""The fields of every body, as tables: those of OpenAI's client, and the common ones of vLLM.

Sources: https://platform.openai.com/docs/api-reference/completions, .../chat;
https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html
"""

from typing import Any

from bloomlm.serving.http.schema import Field, Fields, Schema

MAX_LOG_PROBS = 20
"""Most alternatives of a token."""
MAX_BIASES = 1024
"""Most ids in logit_bias, which act on the logits at every step."""
MAX_SEQUENCES = 128
"""Most choices that one prompt may ask for."""
DEFAULT_MAX_TOKENS = 16
"""max_tokens of /v1/completions where it is not given, as OpenAI has it."""

BOOLEAN: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string"}
WORD: Schema = {"type": "string", "minLength": 1}
TOKEN: Schema = {"type": "integer", "minimum": 0}
IDS: Schema = {"type": "array", "items": TOKEN}
STREAM_OPTIONS: Schema = {
    "type": "object",
    "properties": {"include_usage": BOOLEAN, "include_obfuscation": {"enum": [False]}},
}
NO_TOOLS = "BLOOM was not trained to call tools"
TEXT_ONLY = "BLOOM reads and writes text only"


def integer(minimum: int, maximum: int | None = None) -> Schema:
    """The schema of a whole number."""
    return {"type": "integer", "minimum": minimum} | ({} if maximum is None else {"maximum": maximum})


def number(minimum: float, maximum: float) -> Schema:
    """The schema of a number, both bounds allowed."""
    return {"type": "number", "minimum": minimum, "maximum": maximum}


def _unsupported(why: str, *neutral: Any) -> Field:
    """A field of OpenAI's client that is refused unless it has a value under which it has no effect."""
    return Field(schema={"enum": list(neutral)}, help=f"Not supported: {why}.", refusal=why)


COMMON: dict[str, Field] = {
    "model": Field(schema=WORD, help="name of the model or of an adapter; without it, the model"),
    "n": Field(schema=integer(1, MAX_SEQUENCES), help="choices of each prompt, with a temperature above 0"),
    "seed": Field(schema=integer(-(2**63), 2**63 - 1), help="the same request with the same seed has the same answer"),
    "stop": Field(
        schema={"anyOf": [WORD, {"type": "array", "items": WORD, "maxItems": 16}]},
        help="texts at which the answer ends; it is cut before them",
    ),
    "stream": Field(schema=BOOLEAN, help="send the answer in pieces, as server-sent events"),
    "stream_options": Field(schema=STREAM_OPTIONS, help="include_usage: count tokens in a last event"),
    "temperature": Field(
        schema={"anyOf": [{"enum": [0]}, number(0.01, 2)]},
        help="0: the likeliest token each time; below 1, likely tokens become even likelier; 1 by default",
    ),
    "top_p": Field(
        schema={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        help="draw from the likeliest tokens of this total probability",
    ),
    "logit_bias": Field(
        schema={"type": "object", "additionalProperties": number(-100, 100), "maxProperties": MAX_BIASES},
        help="id of a token -> number that is added to its logit",
    ),
    "frequency_penalty": Field(
        schema=number(-2, 2), help="subtracted from a token's logit for each time it was generated"
    ),
    "presence_penalty": Field(schema=number(-2, 2), help="subtracted from the logits of tokens that were generated"),
    "user": Field(schema=TEXT, help="written into the log line of the request"),
    "top_k": Field(schema=integer(-1), help="vLLM: draw from the k likeliest tokens; 0 or -1: from all"),
    "min_p": Field(schema=number(0, 1), help="vLLM: draw from tokens at least this times as likely as the likeliest"),
    "repetition_penalty": Field(
        schema=number(0.01, 100), help="vLLM: above 1, tokens of the prompt and the answer become less likely"
    ),
    "min_tokens": Field(schema=integer(0), help="vLLM: tokens before the answer may end by itself"),
    "ignore_eos": Field(schema=BOOLEAN, help="vLLM: go on after </s>"),
    "stop_token_ids": Field(schema={**IDS, "maxItems": 64}, help="vLLM: ids that end the answer"),
    "return_token_ids": Field(schema=BOOLEAN, help="vLLM: add the ids of the prompt and of the answer"),
    "return_tokens_as_token_ids": Field(
        schema=BOOLEAN, help="vLLM: name tokens token_id:ID in log-probabilities, which no two tokens share"
    ),
}
"""Fields of completions and of chats."""

COMPLETION: Fields = {
    "prompt": Field(
        schema={
            "anyOf": [
                TEXT,
                {"type": "array", "items": TEXT, "minItems": 1},
                {"type": "array", "items": TOKEN, "minItems": 1},
                {"type": "array", "items": IDS, "minItems": 1},
            ]
        },
        help="a text, several texts, the ids of a text, or the ids of several texts",
        is_required=True,
    ),
    "max_tokens": Field(
        schema=integer(0),
        help=f"tokens to generate at most; 0 with echo only; {DEFAULT_MAX_TOKENS} by default",
    ),
    "echo": Field(schema=BOOLEAN, help="begin the answer with the prompt; logprobs are then given for it, too"),
    "logprobs": Field(
        schema=integer(0, MAX_LOG_PROBS), help="add log-probabilities, with this many alternatives of each token"
    ),
    "best_of": Field(
        schema=integer(1, MAX_SEQUENCES), help="generate this many and return the n likeliest by the mean of a token"
    ),
    "suffix": _unsupported("BLOOM continues texts and cannot fill a gap before a suffix", ""),
    **COMMON,
}

_ROLES = ["system", "developer", "user", "assistant", "tool", "function"]
_PART: Schema = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": TEXT},
    "required": ["type", "text"],
}
_MESSAGE: Schema = {
    "type": "object",
    "properties": {
        "role": {"enum": _ROLES},
        "content": {"anyOf": [TEXT, {"type": "array", "items": _PART}]},
        "name": TEXT,
        "refusal": {"enum": [None]},
    },
    "required": ["role", "content"],
}

CHAT: Fields = {
    "messages": Field(
        schema={"type": "array", "items": _MESSAGE, "minItems": 1}, help="the conversation so far", is_required=True
    ),
    "max_completion_tokens": Field(schema=integer(1), help="tokens to generate at most; by default as many as fit"),
    "max_tokens": Field(schema=integer(1), help="the older name of max_completion_tokens"),
    "logprobs": Field(schema=BOOLEAN, help="add log-probabilities"),
    "top_logprobs": Field(schema=integer(0, MAX_LOG_PROBS), help="with logprobs: alternatives of each token"),
    "safety_identifier": Field(schema=TEXT, help="like user"),
    "audio": _unsupported(TEXT_ONLY),
    "modalities": _unsupported(TEXT_ONLY, ["text"]),
    "function_call": _unsupported(NO_TOOLS, "none"),
    "functions": _unsupported(NO_TOOLS, []),
    "parallel_tool_calls": _unsupported(NO_TOOLS, True, False),
    "tool_choice": _unsupported(NO_TOOLS, "none", "auto"),
    "tools": _unsupported(NO_TOOLS, []),
    "web_search_options": _unsupported("the server does not look into the web"),
    "response_format": _unsupported("the form of answers cannot be forced", {"type": "text"}),
    "prediction": _unsupported("the server takes no predicted answers; see --prompt_lookup"),
    "reasoning_effort": _unsupported("BLOOM has no separate reasoning", "none"),
    "verbosity": _unsupported("BLOOM has no such setting", "medium"),
    "moderation": _unsupported("the server has no moderation"),
    "metadata": _unsupported("the server stores no conversations", {}),
    "store": _unsupported("the server stores no conversations", False),
    "prompt_cache_key": _unsupported("the server finds common beginnings of prompts by itself"),
    "prompt_cache_options": _unsupported("the server finds common beginnings of prompts by itself"),
    "prompt_cache_retention": _unsupported("the server finds common beginnings of prompts by itself", "in_memory"),
    "service_tier": _unsupported("all requests are served alike", "auto", "default"),
    **COMMON,
}

TOKENIZE: Fields = {
    "model": COMMON["model"],
    "prompt": Field(schema=TEXT, help="the text", is_required=True),
    "add_special_tokens": Field(schema=BOOLEAN, help="has no effect: BLOOM's tokenizer adds none"),
    "return_token_strs": Field(schema=BOOLEAN, help="add the text of each token"),
}

DETOKENIZE: Fields = {
    "model": COMMON["model"],
    "tokens": Field(schema=IDS, help="ids", is_required=True),
}

LOAD_ADAPTER: Fields = {
    "lora_name": Field(schema=WORD, help="name by which requests choose the adapter", is_required=True),
    "lora_path": Field(schema=WORD, help="directory on the server that holds it", is_required=True),
}

UNLOAD_ADAPTER: Fields = {
    "lora_name": LOAD_ADAPTER["lora_name"],
}
