"""Real jobs of torchrun: ranks that die, and commands that print their output once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bloomlm.cli.main import main
from bloomlm.training.finetune import finetune
from tests.distributed.test_finetune import assert_same_losses, data, flags, losses  # noqa: F401

ROOT = Path(__file__).parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*TORCHRUN, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False
    )


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
    assert "going on from" in done.stderr
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


@pytest.mark.parametrize("degree", [2, 1])
def test_predictions_are_those_of_one_process_and_printed_once(degree: int, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", "--model_name_or_path", "builtin:tiny", "--dtype", "float32", "--device", "cpu"]
    arguments += ["--max_new_tokens", "8", "--batch_size", "2"]
    for prompt in ("Date: 4 May 1999", "one two", "Berlin"):
        arguments += ["--prompt", prompt]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    alone = capsys.readouterr().out
    done = torchrun("-m", "bloomlm", *arguments, "--tensor_parallel_degree", str(degree))
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
