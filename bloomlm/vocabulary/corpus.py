"""The texts of files, in short pieces that are tokenized as the whole text is, and a share of them held out.

A corpus may be larger than memory: files are read a block at a time. A piece ends before a word, at a place where
BLOOM's tokenizer starts a new word anyway, so that the tokens of the pieces are those of the text; only a run of
thousands of characters without such a place is cut inside. Pieces are short so that many can be encoded in parallel,
and so that each is a context of its own when a model is measured on it.
"""

import importlib.resources
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bloomlm.checkpoint.output import Report, no_report
from bloomlm.data.files import FileRows, Row
from bloomlm.data.rows import read_pair
from bloomlm.data.splits import BUILTIN_PREFIX
from bloomlm.errors import DataError

CORPUS = "corpus"
"""The language of texts for which none is named."""
PIECE_CHARACTERS = 1024
LONGEST_PIECE_CHARACTERS = 8 * PIECE_CHARACTERS
HELD_OUT_SHARE = 16
"""One text in so many is held out, until there are enough bytes."""
TEXT_SUFFIX = ".txt"
ROW_SUFFIXES = (".jsonl", ".json", ".csv")
_BLOCK_CHARACTERS = 2**20
# Places before a word: after a line end, before a space, or after one of the marks that BLOOM's expression cuts at.
_BEFORE_LINE = re.compile(r"(?<=\n)(?=\w)")
_BEFORE_WORD = re.compile("(?<=\\w)(?= \\w)|(?<=[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])(?=\\w)")


@dataclass(frozen=True)
class Piece:
    """A piece of a text."""

    language: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files, each with the language of its texts."""

    files: tuple[tuple[str, Path], ...]
    """Language and path; a row with a field `lang` has that language instead."""

    @property
    def size_bytes(self) -> int:
        """Size of all files; what `pieces` reports in total."""
        return sum(path.stat().st_size for _, path in self.files)

    def pieces(self, report: Report = no_report) -> Iterator[Piece]:
        """All texts in order, in pieces.

        Args:
            report: called with a number of bytes of the files as they are read.

        Raises:
            DataError: a file cannot be read, is not UTF-8, or has a row without text.
        """
        for language, path in self.files:
            size_bytes, done = path.stat().st_size, 0
            read = _text_blocks if path.suffix.lower() == TEXT_SUFFIX else _row_texts
            for piece in read(path, language):
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
    files = [(CORPUS, path) for name in names for path in _files_of(_path_of(name))]
    if languages_from is not None:
        directory = _path_of(languages_from)
        if not directory.is_dir():
            raise DataError(f"{directory}: no such directory; expected one with a file or a subdirectory a language")
        for entry in sorted(directory.iterdir()):
            if not entry.name.startswith("."):
                files += [(entry.stem if entry.is_file() else entry.name, path) for path in _files_of(entry)]
    if not files:
        raise DataError("no corpus is named, or it holds no files")
    return Corpus(files=tuple(files))


@dataclass
class HeldOut:
    """Takes some pieces out of a corpus, chosen by a digest of their text, so that a repeated text is taken as one.

    Args:
        bytes_per_language: how much to take of each language at most.
    """

    bytes_per_language: int
    pieces: list[Piece] = field(default_factory=list)
    """What has been taken so far."""

    def rest(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces that stay."""
        taken: dict[str, int] = {}
        for piece in pieces:
            encoded = piece.text.encode()
            num_bytes = taken.get(piece.language, 0) + len(encoded)
            if zlib.crc32(encoded) % HELD_OUT_SHARE or num_bytes > self.bytes_per_language:
                yield piece
            else:
                taken[piece.language] = num_bytes
                self.pieces.append(piece)


def first_pieces(corpus: Corpus, bytes_per_language: int) -> list[Piece]:
    """The first pieces of each language, up to a number of bytes."""
    pieces, taken = list[Piece](), dict[str, int]()
    for piece in corpus.pieces():
        taken[piece.language] = taken.get(piece.language, 0) + len(piece.text.encode())
        if taken[piece.language] <= bytes_per_language:
            pieces.append(piece)
    return pieces


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


def _text_blocks(path: Path, language: str) -> Iterator[Piece]:
    rest = ""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while block := file.read(_BLOCK_CHARACTERS):
                pieces, rest = split_text(rest + block, is_last=False)
                yield from (Piece(language, piece) for piece in pieces)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 (byte 0x{error.object[error.start]:02x}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    yield from (Piece(language, piece) for piece in split_text(rest)[0])


def _row_texts(path: Path, language: str) -> Iterator[Piece]:
    for row in FileRows(path).rows():
        own = row.fields.get("lang")
        name = own if isinstance(own, str) and own else language
        for text in _texts_of(row):
            yield from (Piece(name, piece) for piece in split_text(text)[0])


def _texts_of(row: Row) -> tuple[str, ...]:
    if "text" not in row.fields:
        pair = read_pair(row)
        return pair.source, pair.target
    text = row.fields["text"]
    if not isinstance(text, str):
        raise DataError(f"{row.where}: 'text' is {type(text).__name__} {text!r:.40}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.where}: 'text' holds half of a surrogate pair, which is no character") from error
    return (text,)


def _path_of(name: str) -> Path:
    if name.startswith(BUILTIN_PREFIX):
        path = Path(str(importlib.resources.files("bloomlm.assets"))) / name.removeprefix(BUILTIN_PREFIX)
        if not (path / "train.jsonl").is_file():
            raise DataError(f"{name}: no such data set; there is {BUILTIN_PREFIX}dates")
        return path / "train.jsonl"
    return Path(name).expanduser()


def _files_of(path: Path) -> list[Path]:
    known = (TEXT_SUFFIX, *ROW_SUFFIXES)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        found = [file for file in files if file.suffix.lower() in known]
        if not found:
            raise DataError(f"{path}: no file in it ends in {', '.join(known)}")
        return found
    if not path.is_file():
        raise DataError(f"{path}: no such file or directory; expected text in a file that ends in {', '.join(known)}")
    if path.suffix.lower() not in known:
        raise DataError(
            f"{path}: a corpus is read from files that end in {', '.join(known)}, not in {path.suffix!r}; "
            "write other kinds, such as .parquet, as .jsonl with a field 'text'"
        )
    return [path]
