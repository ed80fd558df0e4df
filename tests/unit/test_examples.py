import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import bloomlm.data.cache
import bloomlm.data.examples
from bloomlm.data.cache import read_arrays, write_arrays
from bloomlm.data.example_set import ExampleSet
from bloomlm.data.examples import load_examples
from bloomlm.data.files import FileRows
from bloomlm.errors import ConfigError, DataError
from bloomlm.files.cache_directory import default_cache_dir
from tests.bloom_tokenizer import make_tokenizer

THE, _THE, AND, ZH = 261, 262, 264, 269
EOS = 2

ROWS = [
    {"src": "the the", "tgt": "and"},
    {"src": "the the the the", "tgt": "中中中"},
    {"src": "中", "tgt": "the</s> the"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_rows(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, **options) -> ExampleSet:
    return load_examples(path, make_tokenizer(), **{"src_length": 3, "tgt_length": 3} | options)


def values(examples: ExampleSet) -> list[tuple[list[int], int, str, str]]:
    return [(one.tokens.tolist(), one.num_source_tokens, one.source_text, one.target_text) for one in examples]


EXPECTED = [
    ([THE, _THE, AND, EOS], 2, "the the", "and"),
    ([THE, _THE, _THE, ZH, ZH, EOS], 3, "the the the the", "中中中"),
    ([ZH, THE, EOS, EOS], 1, "中", "the</s> the"),
]


def test_examples_are_source_target_and_end_cut_from_the_right(tmp_path):
    examples = load(write_rows(tmp_path / "a.jsonl"))
    assert len(examples) == 3
    assert values(examples) == EXPECTED
    assert examples[1].prompt_tokens.tolist() == [THE, _THE, _THE]
    assert examples.num_tokens == 14
    assert examples.num_supervised_tokens == 2 + 3 + 3


def test_report_counts_the_cuts(tmp_path, caplog):
    report = load(write_rows(tmp_path / "a.jsonl")).report
    assert (report.num_examples, report.num_sources_cut, report.num_targets_cut) == (3, 1, 2)
    message = f"{tmp_path}/a.jsonl: 3 examples, 1 sources cut to src_length 3, 2 targets to tgt_length - 1 = 2 tokens"
    assert str(report) == message
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, message)]
    caplog.clear()
    whole = load(tmp_path / "a.jsonl", src_length=4, tgt_length=4)
    assert (whole.report.num_sources_cut, whole.report.num_targets_cut) == (0, 0)
    assert str(whole.report).endswith("3 examples, none cut")
    assert caplog.records == []  # no warning
    assert whole[1].tokens.tolist() == [THE, _THE, _THE, _THE, ZH, ZH, ZH, EOS]
    assert whole[2].tokens.tolist() == [ZH, THE, EOS, _THE, EOS]


def test_examples_by_number(tmp_path):
    examples = load(write_rows(tmp_path / "a.jsonl"))
    assert examples[-1].source_text == examples[2].source_text == "中"
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"example {index} of a set of 3"):
            examples[index]


def test_template_makes_the_source(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": "the", "tgt": "and"}])
    assert values(load(path, prompt_template="{q}{q}中")) == [([THE, THE, ZH, AND, EOS], 3, "thethe中", "and")]


def test_many_rows_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(bloomlm.data.examples, "_CHUNK_ROWS", 4)
    rows = [{"src": f"the {i}", "tgt": str(i)} for i in range(11)]
    examples = load(write_rows(tmp_path / "a.jsonl", rows), src_length=9, tgt_length=9)
    tokenizer = make_tokenizer()
    for i, one in enumerate(examples):
        assert one.tokens.tolist() == [*tokenizer.encode(f"the {i}"), *tokenizer.encode(str(i)), EOS]
        assert (one.source_text, one.target_text) == (f"the {i}", str(i))


def test_the_second_load_maps_the_cache(tmp_path, cache, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl")
    first = load(path)
    assert not first.report.from_cache
    files = list(cache.rglob("*"))
    assert [file.suffix for file in files if file.is_file()] == [".safetensors"]  # no temporary file is left
    # a file with the same bytes and another name is not tokenised again
    monkeypatch.setattr(bloomlm.data.examples, "_tokenise", None)
    second = load(write_rows(tmp_path / "b.jsonl"))
    assert second.report.from_cache
    assert values(second) == EXPECTED
    assert isinstance(second[0].tokens, np.memmap)
    assert not second[0].tokens.flags.writeable
    assert (second.num_tokens, second.num_supervised_tokens) == (14, 8)
    assert (second.report.num_sources_cut, second.report.num_targets_cut) == (1, 2)
    assert second.report.name.endswith("b.jsonl")


def test_cache_file_is_a_safetensors_file(tmp_path, cache):
    load(write_rows(tmp_path / "a.jsonl"))
    (file,) = cache.rglob("*.safetensors")
    arrays = load_file(file)
    assert arrays["token_offsets"].tolist() == [0, 4, 10, 14]
    assert arrays["spans"].tolist() == [[2, 4], [3, 6], [1, 4]]
    assert arrays["span_offsets"].tolist() == [0, 1, 2, 3]
    assert arrays["tokens"].dtype == np.int32


@pytest.mark.parametrize(
    "options", [{"src_length": 2}, {"tgt_length": 2}, {"prompt_template": "{src}!"}, {"tokenizer": "another"}]
)
def test_other_settings_have_another_cache_entry(tmp_path, options):
    path = write_rows(tmp_path / "a.jsonl")
    load(path)
    tokenizer = make_tokenizer()
    if options.pop("tokenizer", None):
        tokenizer = type(tokenizer)(
            tokenizer._json, config={}, special_tokens=tokenizer.special_tokens | {"eos_token": "<pad>"}, name="other"
        )
    changed = load_examples(path, tokenizer, **{"src_length": 3, "tgt_length": 3} | options)
    assert not changed.report.from_cache
    assert values(changed) != EXPECTED
    assert load(path).report.from_cache


def test_other_content_has_another_cache_entry(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    load(path)
    write_rows(path, [*ROWS[:2], {"src": "中", "tgt": "the</s>"}])
    assert not load(path).report.from_cache
    assert load(path)[2].target_text == "the</s>"


def test_other_code_has_another_cache_entry(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl")
    load(path)
    monkeypatch.setattr("tokenizers.__version__", "999")
    assert not load(path).report.from_cache
    monkeypatch.undo()
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))
    assert load(path).report.from_cache
    package = tmp_path / "package"
    package.mkdir()
    for module in Path(bloomlm.data.examples.__file__).parent.glob("*.py"):
        (package / module.name).write_bytes(module.read_bytes() + b"\n")
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    assert not load(path).report.from_cache


def damage_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_middle,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff" * 100),
        lambda file: file.write_bytes(file.read_bytes()[:-16]),
        lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"),
        lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{}"),
    ],
)
def test_a_damaged_cache_is_written_again(tmp_path, cache, caplog, damage):
    path = write_rows(tmp_path / "a.jsonl")
    load(path)
    (file,) = cache.rglob("*.safetensors")
    whole = file.read_bytes()
    damage(file)
    caplog.clear()
    again = load(path)
    assert not again.report.from_cache
    assert values(again) == EXPECTED
    assert "is damaged" in caplog.records[0].message
    assert file.read_bytes() == whole
    assert load(path).report.from_cache


