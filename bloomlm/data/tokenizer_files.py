"""The files of a tokenizer beside a checkpoint: their names, and how those that are JSON or a template are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import read_object

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# BLOOM's special tokens, used unless a JSON file beside tokenizer.json names others.
DEFAULT_SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def named_special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the special tokens, by the keys of DEFAULT_SPECIAL_TOKENS.

    Args:
        config, special_map: contents of tokenizer_config.json and special_tokens_map.json.
    """
    # as in transformers, the map counts only without added_tokens_decoder in the config, and then it comes first
    sources = (config, special_map) if "added_tokens_decoder" in config else (special_map, config)
    named = {}
    for key, default in DEFAULT_SPECIAL_TOKENS.items():
        value = next((source[key] for source in sources if source.get(key)), default)
        named[key] = str(value.get("content", default) if isinstance(value, dict) else value)
    return named


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Fetch or save it again") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8: {error}. Fetch or save it again") from error


def missing_message(directory: Path) -> str:
    """The message of an error: a directory without tokenizer.json."""
    if not directory.is_dir():
        return f"{directory}: no such directory; expected one that holds {TOKENIZER_FILE}"
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:12]) or "nothing"
    return f"{directory}: looked for {TOKENIZER_FILE}, found {found}. Save the tokenizer into this directory"


def read_saved_template(directory: str | Path) -> str | None:
    """The Jinja template of conversations in the files of a model or an adapter; the default one of several.

    Raises:
        CheckpointError: a file is damaged.
    """
    path = Path(directory) / CHAT_TEMPLATE_FILE
    if path.is_file():
        return _read_text(path)
    found = read_json_object(Path(directory) / TOKENIZER_CONFIG_FILE).get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else None
    return None if found is None else str(found)
