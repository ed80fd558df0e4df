"""PaddleNLP stays behind one door: few files outside of checkpoint/paddle name it, and they import the door only."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "bloomlm"
DOOR = PACKAGE / "checkpoint" / "paddle"
# Every other file asks checkpoint/formats.py or checkpoint/adapters/load.py, which name no program in their answers.
MAY_NAME_PADDLE = {
    "api.py",  # the keyword paddle_tokenization
    "checkpoint/adapters/convert.py",
    "checkpoint/adapters/load.py",
    "checkpoint/formats.py",
    "cli/convert.py",  # --to paddle
    "evaluation/protocols/reference.py",  # cites the script whose numbers it repeats
    "flags.py",  # --paddle_tokenization and its neighbours
    "training/config.py",  # the same flag of finetune
}
DOOR_MODULES = {"importer", "model_writer", "adapter_writer"}


def files_outside() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and DOOR not in path.parents]


def test_few_files_name_paddle() -> None:
    texts = {path: path.read_bytes() for path in files_outside() if path.suffix != ".pyc"}
    naming = {path.relative_to(PACKAGE).as_posix() for path, text in texts.items() if re.search(rb"paddle", text, re.I)}
    assert naming == MAY_NAME_PADDLE
    assert len(MAY_NAME_PADDLE) <= 8


def test_code_outside_imports_the_door_only() -> None:
    for path in files_outside():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "bloomlm.checkpoint.paddle":
                assert {alias.name for alias in node.names} <= DOOR_MODULES, path
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bloomlm.checkpoint.paddle."):
                assert node.module.rpartition(".")[2] in DOOR_MODULES, path
