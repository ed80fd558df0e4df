"""The files of the page, without a browser."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "bloomlm" / "serving" / "page"
OWN = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html"))


def test_every_file_that_is_referred_to_is_there() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    referred = set(re.findall(r'(?:src|href)="([^"]+)"', html))
    imported = {name for path in OWN for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8"))}
    assert referred >= {"app.js", "style.css", "vendor/uPlot.iife.min.js"} and "desk.js" in imported
    # nothing comes from another server, which a machine without a network could not reach
    assert {name for name in referred | imported if not (PAGE / name).is_file()} == set()
    used = referred | imported | {"index.html"}
    assert {path.name for path in OWN} <= used


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_text_becomes_html_or_code(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source) == []
    assert re.findall(r"<script(?![^>]*src=)|\son\w+=|\sstyle=|javascript:", source) == []
    assert len(source.splitlines()) <= 300


def test_licence_of_the_drawing_library_lies_beside_it() -> None:
    licence = (PAGE / "vendor" / "uPlot.LICENSE").read_text(encoding="utf-8")
    assert "MIT License" in licence and "Leon Sorokin" in licence
