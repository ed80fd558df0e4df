import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from bloomlm.data import files
from bloomlm.data.files import FileRows, Row
from bloomlm.data.rows import PromptTemplate, TextPair, read_pair, read_source
from bloomlm.data.splits import _open_hub, open_dataset, resolve_splits
from bloomlm.errors import ConfigError, DataError


def row(**fields: object) -> Row:
    return Row(fields=fields, where="data.jsonl, line 7")


def write_split(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"src": text, "tgt": "y"}) + "\n")


def fields_of(path) -> list[dict[str, object]]:
    return [dict(one.fields) for one in FileRows(path).rows()]


# --- what the fields mean -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "source", "target"),
    [
        ({"src": "a", "tgt": "b"}, "a", "b"),
        ({"src": ["a"], "tgt": ["b"]}, "a", "b"),
        ({"instruction": "do", "input": "this", "output": "done"}, "do\nthis", "done"),
        ({"instruction": "do", "input": "", "output": "done"}, "do", "done"),
        ({"instruction": "do", "input": None, "output": "done"}, "do", "done"),
        ({"instruction": "do", "output": "done"}, "do", "done"),
        ({"instruction": "", "input": "this", "output": "done"}, "this", "done"),
        ({"prompt": " p ", "completion": " c ", "id": 5}, " p ", " c "),
        (
            {"title": "福建{x}", "source": "文本。", "target": "t"},
            "答案：福建{x}，上下文：文本。在已知答案的前提下，问题：",
            "t",
        ),
        ({"source": "s", "target": "t"}, "s", "t"),
        ({"title": "", "source": "s", "target": "t"}, "s", "t"),
        ({"title": "ignored", "content": "c", "summary": "s"}, "c", "s"),
    ],
)
def test_formats(fields, source, target):
    assert read_pair(row(**fields)) == TextPair(source=source, target=target)
    assert read_source(row(**fields)) == source


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "q", "answer": "a"}, "found the fields question, answer, expected one of src / tgt, instruction"),
        ({}, "found the fields none, expected"),
        ({"src": "a"}, "found the fields src, expected one of"),
        ({"src": "a", "tgt": "b", "prompt": "p", "completion": "c"}, "fit src / tgt and prompt / completion; keep"),
        ({"src": "a", "tgt": ""}, "the target 'tgt' is empty"),
        ({"prompt": "a", "completion": " \n"}, "the target 'completion' is empty"),
        ({"instruction": "", "input": " ", "output": "x"}, "the source is empty"),
        ({"src": 5, "tgt": "b"}, "'src' is int 5, expected text"),
        ({"src": "a", "tgt": None}, "'tgt' is null, expected text"),
        ({"prompt": ["a"], "completion": "b"}, r"'prompt' is list \['a'\], expected text"),
        ({"src": ["a", "b"], "tgt": ["c", "d"]}, "'tgt' is a list of 2|'src' is a list of 2"),
        ({"src": [], "tgt": "b"}, "'src' is a list of 0 texts, and an example has one turn"),
        ({"src": [1], "tgt": "b"}, "'src' is int 1, expected text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' is int 3, expected text"),
        ({"src": "a\ud83d", "tgt": "b"}, r"'src' has half of a surrogate pair \('\\ud83d'\)"),
    ],
)
def test_a_row_that_does_not_fit_says_where_and_why(fields, message):
    with pytest.raises(DataError, match=rf"^data\.jsonl, line 7: .*(?:{message})"):
        read_pair(row(**fields))


def test_a_source_needs_no_target():
    assert read_source(row(prompt="p")) == "p"
    assert read_source(row(instruction="i", input="n")) == "i\nn"
    assert read_source(row(content="c", prompt="p", completion="x")) == "p"
    with pytest.raises(DataError, match="fit prompt / completion and content / summary"):
        read_source(row(content="c", prompt="p"))
    with pytest.raises(DataError, match="found the fields text, expected the source of one of"):
        read_source(row(text="t"))
    with pytest.raises(DataError, match="the source is empty"):
        read_source(row(prompt=""))


# --- the template -------------------------------------------------------------------------------------------------


def test_template_fills_any_fields():
    template = PromptTemplate("Q: {question}\n{{{topic}}} {question}\nA:")
    assert template.fields == ("question", "topic")
    one = row(question="who {x}?", topic="history", output="me")
    assert read_pair(one, template) == TextPair(source="Q: who {x}?\n{history} who {x}?\nA:", target="me")
    assert read_source(row(question="q", topic="t"), template) == "Q: q\n{t} q\nA:"


