"""The application: which path is answered by which function."""

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from bloomlm.serving.http import endpoints, fields
from bloomlm.serving.http.errors import ApiError, bad_request
from bloomlm.serving.http.gate import Gate, facts_of
from bloomlm.serving.http.openapi import Described, description
from bloomlm.serving.http.schema import Fields, parse_body
from bloomlm.serving.http.service import Service

PAGE_DIR = Path(__file__).parents[1] / "page"
"""The files of the page."""
_PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
}
# Fields of a body that the log line repeats.
_LOGGED = ("user", "safety_identifier", "stream")
_PROMPTS = ("prompt", "messages")


@dataclass(frozen=True, kw_only=True)
class Endpoint(Described):
    """A path and what answers it."""

    run: Callable[[Service, Request, Mapping[str, Any]], Awaitable[Response]]
    """The function of endpoints.py."""
    is_open: bool = False
    """Whether it needs no key."""


def _post(path: str, run: Any, body: Fields, summary: str) -> Endpoint:
    return Endpoint(method="POST", path=path, run=run, body=body, summary=summary)


def _get(path: str, run: Any, summary: str, **options: Any) -> Endpoint:
    return Endpoint(method="GET", path=path, run=run, summary=summary, **options)


ENDPOINTS = (
    _post("/v1/completions", endpoints.completions, fields.COMPLETION, "continue texts, or score them"),
    _post("/v1/chat/completions", endpoints.chat_completions, fields.CHAT, "answer in a conversation"),
    _get("/v1/models", endpoints.models, "the model and its adapters"),
    _get("/v1/models/{name:path}", endpoints.model, "one of them"),
    _post("/v1/load_lora_adapter", endpoints.load_adapter, fields.LOAD_ADAPTER, "load an adapter"),
    _post("/v1/unload_lora_adapter", endpoints.unload_adapter, fields.UNLOAD_ADAPTER, "unload an adapter"),
    _post("/tokenize", endpoints.tokenize, fields.TOKENIZE, "text to ids"),
    _post("/detokenize", endpoints.detokenize, fields.DETOKENIZE, "ids to text"),
    _get("/tokenizer_info", endpoints.tokenizer_info, "special tokens and chat template"),
    _get("/health", endpoints.health, "whether requests are served", is_open=True),
    _get("/version", endpoints.version, "the version of the server", is_open=True),
    _get("/metrics", endpoints.metrics, "numbers for Prometheus"),
    _get("/runs", endpoints.runs, "training runs, the newest first"),
    _get("/runs/{name:path}/metrics.jsonl", endpoints.run_metrics, "the curves of a run", query={"offset": "bytes"}),
)


def create_app(service: Service) -> Starlette:
    """The application of a service, which may open later.

    Args:
        service: engine, options and names.
    """
    options = service.options
    middleware = [Middleware(Gate, options=options)]
    if options.allowed_origins:
        origins = list(options.allowed_origins)
        exposed = ["x-request-id", "x-next-offset", "retry-after"]
        cors = Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
        middleware.insert(0, cors)
    published = description(ENDPOINTS)

    async def openapi(request: Request) -> Response:
        return JSONResponse(published)

    routes = [_route(endpoint, service) for endpoint in ENDPOINTS]
    routes.append(Route("/openapi.json", openapi))
    # A route for each file, because under a mount at / every wrong method of an endpoint would be an unknown file.
    page = _Page(directory=PAGE_DIR, html=True)
    files = [path.relative_to(PAGE_DIR).as_posix() for path in PAGE_DIR.rglob("*") if path.is_file()]
    routes += [Route(f"/{path}", page) for path in ("", *files)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: _as_api_error})


def _route(endpoint: Endpoint, service: Service) -> Route:
    async def run(request: Request) -> Response:
        if not endpoint.is_open:
            _check_key(request, service.options.api_key)
        body: dict[str, Any] = {}
        if endpoint.body is not None:
            body = parse_body(await _read_json(request), endpoint.body)
            logged = (*_LOGGED, *(_PROMPTS if service.options.log_prompts else ()))
            facts_of(request).update({name: body[name] for name in logged if name in body})
        return await endpoint.run(service, request, body)

    return Route(endpoint.path, run, methods=[endpoint.method])


def _check_key(request: Request, key: str | None) -> None:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    found = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # Starlette reads bytes as Latin-1
    if key is not None and not secrets.compare_digest(found, key.encode()):
        what = "the key is wrong" if found else "no key is given"
        raise ApiError(
            401,
            f"{what}; expected the header `Authorization: Bearer KEY` with the server's --api_key (api_key=... in "
            "OpenAI's client)",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )


async def _read_json(request: Request) -> Any:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Pages of other sites can send plain forms without being asked, but not JSON.
        raise ApiError(
            415, f"the Content-Type is {kind or 'missing'}; expected application/json", code="unsupported_media_type"
        )
    try:
        return json.loads(await request.body(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


async def _as_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no {request.url.path}; GET /openapi.json lists the paths",
        405: f"{request.url.path} does not take {request.method}",
    }
    message = messages.get(error.status_code, error.detail)
    return ApiError(error.status_code, message, headers=error.headers).response()


class _Page(StaticFiles):
    """The files of the page, which browsers ask for anew each time and which run no code of others."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(_PAGE_HEADERS)
        return response
