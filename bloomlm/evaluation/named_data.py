"""What --eval_path names: a file, or a data set that is fetched from the Hugging Face hub as the file it was.

| name          | with <unk>, for the reference protocol | raw, for the others |
|---------------|----------------------------------------|---------------------|
| wikitext-2    | wikitext-2-v1                          | wikitext-2-raw-v1   |
| wikitext-103  | wikitext-103-v1                        | wikitext-103-raw-v1 |
| lambada       | lambada_openai                         | lambada_openai      |

`wikitext-2:valid` is its validation split; without a colon it is the test split.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from bloomlm.checkpoint.atomic import atomic_write
from bloomlm.data.cache import default_cache_dir
from bloomlm.errors import ConfigError, DataError

WIKITEXT_NAMES = ("wikitext-2", "wikitext-103")
LAMBADA_NAME = "lambada"
_SPLITS = {"test": "test", "valid": "validation"}


def find_data(name_or_path: str, *, raw: bool, cache_dir: Path | None = None) -> Path:
    """The file, fetched and written into the cache if a name was given.

    Args:
        name_or_path: a file, or a name from the table above.
        raw: which variant of WikiText.
        cache_dir: where fetched files are; default_cache_dir() / "evaluation" if None.

    Raises:
        ConfigError: the `datasets` extra, which fetches, is not installed.
        DataError: there is neither such a file nor such a name, or the hub cannot be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    name, _, split = name_or_path.partition(":")
    split = split or "test"
    if name not in (*WIKITEXT_NAMES, LAMBADA_NAME):
        raise DataError(
            f"{name_or_path}: no such file; expected one such as wiki.valid.tokens or lambada_test.jsonl, or the name "
            f"of a data set: {', '.join((*WIKITEXT_NAMES, LAMBADA_NAME))}"
        )
    if split not in _SPLITS or (name == LAMBADA_NAME and split != "test"):
        splits = "test" if name == LAMBADA_NAME else ", ".join(_SPLITS)
        raise DataError(f"{name_or_path}: {name} has no split {split!r}; it has {splits}")
    cache_dir = cache_dir or default_cache_dir() / "evaluation"
    if name == LAMBADA_NAME:
        cached = cache_dir / "lambada_openai.test.jsonl"
        repository, configuration = "EleutherAI/lambada_openai", "default"
    else:
        configuration = f"{name}-raw-v1" if raw else f"{name}-v1"
        cached = cache_dir / f"{configuration}.{split}.{'raw' if raw else 'tokens'}"
        repository = "Salesforce/wikitext"
    if not cached.is_file():
        rows = _fetch(name_or_path, repository, configuration, _SPLITS[split])
        write = _jsonl if name == LAMBADA_NAME else _wiki_file
        atomic_write(cached, write(rows))
    return cached


def _fetch(name: str, repository: str, configuration: str, split: str) -> list[str]:
    try:
        import datasets  # an extra: heavy, and of no use to those who have files
    except ImportError as error:
        raise ConfigError(
            f"{name} is fetched from the Hugging Face hub, which needs pip install 'bloomlm[datasets]'; "
            "or give a file as --eval_path"
        ) from error
    try:
        return list(datasets.load_dataset(repository, configuration, split=split)["text"])
    except Exception as error:  # offline, moved, no room: the library tells which
        raise DataError(
            f"{name} is not on this machine yet, and {repository} could not be fetched from the Hugging Face hub. "
            f"Connect to the network once, or give a file as --eval_path. The hub client said: {error}"
        ) from error


def _wiki_file(rows: Iterable[str]) -> str:
    """The file that the rows were cut from; its blank lines hold a blank."""
    return "".join(row or " \n" for row in rows)


def _jsonl(rows: Iterable[str]) -> str:
    return "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
