"""PaddleNLP's tokenizer files, vocab.json and merges.txt, as one tokenizer.json.

The two files say how bytes merge into tokens, and not how a text is first cut into words. PaddleNLP cut it with GPT-2's
expression, BLOOM was trained with its own, and the ids differ around digits, punctuation and mixed scripts: BLOOM's is
the default here, and PaddleNLP's is for results that must repeat its own.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bloomlm.errors import CheckpointError

VOCAB_FILE = "vocab.json"
MERGES_FILE = "merges.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
HEADER = "#version"

# Of bigscience/bloom's tokenizer.json: runs of anything but white space, brackets, bars and sentence punctuation.
BLOOM_WORDS = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"


def find_paddle_tokenizer(directory: Path) -> bool:
    """Whether a directory holds a tokenizer in PaddleNLP's form."""
    return (directory / VOCAB_FILE).is_file() and (directory / MERGES_FILE).is_file()


def build_tokenizer_json(
    directory: Path,
    special_tokens: Mapping[str, str],
    *,
    paddle_tokenization: bool = False,
    add_prefix_space: bool = False,
) -> bytes:
    """The tokenizer.json that says the same as vocab.json and merges.txt.

    Args:
        directory: holds both files, and added_tokens.json if there are added tokens.
        special_tokens: text of each special token, by "unk_token", "bos_token" and so on.
        paddle_tokenization: cut texts into words by GPT-2's expression, and lose the first and the last line of
            merges.txt whatever they hold, as PaddleNLP did.
        add_prefix_space: put a space before every text, as tokenizer_config.json may say.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    vocabulary = _read_ids(directory / VOCAB_FILE)
    merges = list(read_merges(directory / MERGES_FILE, paddle_tokenization=paddle_tokenization))
    if unknown := [line for line in merges if not {*line.split(" "), line.replace(" ", "")} <= vocabulary.keys()]:
        raise CheckpointError(
            f"{directory / MERGES_FILE}: merges of tokens that {VOCAB_FILE} does not have, {unknown[0]!r} first; the "
            "two files belong to different tokenizers"
        )
    added_path = directory / ADDED_TOKENS_FILE
    added = _read_ids(added_path) if added_path.is_file() else {}
    specials = {token: vocabulary[token] for token in special_tokens.values() if token in vocabulary}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if paddle_tokenization:
        pre_tokenizer: dict[str, Any] = byte_level | {"add_prefix_space": add_prefix_space, "use_regex": True}
    else:
        split = {"type": "Split", "pattern": {"Regex": BLOOM_WORDS}, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level | {"add_prefix_space": add_prefix_space}]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(token, token_id, is_special=token in specials)
            for token, token_id in sorted((specials | added).items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special_tokens.get("unk_token") if paddle_tokenization else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
    return json.dumps(content, ensure_ascii=False).encode("utf-8")


def write_paddle_tokenizer(directory: Path, tokenizer_json: bytes) -> None:
    """Write the vocab.json, merges.txt and added_tokens.json that say the same as a tokenizer.json.

    They cannot say how texts are cut into words, which PaddleNLP does in its own way.

    Args:
        directory: where to.
        tokenizer_json: of a byte-level BPE tokenizer.

    Raises:
        CheckpointError: it is of another kind.
    """
    content = json.loads(tokenizer_json)
    model = content.get("model") or {}
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"a tokenizer of type {model.get('type')!r} has no form in PaddleNLP's files; expected BPE, as BLOOM's is"
        )
    vocabulary = model["vocab"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {entry["content"]: entry["id"] for entry in content.get("added_tokens") or []}
    others = {token: token_id for token, token_id in added.items() if token not in vocabulary}
    # PaddleNLP leaves out the first line and what follows the last line end, whatever they hold
    merges = "\n".join([f"{HEADER}: 0.2", *pairs, ""])
    (directory / VOCAB_FILE).write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / MERGES_FILE).write_text(merges, encoding="utf-8")
    if others:
        (directory / ADDED_TOKENS_FILE).write_text(json.dumps(others, ensure_ascii=False), encoding="utf-8")


def read_merges(path: Path, *, paddle_tokenization: bool = False) -> Iterable[str]:
    """The merges of a merges.txt, best first, as "left right".

    Args:
        path: the file; its first line may be a header, its last may lack a line end.
        paddle_tokenization: leave out the first line and what follows the last line end, as PaddleNLP does: of a file
            that PaddleNLP's own converter wrote, without header and line end, that loses two merges.

    Raises:
        CheckpointError: it is no UTF-8 text, or a line is no pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if paddle_tokenization:
        lines = lines[1:-1]
    elif lines[0].startswith(HEADER):
        lines = lines[1:]
    for number, line in enumerate(lines, start=1):
        pair = line.split()
        if len(pair) == 2:
            yield " ".join(pair)
        elif pair:
            raise CheckpointError(f"{path}: line {number} of its merges is {line!r}; expected two tokens")


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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(type(token_id) is int for token_id in content.values()):
        raise CheckpointError(f"{path}: expected an object of tokens and their ids")
    return content
