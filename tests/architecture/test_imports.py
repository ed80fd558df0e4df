"""The import direction: a package imports rows below its own, never above, never a neighbour."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "bloomlm"
ROWS = [
    {"cli"},
    {"serving", "diagnosis"},
    {"api"},
    {"training", "export"},
    {"evaluation"},
    {"runtime", "vocabulary"},  # runtime: runs what export writes, and says in its manifest what that is
    {"generation", "checkpoint", "data"},
    {"adapters", "parallel"},
    {"model"},
    {"kernels"},
    {"flags", "files"},
    {"errors", "assets", "allocator", "openmp", "row_memory", "system_memory", "version"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name not in ("__init__.py", "__main__.py")
)


def imported_parts(path: Path) -> set[str]:
    """Parts of bloomlm that a file imports, at its top or inside a function."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module]
            if node.module == "bloomlm":
                names = [f"bloomlm.{alias.name}" for alias in node.names if (PACKAGE / alias.name).exists()]
        parts |= {name.split(".")[1] for name in names if name.startswith("bloomlm.")}
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in ROW_OF, f"{own} has no row: add it to the table"
    for part in imported_parts(path) - {own}:
        assert ROW_OF[own] < ROW_OF[part], f"{path} imports {part}, which is not below {own}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_part_imports_the_whole(path: Path) -> None:
    """The package's own names are made of its parts; a part that took them from there would import in a circle."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert "bloomlm" not in [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "bloomlm":
            assert all((PACKAGE / alias.name).is_dir() for alias in node.names)


def test_importing_bloomlm_loads_no_torch() -> None:
    code = "import sys, bloomlm, bloomlm.cli.main; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_never_imports_test_dependencies() -> None:
    """transformers and PEFT are what we are compared with, never what we run on."""
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not {name.split(".")[0] for name in names} & {"transformers", "peft", "paddle"}, path


def test_only_adapters_test_for_a_kind_of_adapter() -> None:
    """Others ask the adapter (adapters/base.py), so that a new kind needs no change of theirs."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    kinds = {
        node.name
        for path, tree in trees.items()
        if path.parent == PACKAGE / "adapters"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert {"LoraConfig", "PrefixConfig", "FullTuning", "LoRALinear", "PrefixEncoder"} <= kinds
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
                tested = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not tested & kinds or path.parent == PACKAGE / "adapters", f"{path}:{node.lineno}"
