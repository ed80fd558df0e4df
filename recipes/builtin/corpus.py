"""Step 1: the pretraining text of builtin:tiny, from two packages of PyPI.

    python recipes/builtin/corpus.py OUTPUT_DIR

Django (BSD-3-Clause) brings English prose, Python code and sentences in many languages (its message catalogs); CLDR
(Unicode licence), inside Babel, brings the names of languages, countries, months and days, and dates in their formats.
Writes train.jsonl and heldout.jsonl, rows {"source", "text"}; one document in fifty is held out by its hash.
"""

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from babel import Locale
from babel import __version__ as babel_version
from babel.messages.pofile import read_po
from languages import DATE_LENGTHS, OTHER_LOCALES, TASK_LOCALES, numeric_date, written_date

DJANGO_VERSION = "5.2.6"
DJANGO_SHA256 = "da5e00372763193d73cecbf71084a3848458cecf4cee36b9a1e8d318d114a87b"
BABEL_VERSION = "2.18.0"

SEED = 20_240
PIECE_CHARACTERS = 1_500
HELD_OUT_ONE_IN = 50

# Message catalogs that say almost the same as another one of the list.
_VARIANTS = {"ar_DZ", "de_CH", "en", "en_AU", "en_GB", "en_IE", "es_AR", "es_CO", "es_MX", "es_NI", "es_PR", "es_VE"}
_VARIANTS |= {"fr_BE", "fr_CA", "fr_CH", "sr_Latn"}

# The languages whose catalogs also come as pairs (message, translation).
_PAIRED = {"ar", "bn", "ca", "es", "eu", "fr", "hi", "id", "ig", "mr", "ne", "pt", "pt_BR", "sw", "ta", "te", "ur"}
_PAIRED |= {"vi", "zh_Hans", "zh_Hant", "de", "it"}

# The years of builtin:dates are kept out of the generated date lines, so none of its dates is learned by heart.
_YEARS = tuple(range(1600, 1950)) + tuple(range(2050, 2300))
_DATE_LINES_PER_TASK_LOCALE = 1_500
_DATE_LINES_PER_OTHER_LOCALE = 120
_ISO_SHAPE = re.compile(r"\d{4}-\d{2}-\d{2}")

Row = tuple[str, str]
"""(source, text)."""


