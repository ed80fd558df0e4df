"""Windows of raw text: the documents of token files, packed in order.

A window holds as many whole documents as fit into max_length positions. A document that is longer starts a new window
and is cut into pieces of max_length positions; its last piece shares a window with the documents that follow. A piece
of n tokens fills n - 1 positions, because each position predicts the token after it, and pieces overlap by one token:
every token of a document is learned exactly once, except its first, before which there is nothing.

    max_length 4, documents abc</s>, de</s>, fghijk</s>
    windows    abc</s>   de</s>   fghij   jk</s>

Where the windows lie depends on the ends of the documents alone. It is computed once for each max_length and kept
beside the tokens, so that neither it nor the documents take memory of the process.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bloomlm.data.block_file import BlockReader, BlockWriter, cannot_write, read_sizes
from bloomlm.data.example import Example
from bloomlm.data.token_files import TokenFiles
from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_write

_READ_ENDS = 2**16
_COLUMNS = 4


class TextWindows:
    """Windows of token files by index.

    Args:
        files: the tokens.
        max_length: most positions of a window.
        start: number of the first window; with stop, a part of all windows.
        stop: number after that of the last window; None: up to the end.

    Raises:
        DataError: a file is damaged, or the places of the windows cannot be written.
    """

    def __init__(self, files: TokenFiles, max_length: int, *, start: int = 0, stop: int | None = None) -> None:
        self._files = files
        self._max_length = max_length
        self._table = _open_table(files, max_length)
        self._start = start
        self._stop = len(self._table) // _COLUMNS - 1 if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start, stop, _, document_starts = self._place(index % len(self))
        return Example(
            tokens=self._files.tokens.read(start, stop).astype(np.int32),
            learned=((0, stop - start),),
            document_starts=document_starts,
            source_text="",
            target_text="",
        )

    @property
    def name(self) -> str:
        """Where the texts come from, for messages."""
        return self._files.name

    @property
    def digest(self) -> int:
        """Differs for other texts, wherever their files lie."""
        return self._files.tokens.digest

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each window, in memory."""
        rows = np.array(self._rows(self._start, len(self)))
        return rows[:, 1] - rows[:, 0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all windows; one that two windows share is counted once."""
        if len(self) == 0:
            return 0
        return self._rows(self._stop - 1, 1)[0][1] - self._rows(self._start, 1)[0][0]

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learned: all but the first of each document."""
        return self._rows(self._stop, 1)[0][3] - self._rows(self._start, 1)[0][3]

    def document_languages(self, index: int) -> npt.NDArray[np.uint16]:
        """The language of each document of a window: 0 for none, or 1 + its index in language_names."""
        _, _, first, document_starts = self._place(index)
        return self._files.languages.read(first, first + len(document_starts))

    @property
    def language_names(self) -> tuple[str, ...]:
        """The languages that the rows of the whole source name."""
        return tuple(self._files.size.languages)

    def language_codes(self) -> list[int]:
        """Those of document_languages that occur in any window, in order."""
        first, last = self._rows(self._start, 1)[0][2], self._rows(self._stop, 1)[0][2]
        # the last document may go on in the next window
        stop = min(last + 1, len(self._files.languages))
        chunks = range(first, stop, _READ_ENDS)
        return sorted(
            {code for at in chunks for code in set(self._files.languages.read(at, min(at + _READ_ENDS, stop)).tolist())}
        )

    def part(self, start: int, stop: int) -> "TextWindows":
        """The windows from start to stop - 1."""
        assert 0 <= start <= stop <= len(self)
        return TextWindows(self._files, self._max_length, start=self._start + start, stop=self._start + stop)

    def _place(self, index: int) -> tuple[int, int, int, tuple[int, ...]]:
        """Where a window begins and ends in the tokens, its first document, and where its documents begin within it."""
        (start, stop, first, _), (_, _, end, _) = self._rows(self._start + index, 2)
        ends = self._files.ends.read(first, end).astype(np.int64)
        return start, stop, first, (0, *(ends[ends < stop] - start).tolist())

    def _rows(self, number: int, count: int) -> list[list[int]]:
        found = self._table.read(number * _COLUMNS, (number + count) * _COLUMNS)
        rows: list[list[int]] = found.astype(np.int64).reshape(count, _COLUMNS).tolist()
        return rows


class PartialWindows:
    """Windows without some of their documents; the others do not see these and have the same losses.

    Args:
        windows: the whole windows.
        kept: for each window that is left its index, the numbers of the documents that stay, in order, and the number
            of their tokens.
    """

    def __init__(self, windows: TextWindows, kept: Sequence[tuple[int, Sequence[int], int]]) -> None:
        self._windows = windows
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        number, documents, _ = self._kept[index]
        window = self._windows[number]
        pieces = np.split(window.tokens, window.document_starts[1:])
        kept = [pieces[document] for document in documents]
        starts = np.cumsum([0, *map(len, kept)]).tolist()
        return replace(
            window, tokens=np.concatenate(kept), learned=((0, starts[-1]),), document_starts=tuple(starts[:-1])
        )

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each window."""
        return [num_tokens for _, _, num_tokens in self._kept]


def pack(ends: Iterable[int], max_length: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the windows lie.

    Args:
        ends: the position after the last token of each document; every document has at least two tokens.
        max_length: most positions of a window.

    Yields:
        For each window the position of its first token, that after its last token, the number of its first document,
        and the number of tokens that the windows before it learn; at the end a row with the totals.
    """
    start = first = used = begin = learned = number = 0
    for number, end in enumerate(ends):
        positions = end - begin - 1
        if used and used + positions > max_length:
            yield start, begin, first, learned
            start, first, learned, used = begin, number, learned + used, 0
        while positions > max_length:  # here the window is empty
            yield start, start + max_length + 1, number, learned
            start, learned, positions = start + max_length, learned + max_length, positions - max_length
        used += positions
        begin = end
    yield start, begin, first, learned
    yield begin, begin, number + 1, learned + used


def _open_table(files: TokenFiles, max_length: int) -> BlockReader:
    path = files.directory / f"windows-{max_length}.u64"
    manifest = path.with_suffix(".json")
    try:
        if not manifest.is_file():
            with files.locked():
                if not manifest.is_file():  # another process may have written it meanwhile
                    size = {"length": _write_table(path, files, max_length)}
                    atomic_write(manifest, json.dumps({"size": size}))
    except (OSError, CheckpointError) as error:
        raise cannot_write(files.directory, error) from error
    return BlockReader(path, "<u8", read_sizes(manifest, ["length"])["length"])


def _write_table(path: Path, files: TokenFiles, max_length: int) -> int:
    writer = BlockWriter(path, "<u8")
    rows: list[tuple[int, int, int, int]] = []
    for row in pack(_all_ends(files), max_length):
        rows.append(row)
        if len(rows) == _READ_ENDS:
            writer.append(np.array(rows, dtype=np.uint64))
            rows.clear()
    if rows:
        writer.append(np.array(rows, dtype=np.uint64))
    length = writer.sync()
    writer.close()
    return length


def _all_ends(files: TokenFiles) -> Iterator[int]:
    for start in range(0, len(files.ends), _READ_ENDS):
        yield from files.ends.read(start, min(start + _READ_ENDS, len(files.ends))).tolist()
