"""What the fields of a conversation mean: rows of messages, and ShareGPT's.

| field of a row | fields of a message | roles                                     |
|----------------|---------------------|-------------------------------------------|
| messages       | role, content       | system; user; assistant                   |
| conversations  | from, value         | system; human or user; gpt or assistant   |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bloomlm.data.files import Row
from bloomlm.data.rows import checked_text, field_names
from bloomlm.errors import DataError

Message = Mapping[str, Any]
"""A turn: its role, its content as text, and whatever else a template may read."""


@dataclass(frozen=True, kw_only=True)
class _Form:
    field: str
    role: str
    text: str
    roles: Mapping[str, str]


_FORMS = (
    _Form(
        field="messages",
        role="role",
        text="content",
        roles={"system": "system", "user": "user", "assistant": "assistant"},
    ),
    _Form(
        field="conversations",
        role="from",
        text="value",
        roles={"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    ),
)
# Fields of messages that would change what is learned or shown, which nothing here does.
_UNSUPPORTED = ("tool_calls", "function_call", "weight")


def has_messages(fields: Mapping[str, object]) -> bool:
    """Whether a row with these fields is a conversation."""
    return any(form.field in fields for form in _FORMS)


def read_messages(row: Row) -> list[Message]:
    """The turns of a conversation, each with its role (system, user or assistant) and its content as text.

    Raises:
        DataError: a turn without a known role or without text, or one with tools.
    """
    forms = [form for form in _FORMS if form.field in row.fields]
    if len(forms) != 1:
        expected = " or ".join(form.field for form in _FORMS)
        raise DataError(f"{row.where}: found the fields {field_names(row.fields)}, expected {expected}")
    form = forms[0]
    messages = _messages(row, form.field, form)
    if row.fields.get("system"):  # some ShareGPT files have it beside the turns
        system = checked_text(row.fields["system"], row.where, "system")
        messages = [{"role": "system", "content": system}, *messages]
    return messages


def read_messages_of(row: Row, field: str) -> list[Message]:
    """The messages, as in `messages`, that another field of a row holds.

    Raises:
        DataError: as read_messages.
    """
    return _messages(row, field, _FORMS[0])


def _messages(row: Row, field: str, form: _Form) -> list[Message]:
    turns = row.fields[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{row.where}: {field!r} is {turns!r:.60}; expected a list of messages, each an object with "
            f"{form.role!r} and {form.text!r}"
        )
    if row.fields.get("tools"):
        raise DataError(f"{row.where}: found 'tools', and conversations with tools cannot be learned; leave it out")
    return [_message(turn, f"{row.where}, {field}[{number}]", form) for number, turn in enumerate(turns)]


def _message(turn: object, where: str, form: _Form) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {turn!r:.60}; expected an object with {form.role!r} and {form.text!r}")
    for name in (form.role, form.text):
        if name not in turn:
            raise DataError(f"{where}: found the fields {field_names(turn)}, expected {name!r}")
    for name in _UNSUPPORTED:
        if turn.get(name) not in (None, []):
            raise DataError(f"{where}: found {name!r}, which cannot be learned; expected {form.text!r} alone")
    role = turn[form.role]
    if not isinstance(role, str) or role not in form.roles:
        raise DataError(f"{where}: {form.role!r} is {role!r:.40}; expected one of {', '.join(form.roles)}")
    content = turn[form.text]
    if isinstance(content, list) and content and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(checked_text(part["text"], where, "text") for part in content)
    text = checked_text(content, where, form.text)
    if not text.strip():
        raise DataError(f"{where}: {form.text!r} is empty; expected what the {form.roles[role]} wrote")
    others = {name: value for name, value in turn.items() if name not in (form.role, form.text)}
    return {**others, "role": form.roles[role], "content": text}
