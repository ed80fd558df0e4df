"""`bloomlm finetune` on checkpoints in PaddleNLP's files, written here for one process and for several ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.config import BloomConfig
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.training.loop import train
from bloomlm.training.step import Trainer
from tests.bloom_tokenizer import make_tokenizer
from tests.paddle_files import (
    State,
    cut,
    make_model,
    paddle_state,
    random_arrays,
    variable_names,
    write,
    write_config,
    write_json,
)

TOKENIZER = make_tokenizer()
VOCABULARY = -(-TOKENIZER.vocab_size // 6) * 6
CONFIG = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=6)
MODEL = make_model(CONFIG)
D, L = CONFIG.hidden_size, CONFIG.n_layer
STEP, UPDATES, SCALE = 3, 2, 512.0  # one of the steps was skipped
MAX_STEPS = 6
RATE = 5e-3 * (1 - 0.9 * STEP / MAX_STEPS)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def write_material(directory: Path) -> Path:
    """The base model with its tokenizer, and examples."""
    (directory / "model").mkdir()
    write_model(directory / "model", CONFIG, MODEL.named_parameters())
    TOKENIZER.save(directory / "model")
    rows = [{"src": f"the cat number {number}", "tgt": f"sat on mat {number}"} for number in range(10)]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def flags(material: Path, checkpoint: Path | None, output_dir: Path, **options: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "model_name_or_path": str(material / "model"),
        "train_file": str(material / "train.jsonl"),
        "output_dir": str(output_dir),
        "resume_from_checkpoint": None if checkpoint is None else str(checkpoint),
        "max_steps": MAX_STEPS,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "device": "cpu",
    }
    return TrainingConfig(**{**values, **options})


def write_run_state(
    directory: Path, state: State, names: dict[str, str], suffix: str = "", *, half: bool = False
) -> None:
    """Write the files of the optimizer; with ranks, each has a part of the parameters."""
    content: dict[str, Any] = {"LR_Scheduler": {"last_epoch": UPDATES, "last_lr": RATE}}
    for name, array in state.items():
        content[f"{names[name]}_moment1_0"] = 0.01 * array
        content[f"{names[name]}_moment2_0"] = 0.001 * array * array
    if half:
        content["master_weights"] = {names[name]: array for name, array in state.items()}
    write(directory / f"optimizer{suffix}.pdopt", content)
    log = [{"step": 1, "loss": 9.0, "learning_rate": 5e-3, "interval_runtime": 1}, {"step": 2, "eval_loss": 8.0}]
    write_json(directory / "trainer_state.json", {"global_step": STEP, "max_steps": MAX_STEPS, "log_history": log})
    write(directory / "scaler.pdparams", {"scale": np.array([SCALE], np.float32)})


def write_full(directory: Path, degree: int = 1, groups: int = 1, *, half: bool = False) -> None:
    """Write a checkpoint; `half` means fp16 weights with fp32 copies, as at level O2."""
    write_config(directory, CONFIG, tensor_parallel_degree=degree)
    state, names = paddle_state(MODEL), variable_names(CONFIG, {"linear": 4})
    for tp_rank in range(degree):
        part = cut(state, degree, tp_rank)
        suffix = f".tp{tp_rank:02d}" if degree > 1 else ""
        stored = {name: array.astype(np.float16) for name, array in part.items()} if half else part
        write(directory / f"model_state{suffix}.pdparams", stored | {"StructuredToParameterName@@": names})
        for group in range(groups):
            mine = {name: part[name] for name in list(part)[group::groups]}
            group_suffix = f"_shard{group:02d}" if groups > 1 else ""
            write_run_state(directory, mine, names, suffix + group_suffix, half=half)


def write_adapter(
    directory: Path, kind: str, state: State, config: dict[str, Any], degree: int, axes: Callable[[str], int | None]
) -> None:
    write_json(directory / f"{kind}_config.json", config | {"tensor_parallel_degree": degree})
    names = {name: f"layer_{i}.w_0" for i, name in enumerate(state)}
    for tp_rank in range(degree):
        suffix = f".tp{tp_rank:02d}" if degree > 1 else ""
        part = {
            name: array if axes(name) is None else np.split(array, degree, axis=axes(name))[tp_rank].copy()
            for name, array in state.items()
        }
        write(directory / f"{kind}_model_state{suffix}.pdparams", part | {"StructuredToParameterName@@": names})
        write_run_state(directory, part, names, suffix)


def write_lora(directory: Path, degree: int = 1, **more: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(L):
        module = f"bloom.h.{layer}.self_attention.query_key_value"
        shapes |= {f"{module}.lora_A": (D, 6), f"{module}.lora_B": (3, 2 * D), f"{module}.bias": (3 * D,)}
    config = {"r": 3, "lora_alpha": 6, "target_modules": [".*query_key_value.*"]}
    config |= {"enable_lora_list": [[True, False, True]], "trainable_bias": "lora"} | more
    state = {name: 0.1 * array for name, array in random_arrays(shapes).items()}
    write_adapter(
        directory, "lora", state, config, degree, lambda name: None if name.endswith("A") else 1 - name.endswith("bias")
    )


def write_prefix(directory: Path, degree: int = 1, **more: Any) -> None:
    shapes = {"0.weight": (6, D), "1.weight": (D, 12), "1.bias": (12,), "3.weight": (12, 4 * D), "3.bias": (4 * D,)}
    config = {"num_prefix_tokens": 6, "num_attention_heads": 6, "num_hidden_layers": L, "hidden_size": D}
    config |= {"prefix_projection": True, "prefix_projection_hidden_size": 12} | more
    axes = {"0.weight": 0, "1.weight": 1, "1.bias": 0, "3.weight": 0}
    state = {name: 0.3 * array for name, array in random_arrays(shapes).items()}
    write_adapter(directory, "prefix", state, config, degree, axes.get)


LORA, PREFIX = {"lora": True, "r": 3}, {"prefix_tuning": True, "num_prefix_tokens": 6}
RUNS: dict[str, tuple[Callable[[Path], None], dict[str, Any]]] = {
    "full": (write_full, {}),
    "full, 3 ranks x 2 groups": (lambda directory: write_full(directory, 3, 2), {}),
    "full, fp16 with copies": (lambda directory: write_full(directory, 2, half=True), {}),
    "full, bf16 O2": (write_full, {"bf16": True, "fp16_opt_level": "O2"}),
    "lora": (write_lora, LORA),
    "lora, 3 ranks": (lambda directory: write_lora(directory, 3), LORA),
    "lora, bf16 O2": (write_lora, {**LORA, "bf16": True, "fp16_opt_level": "O2"}),
    "prefix": (write_prefix, PREFIX),
    "prefix, 3 ranks": (lambda directory: write_prefix(directory, 3), PREFIX),
    "prefix, new": (
        lambda directory: write_prefix(directory, 2, multi_query_group_num=None),
        {**PREFIX, "prefix_layout": "new"},
    ),
}


class Spy:
    """Records the state of the trainer after restoring and before the first step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state: dict[str, Tensor] = {}
        self.values: dict[str, Any] = {}
        self.learned: dict[str, Tensor] = {}

        def spied_train(trainer: Trainer, *arguments: Any, **options: Any) -> Any:
            tensors, self.values = trainer.state()
            self.state = {name: tensor.clone() for name, tensor in tensors.items()}
            self.learned = {name: p.detach().clone() for name, p in trainer.learned.optimized.items()}
            return train(trainer, *arguments, **options)

        monkeypatch.setattr("bloomlm.training.finetune.train", spied_train)


