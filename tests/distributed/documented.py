"""Finds the commands in the documentation: shell and Python blocks, fenced or indented by four blanks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("bloomlm", "python", "torchrun", "make", "pip", "lm_eval", "cat", "mkdir", "rm", "printf")
FENCE = re.compile(r"^```(\w*)$")


@dataclass(frozen=True)
class Block:
    """A block that is set apart from the text, without its indentation."""

    line: int
    language: str
    """After the fence; "" of other blocks."""
    text: str

    @property
    def is_shell(self) -> bool:
        """Whether a shell runs it."""
        first = next((line for line in self.text.splitlines() if line and not line.startswith("#")), "")
        return self.language in ("sh", "bash") or (not self.language and first.split(" ")[0] in PROGRAMS)

    @property
    def is_python(self) -> bool:
        """Whether Python runs it."""
        return self.language == "python" or (not self.language and self.text.startswith(("import ", "from ")))


@dataclass(frozen=True)
class Command:
    """A command of a shell block, its continued lines joined; a here-document stays below it."""

    line: int
    text: str
    comment: str
    """The last comment above it in the block."""


def blocks(path: Path) -> Iterator[Block]:
    """The blocks of a Markdown file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        begin = number + 1 if fence else number
        if fence:
            number = lines.index("```", begin)
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1]):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number]):
                number += 1
        if number > begin:
            text = "\n".join(line if fence else line[4:] for line in lines[begin:number])
            yield Block(begin + 1, fence[1] if fence else "", text.rstrip())
        if fence or number == begin:
            number += 1


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block."""
    lines = iter(enumerate(block.text.splitlines(), block.line))
    comment = ""
    for number, line in lines:
        if not line.strip():
            continue
        if line.startswith("#"):
            comment = line.removeprefix("#").strip()
            continue
        text = line
        while text.endswith("\\"):
            text = text[:-1].rstrip() + " " + next(lines)[1].strip()
        document = re.search(r"<<'(\w+)'$", text)
        while document and text.splitlines()[-1] != document[1]:
            text += "\n" + next(lines)[1]
        yield Command(number, text, comment)


def words_of(command: str) -> list[str]:
    """The words of a command as bash splits them, without its comment."""
    return shlex.split(command, comments=True)
