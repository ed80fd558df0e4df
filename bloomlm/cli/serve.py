"""`bloomlm serve`: an OpenAI-compatible server for a model with its adapters, or for an exported program."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console

from bloomlm.api import LoadedModel, load
from bloomlm.cli.generator import NOT_OF_PROGRAMS, ProgramFlags, check_generator
from bloomlm.cli.options import config_command
from bloomlm.data.chat_template import read_chat_template
from bloomlm.errors import BackendMissingError, ConfigError, ServingError, format_bytes
from bloomlm.flags import DeviceFlags, Dtype, ModelFlags, flag, same_flag
from bloomlm.parallel.launch import find_device, joined_ranks, world_size
from bloomlm.parallel.mesh import Mesh, degrees_from_flags
from bloomlm.runtime.program import Program
from bloomlm.serving.engine import Engine
from bloomlm.serving.options import EngineOptions

try:
    from bloomlm.serving.http.app import create_app
    from bloomlm.serving.http.gate import REQUESTS_LOG
    from bloomlm.serving.http.server import HttpServer
    from bloomlm.serving.http.service import ServerOptions, Service
except ModuleNotFoundError as error:
    raise BackendMissingError(
        f"bloomlm serve needs the package {error.name}, which is not installed; pip install 'bloomlm[serve]'"
    ) from error

API_KEY_VARIABLE = "BLOOMLM_API_KEY"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NOT_OF_PROGRAMS = {
    **NOT_OF_PROGRAMS,
    "lora": "adapters are put into a program when it is exported; leave the flag out",
}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedModel(ProgramFlags):
    """The flags of `bloomlm serve` that say what is served."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path", default="")
    dtype: Dtype | None = same_flag(DeviceFlags, "dtype")
    device: str | None = same_flag(DeviceFlags, "device")
    lora: tuple[str, ...] = flag(
        "model",
        (),
        "name=path: adapter that requests choose as their model; give the flag again for more",
        repeatable=True,
    )
    served_model_name: str | None = flag(
        "model", None, "name of the model for requests  [default: --model_name_or_path or --model_prefix]"
    )
    chat_template: str | None = flag(
        "model", None, "Jinja template for /v1/chat/completions: a file, or plain  [default: that of the model, if any]"
    )


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EngineOptions, ServedModel):
    """The flags of `bloomlm serve`."""

    host: str = flag("server", "127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = flag("server", 8000, "port to listen on; 0 takes a free one", minimum=0, maximum=65535)
    api_key: str | None = flag(
        "server", None, f"key that requests must bring; better in the variable {API_KEY_VARIABLE}  [default: none]"
    )
    allowed_origins: tuple[str, ...] = flag(
        "server", (), "other sites whose pages may send requests, such as https://example.org; * for all"
    )
    allowed_hosts: tuple[str, ...] = flag(
        "server", (), "names by which clients may call the server; on a loopback address in addition to localhost"
    )
    max_body_mb: float = flag("server", 8.0, "largest body of a request in MB", above=0)
    request_timeout: float = flag("server", 600.0, "longest time of a request in seconds", above=0)
    allow_adapter_loading: bool = flag(
        "server", False, "let requests load adapters; the server then reads any path that they name"
    )
    log_prompts: bool = flag("server", False, "write prompts into the log lines of requests")
    runs: Path | None = flag("server", None, "directory of training runs, whose curves the page draws")

    @property
    def model_name(self) -> str:
        """The name of the model for requests."""
        return self.served_model_name or self.model_name_or_path or self.model_prefix

    def server_options(self) -> ServerOptions:
        """How the server answers.

        Raises:
            ConfigError: a file or directory that cannot be read.
        """
        if self.runs is not None and not self.runs.is_dir():
            raise ConfigError(
                f"--runs {self.runs}: no such directory; expected one with runs of bloomlm finetune in it"
            )
        hosts = (self.host, *_LOOPBACK, *self.allowed_hosts) if self.host in _LOOPBACK else self.allowed_hosts
        return ServerOptions(
            model_name=self.model_name,
            api_key=self.api_key or os.environ.get(API_KEY_VARIABLE) or None,
            allowed_hosts=tuple(dict.fromkeys(name.lower() for name in hosts)) or None,
            allowed_origins=self.allowed_origins,
            max_body_bytes=int(self.max_body_mb * 1e6),
            request_timeout_seconds=self.request_timeout,
            allow_adapter_loading=self.allow_adapter_loading,
            log_prompts=self.log_prompts,
            runs_dir=self.runs,
            chat_template=None if self.chat_template is None else read_chat_template(self.chat_template),
        )

    def adapters(self) -> dict[str, str]:
        """Name -> path of the adapters.

        Raises:
            ConfigError: a value that is not name=path, or a name that is given twice.
        """
        found: dict[str, str] = {}
        for text in self.lora:
            name, separator, path = text.partition("=")
            if not (name and separator and path):
                raise ConfigError(f"--lora {text}: expected name=path, such as --lora dates=demo")
            if name in found or name == self.model_name:
                raise ConfigError(f"--lora {text}: the name {name} is taken; choose another one")
            found[name] = path
        return found


def serve(config: ServeConfig) -> None:
    """Run `bloomlm serve` until a signal ends it.

    Raises:
        BloomlmError: flags or files that cannot be used.
    """
    _check_model(config)
    device = find_device(config.device if config.model_dir is None else "cpu")
    degrees = degrees_from_flags(world_size(), tensor_parallel_degree=world_size())
    if int(os.environ.get("RANK", "0")) > 0:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # rank 0 ends the others when its requests are done
        with joined_ranks(degrees, device.type) as mesh:
            Engine(_load(config, device, mesh), config).follow()
        return
    adapters, service = config.adapters(), Service(config.server_options())
    timeout = config.request_timeout
    server = HttpServer(create_app(service), host=config.host, port=config.port, stop_seconds=timeout)
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    _write_requests_to_stdout()
    with _stop_signals(service) as stopping, joined_ranks(degrees, device.type) as mesh:
        server.start()
        console.print(f"listening on {server.url}, loading {config.model_name}")
        generator = _load(config, device, mesh)
        engine = Engine(generator, config)
        engine.start()
        for name, path in adapters.items():
            engine.load_adapter(name, path)
        service.open(engine)
        _show_banner(console, service, config.host, server.url, _describe(generator))
        while not stopping.wait(1.0):
            if not engine.is_alive:
                raise ServingError("the engine has stopped, see above; its requests got an error")
        console.print("closing: requests that are there are finished; a second signal ends them")
        server.stop()
        engine.close(drain=True)


def _check_model(config: ServeConfig) -> None:
    check_generator(config, _NOT_OF_PROGRAMS)
    if config.model_dir is not None and world_size() > 1:
        raise ConfigError("--model_dir with several processes: a program cannot be divided among them; start one")


def _load(config: ServeConfig, device: torch.device, mesh: Mesh) -> LoadedModel | Program:
    if config.model_dir is not None:
        return Program(config.model_dir / config.model_prefix)
    return load(config.model_name_or_path, dtype=config.dtype, device=device, mesh=mesh)


@contextmanager
def _stop_signals(service: Service) -> Iterator[threading.Event]:
    """Context manager that gives an event, which the first SIGTERM or SIGINT sets; the second one ends the process.

    Until the service is open there is nothing to finish, and the first signal ends the process.
    """
    stopping = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()
        if not service.is_open:
            raise SystemExit(0)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_requests_to_stdout() -> None:
    """Write a line of JSON for each request to standard output, where nothing else is written."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log = logging.getLogger(REQUESTS_LOG)
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.INFO)


def _show_banner(console: Console, service: Service, host: str, url: str, described: str) -> None:
    """Print where the server listens, what it serves, and how much at once."""
    engine = service.engine
    options, has_key = engine.options, service.options.api_key is not None
    names = [adapter.name for adapter in engine.adapters]
    on = {"prefix cache": options.prefix_caching, f"prompt lookup {options.prompt_lookup}": options.prompt_lookup}
    lines = {
        "serving": f"{service.options.model_name} ({described})",
        "budget": f"{options.max_num_seqs} sequences at once, {options.max_model_len:,} tokens each at most, "
        f"{options.max_queue} requests may wait; {format_bytes(engine.kv_cache_bytes)} for keys and values",
        "features": ", ".join(name for name, is_on in on.items() if is_on) or "none",
        "adapters": ", ".join(names) or "none",
        "key": "needed" if has_key else "none",
        "page": f"{url}/",
        "API": f"{url}/v1 (OpenAI's), {url}/openapi.json",
    }
    for name, text in lines.items():
        console.print(f"  {name:<9} {text}")
    console.print(
        f"  try       curl {url}/v1/completions -H 'Content-Type: application/json' "
        f"""-d '{{"prompt": "The history of", "max_tokens": 20}}'"""
    )
    if host not in _LOOPBACK and not has_key:
        console.print(f"warning: everyone who reaches {host} can use this server; --api_key keeps others out")


def _describe(generator: LoadedModel | Program) -> str:
    if isinstance(generator, Program):
        return f"program {generator.path}, format {generator.manifest.format}"
    weights = list(generator.model.parameters())
    millions = sum(weight.numel() for weight in weights) / 1e6
    dtype, device = str(weights[0].dtype).removeprefix("torch."), weights[0].device.type
    ranks = "" if generator.mesh.is_alone else f" on {world_size()} processes"
    return f"{millions:,.0f} million parameters, {dtype}, {device}{ranks}"


command = config_command(
    "serve",
    ServeConfig,
    serve,
    has_ranks=True,
    ends_by_signal=True,
    help="""Serve a model to OpenAI's clients, lm-eval and browsers.

    Requests that come at different times are computed together. Each request chooses the model or one of its adapters
    by name. http://127.0.0.1:8000/ is a page to write with; docs/serve.md describes the endpoints.

    \b
    bloomlm serve --model_name_or_path builtin:tiny
    bloomlm serve --model_name_or_path bigscience/bloom-560m --lora dates=demo --api_key secret --host 0.0.0.0
    bloomlm serve --model_dir inference --model_prefix bloom
    """,
)
