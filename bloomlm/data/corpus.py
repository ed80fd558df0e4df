"""The texts of files, in short pieces that are tokenized as the whole text is.

A .txt file is one document; in other files each row holds one.

A corpus may be larger than memory: files are read a block at a time. A piece ends before a word, at a place where
BLOOM's tokenizer starts a new word anyway, so that the tokens of the pieces are those of the text; only a run of
thousands of characters without such a place is cut inside. Pieces are short so that many can be encoded in parallel,
and so that each can be a context of its own when a model is measured on it.
"""

import importlib.resources
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bloomlm.data.files import ROW_SUFFIXES, FileRows, Row, RowSource
from bloomlm.data.rows import checked_text, field_names, read_pair
from bloomlm.data.splits import BUILTIN_PREFIX
from bloomlm.errors import DataError

CORPUS = "corpus"
"""The language of texts for which none is named."""
PIECE_CHARACTERS = 1024
LONGEST_PIECE_CHARACTERS = 8 * PIECE_CHARACTERS
TEXT_SUFFIX = ".txt"
_BLOCK_CHARACTERS = 2**20
_LANGUAGE_FIELDS = ("language", "lang")
_LANGUAGE = re.compile(r"[\w.+# -]{1,64}")
# Places before a word: after a line end, before a space, or after one of the marks that BLOOM's expression cuts at.
_BEFORE_LINE = re.compile(r"(?<=\n)(?=\w)")
_BEFORE_WORD = re.compile("(?<=\\w)(?= \\w)|(?<=[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])(?=\\w)")


@dataclass(frozen=True)
class Piece:
    """A piece of a document."""

    language: str
    """Empty if none is named."""
    text: str
    ends_document: bool = True
    """Whether the next piece belongs to another document."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files, each with the language of its texts."""

    files: tuple[tuple[str, Path], ...]
    """Language and path; a row may name another language, see row_language."""

    @property
    def size_bytes(self) -> int:
        """Size of all files; what `pieces` reports in total."""
        return sum(path.stat().st_size for _, path in self.files)

    def pieces(self, report: Callable[[int], None] = lambda num_bytes: None) -> Iterator[Piece]:
        """All texts in order, in pieces.

        Args:
            report: called with a number of bytes of the files as they are read.

        Raises:
            DataError: a file cannot be read, is not UTF-8, or has a row without text.
        """
        for language, path in self.files:
            size_bytes, done = path.stat().st_size, 0
            for piece in file_pieces(path, language, _texts_of):
                now = min(size_bytes - done, len(piece.text.encode("utf-8", "surrogatepass")))
                done += now
                report(now)
                yield piece
            if done < size_bytes:
                report(size_bytes - done)  # line ends, names of fields


def find_corpus(names: Sequence[str] = (), languages_from: str | None = None) -> Corpus:
    """Find the files of a corpus.

    Args:
        names: files, or directories whose files are taken, at any depth; builtin:dates is the built-in data set.
        languages_from: a directory whose files and subdirectories hold a language each, by their names.

    Raises:
        DataError: something named does not exist, holds no text, or is of a kind that is not read.
    """
    files = [(CORPUS, path) for name in names for path in corpus_files(_path_of(name))]
    if languages_from is not None:
        directory = _path_of(languages_from)
        if not directory.is_dir():
            raise DataError(f"{directory}: no such directory; expected one with a file or a subdirectory a language")
        for entry in sorted(directory.iterdir()):
            if not entry.name.startswith("."):
                files += [(entry.stem if entry.is_file() else entry.name, path) for path in corpus_files(entry)]
    if not files:
        raise DataError("no corpus is named, or it holds no files")
    return Corpus(files=tuple(files))


def split_text(text: str, *, is_last: bool = True) -> tuple[list[str], str]:
    """Cut a text into pieces.

    Args:
        text: of any length.
        is_last: whether nothing follows; otherwise the last piece is the rest, to be continued.

    Returns:
        The pieces and the rest, which joined are the text.
    """
    pieces, start = [], 0
    while len(text) - start > (PIECE_CHARACTERS if is_last else LONGEST_PIECE_CHARACTERS):
        stop = _piece_end(text, start)
        pieces.append(text[start:stop])
        start = stop
    rest = text[start:]
    if is_last and rest:
        return [*pieces, rest], ""
    return pieces, rest