def assert_restored(spy: Spy) -> None:
    assert spy.learned
    for name, weight in spy.learned.items():
        assert weight.dtype == torch.float32
        # write_run_state computes the moments from the weights
        torch.testing.assert_close(spy.state[f"optimizer/{name}/exp_avg"], 0.01 * weight)
        torch.testing.assert_close(spy.state[f"optimizer/{name}/exp_avg_sq"], 0.001 * weight * weight)
        assert spy.state[f"optimizer/{name}/step"] == UPDATES
    assert spy.values["step"] == STEP
    # 10 examples in batches of 3 are 4 steps, so three quarters of the epoch are done
    assert (spy.values["data"]["epoch"], spy.values["data"]["position"]) == (0, 7)


def losses(output_dir: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_and_its_later_checkpoints_can_be_resumed(
    name: str, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint, options = RUNS[name]
    checkpoint, out = tmp_path / "checkpoint-3", tmp_path / "out"
    write_checkpoint(checkpoint)
    spy = Spy(monkeypatch)
    finetune(flags(material, checkpoint, out, **options))
    assert_restored(spy)
    if name.startswith("full"):
        assert all(torch.equal(spy.learned[name], parameter) for name, parameter in MODEL.named_parameters())
    told = capsys.readouterr().err
    assert f"from PaddleNLP's {checkpoint}: step 3" in told and "moments after 2 updates" in told
    assert "warning: " not in told
    whole = losses(out)
    assert list(whole) == [4, 5, 6]
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert log[0] == {"step": 1, "loss": 9.0, "learning_rate": 5e-3} and "eval_loss" not in log[1]
    # killed after step 4, the same command resumes from its own checkpoint with the same bits
    for step in (5, 6):
        shutil.rmtree(out / f"checkpoint-{step}")
    final = "model.safetensors" if name.startswith("full") else "adapter_model.safetensors"
    first = (out / final).read_bytes()
    (out / final).unlink()
    finetune(flags(material, checkpoint, out, **options))
    assert "from PaddleNLP's" not in capsys.readouterr().err
    assert losses(out) == whole
    assert (out / final).read_bytes() == first
    if "full" not in name:
        other, flag = (PREFIX, "--lora") if "lora" in name else (LORA, "--prefix_tuning")
        with pytest.raises(ConfigError, match=f"checkpoint-6 holds a .* to continue training it, give {flag}"):
            finetune(flags(material, checkpoint, out, **other))


def test_an_fp16_run_resumes_its_fp32_copies_and_loss_scale(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_full(tmp_path / "checkpoint-3", half=True)
    spy = Spy(monkeypatch)
    options = {"fp16": True, "fp16_opt_level": "O2", "max_steps": STEP}
    finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "out", **options))
    assert_restored(spy)
    assert all(torch.equal(spy.learned[name], parameter) for name, parameter in MODEL.named_parameters())
    assert spy.values["loss_scale"]["value"] == SCALE
    assert "fp32 copies of the weights, loss scale 512; the order" in capsys.readouterr().err


def test_a_run_without_moments_resumes_everything_else(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lora(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pdopt").unlink()
    spy = Spy(monkeypatch)
    finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "out", **LORA))
    told = capsys.readouterr().err
    assert "has no optimizer state, so AdamW's moments begin at zero; only weights, step" in told
    assert "step 3, LoRA (r 3, lora_alpha 6, as a plain one of r 6 in PEFT's files); the order" in told
    assert spy.values["step"] == STEP
    assert all(not tensor.any() for name, tensor in spy.state.items() if name.startswith("optimizer/"))
    assert list(losses(tmp_path / "out")) == [4, 5, 6]


def test_another_schedule_is_reported(material: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_full(tmp_path / "checkpoint-3")
    finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "out", max_steps=5))
    told = capsys.readouterr().err
    assert "the learning rate of the next step is 0.0023, but the checkpoint recorded 0.00275" in told
    assert "give the flags of the recorded run and --max_steps 6" in told
    # the recorded learning rate is that after two updates, because the third step was skipped
    rate = RATE / (1 - 0.9 * UPDATES / MAX_STEPS)
    finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "other", learning_rate=rate))
    told = capsys.readouterr().err
    assert "is 0.00216071 and not 0.00275, because the schedule of bloomlm counts 1 steps that fp16 skipped" in told
    assert "warning" not in told


