"""`bloomlm predict` as a user runs it, in this process."""

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import bloomlm
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.cli import main as cli
from bloomlm.cli import predict as predict_module
from bloomlm.cli.completion import ResultFile
from bloomlm.cli.display import CompletionPrinter, TokenPrinter
from bloomlm.generation.config import GenerationConfig
from tests.bloom_tokenizer import make_tokenizer
from tests.tiny_bloom import write_adapter, write_bloom

PROMPTS = ["the end", "and 中文 here", "a", "one in the other", "é"]


class Terminal(io.StringIO):
    """A standard input that nobody pipes into."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("predict") / "model", eos_scale=3.0)


@pytest.fixture(autouse=True)
def terminal_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["predict", *map(str, arguments)])
    return int(exit_info.value.code or 0)


def expected(base: Path, **options: Any) -> list[bloomlm.Completion]:
    return bloomlm.load(base).generate(PROMPTS, **options)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt_flags() -> list[str]:
    return [word for prompt in PROMPTS for word in ("--prompt", prompt)]


def test_prints_each_completion_under_its_prompt(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_name_or_path", base, *prompt_flags(), "--tgt-length", 10) == 0
    output, messages = capsys.readouterr()
    completions = expected(base, max_new_tokens=10)
    assert output == "".join(f"{c.prompt}\n{c.completion}\n" for c in completions)
    assert "tokens/s" in messages


@pytest.mark.parametrize("stop", ["", "zz", "e"])
def test_stream_prints_the_same(base: Path, capsys: pytest.CaptureFixture[str], stop: str) -> None:
    flags = ["--model_name_or_path", base, *prompt_flags(), "--max_new_tokens", 10, *(["--stop", stop] if stop else [])]
    assert run(*flags) == 0
    whole = capsys.readouterr().out
    assert run(*flags, "--stream") == 0
    assert capsys.readouterr().out == whole


def test_several_sequences_are_numbered(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"decode_strategy": "beam_search", "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run("--model_name_or_path", base, "--prompt", "the end", *flags) == 0
    first, second = bloomlm.load(base).generate("the end", **options)
    assert capsys.readouterr().out == f"the end\n[1] {first.completion}\n[2] {second.completion}\n"


def test_sampling_flags_reach_the_generation(base: Path, tmp_path: Path) -> None:
    options = {
        "decode_strategy": "sampling",
        "temperature": 1.8,
        "top_k": 30,
        "top_p": 0.9,
        "seed": 4,
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 2,
        "max_new_tokens": 9,
        "num_return_sequences": 2,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    output = tmp_path / "out.jsonl"
    assert run("--model_name_or_path", base, *prompt_flags(), *flags, "--output_file", output) == 0
    lines = read_lines(output)
    assert lines == [vars(completion) for completion in expected(base, **options)]


@pytest.mark.parametrize("name", ["prompts.txt", "rows.jsonl", "rows.csv"])
def test_data_files(base: Path, tmp_path: Path, name: str) -> None:
    path, output = tmp_path / name, tmp_path / "new" / "out.jsonl"
    if name == "prompts.txt":
        path.write_text("\ufeff" + "\r\n".join([PROMPTS[0], "", "  ", *PROMPTS[1:]]) + "\n", encoding="utf-8")
    elif name == "rows.jsonl":
        path.write_text("".join(json.dumps({"src": p, "tgt": "x"}) + "\n" for p in PROMPTS), encoding="utf-8")
    else:
        path.write_text("prompt\n" + "\n".join(PROMPTS), encoding="utf-8")
    assert run("--model_name_or_path", base, "--data_file", path, "--tgt_length", 5, "--output_file", output) == 0
    assert read_lines(output) == [vars(completion) for completion in expected(base, max_new_tokens=5)]
    assert [entry.name for entry in output.parent.iterdir()] == ["out.jsonl"]


def test_data_set_directory_gives_its_test_split(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, text in (("train", "no"), ("dev", "no"), ("test", "the end")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"src": text, "tgt": "x"}))
    assert run("--model_name_or_path", base, "--data_file", tmp_path, "--tgt_length", 2) == 0
    assert capsys.readouterr().out.startswith("the end\n")


def test_prompt_template_and_exact_match(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    completion = bloomlm.load(base).generate("Q: one\nA:", max_new_tokens=4, min_new_tokens=4)[0].completion
    rows = [{"question": "one", "output": f" {completion}\n"}, {"question": "two", "output": "nothing like it"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ["--data_file", path, "--tgt_length", 4, "--min_new_tokens", 4]
    assert run("--model_name_or_path", base, *flags, "--prompt_template", r"Q: {question}\nA:") == 0
    output, messages = capsys.readouterr()
    assert output.startswith("Q: one\nA:\n")
    assert "exact match: 50.0% (1 of 2)" in messages


def test_exact_match_counts_the_first_sequence_of_each_prompt(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"decode_strategy": "beam_search", "num_return_sequences": 2, "max_new_tokens": 3}
    best = bloomlm.load(base).generate(PROMPTS, **options)[::2]
    rows = [{"src": c.prompt, "tgt": c.completion.strip() or "?"} for c in best]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert run("--model_name_or_path", base, "--data_file", tmp_path / "rows.jsonl", *flags) == 0
    num_right = sum(c.completion.strip() != "" for c in best)
    assert num_right > 2 and f"({num_right} of {len(PROMPTS)})" in capsys.readouterr().err


def test_piped_prompts(base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the end\n\na\n"))
    assert run("--model_name_or_path", base, "--tgt_length", 3) == 0
    first, second = bloomlm.load(base).generate(["the end", "a"], max_new_tokens=3)
    assert capsys.readouterr().out == f"the end\n{first.completion}\na\n{second.completion}\n"


def test_src_length_warns(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--model_name_or_path", base, "--prompt", "a b c d e f", "--src_length", 3, "--tgt_length", 2) == 0
    assert "1 of 1 prompts are longer than src_length 3" in caplog.text


@pytest.mark.parametrize("num_written", [0, 1, 3, 4])
def test_a_stopped_run_goes_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], num_written: int
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    sampling = ["--decode_strategy", "sampling", "--temperature", 2, "--num_return_sequences", 2, "--tgt_length", 8]
    flags = ["--model_name_or_path", base, *prompt_flags(), *sampling, "--batch_size", 1, "--output_file", output]
    written = 0
    write = ResultFile.write

    def stop_after(self: ResultFile, completion: bloomlm.Completion) -> None:
        nonlocal written
        if written == num_written:
            file = self._file
            assert file is not None
            file.write(b'{"number": 3, "prompt": "the e')  # as if killed in the middle of a line
            file.flush()
            raise KeyboardInterrupt
        write(self, completion)
        written += 1

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "write", stop_after)
        assert run(*flags) == 130
    assert output.read_text() == "old\n"
    capsys.readouterr()
    assert run(*flags) == 0
    messages = capsys.readouterr().err
    whole_prompts = num_written // 2 * 2
    assert (f"{whole_prompts} completions are there" in messages) == (whole_prompts > 0)
    options = {"decode_strategy": "sampling", "temperature": 2.0, "num_return_sequences": 2, "max_new_tokens": 8}
    assert read_lines(output) == [vars(completion) for completion in expected(base, **options)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_line_without_its_end_is_written_again(tmp_path: Path) -> None:
    completion = bloomlm.Completion(prompt="p", completion="c", finish_reason="eos", tokens=[5, 2])
    output = tmp_path / "out.jsonl"
    with ResultFile(output, identity="run", lines_per_prompt=1) as file:
        file.write(completion)
        file.write(completion)
    [partial] = tmp_path.iterdir()
    partial.write_bytes(partial.read_bytes().removesuffix(b"\n"))
    with ResultFile(output, identity="run", lines_per_prompt=1) as file:
        assert file.completions == [completion]
        file.write(completion)
        file.finish()
    assert read_lines(output) == [vars(completion)] * 2


def test_another_run_does_not_go_on_from_there(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.jsonl"
    flags = ["--model_name_or_path", base, *prompt_flags(), "--output_file", output, "--tgt_length"]

    def stop(self: ResultFile) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ResultFile, "finish", stop)
        assert run(*flags, 4) == 130
    assert run(*flags, 5) == 0
    assert read_lines(output) == [vars(completion) for completion in expected(base, max_new_tokens=5)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


def test_changed_weights_start_again(base: Path, tmp_path: Path) -> None:
    config = predict_module.PredictConfig(model_name_or_path=str(base), prompt=("a",))
    prompts = config.read_prompts()
    assert prompts is not None
    before = predict_module._identity(config, config.generation_of(8), prompts)
    assert before == predict_module._identity(config, config.generation_of(8), prompts)
    weights = base / "model.safetensors"
    os.utime(weights, ns=(1, weights.stat().st_mtime_ns + 1))
    assert before != predict_module._identity(config, config.generation_of(8), prompts)


def test_adapters_and_the_merged_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompt", "the end", "--tgt_length", 8]
    outputs = {}
    for flag, adapter in (("--lora_path", LoraConfig(r=2)), ("--prefix_path", PrefixConfig(num_prefix_tokens=3))):
        path = write_adapter(tmp_path / flag, base, adapter)
        assert run("--model_name_or_path", base, flag, path, *flags) == 0
        outputs[flag] = capsys.readouterr().out
        assert run("--model_name_or_path", base, "--adapter_path", path, *flags) == 0  # of any kind
        assert capsys.readouterr().out == outputs[flag]
    assert run("--model_name_or_path", base, *flags) == 0
    assert len({*outputs.values(), capsys.readouterr().out}) == 3

    merged = tmp_path / "merged"
    save = ["--lora_path", tmp_path / "--lora_path", "--save_onepiece_model_path", merged]
    assert run("--model_name_or_path", base, *save) == 0
    assert len(list(merged.glob("*.safetensors"))) == 1 and (merged / "tokenizer.json").is_file()
    assert run("--model_name_or_path", merged, *flags) == 0
    assert capsys.readouterr().out == outputs["--lora_path"]


def test_run_file_gives_prompts_and_stops(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model_name_or_path: {base}\nprompt: [the end, 'a, b']\nstop: [zz]\ntgt_length: 2\n")
    assert run("--config", path) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line in ("the end", "a, b")] == ["the end", "a, b"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no prompts; give --prompt"),
        (["--prompt", "a", "--data_file", "x.txt"], "both bring prompts"),
        (["--data_file", "absent.txt"], "absent.txt cannot be read"),
        (["--data_file", "absent.jsonl"], "absent.jsonl: "),
        (["--prompt", "a", "--prompt_template", "{x}"], "--prompt_template fills in the fields of rows"),
        (["--prompt", "a", "--top_p", "0.5"], "top_p has no effect with decode_strategy greedy"),
        (["--prompt", "a", "--decode_strategy", "beam_search", "--stream"], "--stream has nothing to show"),
        (["--prompt", "a", "--stream", "--decode_strategy", "sampling", "--num_return_sequences", "2"], "leave out"),
        (["--prompt", "a", "--device", "tpu9"], "--device tpu9"),
        (["--prompt", "a", "--prefix_path", "x", "--save_onepiece_model_path", "y"], "virtual tokens are no weights"),
        (["--prompt", ""], "prompt 1 of 1 is empty"),
    ],
)
def test_what_cannot_be_done_is_said(
    base: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run("--model_name_or_path", base, *flags) == 2
    output, messages = capsys.readouterr()
    assert output == "" and message in messages


def test_seed_without_sampling_is_a_warning(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run("--model_name_or_path", base, "--prompt", "a", "--seed", 3, "--tgt_length", 1) == 0
    assert "--seed has no effect with --decode_strategy greedy" in caplog.text


def test_unwritable_output_file(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("--model_name_or_path", base, "--prompt", "a", "--output_file", tmp_path / "file" / "out.jsonl") == 2
    message = capsys.readouterr().err
    assert f"--output_file {tmp_path / 'file' / 'out.jsonl'} cannot be written" in message and "partial" not in message


def test_a_complete_output_beside_a_partial_file_that_cannot_be_removed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a disk that turned read-only; the same command then finds everything done."""
    flags = ("--model_name_or_path", base, "--prompt", "a", "--tgt_length", 2, "--output_file", tmp_path / "out.jsonl")
    unlink = Path.unlink

    def fail(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".partial":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        assert run(*flags) == 0
    assert f"{tmp_path / 'out.jsonl'} is complete, but" in caplog.text
    complete = (tmp_path / "out.jsonl").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    assert run(*flags) == 0
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [complete]


def test_stream_shows_text_as_soon_as_it_is_certain() -> None:
    tokenizer = make_tokenizer()
    pieces: list[str] = []

    class Recorder(CompletionPrinter):
        def piece(self, text: str) -> None:
            pieces.append(text)

    printer = TokenPrinter(
        Recorder(Console(file=io.StringIO())), tokenizer, ["prompt"], GenerationConfig(stop=("and中",))
    )
    for token in [
        *tokenizer.encode("a é"),
        *tokenizer.encode("an"),
        *tokenizer.encode("x"),
        *tokenizer.encode("and中y"),
    ]:
        printer.push(0, token)
    printer.finish()
    assert "".join(pieces) == "a éanx"
    assert pieces[0] == ""  # "a" may begin the stop text
    assert "é" in "".join(pieces[: len(tokenizer.encode("a é"))])  # shown with its last byte, not later


def test_stream_shows_in_the_end_what_was_held_back() -> None:
    tokenizer = make_tokenizer()
    file = io.StringIO()
    printer = TokenPrinter(
        CompletionPrinter(Console(file=file)), tokenizer, ["p", "q"], GenerationConfig(stop=("and中",))
    )
    for index in (0, 1):
        for token in tokenizer.encode("x and"):
            printer.push(index, token)
        printer.finish()
    assert file.getvalue() == "p\nx and\nq\nx and\n"


def test_control_characters_do_not_reach_a_terminal() -> None:
    completion = bloomlm.Completion(prompt="p", completion="a\x1b[2Jb\n[red]c", finish_reason="eos", tokens=[])
    for is_terminal, shown in ((True, "a\ufffd[2Jb\n[red]c"), (False, "a\x1b[2Jb\n[red]c")):
        file = io.StringIO()
        CompletionPrinter(Console(file=file, force_terminal=is_terminal, no_color=True)).show(completion, None)
        assert shown in file.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")


TALKS = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the end"}]},
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "c"},
        ]
    },
]
TALK_PROMPTS = ["Be brief.\n\nUser: the end\nAssistant:", "User: a\nAssistant: b</s>User: c\nAssistant:"]


