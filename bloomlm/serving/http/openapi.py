"""The OpenAPI description, made of the tables by which bodies are checked.

Source: https://spec.openapis.org/oas/v3.1.0
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bloomlm.serving.http.schema import Fields
from bloomlm.version import __version__


@dataclass(frozen=True, kw_only=True)
class Described:
    """What the description says of an endpoint."""

    method: str
    """GET or POST."""
    path: str
    """Starlette's path."""
    summary: str
    """What it does."""
    body: Fields | None = None
    """The fields of its body."""
    query: Mapping[str, str] = field(default_factory=dict)
    """Name -> meaning of its parameters, which are numbers."""


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def description(endpoints: Iterable[Described]) -> dict[str, Any]:
    """The document of a server with these endpoints."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r"\{(\w+):path\}", r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path)
    return {
        "openapi": "3.1.0",
        "info": {"title": "bloomlm serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Described, path: str) -> dict[str, Any]:
    names = re.findall(r"\{(\w+)\}", path)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    for name, meaning in endpoint.query.items():
        schema = {"type": "integer", "minimum": 0}
        parameters.append({"name": name, "in": "query", "description": meaning, "schema": schema})
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": f"{endpoint.method} {path}",
        "parameters": parameters,
        "responses": {"200": {"description": "the answer"}, "default": {"description": "an error", "content": error}},
    }
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _body_schema(endpoint.body)}},
        }
    return operation


def _body_schema(fields: Fields) -> dict[str, Any]:
    properties = {
        name: {"description": item.help, "anyOf": [dict(item.schema), {"type": "null"}]}
        if not item.is_required
        else {"description": item.help, **item.schema}
        for name, item in fields.items()
    }
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name, item in fields.items() if item.is_required],
        "additionalProperties": False,
    }
