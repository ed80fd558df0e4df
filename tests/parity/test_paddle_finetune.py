"""`bloomlm finetune` resumes from PaddleNLP's checkpoints: the recorded batches give the recorded losses.

The adapters' runs were recorded with Paddle's wrong gradient of layer norms in front of frozen weights (see
test_paddle_resume.py), so it is put in here too.
"""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bloomlm
from bloomlm.adapters.base import FullTuning, apply_adapter
from bloomlm.data.loader import Batch
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from bloomlm.training import optimizer, setup
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from tests.paddle_files import paddle_state, variable_names, write, write_json
from tests.paddle_fixtures import FIXTURES, FULL_CHECKPOINT, needs_full_checkpoint
from tests.parity.test_paddle_fixtures import BASE, PAD, REF, load_base
from tests.parity.test_paddle_resume import CHECKPOINTS, adam_tensors, build_adamw, paddles_frozen_layer_norm, replay

EXAMPLES, BATCHES = 24, 6  # of an epoch there, by the recorded fractions of an epoch
FLAGS = {
    "full": {},
    "lora": {"lora": True, "r": 8},
    "prefix": {"prefix_tuning": True, "num_prefix_tokens": 6, "prefix_projection": True},
}


class Recorded:
    """The recorded batches in place of a loader, without the padding at the end of each row."""

    trace = ""

    def __init__(self, examples: Any, batch_size: Any, **options: Any) -> None:
        self.position = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Batch]:
        while True:
            step = self.position * BATCHES // EXAMPLES
            self.position += EXAMPLES // BATCHES
            yield self.batch(step)

    def batch(self, step: int) -> Batch:
        stored = np.load(FIXTURES / "train_trace" / self.trace / f"train_step{step}.npz")
        tokens, labels, lengths = [], [], []
        for ids, targets in zip(stored["input_ids"], stored["labels"], strict=True):
            end = int(np.flatnonzero(targets != PAD)[-1])
            tokens.append(ids[:end])
            labels.append(np.where(targets[1 : end + 1] == PAD, IGNORE_INDEX, targets[1 : end + 1]))
            lengths.append(end)
        all_labels = np.concatenate(labels)
        return Batch(
            tokens=torch.from_numpy(np.concatenate(tokens)),
            labels=torch.from_numpy(all_labels),
            lengths=tuple(lengths),
            num_supervised_tokens=int((all_labels != IGNORE_INDEX).sum()),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0, "position": self.position, "num_examples": EXAMPLES}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["epoch"] == 0 and state["num_examples"] == EXAMPLES
        self.position = state["position"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def flags(tmp_path: Path, kind: str, checkpoint: Path | None, **options: Any) -> TrainingConfig:
    """Those of the recorded runs."""
    rows = [{"src": f"question {number}", "tgt": f"answer {number}"} for number in range(EXAMPLES)]
    train_file = tmp_path / "train.jsonl"
    train_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "model_name_or_path": str(FIXTURES / BASE),
        "train_file": str(train_file),
        "output_dir": str(tmp_path / "out"),
        "resume_from_checkpoint": None if checkpoint is None else str(checkpoint),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_steps": 1,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "device": "cpu",
    }
    return TrainingConfig(**{**values, **FLAGS[kind], **options})


