"""The commands on the GPU, and runs that resume there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune

SHORT = {
    "model_name_or_path": "builtin:tiny",
    "dataset_name_or_path": "builtin:dates",
    "max_steps": 8,
    "save_steps": 4,
    "logging_steps": 4,
    "per_device_train_batch_size": 16,
    "device": "gpu",
}
KINDS = {
    "full": {},
    "lora": {"lora": True},
    "full bf16": {"bf16": True},
    "full fp16 O2": {"fp16": True, "fp16_opt_level": "O2"},
    "prefix bf16": {"prefix_tuning": True, "bf16": True},
}


def run(directory: Path, **options: object) -> dict[str, torch.Tensor]:
    finetune(TrainingConfig(output_dir=str(directory), **{**SHORT, **options}))
    (weights,) = directory.glob("*model.safetensors")
    return load_file(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_resumes_gives_the_same_weights(tmp_path: Path, kind: str) -> None:
    expected = run(tmp_path / "whole", **KINDS[kind])
    run(tmp_path / "stopped", max_steps=8, **KINDS[kind])
    stopped = tmp_path / "stopped"
    # what a run that was killed after step 6 leaves
    for path in stopped.iterdir():
        if path.name != "checkpoint-4":
            subprocess.run(["rm", "-r", str(path)], check=True)
    found = run(stopped, **KINDS[kind])
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)}: {different[:5]}"


def bloom(*words: str) -> str:
    command = [sys.executable, "-m", "bloomlm", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_finetune_predict_and_evaluate_from_the_command_line(tmp_path: Path) -> None:
    model = ("--model_name_or_path", "builtin:tiny")
    out = tmp_path / "run"
    bloom(
        "finetune",
        *model,
        "--dataset_name_or_path",
        "builtin:dates",
        "--lora",
        "--max_steps",
        "10",
        "--device",
        "gpu",
        "--learning_rate",
        "3e-3",
        "--logging_steps",
        "5",
        "--output_dir",
        str(out),
        "--bf16",
    )
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_loss"] > 0 and results["peak_memory_bytes"] < 2**30, "torch's memory of the GPU"
    predict = (
        "predict",
        *model,
        "--lora_path",
        str(out),
        "--prompt",
        "Date: 14 juillet 1989\nISO:",
        "--dtype",
        "float32",
    )
    assert bloom(*predict, "--device", "gpu") == bloom(*predict, "--device", "cpu")
    text = tmp_path / "text.txt"
    text.write_text("It was raining. " * 200)
    evaluate = ("evaluate", *model, "--eval_path", str(text), "--dtype", "float32")
    assert "adjusted_ppl" in bloom(*evaluate, "--device", "gpu")