def broken(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).unlink()
    return directory


@pytest.mark.parametrize(
    ("write_checkpoint", "options", "error", "message"),
    [
        (write_lora, {}, ConfigError, r"checkpoint-3 holds a LoRA adapter; to continue training it, give --lora"),
        (write_lora, PREFIX, ConfigError, "holds a LoRA adapter; to continue training it, give --lora"),
        (write_prefix, LORA, ConfigError, "holds a prefix adapter; to continue training it, give --prefix_tuning"),
        (write_full, LORA, ConfigError, "holds a whole model; to continue training it, leave out --lora"),
        (write_lora, {**LORA, "r": 8}, ConfigError, r"--r is 8, but the adapter in .*checkpoint-3 began with 3"),
        (write_lora, {**LORA, "lora_alpha": 7.0}, ConfigError, r"--lora_alpha is 7.0, .* began with 6"),
        (
            write_lora,
            {**LORA, "target_modules": ("query_key_value", "dense")},
            ConfigError,
            r"--target_modules is .* began with \('query_key_value',\)",
        ),
        (write_prefix, {**PREFIX, "num_prefix_tokens": 7}, ConfigError, r"num_prefix_tokens is 7, .* with 6"),
        (write_full, {"trained_tensor_parallel_degree": 2}, ConfigError, "For a whole model its files show the degree"),
        (write_lora, {**LORA, "prefix_layout": "old"}, ConfigError, "add --prefix_tuning"),
        (
            lambda directory: write_prefix(directory, multi_query_group_num=None),
            PREFIX,
            CheckpointError,
            "Give --prefix_layout new",
        ),
        (
            lambda directory: broken(write_full(directory, 3) or directory, "optimizer.tp01.pdopt"),
            {},
            CheckpointError,
            r"files of ranks \[1\] are missing",
        ),
        (
            lambda directory: broken(write_full(directory, 1, 3) or directory, "optimizer_shard01.pdopt"),
            {},
            CheckpointError,
            r"sharding groups \[1\] are missing",
        ),
        (
            lambda directory: broken(write_full(directory, 1, 2) or directory, "optimizer_shard01.pdopt"),
            {},
            CheckpointError,
            r"optimizer_shard00\.pdopt lacks transformer",
        ),
    ],
)
def test_runs_that_cannot_be_resumed_are_refused(
    write_checkpoint: Callable[[Path], Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    material: Path,
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path / "checkpoint-3")
    with pytest.raises(error, match=message):
        finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "out", **options))
    assert not (tmp_path / "out" / "run.yaml").exists()


