"""A tokenizer of BLOOM's kind, small and the same on every machine: 4 special tokens, 256 bytes, a few merges."""

import json
from pathlib import Path

from bloomlm.data.tokenizer import Tokenizer

PATTERN = r" ?[^(\s|[.,!?…。，、।۔،])]+"
# The last two cross punctuation, so that BLOOM's way of cutting words must keep them from happening.
# Ġ is the byte alphabet's space; ä¸ are the first two bytes of 中, 世, 不; ãģ those of many hiragana.
MERGES = [
    "t h",
    "th e",
    "Ġ the",
    "a n",
    "an d",
    "Ġ and",
    "i n",
    "in g",
    "ä ¸",
    "ä¸ Ń",
    "ã ģ",
    "e r",
    "Ġ a",
    "o n",
    "a ,",
    "a ã",
]


def byte_characters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters, extra = [], 0
    for byte in range(256):
        if byte in printable:
            characters.append(chr(byte))
        else:
            characters.append(chr(256 + extra))
            extra += 1
    return characters


def tokenizer_json(special: tuple[str, ...] = ("<unk>", "<s>", "</s>", "<pad>")) -> dict[str, object]:
    tokens = [*special, *byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": MERGES,
        },
    }


def write_tokenizer(directory: Path, content: dict[str, object] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content or tokenizer_json(), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    return directory


def make_tokenizer() -> Tokenizer:
    return Tokenizer(
        json.dumps(tokenizer_json(), ensure_ascii=False).encode(),
        config={},
        special_tokens={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        name="test tokenizer",
    )
