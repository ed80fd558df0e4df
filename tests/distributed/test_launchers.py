"""Real jobs of torchrun and of --num_processes: ranks that die, and commands that print their output once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from bloomlm.cli.main import main
from bloomlm.training.finetune import finetune
from tests.distributed.test_finetune import assert_same_losses, data, flags, losses  # noqa: F401

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300, check=False)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call(*TORCHRUN, *arguments)


def command_line(output_dir: Path, data_dir: Path) -> list[str]:
    config = flags(output_dir, data_dir, per_device_train_batch_size=4, tensor_parallel_degree=2, save_steps=1)
    names = "model_name_or_path train_file eval_file output_dir max_steps logging_steps save_steps eval_steps"
    more = "evaluation_strategy learning_rate adam_epsilon src_length tgt_length disable_tqdm report_to device"
    rest = "per_device_train_batch_size tensor_parallel_degree"
    return [part for name in f"{names} {more} {rest}".split() for part in (f"--{name}", str(getattr(config, name)))]


def test_a_killed_rank_ends_all_and_a_restart_goes_on(tmp_path: Path, data: Path) -> None:  # noqa: F811
    done = torchrun("--max-restarts", "1", "tests/distributed/killed_run.py", "kill", "finetune",
                    *command_line(tmp_path / "run", data))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    finetune(flags(tmp_path / "one", data, per_device_train_batch_size=4, save_steps=100))
    assert_same_losses(losses(tmp_path / "run"), losses(tmp_path / "one"))


def test_a_rank_that_raises_is_named_once(tmp_path: Path, data: Path) -> None:  # noqa: F811
    done = torchrun("tests/distributed/killed_run.py", "raise", "finetune", *command_line(tmp_path / "run", data))
    assert done.returncode != 0
    assert done.stderr.count("RuntimeError: a fault of rank 1") == 1
    assert done.stderr.count("on rank 1 of 2") == 1
    # nothing but torchrun's own report says that something failed on another rank
    assert "Connection closed by peer" not in done.stderr
    manifest = json.loads((tmp_path / "run" / "checkpoint-2" / "checkpoint_manifest.json").read_text())
    assert manifest["step"] == 2
    assert not (tmp_path / "run" / "checkpoint-3").exists()


@pytest.mark.parametrize(
    ("launcher", "degree"),
    [
        ((*TORCHRUN, "-m", "bloomlm", "predict"), 2),
        ((sys.executable, "predict_generation.py", "--num_processes", "2"), 1),
    ],
    ids=["torchrun", "num_processes"],
)
def test_predictions_are_those_of_one_process_and_printed_once(
    launcher: tuple[str, ...], degree: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_name_or_path", "builtin:tiny", "--dtype", "float32", "--device", "cpu"]
    arguments += ["--max_new_tokens", "8", "--batch_size", "2"]
    for prompt in ("Date: 4 May 1999", "one two", "Berlin"):
        arguments += ["--prompt", prompt]
    with pytest.raises(SystemExit) as ended:
        main(["predict", *arguments])
    assert not ended.value.code
    alone = capsys.readouterr().out
    done = call(*launcher, *arguments, "--tensor_parallel_degree", str(degree))
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone


def test_an_error_of_the_users_is_one_line_and_the_status(tmp_path: Path) -> None:
    lacking = ["--model_name_or_path", str(tmp_path / "absent"), "--output_dir", str(tmp_path / "run"), "--r", "8"]
    lacking += ["--lora", "--train_file", str(tmp_path / "absent.jsonl")]
    done = call(sys.executable, "-m", "bloomlm", "finetune", "--num_processes", "2", *lacking)
    assert done.returncode == 2, done.stderr
    assert len(re.findall(r"^error( on rank \d of 2)?: .*absent", done.stderr, re.MULTILINE)) == 1
    assert len(done.stderr.splitlines()) <= 2, done.stderr  # with a note about the flags


def test_after_two_dashes_all_flags_are_the_scripts() -> None:
    """Without them torchrun takes --r for the beginning of one of its own."""
    found = parse_args(["--nproc-per-node", "2", "--", "finetune_generation.py", "--lora", "--r", "8"])
    assert (found.training_script, found.training_script_args) == ("finetune_generation.py", ["--lora", "--r", "8"])


def wait_for_step(run: subprocess.Popen[str], metrics: Path, num_lines: int) -> None:
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < num_lines:
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1]
        time.sleep(0.1)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process."""
    found = {}
    for process in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        found |= {int(word.removeprefix(b"RANK=")): int(process) for word in words if word.startswith(b"RANK=")}
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc, which is Linux's")
def test_signals_end_all_ranks_and_a_stopped_run_has_saved(tmp_path: Path, data: Path) -> None:  # noqa: F811
    """SIGTERM to the launcher and, as Slurm sends it, to every rank; the same command goes on until a rank is killed."""
    words = [*command_line(tmp_path / "run", data), "--max_steps", "5000", "--save_steps", "5000"]
    command = [sys.executable, "-m", "bloomlm", "finetune", "--num_processes", "2", *words]
    metrics, told, statuses = tmp_path / "run" / "metrics.jsonl", [], []
    for stop in ("launcher", "rank"):
        num_lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT) as run:
            wait_for_step(run, metrics, num_lines + 1)
            ranks = ranks_of(run.pid)
            assert ranks.keys() == {0, 1}
            if stop == "launcher":
                for process in (run.pid, *ranks.values()):
                    os.kill(process, signal.SIGTERM)
            else:
                os.kill(ranks[1], signal.SIGKILL)
            told.append(run.communicate(timeout=300)[1])
            statuses.append(run.returncode)
        assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert statuses == [128 + signal.SIGTERM, 128 + signal.SIGKILL]
    assert told[0].count("stopped by SIGTERM after step") == 1 and "error" not in told[0]
    [checkpoint] = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "checkpoint_manifest.json").is_file()
    assert told[1].count(f"resuming from {checkpoint}") == 1
    assert told[1].count("error") == 1 and "error: rank 1 was ended by SIGKILL" in told[1]
    assert "Traceback" not in told[0] + told[1]
    assert "torch/distributed" not in told[0] + told[1]  # the launcher's own log