def test_template_reads_the_escapes_of_a_shell():
    assert PromptTemplate(r"{a}\n\tb\\n\q").fill(row(a="x")) == "x\n\tb\\n\\q"
    assert PromptTemplate("{a}").fill(row(a=r"x\n")) == r"x\n"  # only the text of the template has escapes


def test_template_takes_a_missing_input_as_empty():
    template = PromptTemplate("{instruction}\n{input}\nAnswer:")
    assert template.fill(row(instruction="do", output="x")) == "do\n\nAnswer:"
    assert template.fill(row(instruction="do", input="n")) == "do\nn\nAnswer:"
    with pytest.raises(DataError, match="names the field 'input', but this row has prompt"):
        PromptTemplate("{input}").fill(row(prompt="p"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question", "expected '}'"),
        ("no field", "names no field"),
        ("{}", "plain name of a field"),
        ("{a.b}", "plain name of a field"),
        ("{a[0]}", "plain name of a field"),
        ("{a!r}", "plain name of a field"),
        ("{a:>9}", "plain name of a field"),
    ],
)
def test_bad_templates_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        PromptTemplate(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"q": "a", "output": "b"},
            "line 7: prompt_template names the field 'question', but this row has q",
        ),
        ({"question": 1, "output": "b"}, "'question' is int 1"),
        ({"question": "a", "answer": "b"}, "expected beside the fields of prompt_template one of tgt, output"),
        ({"question": "a", "output": "b", "tgt": "c"}, "keep the fields of one of these forms"),
    ],
)
def test_rows_that_do_not_fit_the_template(fields, message):
    with pytest.raises(DataError, match=message):
        read_pair(row(**fields), PromptTemplate("Q: {question}"))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_jsonl(tmp_path, bom, suffix):
    path = tmp_path / f"train{suffix}"
    path.write_bytes(bom + '\n{"src": "é\u2028中"}\r\n  \n{"src": "\\n"}'.encode())
    found = list(FileRows(path).rows())
    assert [one.fields for one in found] == [{"src": "é\u2028中"}, {"src": "\n"}]
    assert [one.where for one in found] == [f"{path}, line 2", f"{path}, line 4"]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_list(tmp_path, bom):
    path = tmp_path / "train.json"
    path.write_bytes(bom + b'\n [\n{"src":\n "a"},\n\n {"src": "]"} ,{"src": "c"}\n]\n')
    found = list(FileRows(path).rows())
    assert [one.fields for one in found] == [{"src": "a"}, {"src": "]"}, {"src": "c"}]
    assert [one.where for one in found] == [f"{path}, line 3", f"{path}, line 6", f"{path}, line 6"]
    path.write_bytes(bom + b"[]")
    assert fields_of(path) == []


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_csv(tmp_path, bom):
    path = tmp_path / "train.csv"
    path.write_bytes(bom + 'src, tgt\r\n"a, ""x""\r\nsecond",中\r\n\r\nb,\r\n'.encode())
    found = list(FileRows(path).rows())
    assert [one.fields for one in found] == [{"src": 'a, "x"\r\nsecond', "tgt": "中"}, {"src": "b", "tgt": ""}]
    assert [one.where for one in found] == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"src": "a"}\n\n{"src": }\n',
            r"line 3: not JSON \(Expecting value, column 9\); expected one whole",
        ),
        ("a.jsonl", b'{"a": 1}\n["b"]\n', "line 2: expected an object with named fields, found list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"line 2: not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"line 1: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{\n"a": 1}\n', "line 1: not JSON"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"line 2: not JSON \(Expecting ':' delimiter, column 6\)"),
        ("a.json", b'[{"a": 1}\n\n{"a": 2}]', r"line 3: expected ',' or '\]' in the list, found '\{\"a\": 2\}\]'"),
        ("a.json", b'[{"a": 1}\n', r"line 2: expected ',' or '\]' in the list, found the end of the file"),
        ("a.json", b'[{"a": 1},\n', "line 2: not JSON"),
        ("a.json", b'[{"a": 1},\n 5]', "line 2: expected an object with named fields, found int"),
        ("a.json", b"[\n]\n[]", r"line 3: expected the end of the file, found '\[\]'"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', "line 2: not UTF-8"),
        ("a.csv", b"src,tgt\na,b\nc\n", r"line 3: 1 cells, but the first line names 2 columns \(src, tgt\)"),
        ("a.csv", b'src,tgt\n"a\nb",c,d\n', "line 2: 3 cells"),
        ("a.csv", b"src,src\na,b\n", "line 1: two columns are named 'src'"),
        ("a.csv", b'src,tgt\na,"b" c\n', "line 2: not CSV"),
        ("a.csv", b"src,tgt\na,\xe9\n", "line 2: not UTF-8"),
    ],
)
def test_damaged_files_say_line_and_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}, {message}"):
        fields_of(tmp_path / name)


