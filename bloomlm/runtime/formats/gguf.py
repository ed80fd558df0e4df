"""The gguf format, run by llama.cpp through the C functions that llama-cpp-python declares.

llama.cpp has one pool of cache cells. A row here is a sequence there; a copied row shares the cells of its source.

Shapes: B rows, V vocabulary.
"""

import ctypes
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.errors import BackendMissingError, GenerationError, ProgramError
from bloomlm.row_memory import RowFeatures
from bloomlm.runtime.formats.base import ProgramFormat, ProgramRows
from bloomlm.runtime.manifest import Manifest

_LOG = logging.getLogger(__name__)

_CHUNK_TOKENS = 512
"""Number of tokens that are computed at once."""
_FEWEST_OUTPUTS = 16
"""Logits that one call may give, at least; llama.cpp reserves memory for them."""
_LEVEL_ERROR = 3
_ALL = -1
"""Every position of a sequence."""


def gguf_file(prefix: str) -> str:
    """Name of a GGUF file."""
    return f"{prefix}.gguf"


@dataclass(frozen=True)
class _Token:
    id: int
    position: int
    row: int
    wants_logits: bool


class LlamaCppModel:
    """A gguf program with the interface of LanguageModel; see ProgramFormat.open."""

    features = RowFeatures(scores_chunks=True, truncates=True)

    def __init__(self, manifest: Manifest, directory: Path, prefix: str) -> None:
        self.library, self._messages = _library()
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        self.bytes_per_token = manifest.bytes_per_token
        self.format = manifest.format
        path = directory / gguf_file(prefix)
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.handle = self.library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.handle:
            raise ProgramError(f"{path} cannot be loaded by llama.cpp: {self.last_message()}")
        weakref.finalize(self, self.library.llama_model_free, self.handle)
        found = self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.handle))
        if found != manifest.vocab_size:
            raise ProgramError(
                f"{path} holds a model with {found} ids, and the program has {manifest.vocab_size}; "
                "copy all files of the program again"
            )

    def open_rows(self, num_rows: int, num_tokens: int) -> "LlamaCppRows":
        """Allocate memory for num_rows sequences of at most num_tokens tokens each, all rows free.

        Raises:
            GenerationError: llama.cpp cannot continue so many sequences at once.
            ProgramError: there is not enough memory.
        """
        return LlamaCppRows(self, num_rows, num_tokens)

    def last_message(self) -> str:
        """The last error message of llama.cpp."""
        return self._messages[-1] if self._messages else "it gives no reason"