def _piece_end(text: str, start: int) -> int:
    """A place to cut at, about PIECE_CHARACTERS after the start."""
    middle, stop = start + PIECE_CHARACTERS // 2, start + PIECE_CHARACTERS
    for expression in (_BEFORE_LINE, _BEFORE_WORD):
        for match in expression.finditer(text, middle, stop):
            return match.start()
    later = _BEFORE_WORD.search(text, stop - 1, start + LONGEST_PIECE_CHARACTERS)
    return later.start() if later else min(len(text), start + LONGEST_PIECE_CHARACTERS)


def file_pieces(path: Path, language: str, texts_of: Callable[[Row], tuple[str, ...]]) -> Iterator[Piece]:
    """The documents of one file in order, in pieces.

    Args:
        path: a file that ends in .txt, or one of rows.
        language: of its texts.
        texts_of: the texts of a row, each a document.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has a row without text.
    """
    if path.suffix.lower() == TEXT_SUFFIX:
        return _text_blocks(path, language)
    return row_pieces(FileRows(path), language, texts_of)


def row_pieces(rows: RowSource, language: str, texts_of: Callable[[Row], tuple[str, ...]]) -> Iterator[Piece]:
    """As file_pieces, of rows; a row may name another language, see row_language."""
    for row in rows.rows():
        name = row_language(row) or language
        for text in texts_of(row):
            yield from _last_ends(Piece(name, piece, ends_document=False) for piece in split_text(text)[0])


def row_language(row: Row) -> str:
    """The language that a row names in its field `language` or `lang`; empty if it names none.

    Raises:
        DataError: a field holds something else.
    """
    for name in _LANGUAGE_FIELDS:
        if row.fields.get(name) in (None, ""):
            continue
        language = checked_text(row.fields[name], row.where, name)
        if not _LANGUAGE.fullmatch(language):
            raise DataError(
                f"{row.where}: {name!r} is {language!r:.60}, expected the name of a language: at most 64 letters, "
                "digits, spaces and _ . - + #"
            )
        return language
    return ""


def _text_blocks(path: Path, language: str) -> Iterator[Piece]:
    rest = ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(_BLOCK_CHARACTERS):
                pieces, rest = split_text(rest + block, is_last=False)
                yield from (Piece(language, piece, ends_document=False) for piece in pieces)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    yield from _last_ends(Piece(language, piece, ends_document=False) for piece in split_text(rest)[0])


def _last_ends(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces, the last of which ends its document."""
    last = next(pieces, None)
    for piece in pieces:
        assert last is not None
        yield last
        last = piece
    if last is not None:
        yield replace(last, ends_document=True)


def _texts_of(row: Row) -> tuple[str, ...]:
    if "text" in row.fields:
        return (text_of(row),)
    pair = read_pair(row)
    return pair.source, pair.target


def text_of(row: Row) -> str:
    """The field `text` of a row.

    Raises:
        DataError: it is missing, or is not text.
    """
    if "text" not in row.fields:
        raise DataError(f"{row.where}: found the fields {field_names(row.fields)}, expected 'text'")
    return checked_text(row.fields["text"], row.where, "text")


def _path_of(name: str) -> Path:
    if name.startswith(BUILTIN_PREFIX):
        path = Path(str(importlib.resources.files("bloomlm.assets"))) / name.removeprefix(BUILTIN_PREFIX)
        if not (path / "train.jsonl").is_file():
            raise DataError(f"{name}: no such data set; there is {BUILTIN_PREFIX}dates")
        return path / "train.jsonl"
    return Path(name).expanduser()


def corpus_files(path: Path) -> list[Path]:
    """The files of a corpus: `path` itself, or those of a directory, at any depth and in order of their names.

    Raises:
        DataError: there is no such file, or it is of a kind that is not read.
    """
    known = (TEXT_SUFFIX, *ROW_SUFFIXES)
    try:
        is_directory, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # a name that is too long
        raise DataError(f"{path}: {error.strerror}") from error
    if is_directory:
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        found = [file for file in files if file.suffix.lower() in known]
        if not found:
            raise DataError(f"{path}: no file in it ends in {', '.join(known)}")
        return found
    if not is_file:
        raise DataError(f"{path}: no such file or directory; expected text in a file that ends in {', '.join(known)}")
    if path.suffix.lower() not in known:
        raise DataError(
            f"{path}: a corpus is read from files that end in {', '.join(known)}, not in {path.suffix!r}; "
            "write other kinds as .jsonl with a field 'text'"
        )
    return [path]