def test_files_with_another_ending_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"ends in \.jsonl, \.json, \.csv, \.parquet, not in '\.txt'"):
        FileRows(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file or directory\)"):
        FileRows(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b\.jsonl: cannot be read \(Is a directory\)"):
        FileRows(tmp_path / "b.jsonl")


def test_paths_may_start_with_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_split(tmp_path / "set/train.jsonl")
    assert FileRows("~/set/train.jsonl").name == str(tmp_path / "set/train.jsonl")
    assert open_dataset("~/set").train.name == str(tmp_path / "set/train.jsonl")


def test_fingerprint_of_a_file_follows_bytes_and_kind(tmp_path):
    for name, content in (("a.json", "[]"), ("b.json", "[]"), ("c.json", "[ ]"), ("a.jsonl", "[]")):
        (tmp_path / name).write_text(content)
    a, b, c, other_kind = (
        FileRows(tmp_path / name).fingerprint() for name in ("a.json", "b.json", "c.json", "a.jsonl")
    )
    assert a == b
    assert len({a, c, other_kind}) == 3


# --- splits -------------------------------------------------------------------------------------------------------


def test_a_directory_as_for_paddlenlp(tmp_path):
    write_split(tmp_path / "train.json", "train")
    write_split(tmp_path / "dev.json", "dev")
    splits = open_dataset(str(tmp_path))
    assert [dict(one.fields) for one in splits.train.rows()] == [{"src": "train", "tgt": "y"}]
    assert [dict(one.fields) for one in splits.dev.rows()] == [{"src": "dev", "tgt": "y"}]
    assert splits.test is None


def test_directory_with_other_names(tmp_path):
    write_split(tmp_path / "validation.jsonl")
    write_split(tmp_path / "test.jsonl")
    splits = open_dataset(str(tmp_path))
    assert splits.train is None
    assert splits.dev.name == str(tmp_path / "validation.jsonl")
    assert splits.test.name == str(tmp_path / "test.jsonl")
    write_split(tmp_path / "dev.json")
    with pytest.raises(DataError, match=r"dev\.json, validation\.jsonl all hold the dev split"):
        open_dataset(str(tmp_path))


def test_missing_data_sets_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"it has no split; expected train, dev or test"):
        open_dataset(str(tmp_path))
    with pytest.raises(DataError, match="nowhere: no such directory"):
        open_dataset(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="builtin:nowhere: no such data set; the built-in ones are: "):
        open_dataset("builtin:nowhere")
    write_split(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="Give a file as --train_file or --eval_file"):
        open_dataset(str(tmp_path / "train.jsonl"))


