"""vocab.json and merges.txt become the tokenizer that they were split from, or GPT-2's reading of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from bloomlm.data.gpt2_files import (
    build_tokenizer_json,
    find_gpt2_files,
    read_merges,
    write_gpt2_files,
)
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.tokenizer_files import DEFAULT_SPECIAL_TOKENS
from bloomlm.errors import CheckpointError
from tests.bloom_tokenizer import MERGES, make_tokenizer, tokenizer_json

TEXTS = [
    "the and, then",
    "a,b 1a2",
    "  two  spaces\n\tand tabs ",
    "\u4e2d\u4e16\u3042\u3044\u3002 x",
    "</s> the <pad>",
    "",
    "it's 42!",
]
HEADED = "#version: 0.2\n" + "\n".join(MERGES) + "\n"


def write_tokenizer(directory: Path, merges: str = HEADED, **more: int) -> Path:
    vocabulary: Any = tokenizer_json()["model"]
    (directory / "vocab.json").write_text(json.dumps(vocabulary["vocab"] | more, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    return directory


def build(directory: Path, **options: bool) -> Tokenizer:
    content = build_tokenizer_json(directory, DEFAULT_SPECIAL_TOKENS, **options)
    return Tokenizer(content, config={}, special_tokens=DEFAULT_SPECIAL_TOKENS, name="two files")


@pytest.mark.parametrize("merges", [HEADED, "\n".join(MERGES), "\n".join(MERGES) + "\n"])
def test_blooms_words_are_the_default(tmp_path: Path, merges: str) -> None:
    assert not find_gpt2_files(tmp_path)
    ours, original = build(write_tokenizer(tmp_path, merges)), make_tokenizer()
    assert find_gpt2_files(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


def test_gpt2s_words(tmp_path: Path) -> None:
    """GPT-2 ends a word between letters and digits, BLOOM does not."""
    vocabulary: Any = tokenizer_json()["model"]
    one = len(vocabulary["vocab"])
    write_tokenizer(tmp_path, HEADED + "a 1\n", a1=one)
    assert one in build(tmp_path).encode("a1")
    assert build(tmp_path, as_gpt2=True).encode("a1") == build(tmp_path).encode("a") + build(tmp_path).encode("1")
    text = "it's 42 the"
    assert build(tmp_path, as_gpt2=True).decode(build(tmp_path, as_gpt2=True).encode(text)) == text


@pytest.mark.parametrize(
    ("text", "plain", "as_gpt2"),
    [
        ("#version: 0.2\na b\nc d\n", ["a b", "c d"], ["a b", "c d"]),
        ("a b\nc d\ne f", ["a b", "c d", "e f"], ["c d"]),
        ("a b\nc d\n", ["a b", "c d"], ["c d"]),
        ("#version: 0.2\na b\nc d", ["a b", "c d"], ["a b"]),
        ("# b\nc d\n", ["# b", "c d"], ["c d"]),
        ("#version: 0.2\r\na b\r\n", ["a b"], ["a b"]),
    ],
)
def test_merges(tmp_path: Path, text: str, plain: list[str], as_gpt2: list[str]) -> None:
    path = tmp_path / "merges.txt"
    path.write_bytes(text.encode())
    assert list(read_merges(path)) == plain
    assert list(read_merges(path, as_gpt2=True)) == as_gpt2


def test_added_tokens_and_prefix_space(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    size = make_tokenizer().vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<sep>": size}))
    tokenizer = build(tmp_path, add_prefix_space=True)
    assert tokenizer.encode("the<sep>") == [*build(tmp_path).encode(" the"), size]
    assert tokenizer.decode([size]) == "<sep>"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vocab\.json cannot be read"):
        build(tmp_path)
    write_tokenizer(tmp_path, "a b c\n")
    with pytest.raises(CheckpointError, match="line 1 of its merges is 'a b c'"):
        build(tmp_path)
    write_tokenizer(tmp_path, "q z\n")
    with pytest.raises(CheckpointError, match="does not have, first 'q z'"):
        build(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(CheckpointError, match="maps tokens to ids"):
        build(tmp_path)


def test_written_files_lose_no_merge_where_they_are_read_as_gpt2(tmp_path: Path) -> None:
    for pairs in (["a b", "ab c", "b c"], [["a", "b"], ["ab", "c"], ["b", "c"]]):  # both ways the library spells them
        vocabulary = {
            token: number for number, token in enumerate(["<unk>", "a", "b", "c", "ab", "abc", "bc", "\u00e9"])
        }
        added = [{"content": "<unk>", "id": 0}, {"content": "<new>", "id": 8}]
        content = {"model": {"type": "BPE", "vocab": vocabulary, "merges": pairs}, "added_tokens": added}
        write_gpt2_files(tmp_path, json.dumps(content).encode())
        for as_gpt2 in (False, True):
            merges = list(read_merges(tmp_path / "merges.txt", as_gpt2=as_gpt2))
            assert merges == ["a b", "ab c", "b c"]
        assert json.loads((tmp_path / "vocab.json").read_text("utf-8")) == vocabulary
        assert json.loads((tmp_path / "added_tokens.json").read_text("utf-8")) == {"<new>": 8}
    with pytest.raises(CheckpointError, match=r"'Unigram' cannot be written as vocab\.json and merges\.txt"):
        write_gpt2_files(tmp_path, json.dumps({"model": {"type": "Unigram"}}).encode())
