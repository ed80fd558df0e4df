"""From rows to tokenised examples (source, target, </s>), cut to maximum lengths and cached on disk.

A text that is cut keeps its beginning. A cached set is mapped from disk and so takes no memory of the process.
"""

import hashlib
import importlib.resources
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomlm.data.cache import Arrays, read_arrays, write_arrays
from bloomlm.data.example import Example
from bloomlm.data.files import FileRows, RowSource
from bloomlm.data.rows import PromptTemplate, TextPair, read_pair
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from bloomlm.files.cache_directory import default_cache_dir

_LOG = logging.getLogger(__name__)

_CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """Size of a set of examples, and how many of its texts were cut."""

    name: str
    num_examples: int
    num_sources_cut: int
    num_targets_cut: int
    src_length: int
    tgt_length: int
    from_cache: bool

    def __str__(self) -> str:
        cuts = (
            f"{self.num_sources_cut} sources cut to src_length {self.src_length}, {self.num_targets_cut} targets "
            f"to tgt_length - 1 = {self.tgt_length - 1} tokens"
        )
        return f"{self.name}: {self.num_examples} examples, {cuts if self.any_cut else 'none cut'}"

    @property
    def any_cut(self) -> bool:
        """Whether any source or target lost its end."""
        return self.num_sources_cut + self.num_targets_cut > 0


