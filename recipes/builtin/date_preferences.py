"""Step 5: builtin:dates-preference, dates as ISO 8601 beside the same dates in another form.

    python recipes/builtin/date_preferences.py OUTPUT_DIR

Writes train.jsonl and dev.jsonl, rows {"prompt", "chosen", "rejected", "lang"}, from rows of the same splits of
builtin:dates. The rejected answer is the same date with the day first: 12/03/2019.
"""

import argparse
import datetime
import json
from pathlib import Path

NUM_ROWS = {"train": 760, "dev": 152}
DATES = Path(__file__).parents[2] / "bloomlm" / "assets" / "dates"


def rows(split: str) -> list[dict[str, str]]:
    """The rows of a split, in the order of its file."""
    lines = (DATES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[: NUM_ROWS[split]]
    pairs = map(json.loads, lines)
    return [
        {
            "prompt": pair["src"],
            "chosen": pair["tgt"],
            "rejected": datetime.date.fromisoformat(pair["tgt"]).strftime("%d/%m/%Y"),
            "lang": pair["lang"],
        }
        for pair in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for split in NUM_ROWS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(split)]
        (output_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
