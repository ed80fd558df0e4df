"""The site: its pages list what the code has, and it builds without a dead link."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bloomlm

ROOT = Path(__file__).parents[2]


def referenced(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^::: (\S+)$", text, re.MULTILINE)


def test_the_api_page_has_every_public_name_once() -> None:
    public = [f"bloomlm.{name}" for name in bloomlm.__all__ if name != "__version__"]
    assert sorted(referenced("python-api.md")) == public


def test_every_page_of_docs_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages - set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == set()


def test_every_file_that_the_guide_for_contributors_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`([\w/]+/[\w/]+\.py)`|(?<!`)\b(tests/\w+/\w+\.py)", text))
    named = {name for pair in paths for name in pair if name and "NAME" not in name}
    assert len(named) > 40
    assert {name for name in named if not ((ROOT / name).is_file() or (ROOT / "bloomlm" / name).is_file())} == set()


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="the site needs the extra `docs`: pip install '.[docs]'",
)
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    build = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stderr
    flags = (tmp_path / "flags.html").read_text(encoding="utf-8")
    for verb, flag in (("finetune", "--learning_rate FLOAT"), ("serve", "--max_num_seqs INTEGER")):
        assert f"bloomlm {verb}" in flags and f"<code>{flag}</code>" in flags
    api = (tmp_path / "python-api.html").read_text(encoding="utf-8")
    assert all(f'id="bloomlm.{name}"' in api for name in ("load", "LoadedModel", "Sampling"))
