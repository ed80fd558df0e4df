"""From rows to tokenised pairs (source, target, </s>), cut to maximum lengths; a cut text keeps its beginning."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bloomlm.data.cache import Arrays
from bloomlm.data.example import Example
from bloomlm.data.example_set import ExampleSet, cached_arrays, example_arrays, in_chunks
from bloomlm.data.files import FileRows, Row, RowSource
from bloomlm.data.rows import PromptTemplate, TextPair, read_pair
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError, counted

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
    left_out: tuple[int, ...] = ()
    """No row is left out, because long texts are cut."""

    def __str__(self) -> str:
        cuts = (
            f"{self.num_sources_cut} sources cut to src_length {self.src_length}, {self.num_targets_cut} targets "
            f"to tgt_length - 1 = {self.tgt_length - 1} tokens"
        )
        return f"{self.name}: {counted(self.num_examples, 'examples')}, {cuts if self.any_cut else 'none cut'}"

    @property
    def any_cut(self) -> bool:
        """Whether any source or target lost its end."""
        return self.num_sources_cut + self.num_targets_cut > 0


@dataclass(frozen=True, kw_only=True)
class PairForm:
    """How a row becomes pairs of a source and a target."""

    name: str
    """Names the form in the cache."""
    read: Callable[[Row, PromptTemplate | None], Sequence[TextPair]]
    """The pairs of a row, equally many for every row."""
    modules: tuple[str, ...]
    """Files of bloomlm.data with its code."""


ONE_PAIR = PairForm(name="pair", read=lambda row, template: [read_pair(row, template)], modules=())
"""A row has one source and one target, as rows.py says."""


def load_examples(
    rows: RowSource | str | Path,
    tokenizer: Tokenizer,
    *,
    src_length: int,
    tgt_length: int,
    prompt_template: str | None = None,
    cache_dir: Path | None = None,
    show_progress: bool = True,
    form: PairForm = ONE_PAIR,
) -> ExampleSet[LoadReport]:
    """Tokenise rows into examples, or read them from the cache.

    Args:
        rows: source of the rows; a path stands for FileRows(path).
        tokenizer: tokenizer of the model.
        src_length: maximum number of tokens of a source; a longer source loses its end.
        tgt_length: maximum number of tokens of a target and its </s>; a longer target loses its end, but not </s>.
        prompt_template: builds the source of each row, see PromptTemplate.
        cache_dir: directory of cached sets; None: default_cache_dir() / "examples".
        show_progress: whether a terminal shows a bar while texts are tokenised.
        form: how a row is read.

    Raises:
        ConfigError: a length is too small, or the template cannot be read.
        DataError: a row fits no format, or there are no rows.
    """
    _check_lengths(src_length, tgt_length)
    source: RowSource = FileRows(rows) if isinstance(rows, str | Path) else rows
    arrays, from_cache = cached_arrays(
        source,
        tokenizer,
        lambda: _tokenise(
            _read_pairs(source, prompt_template, form), tokenizer, src_length, tgt_length, show_progress=show_progress
        ),
        settings=(src_length, tgt_length, prompt_template, form.name),
        modules=("examples.py", "rows.py", *form.modules),
        cache_dir=cache_dir,
    )
    report = LoadReport(
        name=source.name,
        num_examples=len(arrays["token_offsets"]) - 1,
        num_sources_cut=int(arrays["num_cut"][0]),
        num_targets_cut=int(arrays["num_cut"][1]),
        src_length=src_length,
        tgt_length=tgt_length,
        from_cache=from_cache,
    )
    _LOG.log(logging.WARNING if report.any_cut else logging.INFO, "%s", report)
    return ExampleSet(arrays, report)


def _check_lengths(src_length: int, tgt_length: int) -> None:
    if src_length < 1 or tgt_length < 2:
        raise ConfigError(
            f"src_length {src_length} and tgt_length {tgt_length}: a source needs at least 1 token, "
            "a target at least 2 (one token and </s>)"
        )


def _read_pairs(source: RowSource, prompt_template: str | None, form: PairForm) -> list[TextPair]:
    template = PromptTemplate(prompt_template) if prompt_template is not None else None
    pairs = [pair for row in source.rows() for pair in form.read(row, template)]
    if not pairs:
        raise DataError(f"{source.name}: it has no rows; expected at least one example")
    return pairs


def _tokenise(
    pairs: list[TextPair], tokenizer: Tokenizer, src_length: int, tgt_length: int, *, show_progress: bool
) -> Arrays:
    examples = []
    num_cut = [0, 0]
    for chunk in in_chunks(pairs, _CHUNK_ROWS, show_progress=show_progress):
        encoded = tokenizer.encode_batch([text for pair in chunk for text in (pair.source, pair.target)])
        for pair, source, target in zip(chunk, encoded[::2], encoded[1::2], strict=True):
            num_cut[0] += len(source) > src_length
            num_cut[1] += len(target) > tgt_length - 1
            kept = [*source[:src_length], *target[: tgt_length - 1], tokenizer.eos_token_id]
            example = Example.pair(
                np.array(kept, dtype=np.int32),
                min(len(source), src_length),
                source_text=pair.source,
                target_text=pair.target,
            )
            examples.append(example)
    return {**example_arrays(examples), "num_cut": np.array(num_cut, dtype=np.int64)}
