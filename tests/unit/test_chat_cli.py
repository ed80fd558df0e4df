"""`bloomlm chat` as a user runs it: through a pipe in this process, and in a terminal of its own."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import bloomlm
import bloomlm.export.formats.pt2
from bloomlm.adapters.lora import LoraConfig
from bloomlm.cli import main as cli
from bloomlm.cli.chat import Chat
from bloomlm.cli.dialog import Conversation
from bloomlm.data.chat_template import PLAIN_TEMPLATE, ChatTemplate
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.growing import GrowingText
from bloomlm.runtime.program import Program
from tests.bloom_tokenizer import make_tokenizer
from tests.tiny_bloom import write_adapter, write_bloom

PLAIN = ("--chat_template", "plain")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("chat") / "model", eos_scale=1.5)


def run(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["chat", *map(str, arguments)])
    return int(exit_info.value.code or 0)


def prompt_of(messages: list[dict[str, str]], tokenizer: Tokenizer) -> str:
    return ChatTemplate(PLAIN_TEMPLATE, tokenizer.special_tokens).render(messages, add_generation_prompt=True)


def expected_talk(completer: Any, lines: list[str], system: str = "", **options: Any) -> list[dict[str, str]]:
    """A conversation in which each prompt is computed for itself."""
    messages = [{"role": "system", "content": system}] if system else []
    for line in lines:
        messages.append({"role": "user", "content": line})
        answer = completer.generate(prompt_of(messages, completer.tokenizer), max_new_tokens=8, **options)[0]
        messages.append({"role": "assistant", "content": answer.completion.strip()})
    return messages


def answers(messages: list[dict[str, str]]) -> str:
    return "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")


def test_each_answer_follows_the_whole_conversation(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines, saved = ["the end", "and 中?", "why"], tmp_path / "talk.jsonl"
    talk = expected_talk(bloomlm.load(model), lines, "Be brief.")
    script = "\n".join([*lines, f"/save {saved}"])
    flags = ("--model_name_or_path", model, *PLAIN, "--system", "Be brief.", "--max_new_tokens", 8)
    assert run(monkeypatch, script, *flags) == 0
    assert capsys.readouterr().out == answers(talk)
    assert [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()] == [{"messages": talk}]


def test_an_adapter_answers_by_its_own_template(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", model, LoraConfig(r=2))
    make_tokenizer().with_chat_template(PLAIN_TEMPLATE).save(adapter)
    loaded = bloomlm.load(model, lora_path=adapter)
    flags = ("--model_name_or_path", model, "--lora_path", adapter, "--max_new_tokens", 8)
    assert run(monkeypatch, "the end\nwhy\n", *flags) == 0
    assert capsys.readouterr().out == answers(expected_talk(loaded, ["the end", "why"]))


def test_commands(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded, saved = bloomlm.load(model), tmp_path / "talk.jsonl"
    script = f"a\n/undo\nthe end\n/save {saved}\n/system Be brief.\nb\n/reset\nc\n/save {saved}\n/exit\nnever\n"
    assert run(monkeypatch, script, "--model_name_or_path", model, *PLAIN, "--max_new_tokens", 8) == 0
    rows = [json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert rows == [expected_talk(loaded, ["the end"]), expected_talk(loaded, ["c"], "Be brief.")]
    assert capsys.readouterr().out.count("\n") == 4


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("/bla", "/bla is no command; /help lists them"),
        ("/save", "nothing was answered yet"),
        ("a\n/save", "/save needs a file"),
        ("a\n/save /nowhere/at/all", "/nowhere/at/all"),
        ("/undo", "there is nothing to undo"),
        ("/help", "/system TEXT  begin anew with this system message"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_chat_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, message: str
) -> None:
    flags = ("--model_name_or_path", model, *PLAIN, "--max_new_tokens", 8)
    assert run(monkeypatch, f"{script}\n/reset\nthe end\n", *flags) == 0
    output, errors = capsys.readouterr()
    assert message in errors
    assert output.endswith(answers(expected_talk(bloomlm.load(model), ["the end"])))


def test_a_model_without_a_template_continues_lines(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines, saved = ["the end", "and 中"], tmp_path / "rows.jsonl"
    flags = ("--model_name_or_path", model, "--max_new_tokens", 8)
    assert run(monkeypatch, "\n".join([*lines, f"/save {saved}", "/system x"]), *flags) == 0
    completions = bloomlm.load(model).generate(lines, max_new_tokens=8)
    output, errors = capsys.readouterr()
    assert output == "".join(completion.completion.lstrip() + "\n" for completion in completions)
    assert "the model has no chat template" in errors
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"prompt": found.prompt, "completion": found.completion} for found in completions]


def test_sampled_answers_differ_unless_there_is_a_seed(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--model_name_or_path", model, "--decode_strategy", "sampling", "--max_new_tokens", 12)

    def say(*more: object) -> list[str]:
        assert run(monkeypatch, "the end\nthe end\n", *flags, *more) == 0
        return capsys.readouterr().out.splitlines()

    seeded = say("--seed", 3)
    options = {"decode_strategy": "sampling", "max_new_tokens": 12}
    first, second = (bloomlm.load(model).generate("the end", seed=seed, **options)[0] for seed in (3, 4))
    assert seeded == [first.completion.strip(" \n"), second.completion.strip(" \n")]
    assert say() != say()


def test_a_program_answers_like_its_model(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)  # compiling takes minutes
    path = tmp_path / "inference" / "bloom"
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["export", "--model_name_or_path", str(model), "--output_path", str(path), "--no_verify"])
    assert not exit_info.value.code
    capsys.readouterr()
    flags = ("--model_dir", path.parent, *PLAIN, "--max_new_tokens", 8)
    assert run(monkeypatch, "the end\nwhy\n", *flags) == 0
    output = capsys.readouterr().out
    assert output == answers(expected_talk(Program(path), ["the end", "why"]))
    assert output == answers(expected_talk(bloomlm.load(model), ["the end", "why"]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "missing --model_name_or_path"),
        (["--model_name_or_path", "m", "--model_dir", "d"], "give one: an exported program or a model"),
        (["--model_name_or_path", "m", "--model_prefix", "p"], "give its --model_dir too"),
        (["--model_dir", "d", "--lora_path", "a"], "--lora_path with --model_dir: adapters are put into a program"),
        (["--model_name_or_path", "builtin:tiny", "--chat_template", "/none"], "--chat_template /none cannot be read"),
        (["--model_name_or_path", "builtin:tiny", "--system", "x"], "the model has no chat template"),
        (["--model_name_or_path", "builtin:tiny", "--top_p", "0.5"], "top_p"),
    ],
)
def test_flags_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(monkeypatch, "", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_stopped_answer_stays_in_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer: Any = make_tokenizer()

    def say(text: GrowingText, prompt: list[int], config: GenerationConfig, on_token: Callable[[int], None]) -> str:
        for token in tokenizer.encode(" the and"):
            on_token(token)
        if tokenizer.decode(prompt).endswith("stop\nAssistant:"):
            raise KeyboardInterrupt
        return "eos"

    monkeypatch.setattr(GrowingText, "extend", say)
    model: Any = SimpleNamespace(model=None, tokenizer=tokenizer)
    dialog = Conversation(ChatTemplate(PLAIN_TEMPLATE, {"eos_token": "</s>"}), "")
    lines = iter(["stop", "go"])
    messages = Console(stderr=True)
    Chat(model, dialog, GenerationConfig(), has_seed=False, messages=messages).run(lambda: next(lines, None))
    assert dialog.prompt("on") == (
        "User: stop\nAssistant: the and</s>User: go\nAssistant: the and</s>User: on\nAssistant:"
    )
    output, errors = capsys.readouterr()
    assert output == "the and\nthe and\n"
    assert errors.count("(stopped)") == 1


class Terminal:
    """`bloomlm chat` in a terminal."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "bloomlm", "chat", *map(str, arguments)]
        self.fd, child = pty.openpty()
        self.process = subprocess.Popen(command, stdin=child, stdout=child, stderr=child, start_new_session=True, preexec_fn=_take_terminal)  # fmt: skip
        os.close(child)

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_until_it_waits(self, seconds: float = 60.0) -> None:
        """Return when the program sleeps; input() overlooks a Ctrl-C that comes just before it does, until the next key."""
        stat, end = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + seconds
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the program is always busy"
            time.sleep(0.01)

    def read_until(self, pattern: str, seconds: float = 120.0) -> str:
        """What is shown until a pattern occurs, without control sequences."""
        shown, end = b"", time.monotonic() + seconds
        while True:
            text = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown.decode("utf-8", "replace")).replace("\r", "")
            if re.search(pattern, text):
                return text
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there was {text!r}"
            try:
                shown += os.read(self.fd, 4096)
            except OSError:  # the process has ended
                assert re.search(pattern, text), f"{pattern!r} did not come; there was {text!r}"
                return text


