"""What the endpoints share: the engine, once there is one, the options of the server, and the names of the models."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.chat_template import ChatTemplate
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.serving.engine import Engine
from bloomlm.serving.http.errors import ApiError
from bloomlm.serving.http.metrics import Metrics
from bloomlm.serving.request import GenerationRequest, RequestHandle

LOADING_RETRY_SECONDS = 5
_MOST_CHANGES = 32
"""Adapters that are loaded and unloaded at once; further requests to do so wait."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server answers, whatever it serves."""

    model_name: str
    """Name under which requests find the model."""
    api_key: str | None = None
    """Key that requests must bring; None: none."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that the Host header may have; None: any."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of the pages of others that may send requests from a browser; "*" allows all."""
    max_body_bytes: int = 8_000_000
    """Most bytes of a request's body."""
    request_timeout_seconds: float = 600.0
    """Longest time of a request, from its first byte to the end of its answer."""
    allow_adapter_loading: bool = False
    """Whether requests may load and unload adapters, for which the server reads any path that they name."""
    log_prompts: bool = False
    """Whether log lines hold prompts."""
    runs_dir: Path | None = None
    """Directory of training runs, whose curves the page draws."""
    chat_template: str | None = None
    """Jinja template of conversations; None: that of the tokenizer's files."""


class Service:
    """The state of a server.

    Args:
        options: how it answers.

    Raises:
        ConfigError: the options' chat template is none.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.started = int(time.time())
        self.metrics = Metrics(options.model_name)
        self._engine: Engine | None = None
        if options.chat_template is not None:
            ChatTemplate(options.chat_template, {})  # an error in it is told before the model is loaded
        self._chat_template: ChatTemplate | None = None
        self._of_adapters: dict[str, ChatTemplate] = {}  # by the text of the template
        # They wait for running requests, and must not take the threads that texts are encoded in.
        self._changes = ThreadPoolExecutor(_MOST_CHANGES, thread_name_prefix="adapters")

    def open(self, engine: Engine) -> None:
        """Answer from now on with an engine that runs.

        Raises:
            ConfigError: the chat template cannot be read.
        """
        self._chat_template = find_chat_template(self.options.chat_template, engine.tokenizer)
        self.metrics.observe(engine)
        self._engine = engine

    @property
    def is_open(self) -> bool:
        """Whether the model is loaded."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: 503 while the model is being loaded.
        """
        if self._engine is None:
            raise ApiError(
                503,
                f"the model {self.options.model_name} is still being loaded; try again in a few seconds",
                code="model_loading",
                headers={"retry-after": str(LOADING_RETRY_SECONDS)},
            )
        return self._engine

    def chat_template_of(self, adapter: str | None) -> ChatTemplate:
        """The template of conversations: the server's, that of an adapter, or the model's.

        Args:
            adapter: the adapter that answers; None: the model itself.

        Raises:
            ApiError: 400 where there is none.
        """
        own = next((info.chat_template for info in self.engine.adapters if info.name == adapter), None)
        if own is not None and self.options.chat_template is None:
            if own not in self._of_adapters:
                self._of_adapters[own] = ChatTemplate(own, self.engine.tokenizer.special_tokens)
            return self._of_adapters[own]
        if self._chat_template is None:
            raise ApiError(
                400,
                f"{adapter or self.options.model_name} has no chat template, so messages cannot be turned into a "
                "prompt. Use /v1/completions, or start the server with --chat_template FILE, a Jinja template such as "
                "those in transformers' tokenizer_config.json, or with --chat_template plain",
                code="no_chat_template",
            )
        return self._chat_template

    def submit(self, request: GenerationRequest) -> RequestHandle:
        """Give a request to the engine; see Engine.submit.

        Raises:
            ApiError: 404, its adapter was unloaded since adapter_of; 503 while the model is being loaded.
        """
        try:
            return self.engine.submit(request)
        except AdapterError as error:
            raise ApiError(404, str(error), param="model", code="model_not_found") from error

    async def change_adapters(self, change: Callable[..., None], *arguments: str) -> None:
        """Call the engine's load_adapter or unload_adapter in a thread of its own."""
        await asyncio.get_running_loop().run_in_executor(self._changes, change, *arguments)

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a request's model names; None for the model itself.

        Raises:
            ApiError: 404, an unknown model; 503 while the model is being loaded.
        """
        if model in (None, self.options.model_name):
            return None
        names = [adapter.name for adapter in self.engine.adapters]
        if model not in names:
            known = ", ".join([self.options.model_name, *names])
            raise ApiError(
                404,
                f"the model {model!r} does not exist; this server has {known}",
                param="model",
                code="model_not_found",
            )
        return model


def find_chat_template(given: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of conversations: the given one, or that of the tokenizer's files; None without either.

    Raises:
        ConfigError: it cannot be read.
    """
    text = given or tokenizer.chat_template
    if text is None:
        return None
    try:
        return ChatTemplate(text, tokenizer.special_tokens)
    except ConfigError as error:
        raise ConfigError(f"{'--chat_template' if given else tokenizer.name}: {error}") from error
