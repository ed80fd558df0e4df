"""Flags from a dataclass, --config, and how the command reports errors."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import click
import pytest

from bloomlm.cli import main as cli
from bloomlm.cli.options import config_command, config_flags, join_values
from bloomlm.errors import ConfigError, DataError
from bloomlm.flags import Flags, flag, same_flag

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Toy:
    out_dir: str = field(metadata={"help": "where to write", "section": "files"})
    rate: float = field(default=0.5, metadata={"help": "speed in 1/s", "section": "numbers"})
    count: int = field(default=-1, metadata={"help": "how many", "section": "numbers"})
    limit: int | None = field(default=None, metadata={"help": "most of them", "section": "numbers"})
    soft: bool = field(default=False, metadata={"help": "be gentle", "section": "numbers", "aliases": ("gentle",)})
    hard_mode: bool = field(default=True, metadata={"help": "be strict", "section": "numbers"})
    kind: Literal["O1", "O2"] = field(default="O1", metadata={"help": "which", "section": "numbers"})
    names: tuple[str, ...] = field(default=("a", "b"), metadata={"help": "some names", "section": "files"})
    maybe: bool | None = field(default=None, metadata={"help": "perhaps", "section": "files"})


def parse(*arguments: str) -> Toy:
    seen: list[Toy] = []
    command = config_command("toy", Toy, seen.append, help="Play.")
    command.main([*arguments], standalone_mode=False)
    return seen[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--soft"], True),
        (["--soft", "True"], True),
        (["--soft", "False"], False),
        (["--soft=no"], False),
        (["--soft", "1"], True),
        (["--soft", "f"], False),
        (["--gentle", "yes"], True),
        (["--gentle", "--count", "3"], True),
        (["--soft", "True", "--gentle", "False"], False),
    ],
)
def test_booleans(arguments: list[str], expected: bool) -> None:
    assert parse("--out_dir", "x", *arguments).soft is expected


def test_values_and_spellings() -> None:
    toy = parse("--out-dir", "x", "--hard-mode", "False", "--count", "-7", "--names", "c, d", "--kind", "o2", "--maybe")
    assert toy == Toy(out_dir="x", hard_mode=False, count=-7, names=("c", "d"), kind="O2", maybe=True)
    assert parse("--out_dir", "").out_dir == ""


def test_a_list_of_names_may_be_several_words() -> None:
    assert parse("--names", "c", "d,e", "f", "--out_dir", "x", "--count", "3") == Toy(
        out_dir="x", names=("c", "d", "e", "f"), count=3
    )
    with pytest.raises(click.UsageError, match="unexpected extra argument"):
        parse("--names", "c", "--out_dir", "x", "d")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out_dir", "x", "--cuont", "3"], "count"),
        (["--out_dir", "x", "--rate", "fast"], "'fast' is not a valid float"),
        (["--out_dir", "x", "--coun", "3"], "No such option"),  # no abbreviations
        (["--out_dir", "x", "--soft", "perhaps"], "not a valid boolean"),
        (["--out_dir", "x", "left"], "unexpected extra argument"),
    ],
)
def test_bad_flags_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(*arguments)
    assert message in caught.value.format_message()


def test_required_flag_may_come_from_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing --out_dir \(where to write\)"):
        parse("--count", "3")
    run = tmp_path / "run.yaml"
    run.write_text("out-dir: y\nrate: 1e-6\ncount: 3\ngentle: true\nnames: [c, d]\nlimit:\nkind: O2\n")
    expected = Toy(out_dir="y", rate=1e-6, count=3, soft=True, names=("c", "d"), kind="O2")
    assert parse("--config", str(run)) == expected
    changed = parse("--count", "4", "--soft", "False", "--config", str(run))
    assert (changed.count, changed.soft, changed.rate) == (4, False, 1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cuont: 3", r"unknown key 'cuont'; did you mean 'count'\?"),
        ("zzzz: 3", "unknown key 'zzzz'; `--help` lists the names"),
        ("count: 3.5", "count is 3.5; expected a whole number"),
        ("soft: maybe", "soft is 'maybe'; expected True or False"),
        ("count:", "count is empty; expected a whole number"),
        ("kind: O3", "kind is 'O3'; expected one of O1, O2"),
        ("rate: [1, 2]", r"rate is \[1, 2\]; expected a number"),
        ("soft: true\ngentle: true", "soft is given twice"),
        ("- 1", "expected lines of `name: value`, found a list"),
        ("a: b: c", "cannot read --config"),
    ],
)
def test_bad_run_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(content)
    with pytest.raises(ConfigError, match=message):
        join_values(config_flags(Toy), {"out_dir": "x"}, run)
    with pytest.raises(ConfigError, match="cannot read --config"):
        join_values(config_flags(Toy), {"out_dir": "x"}, tmp_path / "absent.yaml")


@dataclass(frozen=True, kw_only=True)
class Ranged(Flags):
    share: float | None = flag("numbers", None, "a share", minimum=0, below=1)
    count: int = flag("numbers", 1, "a count", minimum=1)
    epsilon: float = flag("numbers", 0.5, "a small number", above=0, maximum=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 0.0, "count": 1, "epsilon": 1.0}, None),
        ({"share": 1.0}, "--share is 1.0; expected at least 0 and below 1"),
        ({"share": -0.1}, "--share is -0.1; expected at least 0 and below 1"),
        ({"count": 0}, "--count is 0; expected at least 1"),
        ({"epsilon": 0.0}, "--epsilon is 0.0; expected above 0 and at most 1"),
        ({"epsilon": 1.5}, "--epsilon is 1.5; expected above 0 and at most 1"),
        ({"epsilon": float("nan")}, "--epsilon is nan; expected above 0 and at most 1"),
    ],
)
def test_no_config_is_made_of_numbers_out_of_range(values: dict[str, float], message: str | None) -> None:
    if message is None:
        assert vars(Ranged(**values)) == values
        return
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Ranged(**values)


def test_the_same_flag_in_another_config_takes_changes() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other(Flags):
        count: int = same_flag(Ranged, "count", default=3, help="another count")

    [other] = config_flags(Other)
    assert (other.default, other.help, other.section) == (3, "another count", "numbers")
    with pytest.raises(ConfigError, match="--count is 0; expected at least 1"):
        Other(count=0)


def test_help_is_grouped_and_shows_defaults() -> None:
    command = config_command("toy", Toy, lambda toy: None, help="Play.")
    text = command.get_help(click.Context(command, info_name="toy", terminal_width=100))
    files, numbers = text.index("Files:"), text.index("Numbers:")
    assert files < text.index("where to write  [required]") < text.index("some names  [default: a,b]") < numbers
    assert "speed in 1/s  [default: 0.5]" in text
    assert "--soft, --gentle [True|False]" in text
    assert "--kind [O1|O2]" in text


def run_main(command: click.Command, arguments: Sequence[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli._exit_with(command, list(arguments), "toy")
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_errors_are_one_line_and_status_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(toy: Toy) -> None:
        raise DataError("rows.jsonl, line 3: no target")

    command = config_command("toy", Toy, fail, help="Play.")
    assert run_main(command, ["--out_dir", "x"]) == 2
    assert capsys.readouterr().err == "error: rows.jsonl, line 3: no target\n"
    assert run_main(command, ["--out_dri", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No such option") and "--out_dir" in error and "`toy --help`" in error
    monkeypatch.setenv("BLOOMLM_DEBUG", "1")
    with pytest.raises(DataError):
        cli._exit_with(command, ["--out_dir", "x"], "toy")


def test_status_of_success_interrupt_and_verb(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(toy: Toy) -> None:
        raise KeyboardInterrupt

    def terminated(toy: Toy) -> None:
        raise SystemExit(143)

    for run, status in ((lambda toy: None, 0), (interrupted, 130), (terminated, 143)):
        assert run_main(config_command("toy", Toy, run, help="Play."), ["--out_dir", "x"]) == status
    with pytest.raises(SystemExit) as caught:
        cli.main(["finetun"])
    assert caught.value.code == 2
    assert "unknown verb 'finetun'; did you mean 'finetune'?" in capsys.readouterr().err


def test_every_verb_has_its_file_and_help_needs_no_torch() -> None:
    for verb, (module, _) in cli.VERBS.items():
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), verb
    for arguments in (["--help"], ["--version"], ["finetune", "--help"]):
        code = (
            "import sys\nfrom bloomlm.cli.main import main\n"
            f"try: main({arguments!r})\nexcept SystemExit as e: assert e.code == 0\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert arguments[0] == "--version" or "finetune" in done.stdout


def test_importing_a_verb_looks_for_no_garbage_and_switches_the_collector_on_again() -> None:
    code = (
        "import gc\nfrom bloomlm.cli.main import main\n"
        "full = gc.get_stats()[2]['collections']\n"
        "try: main(['infer', '--model_dir', 'nowhere', '--prompt', 'x'])\nexcept SystemExit: pass\n"
        "assert gc.get_stats()[2]['collections'] - full <= 1 and gc.get_freeze_count() > 100_000 and gc.isenabled()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bloomlm_without_a_verb_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 0
    shown = capsys.readouterr()
    assert "finetune" in shown.out
    assert shown.err == ""