def _take_terminal() -> None:
    """Let Ctrl-C of the terminal on standard input reach this process, also if the tests run where it is ignored."""
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_terminal(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.jsonl"
    terminal = Terminal("--model_name_or_path", model, *PLAIN, "--min_new_tokens", 4000, "--max_new_tokens", 4000)
    try:
        terminal.read_until(r"a conversation(.|\n)*> $")
        terminal.type("never mind")
        terminal.read_until("never mind")
        terminal.wait_until_it_waits()
        terminal.type("\x03")  # Ctrl-C where nothing is answered forgets the line
        terminal.read_until(r"\n> $")
        terminal.type("the end\n")
        terminal.read_until(r"the end\n.{20}")
        terminal.type("\x03")
        terminal.read_until(r"\(stopped\)\n> $")
        terminal.type("\x1b[A\n")  # the line before, by the arrow up
        terminal.read_until(r"the end\n.{20}")
        terminal.type("\x03")
        terminal.read_until(r"\(stopped\)\n> $")
        terminal.type(f"/save {saved}\n")
        terminal.read_until(r"learns from it\)\n> $")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)
    (row,) = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    messages, loaded = row["messages"], bloomlm.load(model)
    assert [message["content"] for message in messages[::2]] == ["the end", "the end"]
    for place in (1, 3):  # what was shown before Ctrl-C is what the model says
        prompt = prompt_of(messages[:place], loaded.tokenizer)
        whole = loaded.generate(prompt, min_new_tokens=400, max_new_tokens=400)[0].completion.strip()
        answer = messages[place]["content"].removesuffix("\ufffd")  # the last token may be part of a character
        assert len(answer) >= 15
        assert whole.startswith(answer[:200])
