"""Chat templates: a conversation -> the text that a model reads, and the parts of it that the model wrote.

They are Jinja templates, which come with the files of a model and are not trusted: see template_sandbox.py. A template
marks the answers as {% generation %} ... {% endgeneration %}; where it marks nothing, they are found by rendering the
conversation up to each of them.

Source of the names that a template may use: https://huggingface.co/docs/transformers/chat_templating_writing
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context

from bloomlm.data.messages import Message
from bloomlm.data.template_sandbox import TemplateSandbox
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError

PLAIN = "plain"
"""The value of --chat_template that stands for PLAIN_TEMPLATE."""

# An answer begins with a space because BLOOM's tokenizer always splits "Assistant:" from " Hello", so a prompt has the
# same tokens in training, where the answer follows it, and in generation.
PLAIN_TEMPLATE = r"""{%- for message in messages %}
    {%- set text = message.content | trim %}
    {%- if message.role == 'system' and loop.first %}
        {{- text + '\n\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + text + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant:' }}
        {%- generation %}
            {{- ' ' + text + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('expected user and assistant messages, and a system message at the beginning only') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""
"""A conversation for a model that was trained on plain texts: `User: ...`, `Assistant: ...</s>`."""

_MARKS = "bloomlm_marks"
"""The variable that tells generation blocks to mark their text."""


class ChatTemplate:
    """A template of conversations.

    Args:
        text: the Jinja template.
        special_tokens: the texts of special tokens, such as eos_token, which it may use.

    Raises:
        ConfigError: it is not a Jinja template.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str]) -> None:
        environment = TemplateSandbox(extensions=[loopcontrols, _GenerationBlocks], filters={"tojson": _to_json})
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._budget = environment.budget
        try:
            with environment.budget():  # filters of constants are applied now
                self._template = environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise ConfigError(f"the chat template is no Jinja template: {error}") from error
        self.text = text
        """The Jinja template."""
        self._special_tokens = dict(special_tokens)
        # nothing that a conversation holds can equal them
        self._marks = tuple(f"<{secrets.token_hex(16)}>" for _ in range(2))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Args:
            messages: the turns.
            add_generation_prompt: whether the text goes on to where the assistant's next answer begins.

        Raises:
            DataError: the template does not take such a conversation.
        """
        return self._render(messages, add_generation_prompt=add_generation_prompt)

    def render_with_answers(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the (start, stop) of its characters that the assistant wrote, in order.

        Raises:
            DataError: the template does not take such a conversation, or it neither marks the answers nor continues the
                text of a shorter conversation in that of a longer one, so they cannot be told.
        """
        opening, closing = self._marks
        marked = self._render(messages, add_generation_prompt=False, **{_MARKS: self._marks})
        text, answers, depth, start = "", list[tuple[int, int]](), 0, 0
        for piece in re.split(f"({opening}|{closing})", marked):
            if piece == opening:
                start = len(text) if depth == 0 else start
                depth += 1
            elif piece == closing:
                depth -= 1
                if depth == 0 and len(text) > start:
                    answers.append((start, len(text)))
            else:
                text += piece
        return text, answers or self._answers_by_prefixes(messages, text)

    def _answers_by_prefixes(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        answers = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1], add_generation_prompt=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    "the chat template does not mark the answers, and cannot be asked for them: the text of a whole "
                    f"conversation does not begin with that of its first {number + 1} messages. Put "
                    "{% generation %} and {% endgeneration %} around the answers in the template"
                )
            if len(after) > len(before):
                answers.append((len(before), len(after)))
        return answers

    def _render(self, messages: Sequence[Message], **variables: Any) -> str:
        try:
            with self._budget():
                return self._template.render(messages=list(messages), **self._special_tokens, **variables)
        except Exception as error:  # a template may fail in any way that Python code may
            raise DataError(f"the chat template does not take these messages: {error}") from error


def read_chat_template(name: str) -> str:
    """The template that the flag --chat_template names: `plain`, or a file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if name == PLAIN:
        return PLAIN_TEMPLATE
    path = Path(name).expanduser()
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat_template {name} cannot be read: {error}; expected a file with a Jinja template, or {PLAIN}"
        ) from error


def with_given_template(tokenizer: Tokenizer, name: str | None) -> Tokenizer:
    """The tokenizer with the template that the flag --chat_template names; unchanged if it names none.

    Raises:
        ConfigError: the file cannot be read, or holds no Jinja template.
    """
    if name is None:
        return tokenizer
    template = ChatTemplate(read_chat_template(name), tokenizer.special_tokens)
    return tokenizer.with_chat_template(template.text)


def chat_template_of(tokenizer: Tokenizer, reason: str) -> ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: has it, or was given one.
        reason: why there must be one, for the message, such as "talks.jsonl holds conversations".

    Raises:
        ConfigError: there is none, or it is not a Jinja template.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{reason}, and {tokenizer.name} has no chat template; give --chat_template plain or "
            "--chat_template FILE, a Jinja template"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens)


class _GenerationBlocks(Extension):
    """The block {% generation %}: its text, between two marks where the variable _MARKS holds them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block up to {% endgeneration %}."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @pass_context
    def _marked(self, context: Context, caller: Callable[[], str]) -> str:
        opening, closing = context.get(_MARKS) or ("", "")
        return f"{opening}{caller()}{closing}"


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
