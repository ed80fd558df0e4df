"""Checks JSON values by the keywords of JSON Schema that fields.py uses.

The same tables are published as the OpenAPI description, so what is described is what is checked.

Source: https://json-schema.org/draft/2020-12/json-schema-validation
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from bloomlm.serving.http.errors import ApiError, bad_request

Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[type, ...]] = {
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
_WORDS = {"boolean": "true or false", "string": "a text", "object": "an object"}
_NUM_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a body. null means that the field is not given."""

    schema: Schema
    """The values that it may have."""
    help: str
    """What it does, for the OpenAPI description."""
    is_required: bool = False
    refusal: str | None = None
    """Why other values than those of the schema, under which the field has no effect, are refused."""


Fields = Mapping[str, Field]


def parse_body(body: Any, fields: Fields) -> dict[str, Any]:
    """The fields that are given and have an effect, checked.

    Args:
        body: a JSON value.
        fields: the fields that the body may have, by name.

    Raises:
        ApiError: 400, for the first field that is wrong, unknown or missing.
    """
    if not isinstance(body, dict):
        raise bad_request(f"the body is {_shown(body)}; expected a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(sorted(fields))}"
            raise bad_request(f"unknown field {_shown(name)}; {hint}", name[:_NUM_SHOWN])
    for name, field in fields.items():
        if field.is_required and name not in given:
            raise bad_request(f"{name} is missing; expected {describe(field.schema)}", name)
    checked = {}
    for name, value in given.items():
        field = fields[name]
        if field.refusal is None:
            checked[name] = check(value, field.schema, name)
        elif not any(_equal(value, option) for option in field.schema["enum"]):
            raise bad_request(f"{name} is not supported: {field.refusal}. Leave it out", name)
    return checked


def check(value: Any, schema: Schema, where: str) -> Any:
    """The value, with whole numbers as integers where the schema asks for integers.

    Args:
        value: a JSON value.
        schema: what it must be.
        where: its place in the body, such as messages[0].role.

    Raises:
        ApiError: 400.
    """
    if "anyOf" in schema:
        return _check_any(value, schema, where)
    if "enum" in schema:
        if not any(_equal(value, option) for option in schema["enum"]):
            raise _refusal(value, schema, where)
        return value
    if not _has_type(value, schema["type"]):
        raise _refusal(value, schema, where)
    checks: dict[str, Callable[[Any, Schema, str], Any]] = {
        "integer": _check_number,
        "number": _check_number,
        "string": _check_text,
        "array": _check_list,
        "object": _check_object,
    }
    return checks[schema["type"]](value, schema, where) if schema["type"] in checks else value


def describe(schema: Schema) -> str:
    """What a value must be, in words."""
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    if "enum" in schema:
        options = [json.dumps(option) for option in schema["enum"]]
        return options[0] if len(options) == 1 else "one of " + ", ".join(options)
    kind = schema["type"]
    if kind == "array":
        most = f" of at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"a list{most}, each {describe(schema['items'])}"
    if kind in ("integer", "number"):
        bounds = [
            f"{word} {schema[key]}"
            for key, word in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"))
            if key in schema
        ]
        return " ".join(["a whole number" if kind == "integer" else "a number", " and ".join(bounds)]).strip()
    if kind == "string" and schema.get("minLength"):
        return "a text that is not empty"
    return _WORDS[kind]


def _check_any(value: Any, schema: Schema, where: str) -> Any:
    """The value by the option that fits it; where one option alone takes its type, that one tells what is wrong."""
    options = [option for option in schema["anyOf"] if "type" not in option or _has_type(value, option["type"])]
    if len(options) == 1 and "type" in options[0]:
        return check(value, options[0], where)
    for option in options:
        with suppress(ApiError):
            return check(value, option, where)
    raise _refusal(value, schema, where)


def _equal(value: Any, option: Any) -> bool:
    return bool(value == option) and isinstance(value, bool) == isinstance(option, bool)  # True == 1 in Python


def _has_type(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")


def _check_number(value: float, schema: Schema, where: str) -> float:
    is_in_range = schema.get("minimum", value) <= value <= schema.get("maximum", value)
    is_finite = isinstance(value, int) or math.isfinite(value)  # an integer may be too large for a float
    if not (is_finite and is_in_range and value > schema.get("exclusiveMinimum", -math.inf)):
        raise _refusal(value, schema, where)
    return int(value) if schema["type"] == "integer" else value


def _check_text(value: str, schema: Schema, where: str) -> str:
    if len(value) < schema.get("minLength", 0):
        raise _refusal(value, schema, where)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise bad_request(
            f"{where} contains half of a surrogate pair (character {error.start}), which is not text; send both halves "
            "or leave it out",
            where,
        ) from None
    return value


def _check_list(value: list[Any], schema: Schema, where: str) -> list[Any]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        raise bad_request(f"{where} has {len(value)} entries; expected {describe(schema)}", where)
    items = schema["items"]
    if items.get("type") == "integer" and set(map(type, value)) == {int}:  # ids, of which there can be many
        for extreme in (min(value), max(value)):
            _check_number(extreme, items, where)
        return value
    return [check(item, items, f"{where}[{place}]") for place, item in enumerate(value)]


def _check_object(value: dict[str, Any], schema: Schema, where: str) -> dict[str, Any]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", False)
    most = schema.get("maxProperties", len(value))
    if len(value) > most:
        raise bad_request(f"{where} has {len(value)} entries; expected at most {most}", where)
    for name in schema.get("required", ()):
        if name not in value:
            raise bad_request(f"{where}.{name} is missing; expected {describe(properties[name])}", f"{where}.{name}")
    checked = {}
    for name, item in value.items():
        if name not in properties and others is False:
            raise bad_request(f"unknown field {_shown(name)} in {where}; known: {', '.join(properties)}", where)
        _check_text(name, {}, where)
        checked[name] = check(item, properties.get(name, others), f"{where}.{name}")
    return checked


def _refusal(value: Any, schema: Schema, where: str) -> ApiError:
    return bad_request(f"{where} is {_shown(value)}; expected {describe(schema)}", where)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _NUM_SHOWN else text[:_NUM_SHOWN] + "..."
