"""Chat templates: a conversation -> the text of a prompt.

They are Jinja templates, which come with the files of a model and are not trusted: they run in a sandbox.

Source of the names that a template may use: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bloomlm.errors import ConfigError
from bloomlm.serving.http.errors import bad_request


class ChatTemplate:
    """A template of conversations.

    Args:
        template: the Jinja template.
        special_tokens: the texts of special tokens, such as eos_token, which it may use.

    Raises:
        ConfigError: it is not a Jinja template.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ConfigError(f"the chat template is no Jinja template: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt after which the model is to answer.

        Args:
            messages: the conversation, as in a checked body; a content in parts becomes one text.

        Raises:
            ApiError: 400, the template does not take such a conversation.
        """
        plain = [{**message, "content": _joined(message["content"])} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # a template may fail in any way that Python code may
            raise bad_request(f"the chat template does not take these messages: {error}", "messages") from error


def _joined(content: str | Sequence[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
