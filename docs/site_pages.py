"""MkDocs hook: the pages of the site that are not files in docs/.

README.md becomes the start page; CONTRIBUTING.md, SECURITY.md and CHANGELOG.md become pages. flags.md is made from the
commands themselves, so that it lists exactly what `bloomlm VERB --help` lists.
"""

import importlib
import inspect
import re
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from bloomlm.cli.main import VERBS

ROOT = Path(__file__).parents[1]
# File in the repository's root -> page of the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "reporting.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; MkDocs calls this after it has read docs/."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=for_site(text)))
    files.append(File.generated(config, "flags.md", content=flags_page()))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links from docs/ to files of the root at their pages."""
    for name, page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    return markdown


def for_site(text: str) -> str:
    """A file of the root with the links that it needs as a page."""
    text = text.replace("](docs/", "](")
    for name, page in ROOT_PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text


def flags_page() -> str:
    """Markdown with a heading for each verb and a table for each section of its flags."""
    parts = [
        "# Flags of every verb",
        "A boolean is given as `--x`, `--x True` or `--x False`. Dashes and underscores in names are the "
        "same. `--config run.yaml` reads flags from lines of `name: value`.",
    ]
    for verb in VERBS:
        command = importlib.import_module(VERBS[verb][0]).command
        parts += [f"## bloomlm {verb}", described(command), *tables(command)]
    return "\n\n".join(parts) + "\n"


def described(command: click.Command) -> str:
    """The text of a command's help, with its examples as a block."""
    text, _, examples = inspect.cleandoc(command.help or "").rpartition("\n\n\b\n")
    return f"{text}\n\n```bash\n{examples}\n```"


def tables(command: click.Command) -> list[str]:
    """A heading and a table for each section of a command's flags."""
    context = click.Context(command)
    rows: dict[str, list[str]] = {}
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None:
            section = command.sections.get(param.name, "general")
            rows.setdefault(section, []).append("| " + " | ".join(cell(text) for text in record) + " |")
    return [
        "\n".join([f"**{section.capitalize()}**", "", "| flag | meaning |", "|---|---|", *lines])
        for section, lines in rows.items()
    ]


def cell(text: str) -> str:
    """A text in a cell of a table: a flag as code, in which a bar ends no cell, or the line that explains it."""
    text = re.sub(r"\s+", " ", text)
    return f"`{text}`" if text.startswith("-") else re.sub(r"([|<*_])", r"\\\1", text)