class LlamaCppRows(ProgramRows):
    """Rows, which are sequences of a llama.cpp context."""

    def __init__(self, model: LlamaCppModel, num_rows: int, num_tokens: int) -> None:
        super().__init__(model.format)
        self._context = _Context(model, num_rows, num_rows * num_tokens)
        self._lengths = [0] * num_rows

    def prefill(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], *, num_logits: Sequence[int] | None = None
    ) -> Tensor:
        """Append tokens to rows; see ModelRows."""
        tokens = [
            _Token(token, position, row, place + wanted >= len(prompt))
            for row, prompt, wanted in zip(rows, prompts, num_logits or [1] * len(prompts), strict=True)
            for place, (position, token) in enumerate(enumerate(prompt, start=self._lengths[row]))
        ]
        logits = self._context.read(tokens)
        for row, prompt in zip(rows, prompts, strict=True):
            self._lengths[row] += len(prompt)
        return logits

    def decode_step(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Append one token to each of the rows; see ModelRows."""
        return self.prefill(rows, tokens[:, None].tolist())

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep the first num_tokens tokens of a row; see ModelRows."""
        if not 0 <= num_tokens <= self._lengths[row]:
            raise ValueError(f"row {row} has {self._lengths[row]} tokens; it cannot keep {num_tokens}")
        self._context.remove(row, num_tokens)
        self._lengths[row] = num_tokens

    def copy_row(self, source: int, target: int) -> None:
        """Make the target row equal to the source row; they share the cells of their common tokens."""
        self._context.copy(source, target)
        self._lengths[target] = self._lengths[source]

    def free(self, row: int) -> None:
        """Let a row be used for another sequence."""
        self._context.remove(row)
        self._lengths[row] = 0


class _Context:
    """A llama.cpp context: cache cells, and the sequences that use them."""

    def __init__(self, model: LlamaCppModel, num_sequences: int, num_cells: int) -> None:
        library = model.library
        most = library.llama_max_parallel_sequences()
        if num_sequences > most:
            raise GenerationError(
                f"llama.cpp continues at most {most} texts at once, and this batch has {num_sequences} (prompts times "
                "samples or beams); choose a smaller --batch_size"
            )
        parameters = library.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max, parameters.kv_unified = num_cells, num_sequences, True
        parameters.n_batch = parameters.n_ubatch = _CHUNK_TOKENS
        self._most_outputs = max(num_sequences, _FEWEST_OUTPUTS)
        parameters.n_outputs_max = self._most_outputs
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        # float32 as in the model; the default is a cache in 16 bits
        parameters.type_k = parameters.type_v = library.GGML_TYPE_F32
        parameters.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.no_perf = True
        self._model = model  # must outlive the context
        self.handle = library.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ProgramError(f"llama.cpp has no room for {num_cells} tokens: {model.last_message()}")
        weakref.finalize(self, library.llama_free, self.handle)
        self._memory = library.llama_get_memory(self.handle)

    def read(self, tokens: Sequence[_Token]) -> Tensor:
        """Compute tokens; returns the logits [B, V] of the tokens with wants_logits, in their order."""
        logits = [row for chunk in _chunks(tokens, self._most_outputs) for row in self._read_chunk(chunk)]
        return torch.from_numpy(np.stack(logits)) if logits else torch.empty(0, self._model.vocab_size)

    def remove(self, sequence: int, start: int = 0) -> None:
        """Free a sequence's cells from a position on."""
        self._model.library.llama_memory_seq_rm(self._memory, sequence, start, _ALL)

    def copy(self, source: int, target: int) -> None:
        """Make a sequence equal to another one."""
        self.remove(target)
        self._model.library.llama_memory_seq_cp(self._memory, source, target, _ALL, _ALL)

    def _read_chunk(self, tokens: Sequence[_Token]) -> list[np.ndarray[Any, Any]]:
        library = self._model.library
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token.id, token.position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, token.row
                batch.logits[place] = token.wants_logits
            code = library.llama_decode(self.handle, batch)
        finally:
            library.llama_batch_free(batch)
        if code:
            raise ProgramError(f"llama.cpp cannot compute the batch (code {code}): {self._model.last_message()}")
        shape = (self._model.vocab_size,)
        wanted = [place for place, token in enumerate(tokens) if token.wants_logits]
        # copies, because the next call overwrites the logits
        return [
            np.ctypeslib.as_array(library.llama_get_logits_ith(self.handle, place), shape).copy() for place in wanted
        ]


def _chunks(tokens: Sequence[_Token], most_outputs: int) -> Iterator[Sequence[_Token]]:
    chunk: list[_Token] = []
    num_outputs = 0
    for token in tokens:
        if len(chunk) == _CHUNK_TOKENS or num_outputs + token.wants_logits > most_outputs:
            yield chunk
            chunk, num_outputs = [], 0
        chunk.append(token)
        num_outputs += token.wants_logits
    yield chunk


_messages: list[str] = []
_callbacks: list[Any] = []
"""The callback for messages, which llama.cpp may call until the process ends."""


def _library() -> tuple[Any, list[str]]:
    """llama.cpp's functions, and the list that holds its last error message."""
    try:
        from llama_cpp import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:  # the library of an installed package may not load
        raise BackendMissingError(
            f"backend llama_cpp needs llama-cpp-python ({error}); install it with pip install 'bloomlm[llama_cpp]', "
            "which compiles llama.cpp and takes some minutes"
        ) from error
    if not _callbacks:

        def log(level: int, text: bytes, user_data: object) -> None:
            message = text.decode("utf-8", "replace").strip()
            _LOG.debug("llama.cpp: %s", message)
            if level == _LEVEL_ERROR and message:
                _messages[:] = [message]

        _callbacks.append(llama_cpp.llama_log_callback(log))
        llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp, _messages


GGUF = ProgramFormat(name="gguf", backend="llama_cpp", large_file=gguf_file, open=LlamaCppModel)
