"""Examples as flat arrays in memory or on disk; a set that was made once is mapped from the cache.

A mapped set takes no memory of the process.
"""

import hashlib
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomlm.data.cache import Arrays, read_arrays, write_arrays
from bloomlm.data.example import Example, divide
from bloomlm.data.files import RowSource
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.files.cache_directory import default_cache_dir

# The code that every set depends on.
_MODULES = ("cache.py", "example.py", "example_set.py", "files.py", "tokenizer.py", "tokenizer_files.py")

T = TypeVar("T")


class SetReport(Protocol):
    """What the loader of a form says about a set that it made."""

    @property
    def name(self) -> str:
        """Where the examples come from."""
        ...


R_co = TypeVar("R_co", bound=SetReport, covariant=True)


class ExampleSet(Generic[R_co]):
    """Examples by index, stored as the arrays that example_arrays makes."""

    unit = "examples"

    def __init__(self, arrays: Arrays, report: R_co) -> None:
        self._arrays = arrays
        self.report = report

    def __len__(self) -> int:
        return len(self._arrays["token_offsets"]) - 1

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a set of {len(self)}")
        index %= len(self)
        return Example(
            tokens=self._piece("token", index),
            learned=tuple((int(start), int(stop)) for start, stop in self._piece("span", index)),
            source_text=self._text(2 * index),
            target_text=self._text(2 * index + 1),
        )

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def part(self, start: int, stop: int) -> "ExampleSet[R_co]":
        """The examples from start to stop - 1, sharing the memory of this set."""
        assert 0 <= start <= stop <= len(self)
        arrays = {
            **self._arrays,
            "token_offsets": self._arrays["token_offsets"][start : stop + 1],
            "span_offsets": self._arrays["span_offsets"][start : stop + 1],
            "text_offsets": self._arrays["text_offsets"][2 * start : 2 * stop + 1],
        }
        return ExampleSet(arrays, self.report)

    def hold_out(self, most: int) -> "tuple[ExampleSet[R_co], ExampleSet[R_co]]":
        """The examples without the last 5 %, at least one and at most so many, and these."""
        return divide(self, most)

    @property
    def name(self) -> str:
        """Where the examples come from, for messages."""
        return self.report.name

    def describe(self) -> tuple[str, ...]:
        """Nothing more than its sizes."""
        return ()

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each example."""
        return np.diff(self._arrays["token_offsets"]).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples."""
        offsets = self._arrays["token_offsets"]
        return int(offsets[-1] - offsets[0])

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learned."""
        offsets = self._arrays["span_offsets"]
        spans = self._arrays["spans"][offsets[0] : offsets[-1]]
        return int((spans[:, 1] - spans[:, 0]).sum(dtype=np.int64))

    def _piece(self, kind: str, index: int) -> npt.NDArray[Any]:
        start, stop = self._arrays[f"{kind}_offsets"][index : index + 2]
        return self._arrays[f"{kind}s"][start:stop]

    def _text(self, number: int) -> str:
        return self._piece("text", number).tobytes().decode("utf-8")


def example_arrays(examples: Sequence[Example]) -> dict[str, npt.NDArray[Any]]:
    """Examples as flat arrays: tokens and spans of all, their texts as UTF-8, and where each one's begin and end."""
    texts = [text.encode() for example in examples for text in (example.source_text, example.target_text)]
    return {
        "tokens": np.concatenate([example.tokens for example in examples]),
        "token_offsets": _offsets([len(example.tokens) for example in examples]),
        "spans": np.array([span for example in examples for span in example.learned], dtype=np.int32),
        "span_offsets": _offsets([len(example.learned) for example in examples]),
        "texts": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_offsets": _offsets([len(text) for text in texts]),
    }


def cached_arrays(
    source: RowSource,
    tokenizer: Tokenizer,
    make: Callable[[], Arrays],
    *,
    settings: tuple[object, ...],
    modules: tuple[str, ...],
    cache_dir: Path | None,
) -> tuple[Arrays, bool]:
    """The arrays of a set: from the cache, or made and then kept there.

    Args:
        source, tokenizer: what they are made of.
        make: makes them.
        settings: everything else that they depend on.
        modules: files of bloomlm.data with the code of `make`.
        cache_dir: directory of cached sets; None: default_cache_dir() / "examples".

    Returns:
        The arrays, and whether they come from the cache.
    """
    code = hashlib.sha256()
    for module in (*_MODULES, *modules):
        code.update((importlib.resources.files("bloomlm.data") / module).read_bytes())
    parts = (source.fingerprint(), tokenizer.fingerprint, settings, (code.hexdigest(), tokenizers.__version__))
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
    path = (cache_dir or default_cache_dir() / "examples") / f"{key}.safetensors"
    arrays: Arrays | None = read_arrays(path)
    if arrays is not None:
        return arrays, True
    arrays = make()
    write_arrays(path, arrays)
    return arrays, False


def in_chunks(items: Sequence[T], size: int, *, show_progress: bool) -> Iterator[Sequence[T]]:
    """Pieces of a list, with a bar on a terminal while they are tokenised."""
    console = Console(stderr=True)
    columns = TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (show_progress and console.is_terminal)) as progress:
        task = progress.add_task("tokenising", total=len(items))
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            yield chunk
            progress.advance(task, len(chunk))


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    """The start of each piece in the joined array, and the end of the last: lengths [2, 3] give [0, 2, 5]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
