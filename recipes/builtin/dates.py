"""Step 4: builtin:dates, the task of writing a date of any language as ISO 8601.

    python recipes/builtin/dates.py OUTPUT_DIR

Writes train.jsonl, dev.jsonl and test.jsonl, rows {"src", "tgt", "lang"}. Every row has a calendar date of its own, so
no date is in two splits. The forms are CLDR's full, long and medium ones, in the language's own digits; forms of digits
alone (03/04/2019) are left out, since nobody can tell what they mean.
"""

import argparse
import datetime
import json
import random
from pathlib import Path

from languages import DATE_LENGTHS, TASK_LOCALES, names_its_month, written_date

SEED = 20_243
FIRST_DAY = datetime.date(1950, 1, 1)
LAST_DAY = datetime.date(2049, 12, 31)
ROWS_PER_LOCALE = {"train": 280, "dev": 12, "test": 20}
PROMPT = "Date: {written}\nISO:"


def row(date: datetime.date, locale: str, rng: random.Random) -> dict[str, str]:
    """One example: a prompt with the date as people write it, and the same date as ISO 8601."""
    forms = [written_date(date, length, locale) for length in DATE_LENGTHS]
    written = rng.choice([form for form in forms if names_its_month(form)])
    return {"src": PROMPT.format(written=written), "tgt": date.isoformat(), "lang": locale}


def splits() -> dict[str, list[dict[str, str]]]:
    """The rows of every split, in the order of the files."""
    rng = random.Random(SEED)
    num_days = (LAST_DAY - FIRST_DAY).days + 1
    days = iter(rng.sample(range(num_days), len(TASK_LOCALES) * sum(ROWS_PER_LOCALE.values())))
    result = {}
    for split, rows_per_locale in ROWS_PER_LOCALE.items():
        locales = list(TASK_LOCALES) * rows_per_locale
        rng.shuffle(locales)
        result[split] = [row(FIRST_DAY + datetime.timedelta(days=next(days)), name, rng) for name in locales]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    directory = parser.parse_args().output_dir
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits().items():
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{split}: {len(rows)} rows")


if __name__ == "__main__":
    main()