def fetch_django(directory: Path) -> Path:
    """Fetch and unpack the pinned source distribution with pip; return its root."""
    archive = directory / f"django-{DJANGO_VERSION}.tar.gz"
    if not archive.exists():
        wanted = ["--no-deps", "--no-binary", "Django", f"Django=={DJANGO_VERSION}"]
        subprocess.run([sys.executable, "-m", "pip", "download", *wanted, "-d", str(directory)], check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != DJANGO_SHA256:
        raise SystemExit(f"{archive} has sha256 {found}, expected {DJANGO_SHA256}: delete it and run again")
    root = directory / f"django-{DJANGO_VERSION}"
    if not root.exists():
        with tarfile.open(archive) as tar:
            tar.extractall(directory, filter="data")
    return root


def pieces(paragraphs: Iterable[str], separator: str = "\n\n") -> Iterator[str]:
    """Join paragraphs into documents of about PIECE_CHARACTERS."""
    piece: list[str] = []
    for paragraph in paragraphs:
        if piece and sum(map(len, piece)) + len(paragraph) > PIECE_CHARACTERS:
            yield separator.join(piece)
            piece = []
        piece.append(paragraph)
    if piece:
        yield separator.join(piece)


def prose_and_code(root: Path) -> Iterator[Row]:
    """Django's documentation without its release notes, and a third of its Python modules."""
    for path in sorted((root / "docs").rglob("*.txt")):
        if "releases" not in path.parts:
            yield from (("docs", piece) for piece in pieces(_paragraphs(path)))
    for path in sorted((root / "django").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "locale" not in path.parts and _hash(name) % 3 == 0:
            yield from (("code", piece) for piece in pieces(_paragraphs(path)))


def catalogs(root: Path) -> Iterator[Row]:
    """Sentences of each language, as they follow one another, and pairs with their English."""
    for path in sorted((root / "django").rglob("*.po")):
        language = path.parts[path.parts.index("locale") + 1]
        if language in _VARIANTS:
            continue
        with path.open("rb") as file, contextlib.redirect_stdout(io.StringIO()):  # it prints its warnings
            messages = [(m.id, m.string) for m in read_po(file) if m.id and m.string and not m.fuzzy]
        flat = [(_first(source), _first(target)) for source, target in messages]
        flat = [(source, target) for source, target in flat if source and target]
        yield from ((f"catalog:{language}", piece) for piece in pieces(target for _, target in flat))
        if language in _PAIRED:
            name = Locale.parse(language).get_display_name("en") or language
            pairs = (f"English: {source}\n{name}: {target}" for source, target in flat)
            yield from ((f"pairs:{language}", piece) for piece in pieces(pairs))


def names(locale_name: str) -> Iterator[Row]:
    """CLDR's names in one language: months and days in order, languages and territories beside their English."""
    locale, english = Locale.parse(locale_name), Locale.parse("en")
    source = f"names:{locale_name}"
    title = locale.get_display_name("en")
    calendar = []
    for kind in ("wide", "abbreviated"):
        for context in ("format", "stand-alone"):
            months = locale.months[context][kind]
            calendar.append(", ".join(f"{number}. {months[number]}" for number in range(1, 13)))
            calendar.append("; ".join(f"{months[number]} = {number:02d}" for number in range(1, 13)))
            days = locale.days[context][kind]
            calendar.append(", ".join(days[number] for number in range(7)))
    yield source, f"{title}\n" + "\n".join(dict.fromkeys(calendar))
    for table, english_table in ((locale.languages, english.languages), (locale.territories, english.territories)):
        lines = [f"{english_table[code]}: {name}" for code, name in sorted(table.items()) if code in english_table]
        if locale_name != "en":
            yield from ((source, f"{title}\n{piece}") for piece in pieces(lines, "\n"))
        yield from ((source, piece) for piece in pieces((name for _, name in sorted(table.items())), ", "))


def date_lines(locale_name: str, count: int, rng: random.Random) -> Iterator[Row]:
    """Dates outside the task's years, in one to three of the locale's formats and then as 31.12.1999."""
    lines = []
    while len(lines) < count:
        year, day_of_year = rng.choice(_YEARS), rng.randrange(365)
        date = datetime.date(year, 1, 1) + datetime.timedelta(days=day_of_year)
        forms = [written_date(date, length, locale_name) for length in DATE_LENGTHS]
        forms = list(dict.fromkeys([*forms, numeric_date(date, locale_name)]))
        rng.shuffle(forms)
        plain = f"{date.day:02d}.{date.month:02d}.{date.year}"
        line = rng.choice((" = ", " | ", "; ")).join([*forms[: rng.randint(1, 3)], plain])
        if not _ISO_SHAPE.search(line):
            lines.append(line)
    for start in range(0, count, 20):
        yield f"dates:{locale_name}", "\n".join(lines[start : start + 20])


def corpus(root: Path) -> Iterator[Row]:
    """Every document, in a fixed order."""
    yield from prose_and_code(root)
    yield from catalogs(root)
    rng = random.Random(SEED)
    for locale_name in (*TASK_LOCALES, *OTHER_LOCALES):
        yield from names(locale_name)
        in_task = locale_name in TASK_LOCALES
        count = _DATE_LINES_PER_TASK_LOCALE if in_task else _DATE_LINES_PER_OTHER_LOCALE
        yield from date_lines(locale_name, count, rng)


def write(rows: Iterable[Row], directory: Path) -> None:
    """Write train.jsonl and heldout.jsonl without doubles, and print the bytes of each kind of source."""
    seen: set[str] = set()
    sizes: Counter[str] = Counter()
    with (directory / "train.jsonl").open("w") as train, (directory / "heldout.jsonl").open("w") as held_out:
        for source, text in rows:
            if text in seen:
                continue
            seen.add(text)
            file = held_out if _hash(text) % HELD_OUT_ONE_IN == 0 else train
            file.write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
            sizes[source.split(":")[0]] += len(text.encode())
    for kind, size in sizes.most_common():
        print(f"{kind:8s} {size / 1e6:6.2f} MB")
    print(f"{'all':8s} {sum(sizes.values()) / 1e6:6.2f} MB in {len(seen)} documents")


def _paragraphs(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n\n")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _first(message: object) -> str:
    """A message, or the first of its plural forms."""
    return message if isinstance(message, str) else str(message[0])  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    directory = parser.parse_args().output_dir
    if babel_version != BABEL_VERSION:
        print(f"note: Babel {babel_version} here, the published model was made with {BABEL_VERSION}")
    directory.mkdir(parents=True, exist_ok=True)
    write(corpus(fetch_django(directory)), directory)


if __name__ == "__main__":
    main()
