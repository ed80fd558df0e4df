"""The endpoints: each takes the service, the request and its checked body, and returns the answer."""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from bloomlm.serving.engine import Engine
from bloomlm.serving.http.choices import token_names
from bloomlm.serving.http.errors import ApiError, bad_request
from bloomlm.serving.http.generation import answer
from bloomlm.serving.http.requests import plan_chat, plan_completion
from bloomlm.serving.http.service import Service
from bloomlm.version import __version__

Body = Mapping[str, Any]

METRICS_FILE = "metrics.jsonl"
"""The file of a training run that holds its curves."""
MAX_PIECE_BYTES = 4_000_000
"""Most bytes of a run's file in one answer."""


async def completions(service: Service, request: Request, body: Body) -> Response:
    """POST /v1/completions."""
    plan = await asyncio.to_thread(plan_completion, body, service)  # long texts take their time
    return await answer(plan, service, request)


async def chat_completions(service: Service, request: Request, body: Body) -> Response:
    """POST /v1/chat/completions."""
    plan = await asyncio.to_thread(plan_chat, body, service)
    return await answer(plan, service, request)


async def models(service: Service, request: Request, body: Body) -> Response:
    """GET /v1/models: the model and its adapters."""
    return JSONResponse({"object": "list", "data": _models(service)})


async def model(service: Service, request: Request, body: Body) -> Response:
    """GET /v1/models/{name}."""
    name = request.path_params["name"]
    service.adapter_of(name)
    return JSONResponse(next(entry for entry in _models(service) if entry["id"] == name))


def _models(service: Service) -> list[dict[str, Any]]:
    """The entries of the model and of its adapters, as vLLM lists them."""
    engine, base = service.engine, service.options.model_name
    common = {"object": "model", "created": service.started, "owned_by": "bloomlm"}
    entries = [{"id": base, **common, "root": base, "parent": None, "max_model_len": engine.options.max_model_len}]
    return entries + [
        {"id": adapter.name, **common, "root": str(adapter.path), "parent": base, "max_model_len": None}
        for adapter in engine.adapters
    ]


async def load_adapter(service: Service, request: Request, body: Body) -> Response:
    """POST /v1/load_lora_adapter."""
    _check_adapter_loading(service)
    name, path = body["lora_name"], body["lora_path"]
    if name == service.options.model_name:
        raise bad_request(f"lora_name is {name!r}, the name of the model; choose another one", "lora_name")
    await service.change_adapters(service.engine.load_adapter, name, path)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_adapter(service: Service, request: Request, body: Body) -> Response:
    """POST /v1/unload_lora_adapter."""
    _check_adapter_loading(service)
    name = body["lora_name"]
    if service.adapter_of(name) is None:
        raise bad_request(f"lora_name is {name!r}, the name of the model, which stays", "lora_name")
    await service.change_adapters(service.engine.unload_adapter, name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _check_adapter_loading(service: Service) -> None:
    if not service.options.allow_adapter_loading:
        raise ApiError(
            403,
            "requests may not load or unload adapters, because the server would read any path that they name; start it "
            "with --allow_adapter_loading, or name the adapters at its start with --lora name=path",
            code="adapter_loading_off",
        )


async def tokenize(service: Service, request: Request, body: Body) -> Response:
    """POST /tokenize: text -> ids."""
    service.adapter_of(body.get("model"))
    # All of it for a body of megabytes takes seconds, in which other requests need the event loop.
    return await asyncio.to_thread(_tokenized, service.engine, body["prompt"], body.get("return_token_strs", False))


def _tokenized(engine: Engine, text: str, has_names: bool) -> Response:
    tokens = engine.tokenizer.encode(text)
    content = {"count": len(tokens), "max_model_len": engine.options.max_model_len, "tokens": tokens}
    if has_names:
        content["token_strs"] = list(map(token_names(engine.tokenizer, as_ids=False), tokens))
    return JSONResponse(content)


async def detokenize(service: Service, request: Request, body: Body) -> Response:
    """POST /detokenize: ids -> text, with special tokens."""
    service.adapter_of(body.get("model"))
    return await asyncio.to_thread(_detokenized, service.engine, body["tokens"])


def _detokenized(engine: Engine, tokens: list[int]) -> Response:
    unknown = max(tokens, default=0)
    if unknown >= engine.vocab_size:
        raise bad_request(f"tokens has the id {unknown}; the model has ids 0 to {engine.vocab_size - 1}", "tokens")
    return JSONResponse({"prompt": engine.tokenizer.decode(tokens, skip_special_tokens=False)})


async def tokenizer_info(service: Service, request: Request, body: Body) -> Response:
    """GET /tokenizer_info: special tokens and chat template."""
    tokenizer = service.engine.tokenizer
    template = service.options.chat_template or tokenizer.chat_template
    info = {"tokenizer_class": "BloomTokenizerFast", **tokenizer.special_tokens, "chat_template": template}
    return JSONResponse(info)


async def health(service: Service, request: Request, body: Body) -> Response:
    """GET /health: 200 once requests are served."""
    if not service.is_open:
        return JSONResponse({"status": "loading"}, status_code=503)
    if not service.engine.is_alive:
        return JSONResponse({"status": "closed"}, status_code=503)
    return JSONResponse({"status": "ok"})


async def version(service: Service, request: Request, body: Body) -> Response:
    """GET /version."""
    return JSONResponse({"version": __version__})


async def metrics(service: Service, request: Request, body: Body) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def runs(service: Service, request: Request, body: Body) -> Response:
    """GET /runs: the training runs below --runs, the newest first."""
    found = await asyncio.to_thread(_find_runs, service)
    stats = [(name, path.stat()) for name, path in found.items()]
    entries = [{"name": name, "size": stat.st_size, "modified": stat.st_mtime} for name, stat in stats]
    return JSONResponse({"runs": sorted(entries, key=lambda entry: -float(entry["modified"]))})


async def run_metrics(service: Service, request: Request, body: Body) -> Response:
    """GET /runs/{name}/metrics.jsonl: its whole lines from byte `offset` on."""
    name, offset = request.path_params["name"], request.query_params.get("offset", "0")
    if not (offset.isascii() and offset.isdigit() and len(offset) < 16):
        raise bad_request(f"offset is {offset[:60]!r}; expected a number of bytes", "offset")
    path = (await asyncio.to_thread(_find_runs, service)).get(name)
    if path is None:
        raise ApiError(404, f"there is no run {name!r}; GET /runs lists them", code="run_not_found")
    lines = await asyncio.to_thread(_read_lines, path, int(offset))
    headers = {"x-next-offset": str(int(offset) + len(lines)), "cache-control": "no-store"}
    return Response(lines, media_type="application/x-ndjson", headers=headers)


def _find_runs(service: Service) -> dict[str, Path]:
    """Name -> file of every run; the directory itself, where it is a run, has its own name."""
    root = service.options.runs_dir
    if root is None:
        raise ApiError(404, "this server shows no training runs; start it with --runs DIR", code="no_runs")
    names = {}
    for directory, _, files in os.walk(root):  # does not follow links to other places
        path = Path(directory, METRICS_FILE)
        if METRICS_FILE in files and not path.is_symlink():
            name = path.parent.relative_to(root).as_posix()
            names[root.resolve().name if name == "." else name] = path
    return names


def _read_lines(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(MAX_PIECE_BYTES)
    return data[: data.rfind(b"\n") + 1]
