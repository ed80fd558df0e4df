"""A run that SIGKILL ends at any moment and that starts again has the weights of an undisturbed run, bit for bit.

The test starts this file as a program, which imports torch once and forks a process for every attempt.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import Adapter, FullTuning, apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.training_state import (
    checkpoint_directory,
    load_training_state,
    newest_checkpoint,
    prune_checkpoints,
    read_values,
    save_training_state,
)
from bloomlm.checkpoint.writer import write_model
from bloomlm.data.loader import BatchLoader
from bloomlm.files.atomic import atomic_directory
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.training.loop import LoopConfig, train
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.results import StepLog, StepResult
from bloomlm.training.step import StepConfig, Trainer
from tests.unit.test_loop import V, some_examples

ADAPTERS: dict[str, Adapter] = {"full": FullTuning(), "lora": LoraConfig(r=2, lora_dropout=0.2)}
MAX_STEPS = 40
NUM_KILLS = 12
"""More attempts on a busy machine, where each does fewer steps; they get longer until one comes to another step."""


def build_model(adapter_name: str, checkpoint: Path | None) -> BloomForCausalLM:
    adapter = ADAPTERS[adapter_name]
    if checkpoint is not None and isinstance(adapter, FullTuning):
        model = load_model(str(checkpoint))
    else:
        config = BloomConfig(vocab_size=V, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.1)
        model = BloomForCausalLM(config)
        model.init_weights(torch.Generator().manual_seed(0))
    apply_adapter(model, adapter, torch.Generator().manual_seed(1))
    return model


class Saver:
    """Callbacks of a run that keeps two checkpoints."""

    def __init__(self, trainer: Trainer, output_dir: Path) -> None:
        self.trainer = trainer
        self.output_dir = output_dir

    def on_step(self, result: StepResult) -> None: ...

    def on_log(self, log: StepLog) -> None: ...

    def on_evaluate(self, step: int) -> None: ...

    def ends_early(self) -> bool:
        return False

    def on_save(self, step: int) -> None:
        with checkpoint_directory(self.output_dir, step) as directory:
            if all(p.requires_grad for p in self.trainer.model.parameters()):
                write_model(directory, self.trainer.model.config, self.trainer.model.named_parameters())
            save_training_state(directory, *self.trainer.state())
        prune_checkpoints(self.output_dir, 2)


def attempt(adapter_name: str, output_dir: Path) -> None:
    """Start, or resume from the newest checkpoint, and write the learned weights at the end."""
    checkpoint = newest_checkpoint(output_dir)
    trainer = Trainer(
        build_model(adapter_name, checkpoint),
        BatchLoader(some_examples(), 3, shuffle=True, seed=4),
        optimizer=AdamWConfig(weight_decay=0.1),
        schedule=ScheduleConfig(learning_rate=0.02, warmup_steps=3).over(MAX_STEPS),
        precision=Precision(),
        config=StepConfig(gradient_accumulation_steps=2),
    )
    if checkpoint is not None:
        tensors, _ = trainer.state()
        trainer.load_state(tensors, load_training_state(checkpoint, tensors))
    train(trainer, LoopConfig(max_steps=MAX_STEPS, save_steps=3), Saver(trainer, output_dir))
    prune_checkpoints(output_dir, 2)  # the last kill may have come after the last save and before its pruning
    with atomic_directory(output_dir / "final") as directory:
        torch.save(dict(trainer.model.named_parameters()), directory / "weights.pt")


def fork_attempt(adapter_name: str, output_dir: Path) -> int:
    process_id = os.fork()
    if process_id == 0:
        status = 1
        try:
            attempt(adapter_name, output_dir)
            status = 0
        finally:
            os._exit(status)
    return process_id


def main(adapter_name: str, directory: Path) -> None:
    """Do one run undisturbed and one that is killed again and again; print the step at which each attempt began."""
    torch.set_num_threads(1)
    attempt(
        adapter_name, directory / "warm"
    )  # so that modules which the first step imports are imported before the forks
    start = time.monotonic()
    _, status = os.waitpid(fork_attempt(adapter_name, directory / "whole"), 0)
    if status != 0:
        sys.exit("the undisturbed run failed")
    whole_seconds = time.monotonic() - start
    print(f"{whole_seconds:.2f} seconds", file=sys.stderr)
    moments = random.Random(11)
    began_from: list[int] = []
    while len(began_from) < NUM_KILLS or (len(set(began_from)) < 3 and len(began_from) < 5 * NUM_KILLS):
        checkpoint = newest_checkpoint(directory / "killed")
        began_from.append(0 if checkpoint is None else read_values(checkpoint)["step"])
        print(began_from[-1], flush=True)
        process_id = fork_attempt(adapter_name, directory / "killed")
        patience = max(1.0, len(began_from) / NUM_KILLS)
        time.sleep(moments.uniform(0.02, 0.22) * whole_seconds * patience)
        os.kill(process_id, signal.SIGKILL)
        os.waitpid(process_id, 0)
    _, status = os.waitpid(fork_attempt(adapter_name, directory / "killed"), 0)
    if status != 0:
        sys.exit("the last run failed")


@pytest.mark.parametrize("adapter_name", ["full", "lora"])
def test_a_killed_and_restarted_run_gives_the_same_weights(adapter_name: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "tests.unit.test_kill_resume", adapter_name, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    began_from = [int(line) for line in process.stdout.split()]
    assert len(set(began_from)) >= 3, began_from  # it was killed and resumed at several steps
    whole, killed = (torch.load(tmp_path / run / "final" / "weights.pt") for run in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, expected in whole.items():
        assert torch.equal(killed[name], expected), name
    fresh = dict(build_model(adapter_name, None).named_parameters())
    assert any(not torch.equal(fresh[name], weight) for name, weight in whole.items())
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == ["checkpoint-39", "checkpoint-40", "final"]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
