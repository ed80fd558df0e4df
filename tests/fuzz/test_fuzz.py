"""500 mutations with a fixed seed, and the fuzzer itself: it must see every rule that is broken."""

import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from bloomlm.errors import BloomlmError, CheckpointError, ProgramError
from tests.fuzz.__main__ import all_cases
from tests.fuzz.file_kinds import KINDS, FileKind, Open, build_templates
from tests.fuzz.mutators import Evil
from tests.fuzz.pool import run_cases
from tests.fuzz.worker import MEMORY_BYTES, READ, REFUSED, Outcome

QUICK = tuple(kind for kind in KINDS if not kind.is_slow)


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("templates")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("CXX", "no-compiler")  # compiling the operators takes longer than everything else here
        patch.setenv("BLOOMLM_CACHE", str(directory / "cache"))
        build_templates(directory, QUICK)
        yield directory


def test_damaged_files_are_read_or_refused_by_name(templates: Path, tmp_path: Path) -> None:
    cases = list(islice(all_cases(QUICK, seed=0), 500))
    outcomes = list(run_cases(cases, templates, tmp_path, num_workers=1))
    assert len(outcomes) == 500
    assert [str(outcome) for outcome in outcomes if not outcome.is_right] == []
    assert {outcome.kind for outcome in outcomes} == {kind.name for kind in QUICK}
    refused = sum(outcome.verdict == REFUSED for outcome in outcomes)
    assert 250 < refused < 450  # the mutations do harm, and not all of them are found at the first byte


def outcomes_of(action: Open, templates: Path, scratch: Path) -> list[Outcome]:
    """The outcomes of two mutations of a file kind that is opened by the action."""
    kind = replace(KINDS[0], open=action, raises=(CheckpointError,))
    return list(run_cases([(kind, 1), (kind, 2)], templates, scratch, num_workers=1))


def refuse(message: str, kind: type[BloomlmError] = CheckpointError) -> Open:
    def action(directory: Path, templates: Path, out: Path) -> None:
        raise kind(message.format(directory=directory))

    return action


def hang(directory: Path, templates: Path, out: Path) -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("action", "verdict"),
    [
        (lambda directory, templates, out: None, READ),
        (refuse("{directory} is damaged"), REFUSED),
        (refuse("something is damaged"), "unnamed"),
        (refuse("{directory} is damaged", ProgramError), "kind of error"),
        (lambda directory, templates, out: {}["missing"], "traceback"),
        (lambda directory, templates, out: bytearray(2 * MEMORY_BYTES), "memory"),
        (lambda directory, templates, out: [bytearray(2**20) for _ in range(1000)], "memory"),
        (lambda directory, templates, out: os.kill(os.getpid(), signal.SIGSEGV), "crash"),
        (lambda directory, templates, out: pickle.loads(pickle.dumps(Evil())), "escape"),
        (lambda directory, templates, out: (directory / "../marker").write_text("x"), "escape"),
        (lambda directory, templates, out: Path("../secret").read_bytes(), "escape"),
        (lambda directory, templates, out: (templates / "old").rename(templates / "new"), "escape"),
        (lambda directory, templates, out: out.write_text("a result"), READ),
    ],
)
def test_the_fuzzer_sees(action: Open, verdict: str, templates: Path, tmp_path: Path) -> None:
    outcomes = outcomes_of(action, templates, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == [verdict, verdict]
    assert list(tmp_path.iterdir()) == []


def test_a_hang_is_ended_and_the_next_mutation_runs(
    templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.pool.HANG_SECONDS", 0.3)

    def first_hangs(directory: Path, templates: Path, out: Path) -> None:
        if directory.parent.name.endswith("-1"):
            hang(directory, templates, out)

    started = time.monotonic()
    outcomes = outcomes_of(first_hangs, templates, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == ["hang", READ]
    assert outcomes[0].seconds <= time.monotonic() - started


def test_a_seed_repeats_a_mutation(templates: Path, tmp_path: Path) -> None:
    kind: FileKind = next(kind for kind in QUICK if kind.name == "torch .bin")
    first, again = (
        [
            replace(o, seconds=0, peak_bytes=0, detail="")
            for o in run_cases([(kind, 5), (kind, 6)], templates, tmp_path, 1)
        ]
        for _ in range(2)
    )
    assert first == again
    assert first[0].mutation != first[1].mutation