def write_talks(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_messages_are_answered_by_a_chat_template(base: Path, tmp_path: Path) -> None:
    talks, output = write_talks(tmp_path / "talks.jsonl", TALKS), tmp_path / "out.jsonl"
    flags = ("--model_name_or_path", base, "--messages_file", talks, "--output_file", output, "--max_new_tokens", 6)
    assert run(*flags, "--chat_template", "plain") == 0
    completions = bloomlm.load(base).generate(TALK_PROMPTS, max_new_tokens=6)
    assert read_lines(output) == [vars(completion) for completion in completions]


def test_the_last_answer_of_messages_is_what_is_expected(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bloomlm.load(base).generate(TALK_PROMPTS[1], max_new_tokens=6)[0].completion
    turns = TALKS[1]["conversations"]
    talks = write_talks(
        tmp_path / "talks.jsonl",
        [{"conversations": [*turns, {"from": "gpt", "value": text}]} for text in (right, "else")],
    )
    template = ("--chat_template", "plain", "--max_new_tokens", 6)
    assert run("--model_name_or_path", base, "--messages_file", talks, *template) == 0
    output, messages = capsys.readouterr()
    assert output.count(TALK_PROMPTS[1]) == 2
    assert "exact match: 50.0% (1 of 2)" in messages


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (TALKS, [], "has no chat template; give --chat_template plain or --chat_template FILE"),
        (TALKS, ["--chat_template", "plain", "--prompt", "a"], "--prompt and --messages_file both bring prompts"),
        (TALKS, ["--chat_template", "plain", "--src_length", 9], "--src_length would cut the end of a prompt"),
        (TALKS, ["--prompt_template", "{a}"], "--prompt_template does not act on --messages_file"),
        ([], ["--chat_template", "plain"], "no rows in it; expected at least one conversation"),
        ([{"messages": [{"role": "system", "content": "a"}]}], ["--chat_template", "plain"], "line 1: there is nothing to"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], ["--chat_template", "plain"], "line 1: there is nothing"),
        ([{"messages": [{"role": "bot", "content": "a"}]}], ["--chat_template", "plain"], "messages[0]: 'role' is 'bot'"),
        (
            [*TALKS, {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}],
            ["--chat_template", "plain"],
            "line 3: the chat template does not take these messages",
        ),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_used(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    flags: list[Any],
    message: str,
) -> None:
    talks = write_talks(tmp_path / "talks.jsonl", rows)
    assert run("--model_name_or_path", base, "--messages_file", talks, *flags) == 2
    assert message in capsys.readouterr().err


def test_conversations_as_prompts_are_pointed_to_their_flag(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = write_talks(tmp_path / "talks.jsonl", TALKS)
    assert run("--model_name_or_path", base, "--data_file", talks) == 2
    assert "its rows are conversations; give the file as --messages_file" in capsys.readouterr().err


def test_a_chat_template_needs_messages(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model_name_or_path", base, "--prompt", "a", "--chat_template", "plain") == 2
    assert "give --messages_file, or leave it out" in capsys.readouterr().err
