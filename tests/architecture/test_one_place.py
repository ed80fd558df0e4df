"""What the package knows in one place only: the formats of programs, and PyTorch's private modules."""

import ast
from pathlib import Path

import pytest

from bloomlm.export.formats import FORMATS as WRITTEN
from bloomlm.runtime.formats import FORMATS as RUN
from tests.architecture.test_imports import FILES, PACKAGE

NAMES = {*RUN, *(form.backend for form in RUN.values())}
FORMAT_DIRECTORIES = {PACKAGE / "export" / "formats", PACKAGE / "runtime" / "formats"}
HEAD_OF = PACKAGE / "parallel" / "tensor_parallel.py"
TORCH_INTERNALS = PACKAGE / "runtime" / "torch_internals.py"
PRIVATE = ("torch._inductor", "torch._C", "torch._dynamo")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def chosen_by(tree: ast.AST) -> set[str]:
    """Texts that code compares with, matches or looks up."""
    nodes: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            nodes += [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            nodes += node.keys
        elif isinstance(node, ast.MatchValue):
            nodes.append(node.value)
    constants = [inner for node in nodes if node is not None for inner in ast.walk(node)]
    return {node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def private_names(tree: ast.AST) -> set[str]:
    """Private modules of torch that code imports or reaches as attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return {name for name in found if name.startswith(PRIVATE)}


def test_each_format_has_a_row_on_both_sides() -> None:
    assert list(WRITTEN) == list(RUN) != []


@pytest.mark.parametrize("path", [path for path in FILES if path.parent not in FORMAT_DIRECTORIES], ids=name_of)
def test_only_the_formats_know_their_names(path: Path) -> None:
    assert chosen_by(ast.parse(path.read_text(encoding="utf-8"))) & NAMES == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_head_is_used_with_all_that_belongs_to_it(path: Path) -> None:
    """Its weight alone is not the head where it is int8, or where some of its rows learn apart from it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    made = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Head"]
    assert len(made) == (path == HEAD_OF), f"{path}:{made}"


@pytest.mark.parametrize("path", [path for path in FILES if path != TORCH_INTERNALS], ids=name_of)
def test_only_one_file_knows_private_modules_of_torch(path: Path) -> None:
    assert private_names(ast.parse(path.read_text(encoding="utf-8"))) == set()


def test_these_tests_can_fail() -> None:
    assert chosen_by(ast.parse('a if form in ("pt2", "x") else {"onnx": b}[form]')) & NAMES == {"pt2", "onnx"}
    assert private_names(ast.parse(TORCH_INTERNALS.read_text(encoding="utf-8")))
