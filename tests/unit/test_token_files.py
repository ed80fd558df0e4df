"""Raw text on disk: checksummed blocks, tokens equal to those of one document after another, and continued runs."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomlm.data import block_file, token_files
from bloomlm.data.block_file import BlockReader, BlockWriter, crc_path
from bloomlm.data.corpus import Piece
from bloomlm.data.files import FileRows
from bloomlm.data.token_files import TextInput, TokenFiles, file_inputs, load_token_files, rows_input
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.windows import TextWindows
from bloomlm.errors import DataError
from tests.bloom_tokenizer import make_tokenizer

DOCUMENTS = ["The one and the other.", "", "A text, in two lines.\nThe other one. " * 90, "中文，不。", "x"]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write_rows(path, [{"text": text, "url": "u"} for text in texts])


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def documents_of(files: TokenFiles) -> list[list[int]]:
    tokens = files.tokens.read(0, len(files.tokens)).tolist()
    ends = files.ends.read(0, len(files.ends)).tolist()
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def expected_documents(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts if text]


def load(inputs: list[TextInput], cache_dir: Path) -> TokenFiles:
    return load_token_files("texts", inputs, make_tokenizer(), cache_dir=cache_dir, show_progress=False)


@given(
    parts=st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=30), max_size=12),
    safe=st.integers(0, 12),
    block_bytes=st.sampled_from([4, 8, 64]),
)
@settings(max_examples=60, deadline=None)
def test_a_block_file_continues_after_its_last_sync(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], safe: int, block_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "numbers.u32"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_file, "BLOCK_BYTES", block_bytes)
        writer, length = BlockWriter(path, "<u4"), 0
        for number, part in enumerate(parts):
            writer.append(np.array(part, dtype=np.uint32))
            if number < safe:
                length = writer.sync()
        writer.close()  # what was added after the last sync is lost
        writer = BlockWriter(path, "<u4", length)
        for part in parts[safe:]:
            writer.append(np.array(part, dtype=np.uint32))
        length = writer.sync()
        writer.close()
        expected = [number for part in parts for number in part]
        assert np.fromfile(path, dtype="<u4").tolist() == expected
        reader = BlockReader(path, "<u4", length)
        assert len(reader) == len(expected)
        for start in range(0, len(expected) + 1, 3):
            stop = min(start + 7, len(expected))
            assert reader.read(start, stop).tolist() == expected[start:stop]


def test_a_changed_byte_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "numbers.u32"
    writer = BlockWriter(path, "<u4")
    writer.append(np.arange(50_000, dtype=np.uint32))
    length = writer.sync()
    writer.close()
    with path.open("r+b") as file:
        file.seek(70_000)
        file.write(b"\xff")
    reader = BlockReader(path, "<u4", length)
    assert reader.read(0, 16_384).tolist() == list(range(16_384))
    with pytest.raises(DataError, match=r"numbers\.u32 is damaged: the block of 64 KiB at byte 65,536 has changed"):
        reader.read(16_380, 16_390)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="has 199,999 bytes, expected 200,000"):
        BlockReader(path, "<u4", length)
    with pytest.raises(DataError, match="it has 199,999 bytes, and 200,000 were written"):
        BlockWriter(path, "<u4", length)
    path.write_bytes(path.read_bytes()[:-3])
    crc_path(path).unlink()
    with pytest.raises(DataError, match=r"numbers\.u32\.crc has 0 bytes"):
        BlockReader(path, "<u4", 49_999)


def test_documents_have_the_tokens_of_each_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "BATCH_PIECES", 2)
    corpus = tmp_path / "corpus"
    (corpus / "below").mkdir(parents=True)
    write_jsonl(corpus / "a.jsonl", DOCUMENTS)
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS[::-1], "id": range(5)}), corpus / "b.parquet")
    (corpus / "below" / "c.txt").write_text(DOCUMENTS[2] * 3, encoding="utf-8")
    (corpus / "d.txt").write_text("", encoding="utf-8")
    expected = expected_documents([*DOCUMENTS, *DOCUMENTS[::-1], DOCUMENTS[2] * 3], make_tokenizer())
    files = load(file_inputs(corpus), tmp_path / "cache")
    assert documents_of(files) == expected
    assert files.size.num_text_bytes == 2 * sum(map(len, map(str.encode, DOCUMENTS))) + 3 * len(DOCUMENTS[2])
    rows = load([rows_input(FileRows(corpus / "a.jsonl"))], tmp_path / "cache")
    assert documents_of(rows) == expected_documents(DOCUMENTS, make_tokenizer())


def test_documents_have_the_languages_that_their_rows_name(tmp_path: Path) -> None:
    languages = [{"language": "en"}, {}, {"lang": "de"}, {"language": "", "lang": "en"}, {"language": None}]
    rows = [{"text": text, **language} for text, language in zip(DOCUMENTS, languages, strict=True)]
    files = load(file_inputs(write_rows(tmp_path / "a.jsonl", rows)), tmp_path / "cache")
    assert files.size.languages == ["en", "de"]
    assert files.languages.read(0, 4).tolist() == [1, 2, 1, 0]  # the second document has no token


@pytest.mark.parametrize(("language", "found"), [(3, "int 3, expected text"), ("a/b", "'a/b', expected the name of a")])
def test_a_language_that_is_none_is_an_error(tmp_path: Path, language: object, found: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b", "language": language}])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: 'language' is {found}"):
        load(file_inputs(path), tmp_path / "cache")


def test_texts_are_read_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    first = load(file_inputs(path), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_tokenise", lambda *args, **kwargs: pytest.fail("read again"))
        assert load(file_inputs(path), tmp_path / "cache").directory == first.directory
    write_jsonl(path, DOCUMENTS[:1])
    again = load(file_inputs(path), tmp_path / "cache")
    assert documents_of(again) == expected_documents(DOCUMENTS[:1], make_tokenizer())


class Stopped(Exception):
    pass


def stops_after(one: TextInput, number: int) -> TextInput:
    def pieces() -> Iterator[Piece]:
        for count, piece in enumerate(one.pieces()):
            if count == number:
                raise Stopped
            yield piece

    return TextInput(name=one.name, identity=one.identity, size_bytes=one.size_bytes, pieces=pieces)


@pytest.mark.parametrize("number", [0, 1, 5, 9, 11])
def test_a_stopped_run_continues_where_its_files_were_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(token_files, "BATCH_PIECES", 2)
    monkeypatch.setattr(token_files, "COMMIT_TOKENS", 100)
    named = [{"text": text, "language": f"l{number % 3}"} for number, text in enumerate(DOCUMENTS * 2)]
    texts = [write_jsonl(tmp_path / "a.jsonl", DOCUMENTS), write_rows(tmp_path / "b.jsonl", named)]
    inputs = [one for path in texts for one in file_inputs(path)]
    whole = load(inputs, tmp_path / "whole")
    with pytest.raises(Stopped):
        load([inputs[0], stops_after(inputs[1], number)], tmp_path / "cache")
    encoded: list[str] = []
    encode_batch = Tokenizer.encode_batch

    def noted(self: Tokenizer, given: list[str]) -> list[list[int]]:
        encoded.extend(given)
        return encode_batch(self, given)

    monkeypatch.setattr(Tokenizer, "encode_batch", noted)
    continued = load(inputs, tmp_path / "cache")
    assert continued.size == whole.size
    for name in (token_files.TOKENS_FILE, token_files.ENDS_FILE, token_files.LANGUAGES_FILE):
        for path in (Path(name), crc_path(Path(name))):
            assert (continued.directory / path).read_bytes() == (whole.directory / path).read_bytes()
    num_pieces = sum(1 for one in inputs for _ in one.pieces())
    assert len(encoded) < num_pieces  # the first file at least was safe
    assert not (continued.directory / token_files.PROGRESS_FILE).exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from bloomlm.data import token_files
from tests.unit.test_token_files import load
token_files.BATCH_PIECES, token_files.COMMIT_TOKENS = 2, 100
commit = token_files._Writer.commit
def killed(self):
    commit(self)
    if self.done.num_documents > 6:
        os.kill(os.getpid(), signal.SIGKILL)
token_files._Writer.commit = killed
load(token_files.file_inputs(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_process_leaves_what_the_next_one_continues(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 5)
    command = [sys.executable, "-c", KILLED, str(path), str(tmp_path / "cache")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (progress,) = (tmp_path / "cache").glob(f"*/{token_files.PROGRESS_FILE}")
    assert 6 < json.loads(progress.read_text())["size"]["num_documents"] < 20
    files = load(file_inputs(path), tmp_path / "cache")
    assert documents_of(files) == expected_documents(DOCUMENTS * 5, make_tokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r"a\.jsonl, line 2: 'text' is int 3, expected text"),
        ('{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl, line 2: found the fields txt, expected 'text'"),
        ('{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl, line 3: not JSON"),
        ('{"text": null}\n', r"a\.jsonl, line 1: 'text' is null, expected text"),
        ('{"text": ""}\n', r"a\.jsonl: it has no text; expected at least one document"),
    ],
)
def test_rows_without_text_are_errors(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load(file_inputs(tmp_path / "a.jsonl"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (name, change)
        for name in (token_files.MANIFEST_FILE, token_files.PROGRESS_FILE, "windows-16.json")
        for change in (
            "{",
            "[]",
            '{"size": {}}',
            '{"size": 3}',
            "SIZES: -1",
            "SIZES: null",
            "SIZES: 1e3",
            "SIZES: 1" + "0" * 30,
        )
    ],
)
def test_damaged_sizes_are_an_error_that_names_the_file(tmp_path: Path, name: str, change: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)
    files = load(file_inputs(path), tmp_path / "cache")
    TextWindows(files, 16)
    if name == token_files.PROGRESS_FILE:
        (files.directory / token_files.MANIFEST_FILE).rename(files.directory / name)
    sizes = json.loads((files.directory / name).read_text())["size"]
    value = change.removeprefix("SIZES: ")
    text = json.dumps({"size": dict.fromkeys(sizes, "VALUE")}).replace('"VALUE"', value) if value != change else change
    (files.directory / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name} is damaged: .*Remove {re.escape(str(files.directory))}"):
        TextWindows(load(file_inputs(path), tmp_path / "cache"), 16)


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_file.os, "pwrite", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\).*set BLOOMLM_CACHE"):
        load(file_inputs(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS)), tmp_path / "cache")
