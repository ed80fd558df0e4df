"""Converts between GPT-2's two tokenizer files, vocab.json and merges.txt, and tokenizer.json.

The two files say how bytes merge into tokens, but not how a text is first split into words. BLOOM's tokenizer does
that by another regular expression than GPT-2's, so ids differ around digits, punctuation and mixed scripts. The default
here is BLOOM's expression; GPT-2's is for models that were trained with it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import read_json

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
HEADER = "#version"

# From bigscience/bloom's tokenizer.json: runs of anything but white space, brackets, bars and sentence punctuation.
BLOOM_WORDS = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"

_BYTE_LEVEL: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_BPE: dict[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}


def find_gpt2_files(directory: Path) -> bool:
    """Whether a directory holds a tokenizer in GPT-2's two files."""
    return (directory / VOCAB_FILE).is_file() and (directory / MERGES_FILE).is_file()


def build_tokenizer_json(
    directory: Path, special_tokens: Mapping[str, str], *, as_gpt2: bool = False, add_prefix_space: bool = False
) -> bytes:
    """The content of a tokenizer.json that is equivalent to vocab.json and merges.txt.

    Args:
        directory: holds both files, and added_tokens.json if there are added tokens.
        special_tokens: text of each special token, by "unk_token", "bos_token" and so on.
        as_gpt2: read the files as GPT-2's tokenizer does: split texts by its regular expression, and ignore the
            first line of merges.txt and everything after its last line end.
        add_prefix_space: put a space before every text, as tokenizer_config.json may say.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    vocabulary = _read_ids(directory / VOCAB_FILE)
    merges = list(read_merges(directory / MERGES_FILE, as_gpt2=as_gpt2))
    if unknown := [line for line in merges if not {*line.split(" "), line.replace(" ", "")} <= vocabulary.keys()]:
        raise CheckpointError(
            f"{directory / MERGES_FILE} merges tokens that {VOCAB_FILE} does not have, first {unknown[0]!r}; the two "
            "files belong to different tokenizers"
        )
    added_path = directory / ADDED_TOKENS_FILE
    added = _read_ids(added_path) if added_path.is_file() else {}
    specials = {token: vocabulary[token] for token in special_tokens.values() if token in vocabulary}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, token_id, is_special=token in specials)
            for token, token_id in sorted((specials | added).items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(as_gpt2=as_gpt2, add_prefix_space=add_prefix_space),
        "post_processor": _BYTE_LEVEL | {"trim_offsets": False},
        "decoder": _BYTE_LEVEL,
        "model": _BPE
        | {
            "unk_token": special_tokens.get("unk_token") if as_gpt2 else None,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8")


def write_gpt2_files(directory: Path, tokenizer_json: bytes) -> None:
    """Write a tokenizer.json as vocab.json, merges.txt and added_tokens.json, which leave out how texts are split.

    Args:
        directory: where the files are written.
        tokenizer_json: content of the tokenizer.json of a byte-level BPE tokenizer.

    Raises:
        CheckpointError: it is a tokenizer of another kind.
    """
    content = json.loads(tokenizer_json)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"a tokenizer of type {model.get('type')!r} cannot be written as {VOCAB_FILE} and {MERGES_FILE}; "
            "expected BPE, as BLOOM's is"
        )
    vocabulary = model["vocab"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    others = {token: token_id for token, token_id in added.items() if token not in vocabulary}
    # a header and a last line end, because GPT-2's tokenizer ignores the first line and what follows the last line end
    merges = "\n".join([f"{HEADER}: 0.2", *pairs, ""])
    (directory / VOCAB_FILE).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / MERGES_FILE).write_text(merges, encoding="utf-8")
    if others:
        (directory / ADDED_TOKENS_FILE).write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")


def read_merges(path: Path, *, as_gpt2: bool = False) -> Iterable[str]:
    """The merges of a merges.txt, best first, as "left right".

    Args:
        path: the file; it may begin with a header, and its last line may lack a line end.
        as_gpt2: ignore the first line and what follows the last line end, as GPT-2's tokenizer does. In a file without
            header and last line end these are two merges.

    Raises:
        CheckpointError: it is not UTF-8 text, or a line is not a pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if as_gpt2:
        lines = lines[1:-1]
    elif lines[0].startswith(HEADER):
        lines = lines[1:]
    for number, line in enumerate(lines, start=1):
        pair = line.split()
        if len(pair) == 2:
            yield " ".join(pair)
        elif pair:
            raise CheckpointError(f"{path}: line {number} of its merges is {line!r}; expected two tokens")


def _pre_tokenizer(*, as_gpt2: bool, add_prefix_space: bool) -> dict[str, Any]:
    """Splits a text into words, and words into characters of the byte alphabet."""
    bytes_of_words = _BYTE_LEVEL | {"add_prefix_space": add_prefix_space}
    if as_gpt2:
        return bytes_of_words | {"use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": BLOOM_WORDS}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, bytes_of_words]}


def _added_token(token: str, token_id: int, *, is_special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": is_special,
    }


def _read_ids(path: Path) -> dict[str, int]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(type(token_id) is int for token_id in content.values()):
        raise CheckpointError(f"{path}: expected an object that maps tokens to ids")
    return content
