"""Counts the blocks of the documentation, and what becomes of each: python -m tests.distributed.count_documented."""

from collections import Counter
from pathlib import Path

from tests.distributed.documented import Block, blocks, commands
from tests.distributed.test_documented_commands import NOT_RUN, PAGES, SHOWN, TUTORIAL

RUN, ELSEWHERE, NOT, SHOWS = "run", "run by another test", "not run, with the reason", "shows a file or an output"
ROW = "{:22}" + "{:>28}" * 4


def fate(block: Block, page: Path) -> str:
    """What the tests do with a block; one without a row in their tables fails its test."""
    if block.text.startswith(SHOWN) or not (block.is_shell or block.is_python or block.text.startswith(tuple(NOT_RUN))):
        return SHOWS
    whole = page == TUTORIAL or not block.is_shell or block.text.startswith(tuple(NOT_RUN))
    texts = [block.text] if whole else [command.text for command in commands(block)]
    starts = ("pip install",) if page == TUTORIAL else tuple(NOT_RUN)
    reasons = [NOT_RUN[start] for text in texts for start in starts if text.startswith(start)]
    if len(reasons) < len(texts):
        return RUN
    return ELSEWHERE if any(word in reason for reason in reasons for word in ("tests/", "the same")) else NOT


def main() -> None:
    """Print a row for each page that has blocks, and one for all."""
    total: Counter[str] = Counter()
    print(ROW.format("page", RUN, ELSEWHERE, NOT, SHOWS))
    for page in [*PAGES, TUTORIAL]:
        found = Counter(fate(block, page) for block in blocks(page))
        if found:
            print(ROW.format(page.name, *(found[kind] for kind in (RUN, ELSEWHERE, NOT, SHOWS))))
        total += found
    print(ROW.format("all", *(total[kind] for kind in (RUN, ELSEWHERE, NOT, SHOWS))))


if __name__ == "__main__":
    main()