def losses(output_dir: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def assert_losses(output_dir: Path, trace: str, tolerance: float) -> None:
    found = losses(output_dir)
    assert list(found) == [3, 4]
    for step, loss in found.items():
        expected = np.load(FIXTURES / "train_trace" / trace / f"train_step{step - 1}.npz")["loss"]
        assert abs(loss - float(expected)) < tolerance, step


def logits(directory: Path, kind: str) -> torch.Tensor:
    options = {} if kind == "full" else {f"{kind}_path": directory}
    loaded = bloomlm.load(directory if kind == "full" else FIXTURES / BASE, **options)
    with torch.no_grad():
        return loaded.model(torch.from_numpy(np.load(FIXTURES / REF / "ids.npy")))


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_adapters_follow_the_record(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "BatchLoader", Recorded)
    monkeypatch.setattr(Recorded, "trace", f"A_{kind}")
    checkpoint = FIXTURES / CHECKPOINTS.format(f"_{kind}", 2)
    config = flags(tmp_path, kind, checkpoint)
    with paddles_frozen_layer_norm(monkeypatch):
        finetune(config)
        told = capsys.readouterr().err
        assert f"from PaddleNLP's {checkpoint}: step 2" in told and "AdamW's moments after 2 updates" in told
        assert "warning" not in told  # the learning rate is the recorded one
        out = tmp_path / "out"
        assert_losses(out, f"A_{kind}", 5e-6)
        last = FIXTURES / CHECKPOINTS.format(f"_{kind}", 4)
        if last.is_dir():  # the archive has LoRA's only
            assert (logits(out, kind) - logits(last, kind)).abs().max() < 5e-5
        # killed after step 3, the same command resumes from its own checkpoint with the same bits
        whole, killed = losses(out), tmp_path / "killed"
        shutil.copytree(out, killed, ignore=shutil.ignore_patterns("checkpoint-4", "*.safetensors", "metrics.jsonl"))
        shutil.copy(out / "checkpoint-3" / "adapter_model.safetensors", killed / "checkpoint-3")
        finetune(flags(tmp_path, kind, checkpoint, output_dir=str(killed)))
    assert losses(killed) == {4: whole[4]}
    name = "adapter_model.safetensors"
    assert (killed / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_correct_gradients_stay_close(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "BatchLoader", Recorded)
    monkeypatch.setattr(Recorded, "trace", f"A_{kind}")
    finetune(flags(tmp_path, kind, FIXTURES / CHECKPOINTS.format(f"_{kind}", 2)))
    assert_losses(tmp_path / "out", f"A_{kind}", 5e-3)


def write_full_checkpoint(directory: Path) -> None:
    """The checkpoint that PaddleNLP would have written after two steps of the full run, of which only the last is recorded."""
    model = load_base(BASE)
    apply_adapter(model, FullTuning())
    adamw = build_adamw(model, None)
    replay(model, adamw, "A_full", range(2))
    names = variable_names(model.config)
    content: dict[str, Any] = {"LR_Scheduler": {"last_epoch": 2, "last_lr": 0.0007}}
    for key, kind in (("exp_avg", "moment1"), ("exp_avg_sq", "moment2")):
        for name, tensor in adam_tensors(model, adamw, key).items():
            structured = name.replace("transformer.", "bloom.", 1)
            linear = ".h." in name and tensor.dim() == 2
            content[f"{names[structured]}_{kind}_0"] = (tensor.t() if linear else tensor).contiguous().numpy()
    for name in ("config.json", "vocab.json", "merges.txt"):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FIXTURES / BASE / name, directory / name)
    write(directory / "model_state.pdparams", paddle_state(model) | {"StructuredToParameterName@@": names})
    write(directory / "optimizer.pdopt", content)
    write_json(directory / "trainer_state.json", {"global_step": 2, "max_steps": 4})


def test_full_tuning_follows_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resume from the second step of PaddleNLP, as test_paddle_resume.py reconstructs it."""
    monkeypatch.setattr(setup, "BatchLoader", Recorded)
    monkeypatch.setattr(Recorded, "trace", "A_full")
    # PaddleNLP decayed ln_f's weight too
    monkeypatch.setattr(optimizer, "is_decayed", lambda name: "bias" not in name and "norm" not in name)
    write_full_checkpoint(tmp_path / "checkpoint-2")
    finetune(flags(tmp_path, "full", tmp_path / "checkpoint-2"))
    assert_losses(tmp_path / "out", "A_full", 5e-5)
    if FULL_CHECKPOINT.is_dir():
        expected = logits(FIXTURES / CHECKPOINTS.format("", 4), "full")
        assert (logits(tmp_path / "out", "full") - expected).abs().max() < 2e-3


@needs_full_checkpoint
def test_an_output_directory_of_paddlenlps_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Like PaddleNLP's script, resume in the same --output_dir from its newest checkpoint, with new examples."""
    out = tmp_path / "out"
    shutil.copytree(FULL_CHECKPOINT, out, copy_function=shutil.copyfile)
    for path in (out, out / "checkpoint-4"):
        path.chmod(0o755)
    theirs = {path: path.read_bytes() for path in (out / "checkpoint-4").iterdir()}
    result = finetune(flags(tmp_path, "full", None, max_steps=6, save_total_limit=1))
    told = capsys.readouterr().err
    assert result.step == 6 and list(losses(out)) == [5, 6]
    assert "step 4, weights of the whole model, AdamW's moments after 4 updates" in told
    assert "is skipped" not in caplog.text
    assert (
        "the learning rate of the next step is 0.00046, but the checkpoint recorded 0.0001" in told
        and "and --max_steps 4" in told
    )
    assert {path: path.read_bytes() for path in (out / "checkpoint-4").iterdir()} == theirs
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4, 5, 6]
    finetune(flags(tmp_path, "full", None, max_steps=7))
    assert list(losses(out)) == [5, 6, 7]
    with pytest.warns(UserWarning, match=r"those are read, and model_state\.pdparams is not"):
        bloomlm.load(out)
    old = pickle.loads((out / "checkpoint-4" / "model_state.pdparams").read_bytes())
    new = bloomlm.load(out / "checkpoint-7").model.state_dict()["transformer.word_embeddings.weight"]
    assert 0 < np.abs(new.numpy() - old["bloom.word_embeddings.weight"]).max() < 3e-3  # three steps of Adam
