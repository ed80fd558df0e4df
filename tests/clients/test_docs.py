"""What docs/serve.md, Containerfile and the help show: clients of a server, and servers with the flags shown."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from bloomlm.cli.serve import command as serve_command
from tests.clients.server import Server, running
from tests.distributed.documented import Block, blocks, commands, words_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serve.md"
BLOCKS = list(blocks(PAGE))
ADDRESS = "http://127.0.0.1:8000"
PYTHON = [block for block in BLOCKS if block.is_python]
CURLS = [
    found.text
    for block in BLOCKS
    if block.text.startswith("curl ")
    for found in commands(Block(block.line, "sh", block.text))
]


def start_commands() -> list[list[str]]:
    """The flags of every server that the page, the help and the container start."""
    assert serve_command.help is not None
    shown = re.findall(r"^ *bloomlm serve (.+)$", PAGE.read_text() + serve_command.help, re.MULTILINE)
    shown += re.findall(r"^ExecStart=/opt/bloomlm/bin/bloomlm serve (.+)$", PAGE.read_text(), re.MULTILINE)
    container = (ROOT / "Containerfile").read_text()
    first, second = (
        json.loads(re.findall(rf"^{word} (\[.*\])$", container, re.MULTILINE)[0]) for word in ("ENTRYPOINT", "CMD")
    )
    assert first[:2] == ["bloomlm", "serve"]
    return [*(words_of(text) for text in dict.fromkeys(shown)), [*first[2:], *second]]


def test_there_is_something_to_test() -> None:
    assert len(CURLS) >= 5
    assert len(PYTHON) == 2
    assert len(start_commands()) >= 5


@pytest.mark.parametrize("text", CURLS)
def test_curl_lines(server: Server, text: str) -> None:
    line = text.replace(ADDRESS, server.url) + " --fail-with-body"
    output = subprocess.run(["bash", "-c", line], check=True, stdout=subprocess.PIPE, text=True).stdout
    if '"stream": true' in text:
        events = output.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-1]]
        assert "".join(pieces)
    else:
        answer = json.loads(output)
        assert answer.get("choices") or answer.get("data") or answer.get("tokens")


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.text.split()[1])
def test_python_blocks(server: Server, block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(block.text.split()[1])
    assert ADDRESS in block.text
    exec(compile(block.text.replace(ADDRESS, server.url), "block", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 10


@pytest.mark.parametrize("flags", start_commands(), ids=" ".join)
def test_servers_start_as_shown(flags: list[str], adapters: dict[str, Path]) -> None:
    if "--model_dir" in flags:
        pytest.skip("needs an exported program; tests/unit/test_serving_engine.py serves one")
    names = iter(adapters.values())
    changed = [
        f"{word.split('=')[0]}={next(names)}"
        if before == "--lora"
        else re.sub(r"bigscience/bloom\S*", "builtin:tiny", word)
        for before, word in zip(["", *flags], flags, strict=False)
    ]
    with running(changed) as server:
        assert server.stop() == 0
