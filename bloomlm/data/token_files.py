"""Texts tokenised once into flat files on disk, of any size, from which a run reads what it needs.

A directory of the cache holds the texts of one source:

    tokens.u32      the tokens of all documents, each closed by </s>, as little-endian uint32
    ends.u64        where each document ends in it (the position after its </s>), as little-endian uint64
    languages.u16   the language of each document as little-endian uint16: 0 for none, or 1 + its index in the manifest
    manifest.json   sizes, and what was tokenised
    progress.json   its name until all texts are done: how far the files are safe, so that a stopped run continues there

Each file of numbers has its checksums beside it, see block_file.py. The directory is named after the tokenizer and
after path, size and time of change of every file that was read, so that nothing is read again to see that it is the
same.
"""

import fcntl
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bloomlm.data.block_file import BlockReader, BlockWriter, cannot_write, read_sizes
from bloomlm.data.corpus import Piece, corpus_files, file_pieces, row_pieces, text_of
from bloomlm.data.files import RowSource
from bloomlm.data.token_progress import TokenProgress
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, DataError
from bloomlm.files.atomic import atomic_write, sync
from bloomlm.files.cache_directory import default_cache_dir

_LOG = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the same texts would become other files."""
TOKENS_FILE = "tokens.u32"
ENDS_FILE = "ends.u64"
LANGUAGES_FILE = "languages.u16"
MANIFEST_FILE = "manifest.json"
PROGRESS_FILE = "progress.json"
LOCK_FILE = "lock"
NO_LANGUAGE = ""
MOST_LANGUAGES = 2**16 - 1
BATCH_PIECES = 1024
"""Pieces that are encoded at once, on all cores."""
COMMIT_TOKENS = 2**24
"""After so many tokens the files are flushed, and a run that is stopped later continues there."""


@dataclass(frozen=True, kw_only=True)
class TextInput:
    """Documents of one file, or of a split of a data set."""

    name: str
    """For messages."""
    identity: str
    """Differs whenever the documents may differ."""
    size_bytes: int | None
    """Size of the file; None if that is not known before it is read."""
    pieces: Callable[[], Iterator[Piece]]
    """The documents in order, in pieces; the same ones at every call."""


def file_inputs(path: Path) -> list[TextInput]:
    """The documents of a file, or of all files of a directory, see corpus_files.

    Raises:
        DataError: there is no such file, or it is of a kind that is not read.
    """
    return [_file_input(file) for file in corpus_files(path)]


def rows_input(rows: RowSource) -> TextInput:
    """The documents of rows, each in the field `text`."""
    return TextInput(
        name=rows.name,
        identity=f"{rows.name} {rows.fingerprint()}",
        size_bytes=None,
        pieces=lambda: row_pieces(rows, NO_LANGUAGE, lambda row: (text_of(row),)),
    )


@dataclass(kw_only=True)
class Progress:
    """How far the texts of a source have been tokenised."""

    input: int = 0
    """Number of inputs that are done."""
    pieces: int = 0
    """Number of pieces of the next input that are done."""
    num_tokens: int = 0
    num_documents: int = 0
    open_tokens: int = 0
    """Number of tokens of the document that has not ended yet."""
    num_text_bytes: int = 0
    """Size of all texts in UTF-8."""
    languages: list[str] = field(default_factory=list)
    """The languages that rows have named."""


def _read_progress(path: Path) -> Progress:
    names = [each.name for each in fields(Progress) if each.name != "languages"]
    return Progress(**read_sizes(path, names, lists=["languages"]))


class TokenFiles:
    """The tokens of a source on disk.

    Args:
        directory: holds a manifest.
        name: name of the source in messages.

    Raises:
        DataError: a file is damaged or missing.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.name = name
        self.size = _read_progress(directory / MANIFEST_FILE)
        """What was tokenised."""
        self.tokens = BlockReader(directory / TOKENS_FILE, "<u4", self.size.num_tokens)
        self.ends = BlockReader(directory / ENDS_FILE, "<u8", self.size.num_documents)
        self.languages = BlockReader(directory / LANGUAGES_FILE, "<u2", self.size.num_documents)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the directory meanwhile."""
        with _locked(self.directory):
            yield


def load_token_files(
    name: str,
    inputs: Sequence[TextInput],
    tokenizer: Tokenizer,
    *,
    cache_dir: Path | None = None,
    show_progress: bool = True,
) -> TokenFiles:
    """Tokenise texts into files, continue what a stopped run has begun, or open what is finished.

    Args:
        name: name of the source in messages.
        inputs: the documents.
        tokenizer: tokenizer of the model.
        cache_dir: directory of all sources; None: default_cache_dir() / "tokens".
        show_progress: whether progress is shown.

    Raises:
        DataError: a text cannot be read, there is no document, or the files cannot be written or are damaged.
    """
    identity = [tokenizer.fingerprint, *(one.identity for one in inputs)]
    key = hashlib.sha256(repr((FORMAT, identity)).encode()).hexdigest()[:40]
    directory = (cache_dir or default_cache_dir() / "tokens") / key
    manifest = directory / MANIFEST_FILE
    try:
        if not manifest.is_file():
            directory.mkdir(parents=True, exist_ok=True)
            with _locked(directory):
                if not manifest.is_file():  # another process may have written it meanwhile
                    _tokenise(directory, name, inputs, tokenizer, show_progress=show_progress)
    except (OSError, CheckpointError) as error:
        raise cannot_write(directory, error) from error
    return TokenFiles(directory, name)


def _tokenise(
    directory: Path, name: str, inputs: Sequence[TextInput], tokenizer: Tokenizer, *, show_progress: bool
) -> None:
    writer = _Writer(directory, tokenizer.eos_token_id, [one.identity for one in inputs])
    done = writer.done
    if done.num_tokens:
        _LOG.warning("%s: continuing after %s tokens of an earlier run", name, f"{done.num_tokens:,}")
    total_bytes = None if any(one.size_bytes is None for one in inputs) else sum(one.size_bytes or 0 for one in inputs)
    with TokenProgress(name, total_bytes, num_tokens=done.num_tokens, shown=show_progress) as shown:
        while done.input < len(inputs):
            passed = sum(one.size_bytes or 0 for one in inputs[: done.input])
            before = done.num_text_bytes
            for pieces, encoded in _encoded(islice(inputs[done.input].pieces(), done.pieces, None), tokenizer):
                writer.add(pieces, encoded)
                shown.update(done.num_tokens, passed + done.num_text_bytes - before)
            done.input, done.pieces = done.input + 1, 0
    if done.num_documents == 0:
        where = inputs[0].name if len(inputs) == 1 else name
        raise DataError(f"{where}: it has no text; expected at least one document")
    writer.commit()
    (directory / PROGRESS_FILE).replace(directory / MANIFEST_FILE)
    sync(directory)
    writer.close()


class _Writer:
    """Appends documents to the files, and notes from time to time how far they are safe."""

    def __init__(self, directory: Path, eos_token_id: int, inputs: list[str]) -> None:
        self._progress_path = directory / PROGRESS_FILE
        self._eos_token_id = eos_token_id
        self._inputs = inputs
        self.done = Progress()
        if self._progress_path.is_file():
            self.done = _read_progress(self._progress_path)
        self._tokens = BlockWriter(directory / TOKENS_FILE, "<u4", self.done.num_tokens)
        self._ends = BlockWriter(directory / ENDS_FILE, "<u8", self.done.num_documents)
        self._languages = BlockWriter(directory / LANGUAGES_FILE, "<u2", self.done.num_documents)
        self._codes = {name: code for code, name in enumerate([NO_LANGUAGE, *self.done.languages])}
        self._committed = self.done.num_tokens

    def add(self, pieces: Sequence[Piece], encoded: Sequence[Sequence[int]]) -> None:
        """Add pieces, which follow those that were added before, and their tokens."""
        done, tokens, ends, languages = self.done, list[int](), list[int](), list[int]()
        for piece, ids in zip(pieces, encoded, strict=True):
            tokens += ids
            done.open_tokens += len(ids)
            done.num_text_bytes += len(piece.text.encode())
            if not piece.ends_document:
                continue
            if done.open_tokens:  # a document without tokens is left out
                tokens.append(self._eos_token_id)
                ends.append(done.num_tokens + len(tokens))
                languages.append(self._code(piece.language))
            done.open_tokens = 0
        self._tokens.append(np.array(tokens, dtype=np.uint32))
        self._ends.append(np.array(ends, dtype=np.uint64))
        self._languages.append(np.array(languages, dtype=np.uint16))
        done.pieces += len(pieces)
        done.num_tokens += len(tokens)
        done.num_documents += len(ends)
        if done.num_tokens - self._committed >= COMMIT_TOKENS:
            self.commit()

    def commit(self) -> None:
        """Flush the files, and note how far they are safe."""
        self._tokens.sync()
        self._ends.sync()
        self._languages.sync()
        content = {"format": FORMAT, "size": asdict(self.done), "inputs": self._inputs}
        atomic_write(self._progress_path, json.dumps(content, indent=2) + "\n")
        self._committed = self.done.num_tokens

    def close(self) -> None:
        """Close the files."""
        self._tokens.close()
        self._ends.close()
        self._languages.close()

    def _code(self, language: str) -> int:
        if language not in self._codes:
            if len(self._codes) > MOST_LANGUAGES:
                raise DataError(f"its rows name more than {MOST_LANGUAGES:,} languages, the last one {language!r}")
            self._codes[language] = len(self._codes)
            self.done.languages.append(language)
        return self._codes[language]


def _encoded(
    pieces: Iterable[Piece], tokenizer: Tokenizer
) -> Iterator[tuple[Sequence[Piece], Sequence[Sequence[int]]]]:
    """Pieces and their tokens; the next pieces are read and encoded while the caller works with these."""
    waiting = deque[tuple[list[Piece], Future[Any]]]()
    pieces = iter(pieces)
    with ThreadPoolExecutor(1) as thread:
        while True:
            if batch := list(islice(pieces, BATCH_PIECES)):
                waiting.append((batch, thread.submit(tokenizer.encode_batch, [piece.text for piece in batch])))
            elif not waiting:
                return
            if len(waiting) > 1 or not batch:
                read, encoded = waiting.popleft()
                yield read, encoded.result()


def _file_input(path: Path) -> TextInput:
    found = path.stat()
    return TextInput(
        name=str(path),
        identity=f"{path.resolve()} {found.st_size} {found.st_mtime_ns}",
        size_bytes=found.st_size,
        pieces=partial(file_pieces, path, NO_LANGUAGE, lambda row: (text_of(row),)),
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with (directory / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning("%s: waiting for another process that writes there", directory)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