class ExampleSet:
    """Examples by index, stored as flat arrays in memory or on disk. load_examples creates it."""

    def __init__(self, arrays: Arrays, report: LoadReport) -> None:
        self._tokens = arrays["tokens"]
        self._token_offsets = arrays["token_offsets"]
        self._num_source_tokens = arrays["num_source_tokens"]
        self._texts = arrays["texts"]
        self._text_offsets = arrays["text_offsets"]
        self.report = report

    def __len__(self) -> int:
        return len(self._num_source_tokens)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a set of {len(self)}")
        index %= len(self)
        start, end = self._token_offsets[index : index + 2]
        return Example.pair(
            self._tokens[start:end],
            int(self._num_source_tokens[index]),
            source_text=self._text(2 * index),
            target_text=self._text(2 * index + 1),
        )

    def __iter__(self) -> Iterator[Example]:
        return map(self.__getitem__, range(len(self)))

    def part(self, start: int, stop: int) -> "ExampleSet":
        """The examples from start to stop - 1, sharing the memory of this set."""
        assert 0 <= start <= stop <= len(self)
        arrays = {
            "tokens": self._tokens,
            "token_offsets": self._token_offsets[start : stop + 1],
            "num_source_tokens": self._num_source_tokens[start:stop],
            "texts": self._texts,
            "text_offsets": self._text_offsets[2 * start : 2 * stop + 1],
        }
        return ExampleSet(arrays, self.report)

    @property
    def name(self) -> str:
        """Where the examples come from, for messages."""
        return self.report.name

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each example, </s> included."""
        return np.diff(self._token_offsets).astype(np.int64)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all examples, </s> included."""
        return int(self._token_offsets[-1] - self._token_offsets[0])

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learned: every target token and every </s>."""
        return self.num_tokens - int(self._num_source_tokens.sum(dtype=np.int64))

    def _text(self, number: int) -> str:
        start, end = self._text_offsets[number : number + 2]
        return self._texts[start:end].tobytes().decode("utf-8")


def load_examples(
    rows: RowSource | str | Path,
    tokenizer: Tokenizer,
    *,
    src_length: int,
    tgt_length: int,
    prompt_template: str | None = None,
    cache_dir: Path | None = None,
    show_progress: bool = True,
) -> ExampleSet:
    """Tokenise rows into examples, or read them from the cache.

    Args:
        rows: source of the rows; a path stands for FileRows(path).
        tokenizer: tokenizer of the model.
        src_length: maximum number of tokens of a source; a longer source loses its end.
        tgt_length: maximum number of tokens of a target and its </s>; a longer target loses its end, but not </s>.
        prompt_template: builds the source of each row, see PromptTemplate.
        cache_dir: directory of cached sets; None: default_cache_dir() / "examples".
        show_progress: whether a terminal shows a bar while texts are tokenised.

    Raises:
        ConfigError: a length is too small, or the template cannot be read.
        DataError: a row fits no format, or there are no rows.
    """
    if src_length < 1 or tgt_length < 2:
        raise ConfigError(
            f"src_length {src_length} and tgt_length {tgt_length}: a source needs at least 1 token, "
            "a target at least 2 (one token and </s>)"
        )
    source: RowSource = FileRows(rows) if isinstance(rows, str | Path) else rows
    key = _cache_key(source, tokenizer, src_length, tgt_length, prompt_template)
    path = (cache_dir or default_cache_dir() / "examples") / f"{key}.safetensors"
    arrays: Arrays | None = read_arrays(path)
    from_cache = arrays is not None
    if arrays is None:
        pairs = _read_pairs(source, prompt_template)
        arrays = _tokenise(pairs, tokenizer, src_length, tgt_length, show_progress=show_progress)
        write_arrays(path, arrays)
    report = LoadReport(
        name=source.name,
        num_examples=len(arrays["num_source_tokens"]),
        num_sources_cut=int(arrays["num_cut"][0]),
        num_targets_cut=int(arrays["num_cut"][1]),
        src_length=src_length,
        tgt_length=tgt_length,
        from_cache=from_cache,
    )
    _LOG.log(logging.WARNING if report.any_cut else logging.INFO, "%s", report)
    return ExampleSet(arrays, report)


def _read_pairs(source: RowSource, prompt_template: str | None) -> list[TextPair]:
    template = PromptTemplate(prompt_template) if prompt_template is not None else None
    pairs = [read_pair(row, template) for row in source.rows()]
    if not pairs:
        raise DataError(f"{source.name}: it has no rows; expected at least one example")
    return pairs


def _tokenise(
    pairs: list[TextPair], tokenizer: Tokenizer, src_length: int, tgt_length: int, *, show_progress: bool
) -> dict[str, npt.NDArray[Any]]:
    tokens: list[npt.NDArray[np.int32]] = []
    lengths, source_lengths = [], []
    num_cut = [0, 0]
    console = Console(stderr=True)
    columns = TextColumn("tokenising"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not (show_progress and console.is_terminal)) as progress:
        task = progress.add_task("tokenising", total=len(pairs))
        for start in range(0, len(pairs), _CHUNK_ROWS):
            chunk = pairs[start : start + _CHUNK_ROWS]
            encoded = tokenizer.encode_batch([text for pair in chunk for text in (pair.source, pair.target)])
            for source, target in zip(encoded[::2], encoded[1::2], strict=True):
                num_cut[0] += len(source) > src_length
                num_cut[1] += len(target) > tgt_length - 1
                kept = [*source[:src_length], *target[: tgt_length - 1], tokenizer.eos_token_id]
                tokens.append(np.array(kept, dtype=np.int32))
                lengths.append(len(kept))
                source_lengths.append(min(len(source), src_length))
            progress.advance(task, len(chunk))
    texts = [text.encode("utf-8") for pair in pairs for text in (pair.source, pair.target)]
    return {
        "tokens": np.concatenate(tokens),
        "token_offsets": _offsets(lengths),
        "num_source_tokens": np.array(source_lengths, dtype=np.int32),
        "texts": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "text_offsets": _offsets([len(text) for text in texts]),
        "num_cut": np.array(num_cut, dtype=np.int64),
    }


def _offsets(lengths: list[int]) -> npt.NDArray[np.int64]:
    """The start of each piece in the joined array, and the end of the last: lengths [2, 3] give [0, 2, 5]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


def _cache_key(
    source: RowSource, tokenizer: Tokenizer, src_length: int, tgt_length: int, prompt_template: str | None
) -> str:
    """Digest of everything that the examples depend on, including the code that makes them."""
    code = hashlib.sha256()
    for module in ("cache.py", "example.py", "examples.py", "files.py", "rows.py", "tokenizer.py"):
        code.update((importlib.resources.files("bloomlm.data") / module).read_bytes())
    parts = (
        source.fingerprint(),
        tokenizer.fingerprint,
        (src_length, tgt_length, prompt_template),
        (code.hexdigest(), tokenizers.__version__),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