def test_moments_of_other_parameters_are_refused(material: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "checkpoint-3")
    names = {"a": "layer_0.w_0", "b": "layer_1.w_0"}
    write_run_state(tmp_path / "checkpoint-3", {"a": np.zeros((D, 6), np.float32)}, names)
    with pytest.raises(CheckpointError, match=r"lacks transformer\.h\.0"):
        finetune(flags(material, tmp_path / "checkpoint-3", tmp_path / "out", **LORA))


def test_flags_for_paddles_adapters_need_one(material: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this run resumes from none"):
        finetune(flags(material, None, tmp_path / "new", **PREFIX, prefix_layout="old"))
    ours = tmp_path / "ours"
    finetune(flags(material, None, ours, **LORA, max_steps=1))
    with pytest.raises(ConfigError, match="this run resumes from none"):
        finetune(flags(material, None, ours, **LORA, trained_tensor_parallel_degree=2))


def test_later_checkpoints_of_paddlenlps_are_not_replaced(material: Path, tmp_path: Path) -> None:
    write_full(tmp_path / "checkpoint-3")
    write_full(tmp_path / "checkpoint-5")
    with pytest.raises(ConfigError, match=r"holds checkpoint-5 of another program, which this run would replace"):
        finetune(flags(material, tmp_path / "checkpoint-3", tmp_path))
    write_full(tmp_path / "mine")
    with pytest.raises(ConfigError, match="expected a directory named checkpoint-STEP"):
        finetune(flags(material, tmp_path / "mine", tmp_path / "out"))


def test_paddle_tokenization(material: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds tokenizer\.json, which says how texts are split"):
        finetune(flags(material, None, tmp_path / "out", paddle_tokenization=True))
    model = tmp_path / "model"
    shutil.copytree(material / "model", model)
    content = json.loads((model / "tokenizer.json").read_text())["model"]
    (model / "tokenizer.json").unlink()
    write_json(model / "vocab.json", content["vocab"])
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in content["merges"]]
    (model / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for given in (False, True):
        out = tmp_path / f"out-{given}"
        finetune(flags(material, None, out, model_name_or_path=str(model), paddle_tokenization=given, max_steps=1))
        written = json.loads((out / "tokenizer.json").read_text())
        assert (written["pre_tokenizer"]["type"] == "ByteLevel") is given
