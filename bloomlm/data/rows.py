"""What the fields of a row mean: which text is given (the source), and which text is learned (the target).

| fields                         | source                                            | target          |
|--------------------------------|---------------------------------------------------|-----------------|
| src, tgt                       | src                                               | tgt             |
| instruction, (input), output   | instruction, a line end, input (if it has text)   | output          |
| prompt, completion             | prompt                                            | completion      |
| (title), source, target        | the question-generation prompt, or source alone   | target          |
| content, summary               | content                                           | summary         |

With a prompt template, the template builds the source instead.
"""

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bloomlm.data.files import Row
from bloomlm.errors import ConfigError, DataError
from bloomlm.flags import unescaped

PAIR_FIELDS = ("prompt", "chosen", "rejected")
"""A pair of answers to a prompt, the first of which is preferred."""
JUDGED_FIELDS = ("prompt", "completion", "label")
"""An answer to a prompt, and whether it is desirable."""

# The prompt of question generation on DuReader: given an answer and its context, write the question.
QUESTION_GENERATION_PROMPT = "答案：{title}，上下文：{source}在已知答案的前提下，问题："


@dataclass(frozen=True, kw_only=True)
class TextPair:
    """A text that is given, and the text that continues it."""

    source: str
    target: str


class PromptTemplate:
    r"""A text with named fields, for example "{instruction}\n{input}\nAnswer:".

    Args:
        text: {name} stands for the field of that name, {{ and }} for braces, and the two characters \n, \t or \\,
            as a shell passes them on, for a line end, a tab or a backslash.

    Raises:
        ConfigError: braces do not match or hold something other than a name, or no field is named.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._parts = list(string.Formatter().parse(unescaped(text)))
        except ValueError as error:
            raise ConfigError(
                f"prompt_template {text!r}: {error}. Write a field as {{name}}, and {{{{ or }}}} for a brace itself"
            ) from error
        for _, name, format_spec, conversion in self._parts:
            if name is not None and (format_spec or conversion or not name or set(name) & set(".[]")):
                raise ConfigError(
                    f"prompt_template {text!r}: braces must hold the plain name of a field, for example "
                    f"{{instruction}}; found {name!r} or a format of it"
                )
        self.fields = tuple(dict.fromkeys(name for _, name, _, _ in self._parts if name))
        if not self.fields:
            raise ConfigError(
                f"prompt_template {text!r}: it names no field, so every prompt would be the same. "
                "Name at least one, for example {instruction}"
            )

    def fill(self, row: Row) -> str:
        """The prompt of one row.

        Raises:
            DataError: the row lacks a field that the template names, or the field is not text.
        """
        values = {name: self._value(row, name) for name in self.fields}
        return "".join(literal + (values[name] if name else "") for literal, name, _, _ in self._parts)

    def _value(self, row: Row, name: str) -> str:
        if name == "input" and "instruction" in row.fields:
            return _optional_text(row, name)
        if name not in row.fields:
            raise DataError(
                f"{row.where}: prompt_template names the field {name!r}, but this row has {field_names(row.fields)}"
            )
        return text_field(row, name)


def read_pair(row: Row, template: PromptTemplate | None = None) -> TextPair:
    """The source and the target of one row.

    Args:
        row: fields as in the table at the top of this file; with a template, any fields and one of the targets.
        template: builds the source.

    Raises:
        DataError: the fields fit no format or several, a field is not text, or source or target is empty.
    """
    if template is None:
        fitting = [form for form in _FORMATS if form.fits(row.fields) and form.target in row.fields]
        form = _only(fitting, row, expected=f"one of {', '.join(map(str, _FORMATS))}")
    else:
        fitting = [form for form in _FORMATS if form.target in row.fields]
        targets = ", ".join(form.target for form in _FORMATS)
        form = _only(fitting, row, expected=f"beside the fields of prompt_template one of {targets}")
    source = form.compose(row) if template is None else template.fill(row)
    return TextPair(
        source=filled(source, row, "source"),
        target=filled(text_field(row, form.target), row, f"target {form.target!r}"),
    )


def has_target(fields: Mapping[str, object]) -> bool:
    """Whether one of these fields is the target of a pair."""
    return any(form.target in fields for form in _FORMATS)


def read_source(row: Row, template: PromptTemplate | None = None) -> str:
    """The source of one row, which need not have a target.

    Args:
        row: fields as in the table at the top of this file; with a template, any fields.
        template: builds the source.

    Raises:
        DataError: the fields fit no format or several, a field is not text, or the source is empty.
    """
    if template is not None:
        return filled(template.fill(row), row, "source")
    fitting = [form for form in _FORMATS if form.fits(row.fields)]
    with_target = [form for form in fitting if form.target in row.fields]
    expected = f"the source of one of {', '.join(map(str, _FORMATS))}"
    return filled(_only(with_target or fitting, row, expected=expected).compose(row), row, "source")


def checked_text(value: object, where: str, name: str) -> str:
    """The value of a field, if it is text.

    Args:
        value: what the field holds.
        where: where the field is, for the message.
        name: name of the field.

    Raises:
        DataError: it is something else, or it has half of a surrogate pair.
    """
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise DataError(f"{where}: {name!r} is {found}, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name!r} has half of a surrogate pair ({value[error.start]!a}), which is no character"
        ) from error
    return value


@dataclass(frozen=True, kw_only=True)
class _RowFormat:
    required: str
    optional: str | None = None
    target: str
    compose: Callable[[Row], str]

    def fits(self, fields: Mapping[str, object]) -> bool:
        return self.required in fields

    def __str__(self) -> str:
        optional = f" (+ {self.optional})" if self.optional else ""
        return f"{self.required}{optional} / {self.target}"


def _compose_instruction(row: Row) -> str:
    parts = (text_field(row, "instruction"), _optional_text(row, "input"))
    return "\n".join(part for part in parts if part.strip())


def _compose_question(row: Row) -> str:
    title, source = _optional_text(row, "title"), text_field(row, "source")
    return QUESTION_GENERATION_PROMPT.format(title=title, source=source) if title.strip() else source


_FORMATS = (
    _RowFormat(required="src", target="tgt", compose=lambda row: text_field(row, "src")),
    _RowFormat(required="instruction", optional="input", target="output", compose=_compose_instruction),
    _RowFormat(required="prompt", target="completion", compose=lambda row: text_field(row, "prompt")),
    _RowFormat(required="source", optional="title", target="target", compose=_compose_question),
    _RowFormat(required="content", target="summary", compose=lambda row: text_field(row, "content")),
)


def _only(fitting: list[_RowFormat], row: Row, *, expected: str) -> _RowFormat:
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{row.where}: the fields {field_names(row.fields)} fit {' and '.join(map(str, fitting))}; "
            "keep the fields of one of these forms"
        )
    raise DataError(f"{row.where}: found the fields {field_names(row.fields)}, expected {expected}")


def _optional_text(row: Row, name: str) -> str:
    return "" if row.fields.get(name) is None else text_field(row, name)


def text_field(row: Row, name: str) -> str:
    """The text of a field that the row has; raises DataError if it is none."""
    value = row.fields[name]
    if isinstance(value, list) and name in ("src", "tgt"):  # some files write a text as a list of one
        if len(value) != 1:
            raise DataError(
                f"{row.where}: {name!r} is a list of {len(value)} texts, and an example has one turn; "
                "write one row for each turn"
            )
        value = value[0]
    return checked_text(value, row.where, name)


def filled(text: str, row: Row, what: str) -> str:
    """A text that is not blank; raises DataError if it is, calling it `what`."""
    if not text.strip():
        raise DataError(f"{row.where}: the {what} is empty; an example needs a source and a target")
    return text


def require_fields(row: Row, names: Sequence[str]) -> None:
    """Raise DataError unless the row has all fields of these names."""
    if missing := [name for name in names if name not in row.fields]:
        hint = "; for rows of judged answers, give --preference kto" if row.fields.keys() >= {*JUDGED_FIELDS} else ""
        raise DataError(
            f"{row.where}: found the fields {field_names(row.fields)}, expected {', '.join(names)}; "
            f"missing: {', '.join(missing)}{hint}"
        )


def field_names(fields: Mapping[str, object]) -> str:
    """The names of a row's fields, for messages."""
    return ", ".join(map(str, fields)) or "none"