def test_builtin(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.resources.files", lambda package: tmp_path if package == "bloomlm.assets" else None)
    write_split(tmp_path / "days/train.jsonl", "monday")
    (tmp_path / "tiny").mkdir()
    assert next(open_dataset("builtin:days").train.rows()).fields["src"] == "monday"
    with pytest.raises(DataError, match="builtin:tiny: no such data set; the built-in ones are: days"):
        open_dataset("builtin:tiny")


def test_files_beside_a_data_set(tmp_path):
    write_split(tmp_path / "set/train.json", "set")
    write_split(tmp_path / "mine.jsonl", "mine")
    splits = resolve_splits(dataset_name_or_path=str(tmp_path / "set"), eval_file=tmp_path / "mine.jsonl")
    assert (splits.train.name, splits.dev.name) == (str(tmp_path / "set/train.json"), str(tmp_path / "mine.jsonl"))
    splits = resolve_splits(train_file=tmp_path / "mine.jsonl")
    assert (splits.train.name, splits.dev, splits.test) == (str(tmp_path / "mine.jsonl"), None, None)
    with pytest.raises(
        ConfigError, match=r"--train_file .*mine\.jsonl and --dataset_name_or_path .*both have the train"
    ):
        resolve_splits(dataset_name_or_path=str(tmp_path / "set"), train_file=tmp_path / "mine.jsonl")


def test_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    class Builder:
        def __init__(self, name, configuration):
            asked.append((name, configuration))
            self.cache_dir = f"{name}/revision"

        def as_streaming_dataset(self):
            rows = datasets.Dataset.from_dict({"prompt": ["p1", "p2"], "completion": ["c1", "c2"]})
            return {"train": rows.to_iterable_dataset(), "validation": rows.select([1]).to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset_builder", Builder)
    splits = open_dataset("someone/pairs:main")
    open_dataset("pairs")
    assert asked == [("someone/pairs", "main"), ("pairs", None)]
    assert [read_pair(one) for one in splits.train.rows()] == [
        TextPair(source="p1", target="c1"),
        TextPair(source="p2", target="c2"),
    ]
    assert [one.where for one in splits.dev.rows()] == ["someone/pairs:main, split validation, row 1"]
    assert splits.test is None
    assert splits.train.fingerprint() == open_dataset("someone/pairs:main").train.fingerprint()
    assert splits.train.fingerprint() not in (open_dataset("pairs").train.fingerprint(), splits.dev.fingerprint())


def test_hub_errors_become_data_errors(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset_builder(name, configuration):
        raise ValueError("Config name is missing")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(DataError, match=r"the hub cannot provide such a data set .*Config name is missing"):
        open_dataset("someone/pairs")
    builder = SimpleNamespace(as_streaming_dataset=lambda: {"extra": []}, cache_dir="")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, configuration: builder)
    with pytest.raises(DataError, match="has the splits extra; expected train, validation or test"):
        open_dataset("someone/pairs")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'bloomlm\[datasets\]'"):
        open_dataset("someone/pairs")


def test_rows_of_a_data_set_follow_its_files(tmp_path):
    """A local directory, which `datasets` streams as it does one of the hub."""
    for split, names in (("train", "ab"), ("test", "c")):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": name}) + "\n" for name in names))
    splits = _open_hub(str(tmp_path))
    assert [one.fields for one in splits.train.rows()] == [{"text": "a"}, {"text": "b"}]
    assert splits.train.fingerprint() == _open_hub(str(tmp_path)).train.fingerprint() != splits.test.fingerprint()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "d"}\n{"text":\n')
    changed = _open_hub(str(tmp_path)).train
    assert changed.fingerprint() != splits.train.fingerprint()
    with pytest.raises(DataError, match="split train: cannot be read after row"):
        list(changed.rows())


# --- the page of the documentation --------------------------------------------------------------------------------


def test_the_examples_of_the_documentation_are_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs/data-formats.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", page, flags=re.MULTILINE | re.DOTALL))
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    plain = {name: [read_pair(one) for one in FileRows(tmp_path / name).rows()] for name in files if "faq" not in name}
    assert {name: len(pairs) for name, pairs in plain.items()} == {
        "pairs.jsonl": 2,
        "instructions.json": 2,
        "completions.jsonl": 1,
        "questions.jsonl": 1,
        "news.csv": 2,
        "mydata/train.json": 2,
        "mydata/dev.json": 1,
    }
    assert plain["instructions.json"][0].source == "Translate into French.\nGood morning."
    template = PromptTemplate(r"Question: {question}\nAnswer:")
    assert [read_pair(one, template) for one in FileRows(tmp_path / "faq.jsonl").rows()] == [
        TextPair(source="Question: How tall is the Eiffel tower?\nAnswer:", target=" 330 metres.")
    ]
    assert open_dataset(str(tmp_path / "mydata")).dev is not None


def test_parquet_rows_are_those_of_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(files, "_PARQUET_ROWS", 2)
    expected = [{"src": f"{number}", "tgt": "x", "notes": [number]} for number in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(expected), tmp_path / "a.parquet")
    found = list(FileRows(tmp_path / "a.parquet").rows())
    assert [dict(row.fields) for row in found] == expected
    assert [row.where.removeprefix(str(tmp_path)) for row in found][3:] == ["/a.parquet, row 4", "/a.parquet, row 5"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match=r"b\.parquet: cannot be read as Parquet after row 0"):
        list(FileRows(tmp_path / "b.parquet").rows())
    with pytest.raises(DataError, match=r"cannot be read \(No such file"):
        FileRows(tmp_path / "c.parquet")
