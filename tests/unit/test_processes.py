"""--num_processes: which flags go together, and what the ranks are started with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from bloomlm.cli import options
from bloomlm.cli.finetune import command
from bloomlm.cli.options import config_command
from bloomlm.cli.processes import ProcessFlags, _tell_end, starts_ranks
from bloomlm.errors import ConfigError
from bloomlm.flags import REQUIRED, Flags, flag


@dataclass(frozen=True, kw_only=True)
class Toy(Flags):
    out_dir: str = flag("files", REQUIRED, "where to write")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def run_toy(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[Toy], list[Any]]:
    """The configs that were run in this process, and the ranks that were started."""
    ran: list[Toy] = []
    started: list[Any] = []

    def start_ranks(flags: ProcessFlags, words: Sequence[str], *, ends_by_signal: bool) -> None:
        started.append((flags.num_processes, list(words)))

    monkeypatch.setattr(options, "start_ranks", start_ranks)
    config_command("toy", Toy, ran.append, help="Play.", has_ranks=True).main([*arguments], standalone_mode=False)
    return ran, started


def test_ranks_get_the_words_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out-dir", "a b", "--num_processes", "2"]
    assert run_toy(monkeypatch, *words) == ([], [(2, ["toy", *words])])
    assert run_toy(monkeypatch, "--out_dir", "x") == ([Toy(out_dir="x")], [])


def test_a_run_file_starts_ranks_too_and_a_rank_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("out_dir: x\nnum_processes: 2\n")
    words = ["--config", str(run)]
    assert run_toy(monkeypatch, *words) == ([], [(2, ["toy", *words])])
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = ["--num_processes", "1", "--nnodes", "1"]
    assert run_toy(monkeypatch, *words, *alone) == ([Toy(out_dir="x")], [])


def test_what_cannot_run_is_refused_before_ranks_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="missing --out_dir"):
        run_toy(monkeypatch, "--num_processes", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 0}, "--num_processes is 0; expected at least 1"),
        ({"num_processes": 3, "nnodes": 2}, "counts the processes of all machines"),
        ({"num_processes": 4, "master_addr": "10.0.0.1"}, "--master_addr: not used on one machine"),
        ({"node_rank": 0, "master_port": 1}, "--node_rank, --master_port: not used on one machine"),
        ({"num_processes": 4, "nnodes": 2, "master_addr": "10.0.0.1"}, "--node_rank is None; .* expected 0 to 1"),
        ({"num_processes": 4, "nnodes": 2, "node_rank": 2}, "--node_rank is 2; .* expected 0 to 1"),
        ({"num_processes": 4, "nnodes": 2, "node_rank": 1}, "--nnodes 2 needs --master_addr"),
    ],
)
def test_flags_that_do_not_go_together(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        starts_ranks(ProcessFlags(**flags))


def test_flags_that_go_together() -> None:
    assert not starts_ranks(ProcessFlags())
    assert starts_ranks(ProcessFlags(num_processes=2))
    assert starts_ranks(ProcessFlags(num_processes=2, nnodes=2, node_rank=0, master_addr="10.0.0.1", master_port=1))


def test_a_rank_starts_no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ConfigError, match=r"torchrun or another launcher .*WORLD_SIZE is 8"):
        starts_ranks(ProcessFlags(num_processes=8))
    assert not starts_ranks(ProcessFlags())


@pytest.mark.parametrize(
    ("exitcodes", "status", "message"),
    [
        ({0: 2, 1: -15}, 2, ""),
        ({0: -15, 1: 1}, 1, "error: rank 1 ended with status 1\n"),
        ({0: 1, 1: 2}, 2, ""),
        ({0: 143, 1: 143}, 143, ""),
        ({0: 1, 1: -9}, 137, "error: rank 1 was ended by SIGKILL; the system does so when memory runs out\n"),
        ({0: -15, 1: -11}, 139, "error: rank 1 was ended by SIGSEGV\n"),
    ],
)
def test_the_rank_that_is_the_cause_gives_the_status(
    exitcodes: dict[int, int], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _tell_end(exitcodes) == status
    assert capsys.readouterr().err == message


def test_the_rank_of_lora_has_two_names() -> None:
    [rank] = [param for param in command.params if param.name == "r"]
    assert isinstance(rank, click.Option)
    assert rank.opts == ["--r", "--lora_rank"]