def test_unwritable_cache_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "taken").write_text("a file where a directory is needed")
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "taken"))
    examples = load(write_rows(tmp_path / "a.jsonl"))
    assert values(examples) == EXPECTED
    warnings = [record.message for record in caplog.records if "not cached" in record.message]
    assert len(warnings) == 1
    assert "BLOOMLM_CACHE" in warnings[0]


def test_full_disk_is_a_warning_and_leaves_nothing(tmp_path, cache, monkeypatch, caplog):
    def full_disk(arrays, checksum):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bloomlm.data.cache, "_header", full_disk)
    assert values(load(write_rows(tmp_path / "a.jsonl"))) == EXPECTED
    assert any("No space left on device" in record.message for record in caplog.records)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_the_cache_is_a_safetensors_file(tmp_path):
    arrays = {
        "bytes": np.arange(5, dtype=np.uint8),
        "none": np.empty((0, 2), dtype=np.int32),
        "pairs": np.arange(6, dtype=np.float64).reshape(3, 2).T,
        "tokens": np.arange(7, dtype=np.int32),
        "starts": np.arange(3, dtype=np.int64),
    }
    write_arrays(tmp_path / "a.safetensors", arrays)
    for found in (load_file(tmp_path / "a.safetensors"), read_arrays(tmp_path / "a.safetensors")):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
            assert found[name].flags.aligned


def test_cache_directory(monkeypatch, tmp_path):
    where = default_cache_dir
    monkeypatch.setenv("BLOOMLM_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert where() == Path("/own")
    monkeypatch.delenv("BLOOMLM_CACHE")
    assert where() == Path("/shared/bloomlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert where() == tmp_path / ".cache/bloomlm"


def test_cache_dir_can_be_given(tmp_path, cache):
    path = write_rows(tmp_path / "a.jsonl")
    load(path, cache_dir=tmp_path / "own")
    assert len(list((tmp_path / "own").glob("*.safetensors"))) == 1
    assert not cache.exists()


def test_errors(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, {"src": "a", "tgt": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl, line 4: the target 'tgt' is empty"):
        load(path)
    with pytest.raises(DataError, match=r"b\.jsonl: it has no rows"):
        load(write_rows(tmp_path / "b.jsonl", []))
    for lengths in ({"src_length": 0}, {"tgt_length": 1}):
        with pytest.raises(ConfigError, match="a source needs at least 1 token, a target at least 2"):
            load(path, **lengths)
    with pytest.raises(ConfigError, match="names no field"):
        load(path, prompt_template="x")


def test_rows_of_another_source(tmp_path):
    assert values(
        load_examples(FileRows(write_rows(tmp_path / "a.jsonl")), make_tokenizer(), src_length=3, tgt_length=3)
    ) == (EXPECTED)


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    load(write_rows(tmp_path / "a.jsonl"))
    assert "tokenising" not in capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    load(tmp_path / "a.jsonl", src_length=7)
    shown = capsys.readouterr().err
    assert "tokenising" in shown
    assert "3/3" in shown
    load(tmp_path / "a.jsonl", src_length=8, show_progress=False)
    assert "tokenising" not in capsys.readouterr().err
