"""The adapters that requests can name. They are loaded and unloaded between steps, while other requests go on."""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from bloomlm.adapters.bank import AdapterBank, bank_of
from bloomlm.api import LoadedModel
from bloomlm.checkpoint.adapters.load import load_named_adapter
from bloomlm.checkpoint.main_rank import fail_together
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.chat_template import ChatTemplate
from bloomlm.data.tokenizer_files import read_saved_template
from bloomlm.errors import AdapterError, BloomlmError, first_line, name_some
from bloomlm.runtime.program import Program
from bloomlm.serving.commands import Command, LoadAdapter, UnloadAdapter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """A loaded adapter."""

    name: str
    path: str
    """The directory or hub name that it was loaded from."""
    num_virtual_tokens: int
    """Virtual tokens that it puts before each sequence."""
    chat_template: str | None = None
    """Jinja template of the conversations that it learned from, if its files have one."""


class ServedAdapters:
    """The adapters of an engine.

    Callers use load, unload, num_virtual_tokens and infos, from any thread of rank 0; the engine uses the rest between
    steps, on every rank.

    Args:
        generator: what is served. The layers of a model without an adapter of its own are replaced by layers that
            adapters can share.
        put: hands a command to the engines of all ranks.
    """

    def __init__(self, generator: LoadedModel | Program, put: Callable[[Command], None]) -> None:
        self._bank: AdapterBank | None = None
        self._refusal = "an exported program takes no adapters; serve the model that it was exported from"
        if isinstance(generator, Program):
            self._own_virtual = generator.manifest.num_virtual_tokens
        else:
            self._mesh = generator.mesh
            self._own_virtual = generator.model.transformer.num_virtual_tokens
            try:
                self._bank = bank_of(generator.model)
            except AdapterError as error:
                self._refusal = str(error)
        self._put = put
        self._numbers = count()
        self._results: dict[int, Future[None]] = {}
        self._infos: dict[str, AdapterInfo] = {}
        self._origins: dict[str | None, bytes] = {None: b""}
        self._num_loaded = 0
        self._leaving: list[UnloadAdapter] = []
        self._closed: Exception | None = None

    @property
    def infos(self) -> list[AdapterInfo]:
        """The adapters that requests can name."""
        return list(self._infos.values())

    def load(self, name: str, path: str | Path) -> None:
        """Load an adapter under a name, and return when requests can use it.

        Raises:
            AdapterError: the name is taken, or the adapter does not fit the model or cannot be used beside others.
            CheckpointError: there are no such files.
        """
        if self._bank is None:
            raise AdapterError(self._refusal)
        directory = resolve_source(str(path)).directory
        self._send(LoadAdapter(next(self._numbers), name, str(path), directory)).result()

    def unload(self, name: str) -> "Future[None]":
        """Forget an adapter: new requests cannot name it from now on, and those that were put before keep it.

        Returns:
            What is done when the last request that uses it has ended.

        Raises:
            AdapterError: there is no such adapter.
        """
        if self._infos.pop(name, None) is None:  # in one operation, so that of two callers one unloads it
            raise self._unknown(name)
        return self._send(UnloadAdapter(next(self._numbers), name))

    def num_virtual_tokens(self, name: str | None) -> int:
        """Virtual tokens before each sequence of an adapter that requests can name; None is the base model.

        Raises:
            AdapterError: requests cannot name it.
        """
        if name is None:
            return self._own_virtual
        info = self._infos.get(name)
        if info is None:
            raise self._unknown(name)
        return info.num_virtual_tokens

    def origin(self, name: str | None) -> bytes:
        """What keys and values of this adapter have in common; another one for each adapter that had the name."""
        return self._origins.get(name, b"unknown")

    def obey(self, command: LoadAdapter | UnloadAdapter) -> None:
        """Load an adapter, or note that one is to be unloaded."""
        if isinstance(command, UnloadAdapter):
            self._leaving.append(command)
            return
        assert self._bank is not None
        error: BloomlmError | None = None
        template: str | None = None
        try:
            template = read_saved_template(command.directory)
            if template is not None:
                ChatTemplate(template, {})  # an error in it is told now
            load_named_adapter(self._bank, command.name, command.directory, mesh=self._mesh)
        except BloomlmError as problem:
            error = problem
        except Exception as problem:  # files that change while they are read, too little memory: others go on
            _LOG.exception("loading the adapter %s failed", command.name)
            found = f"{type(problem).__name__}: {first_line(problem)}"
            error = AdapterError(f"the adapter {command.name!r} could not be loaded ({found}); see the server's log")
        try:
            fail_together(error, self._mesh)
        except BloomlmError as problem:
            self._end(command.number, problem)
            return
        self._num_loaded += 1
        self._origins[command.name] = f"{self._num_loaded} {command.name}".encode()
        num_virtual = self._bank.adapter(command.name).num_virtual_tokens
        self._infos[command.name] = AdapterInfo(
            name=command.name, path=command.path, num_virtual_tokens=num_virtual, chat_template=template
        )
        self._end(command.number)

    def unload_unused(self, is_used: Callable[[str], bool]) -> None:
        """Unload those adapters that are to go and that no request uses any more."""
        for command in list(self._leaving):
            if not is_used(command.name):
                assert self._bank is not None
                self._leaving.remove(command)
                self._bank.unload(command.name)
                del self._origins[command.name]
                self._end(command.number)

    def end_all(self, error: Exception) -> None:
        """Let all callers that wait, now or later, get an error."""
        self._closed = error
        for number in list(self._results):
            self._end(number, error)

    def _unknown(self, name: str) -> AdapterError:
        known = f"the loaded ones are {name_some(list(self._infos))}" if self._infos else "none is loaded"
        return AdapterError(f"there is no adapter {name!r}; {known}")

    def _send(self, command: LoadAdapter | UnloadAdapter) -> "Future[None]":
        result: Future[None] = Future()
        self._results[command.number] = result
        self._put(command)
        if self._closed is not None:  # looked at after the result is registered, as end_all does it the other way round
            raise self._closed
        return result

    def _end(self, number: int, error: Exception | None = None) -> None:
        result = self._results.pop(number, None)
        if result is None:  # on ranks without callers
            return
        if error is None:
            result.set_result(None)
        else:
            result.set_exception(error)
