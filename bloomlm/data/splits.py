"""The rows of each split, from --dataset_name_or_path, --train_file and --eval_file.

A data set is a directory with train, dev and test files, `builtin:NAME`, or a name on the Hugging Face hub.
"""

import hashlib
import importlib.resources
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bloomlm.data.files import ROW_SUFFIXES, FileRows, Row, RowSource
from bloomlm.errors import ConfigError, DataError

BUILTIN_PREFIX = "builtin:"

# The names that a split may have; directories of files and the hub name the dev split differently.
_SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "validation", "valid"), "test": ("test",)}
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class DatasetSplits:
    """The rows of each split; None for a split that the data set does not have."""

    train: RowSource | None = None
    dev: RowSource | None = None
    test: RowSource | None = None


def resolve_splits(
    *,
    dataset_name_or_path: str | None = None,
    train_file: str | Path | None = None,
    eval_file: str | Path | None = None,
) -> DatasetSplits:
    """Find the splits that the three flags name together.

    Args:
        dataset_name_or_path: a data set, see open_dataset.
        train_file: a file with the train split.
        eval_file: a file with the dev split.

    Raises:
        ConfigError: a file and the data set both have the same split, or the `datasets` extra is not installed.
        DataError: a file or data set cannot be found.
    """
    splits = open_dataset(dataset_name_or_path) if dataset_name_or_path else DatasetSplits()
    for flag, split, path in (("train_file", "train", train_file), ("eval_file", "dev", eval_file)):
        if path is None:
            continue
        present: RowSource | None = getattr(splits, split)
        if present is not None:
            raise ConfigError(
                f"--{flag} {path} and --dataset_name_or_path {dataset_name_or_path} ({present.name}) "
                f"both have the {split} split; give one of them"
            )
        splits = replace(splits, **{split: FileRows(path)})
    return splits


def open_dataset(name_or_path: str) -> DatasetSplits:
    """Find the splits of a data set.

    Args:
        name_or_path: `builtin:NAME`; a directory with train, dev (or validation, valid) and test files ending in
            .jsonl, .json, .csv or .parquet, of which some may be missing; or a hub name, `NAME` or
            `NAME:CONFIGURATION`.

    Raises:
        ConfigError: it is a hub name, and the `datasets` extra is not installed.
        DataError: there is no such data set, or it has no known split.
    """
    if name_or_path.startswith(BUILTIN_PREFIX):
        return _open_builtin(name_or_path.removeprefix(BUILTIN_PREFIX))
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        raise DataError(
            f"{path} is a file; expected a data set with splits. Give a file as --train_file or --eval_file"
        )
    if not _HUB_NAME.fullmatch(name_or_path):
        raise DataError(f"{path}: no such directory; expected one that holds train.jsonl, train.json or train.csv")
    return _open_hub(name_or_path)


def _open_builtin(name: str) -> DatasetSplits:
    assets = Path(str(importlib.resources.files("bloomlm.assets")))
    if not (assets / name / "train.jsonl").is_file():
        known = sorted(path.parent.name for path in assets.glob("*/train.jsonl"))
        raise DataError(f"builtin:{name}: no such data set; the built-in ones are: {', '.join(known) or 'none'}")
    return _open_directory(assets / name)


def _open_directory(directory: Path) -> DatasetSplits:
    found: dict[str, RowSource] = {}
    for split, names in _SPLIT_NAMES.items():
        paths = [directory / (name + suffix) for name in names for suffix in ROW_SUFFIXES]
        present = [path for path in paths if path.is_file()]
        if len(present) > 1:
            listed = ", ".join(path.name for path in present)
            raise DataError(f"{directory}: {listed} all hold the {split} split; keep one of them")
        if present:
            found[split] = FileRows(present[0])
    if not found:
        raise DataError(
            f"{directory}: it has no split; expected train, dev or test with the ending {', '.join(ROW_SUFFIXES)}"
        )
    return DatasetSplits(**found)


@dataclass(frozen=True)
class HubRows:
    """The rows of one split of a data set, which the `datasets` library streams."""

    dataset: Any
    name: str
    """Names of the data set and the split."""
    revision: str
    """What `datasets` would call the directory of its prepared files: it names configuration, files and commit."""

    def rows(self) -> Iterator[Row]:
        """Rows in the order of the data set, numbered from 1."""
        number = 0
        try:
            for number, fields in enumerate(self.dataset, start=1):
                yield Row(fields=fields, where=f"{self.name}, row {number}")
        except Exception as error:  # of the network, of a file: the message says which
            raise DataError(f"{self.name}: cannot be read after row {number} ({error})") from error

    def fingerprint(self) -> str:
        """Digest of name and revision; the rows need not be read for it."""
        return hashlib.sha256(f"{self.name} {self.revision}".encode()).hexdigest()


def _open_hub(name: str) -> DatasetSplits:
    try:
        import datasets  # an extra that only the hub needs
    except ImportError as error:
        raise ConfigError(
            f"{name}: no such directory, and to load it from the hub needs: pip install 'bloomlm[datasets]'"
        ) from error
    repository, _, configuration = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(repository, configuration or None)
        loaded = builder.as_streaming_dataset()
    except Exception as error:  # offline, unknown, gated, without configuration: the message says which
        raise DataError(
            f"{name}: no such directory, and the hub cannot provide such a data set ({error}). Name a configuration "
            "after a colon, for example openai/gsm8k:main"
        ) from error
    return _hub_splits(loaded, name, builder.cache_dir)


def _hub_splits(loaded: Mapping[str, Any], name: str, revision: str) -> DatasetSplits:
    found: dict[str, RowSource] = {}
    for split, names in _SPLIT_NAMES.items():
        present = next((candidate for candidate in names if candidate in loaded), None)
        if present is not None:
            found[split] = HubRows(loaded[present], name=f"{name}, split {present}", revision=revision)
    if not found:
        raise DataError(f"{name}: it has the splits {', '.join(loaded)}; expected train, validation or test")
    return DatasetSplits(**found)
