"""Fine-tuning from flags to files, on a tiny random model."""

import json
import os
import re
import shlex
import shutil
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bloomlm
from bloomlm.checkpoint.safetensors_file import SafetensorsFile
from bloomlm.cli.finetune import command
from bloomlm.data.examples import load_examples
from bloomlm.data.loader import collate
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.evaluation.answer_scores import score_generations
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import FinetuneResult, finetune
from bloomlm.training.objectives.cross_entropy import CrossEntropy, evaluate_loss
from bloomlm.training.optimizer import ScheduleConfig
from bloomlm.training.output_dir import CheckpointWriter
from bloomlm.training.precision import Precision
from bloomlm.training.report import Reporter
from bloomlm.training.resolve import resolve
from bloomlm.training.resume import ResumePoint
from bloomlm.training.setup import build_trainer, load_batches, load_to_train
from bloomlm.training.step import StepConfig
from bloomlm.vocabulary.new_tokens import write_new_tokens
from tests.tiny_bloom import write_bloom
from tests.unit.test_training_config import CPU, PADDLENLP_FLAGS

WORDS = ("the cat sat on the mat", "a b c", "dates and times", "hello world", "one two three", "12 34")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and two files of examples."""
    directory = tmp_path_factory.mktemp("material")
    write_bloom(directory / "model", eos_scale=1.5)
    write_new_tokens(directory / "model", range(250, 258))
    pairs = list(pairwise(WORDS)) * 3
    rows = [{"src": f"{source} {number}", "tgt": target} for number, (source, target) in enumerate(pairs)]
    for name, chosen in (("train", rows), ("dev", rows[4:7])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return directory


def wider(material: Path, directory: Path) -> Path:
    """The same examples beside a model whose rows nf4 can divide into blocks of 64 weights."""
    write_bloom(directory / "model", eos_scale=1.5, hidden_size=64)
    for name in ("train.jsonl", "dev.jsonl"):
        shutil.copyfile(material / name, directory / name)
    return directory


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def flags(material: Path, output_dir: Path, **options: Any) -> TrainingConfig:
    values: dict[str, Any] = {
        "model_name_or_path": str(material / "model"),
        "train_file": str(material / "train.jsonl"),
        "eval_file": str(material / "dev.jsonl"),
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "tgt_length": 8,
        "report_to": "none",
        "device": "cpu",
    }
    return TrainingConfig(**{**values, **options})


def tensors(path: Path) -> dict[str, Tensor]:
    file = SafetensorsFile(path)
    return {name: file.read(name).clone() for name in file.entries}


def assert_same_file(found: Path, expected: Path) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def reproducible(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries without the values that depend on time and machine."""
    timed = ("seconds", "per_second", "runtime", "memory_bytes")
    return [{name: value for name, value in entry.items() if not name.endswith(timed)} for entry in log]


ADAPTERS: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "full": ({"learning_rate": 0.003}, "model.safetensors", None),
    "lora": (
        {"lora": True, "r": 3, "target_modules": ("query_key_value", "dense")},
        "adapter_model.safetensors",
        "lora",
    ),
    "dora": (
        {"lora": True, "r": 3, "use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
        "adapter_model.safetensors",
        "lora",
    ),
    "new rows": (
        {"lora": True, "r": 3, "train_new_tokens": True},
        "adapter_model.safetensors",
        "lora",
    ),
    "prefix": (
        {"prefix_tuning": True, "num_prefix_tokens": 3, "prefix_projection": True},
        "adapter_model.safetensors",
        "prefix",
    ),
}


def test_new_tokens_need_a_record_of_them(material: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model_name_or_path": "builtin:tiny", "lora": True, "train_new_tokens": True}
    with pytest.raises(ConfigError, match=r"--train_new_tokens: builtin:tiny has no new_tokens\.json"):
        finetune(flags(material, tmp_path / "out", **options))


@pytest.mark.parametrize("int8", [False, True])
def test_only_new_rows_of_the_embedding_learn(material: Path, tmp_path: Path, int8: bool) -> None:
    options: dict[str, Any] = {"lora": True, "train_new_tokens": True, "merge_weights": True}
    result = finetune(flags(material, tmp_path / "out", **options, base_quantization="int8" if int8 else "none"))
    assert result.merged_path is not None
    before, after = (
        bloomlm.load(path).model.transformer.word_embeddings.weight.detach()
        for path in (material / "model", result.merged_path)
    )
    same = (before == after).all(1)
    assert same[:250].all() and same[258:].all() and not same[250:258].any()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_written_model_is_the_evaluated_model(kind: str, material: Path, tmp_path: Path) -> None:
    options, weights_file, path_flag = ADAPTERS[kind]
    out = tmp_path / "out"
    result = finetune(flags(material, out, **options))
    assert (result.step, result.interrupted, result.merged_path) == (6, False, None)
    assert result.train_metrics is not None and result.eval_metrics is not None
    log = metrics(out)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0]
    evaluations = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [2, 4, 6]
    for name in ("eval_loss", "eval_ppl", "eval_accuracy"):
        assert result.eval_metrics[name] == evaluations[-1][name]
    # the written files, read as a user would, give the reported loss
    base = out if path_flag is None else material / "model"
    loaded = bloomlm.load(base, **({f"{path_flag}_path": out} if path_flag else {}))
    examples = load_examples(material / "dev.jsonl", loaded.tokenizer, src_length=512, tgt_length=8)
    again = evaluate_loss(loaded.model, [collate(list(examples))], Precision())
    assert again.loss == pytest.approx(result.eval_metrics["eval_loss"], rel=1e-5)
    assert again.token_accuracy == result.eval_metrics["eval_accuracy"]
    assert_same_file(out / weights_file, out / "checkpoint-6" / weights_file)
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["log_history"] == log and state["global_step"] == 6 and state["max_steps"] == 6
    best = min(evaluations, key=lambda entry: entry["eval_loss"])
    assert state["best_metric"] == best["eval_loss"]
    assert state["best_model_checkpoint"] == f"checkpoint-{best['step']}"
    everything = json.loads((out / "all_results.json").read_text())
    assert everything == {**result.train_metrics, **result.eval_metrics}
    supervised = sum(entry["supervised_tokens"] for entry in log if "loss" in entry)
    weighted = sum(entry["loss"] * entry["supervised_tokens"] for entry in log if "loss" in entry)
    assert everything["train_loss"] == pytest.approx(weighted / supervised)
    assert (out / "loss.png").is_file() and (out / "tokenizer.json").is_file()


class Crash(Exception):
    pass


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("crash_at", [1, 5])
def test_a_crashed_run_resumes_to_the_same_result(
    kind: str, crash_at: int, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, weights_file, _ = ADAPTERS[kind]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(flags(material, whole, **options))
    logged = Reporter.on_log

    def crash(self: Reporter, log: Any) -> None:
        logged(self, log)
        if log.step == crash_at:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_log", crash)
        with pytest.raises(Crash):
            finetune(flags(material, broken, **options))
    assert metrics(broken)[-1]["step"] == crash_at
    result = finetune(flags(material, broken, **options))
    assert result.step == 6
    assert_same_file(broken / weights_file, whole / weights_file)
    assert reproducible(metrics(broken)) == reproducible(metrics(whole))
    done_again = finetune(flags(material, broken, **options))  # all steps are done already
    assert (done_again.train_metrics, done_again.eval_metrics) == (result.train_metrics, result.eval_metrics)
    assert_same_file(broken / weights_file, whole / weights_file)


def test_sigterm_saves_and_the_same_command_resumes(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finetune(flags(material, whole, lora=True))
    stepped = Reporter.on_step

    def stop(self: Reporter, result: Any) -> None:
        stepped(self, result)
        if result.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    line = f"--model_name_or_path {material}/model --train_file {material}/train.jsonl --eval_file {material}/dev.jsonl"
    line += " --max_steps 6 --per_device_train_batch_size 4 --learning_rate 0.01 --logging_steps 1 --eval_steps 2"
    line += f" --save_steps 2 --tgt_length 8 --report_to none --lora --device cpu --output_dir {stopped}"
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "on_step", stop)
        with pytest.raises(SystemExit) as caught:
            command.main(shlex.split(line), standalone_mode=False)
    assert caught.value.code == 128 + signal.SIGTERM
    assert (stopped / "checkpoint-3").is_dir() and not (stopped / "adapter_model.safetensors").exists()
    command.main(shlex.split(line), standalone_mode=False)
    assert_same_file(stopped / "adapter_model.safetensors", whole / "adapter_model.safetensors")
    assert reproducible(metrics(stopped)) == reproducible(metrics(whole))


def test_a_run_that_was_stopped_before_it_pruned_prunes_when_it_resumes(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = flags(material, out, lora=True, save_total_limit=1)

    def stop_after_last_save(self: CheckpointWriter) -> None:
        if (out / "checkpoint-6").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "prune", stop_after_last_save)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    assert len(list(out.glob("checkpoint-*"))) == 3
    finetune(config)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_best_checkpoint_is_the_result(kind: str, material: Path, tmp_path: Path) -> None:
    options, weights_file, _ = ADAPTERS[kind]
    out = tmp_path / "out"
    # the loss falls, so the first evaluation is the best if greater is better
    options = {**options, "greater_is_better": True, "save_total_limit": 1}
    result = finetune(flags(material, out, load_best_model_at_end=True, **options))
    evaluations = {entry["step"]: entry["eval_loss"] for entry in metrics(out) if "eval_loss" in entry}
    best = max(evaluations, key=evaluations.__getitem__)
    assert best != 6, "the last step is the best; the test shows nothing"
    assert result.best_checkpoint == out / f"checkpoint-{best}"
    assert result.eval_metrics is not None and result.eval_metrics["eval_loss"] == evaluations[best]
    assert_same_file(out / weights_file, result.best_checkpoint / weights_file)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{best}", "checkpoint-6"]


def test_answers_come_from_the_prompts_alone(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"do_generation": True, "generate_num": 2, "metric_for_best_model": "rouge1"}
    result = finetune(flags(material, out, lora=True, per_device_eval_batch_size=2, **options))
    loaded = bloomlm.load(material / "model", lora_path=out)
    rows = [json.loads(line) for line in (material / "dev.jsonl").read_text().splitlines()]
    completions = loaded.generate([row["src"] for row in rows], max_new_tokens=8)
    answers = [completion.completion for completion in completions]
    expected = score_generations(answers, [row["tgt"] for row in rows])
    assert result.eval_metrics is not None
    for name, value in expected.numbers().items():
        assert result.eval_metrics[f"eval_{name}"] == pytest.approx(value), name
    assert result.eval_metrics["eval_bleu4_signature"] == expected.bleu4_signature
    assert result.best_checkpoint is not None
    written = [json.loads(line) for line in (out / "infer_result.json").read_text().splitlines()]
    assert written == [
        {"instruction": row["src"], "answer": row["tgt"], "output": answer}
        for row, answer in zip(rows[:2], answers[:2], strict=True)
    ]


def test_sampled_answers_do_not_depend_on_the_batch_size(material: Path, tmp_path: Path) -> None:
    answers = []
    for batch_size in (1, 3):
        out = tmp_path / str(batch_size)
        options = {"generate_num": 3, "top_k": 50, "per_device_eval_batch_size": batch_size, "max_steps": 1}
        finetune(flags(material, out, lora=True, **options))
        written = [json.loads(line) for line in (out / "infer_result.json").read_text().splitlines()]
        answers.append([row["output"] for row in written])
    assert answers[0] == answers[1] and len(set(answers[0])) == 3


def test_weight_files_of_an_earlier_result_are_removed(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(flags(material, out, max_steps=2))
    finetune(flags(material, out, max_steps=3, max_shard_size="20KB"))
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    whole = dict(bloomlm.load(out).model.named_parameters())
    for name, tensor in bloomlm.load(out / "checkpoint-3").model.named_parameters():
        assert torch.equal(whole[name], tensor), name


def test_every_flag_reaches_the_trainer(material: Path, tmp_path: Path) -> None:
    config = flags(
        material,
        tmp_path,
        bf16=True,
        fp16_opt_level="O2",
        max_steps=-1,
        num_train_epochs=1.5,
        gradient_accumulation_steps=2,
        weight_decay=0.3,
        adam_beta1=0.8,
        adam_beta2=0.7,
        adam_epsilon=0.6,
        max_grad_norm=0.5,
        label_smoothing=0.4,
        seed=7,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        lr_decay_ratio=0.05,
        recompute=True,
    )
    plan = resolve(config, CPU)
    assert plan.training is not None
    model = load_to_train(plan, material / "model", ResumePoint())
    examples = list(
        load_examples(material / "train.jsonl", bloomlm.load(material / "model").tokenizer, src_length=9, tgt_length=9)
    )
    trainer = build_trainer(
        plan.training, model, load_batches(plan.training, examples, plan.objective), plan.objective, plan.precision
    )
    assert trainer.schedule.max_steps == 3 and model.transformer.recompute is True
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert trainer.config == StepConfig(gradient_accumulation_steps=2, max_grad_norm=0.5, seed=7)
    assert trainer.objective == CrossEntropy(label_smoothing=0.4)
    assert trainer.schedule == ScheduleConfig(
        learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=2, lr_decay_ratio=0.05
    ).over(3)
    decayed, others = trainer.optimizer.param_groups
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.8, 0.7), 0.6, 0.3)
    assert others["weight_decay"] == 0.0
    assert trainer.batches.state_dict()["seed"] == 7 and len(trainer.batches) == 4


def test_the_merged_model_answers_like_model_and_adapter(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = finetune(flags(material, out, lora=True, merge_weights=True))
    assert result.merged_path == out / "merged"
    merged, adapted = bloomlm.load(result.merged_path), bloomlm.load(material / "model", lora_path=out)
    ids = torch.tensor([merged.tokenizer.encode("the cat sat")])
    base = bloomlm.load(material / "model").model(ids)
    torch.testing.assert_close(merged.model(ids), adapted.model(ids), rtol=1e-5, atol=1e-5)
    assert (merged.model(ids) - base).abs().max() > 1e-3


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_an_adapter_trained_on_a_quantised_base_works_with_the_original_base(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed; most of it is for GPUs")
        material = wider(material, tmp_path / "wider")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options: dict[str, Any] = {"lora": True, "r": 3, "base_quantization": quantization, "merge_weights": True}
    result = finetune(flags(material, whole, **options))
    saved = CheckpointWriter.save

    def crash(self: CheckpointWriter, step: int) -> None:
        saved(self, step)
        if step == 4:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", crash)
        with pytest.raises(Crash):
            finetune(flags(material, broken, **options))
    finetune(flags(material, broken, **options))
    assert_same_file(broken / "adapter_model.safetensors", whole / "adapter_model.safetensors")
    assert reproducible(metrics(broken)) == reproducible(metrics(whole))

    loaded = bloomlm.load(material / "model", lora_path=whole)
    examples = load_examples(material / "dev.jsonl", loaded.tokenizer, src_length=512, tgt_length=8)
    plain = evaluate_loss(loaded.model, [collate(list(examples))], Precision())
    assert result.eval_metrics is not None and result.merged_path == whole / "merged"
    assert plain.loss != result.eval_metrics["eval_loss"]
    tolerance = {"int8": 0.01, "nf4": 0.05}[quantization]
    assert plain.loss == pytest.approx(result.eval_metrics["eval_loss"], rel=tolerance)
    merged = bloomlm.load(result.merged_path).model
    ids = torch.tensor([loaded.tokenizer.encode("the cat sat")])
    torch.testing.assert_close(merged(ids), loaded.model(ids), rtol=1e-5, atol=1e-5)
    untouched = dict(bloomlm.load(material / "model").model.named_parameters())
    assert torch.equal(merged.transformer.word_embeddings.weight, untouched["transformer.word_embeddings.weight"])


def test_a_run_stops_early_and_does_not_go_on(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a learning rate of 0 no evaluation improves on the first one."""
    out = tmp_path / "out"
    options: dict[str, Any] = {"lora": True, "learning_rate": 0.0, "max_steps": 20, "early_stopping_patience": 2}
    options |= {"eval_steps": 1, "save_steps": 5}
    assert finetune(flags(material, out, **options)).step == 3
    assert "stopped after step 3: eval_loss did not improve in the last 2 evaluations" in capfd.readouterr().err
    assert (out / "checkpoint-3").is_dir() and (out / "adapter_model.safetensors").is_file()
    assert finetune(flags(material, out, **options)).step == 3
    options["early_stopping_patience"] = 4  # counts the evaluations before it resumed
    result = finetune(flags(material, out, **options))
    assert (result.step, result.interrupted) == (5, False)
    assert [entry["step"] for entry in metrics(out) if "eval_loss" in entry] == [1, 2, 3, 4, 5]


def test_noise_and_loraplus_resume_by_value(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"lora": True, "neftune_noise_alpha": 5.0, "loraplus_lr_ratio": 4.0}
    finetune(flags(material, tmp_path / "whole", **options))
    saved = CheckpointWriter.save

    def crash(self: CheckpointWriter, step: int) -> None:
        saved(self, step)
        if step == 4:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "save", crash)
        with pytest.raises(Crash):
            finetune(flags(material, tmp_path / "broken", **options))
    finetune(flags(material, tmp_path / "broken", **options))
    assert reproducible(metrics(tmp_path / "broken")) == reproducible(metrics(tmp_path / "whole"))
    for changed in ({"neftune_noise_alpha": 0.0}, {"loraplus_lr_ratio": 1.0}):
        finetune(flags(material, tmp_path / "other", overwrite_output_dir=True, **{**options, **changed}))
        assert reproducible(metrics(tmp_path / "other")) != reproducible(metrics(tmp_path / "whole"))


def test_the_run_file_repeats_the_run(material: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options: dict[str, Any] = {"lora": True, "lora_dropout": 0.2, "label_smoothing": 0.1, "warmup_ratio": 0.5}
    finetune(flags(material, first, lr_scheduler_type="cosine", **options))
    command.main(["--config", str(first / "run.yaml"), "--output-dir", str(second)], standalone_mode=False)
    assert_same_file(second / "adapter_model.safetensors", first / "adapter_model.safetensors")
    assert reproducible(metrics(second)) == reproducible(metrics(first))


@pytest.mark.parametrize("adapter", ["--lora True --r 8", "--prefix True --num_prefix_tokens 64", ""])
def test_paddlenlp_command_lines_train_on_a_cpu(adapter: str, material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = f"{PADDLENLP_FLAGS} {adapter} --model_name_or_path {material}/model --train_file {material}/train.jsonl"
    command.main(shlex.split(f"{line} --device cpu --output_dir {out}"), standalone_mode=False)
    log = [entry for entry in metrics(out) if "loss" in entry]
    assert len(log) == 2 and log[-1]["epoch"] == 2.0  # 14 of the 15 examples, 4 batches of 4 a step, 2 epochs
    assert log[-1]["loss"] < log[0]["loss"] + 0.5 and log[-1]["loss_scale"] is not None
    weights = tensors(out / ("adapter_model.safetensors" if adapter else "model.safetensors"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    evaluation = json.loads((out / "eval_results.json").read_text())
    assert evaluation["eval_loss"] > 0


def test_evaluation_alone(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = finetune(flags(material, out, do_eval=True, do_train=False))
    loaded = bloomlm.load(material / "model")
    examples = load_examples(material / "dev.jsonl", loaded.tokenizer, src_length=512, tgt_length=8)
    expected = evaluate_loss(loaded.model, [collate(list(examples))], Precision())
    assert result.train_metrics is None and result.eval_metrics is not None
    assert result.eval_metrics["eval_loss"] == pytest.approx(expected.loss, rel=1e-6)
    written = {path.name for path in out.iterdir()}
    assert written == {"run.yaml", "metrics.jsonl", "eval_results.json", "all_results.json"}


def test_the_last_examples_are_held_out_without_an_evaluation_file(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = finetune(flags(material, tmp_path / "out", eval_file=None, do_eval=True, do_train=True, max_steps=-1))
    shown = capfd.readouterr().err
    assert re.search(r"evaluation: 1 example from .*, the last one, which is not trained on", shown)
    assert result.train_metrics is not None and result.eval_metrics is not None
    assert result.step == 3 * 4  # 14 examples in batches of 4, three epochs
    tokenizer = bloomlm.load(material / "model").tokenizer
    examples = load_examples(material / "train.jsonl", tokenizer, src_length=512, tgt_length=8)
    learned = sum(len(examples[index].tokens) - examples[index].num_source_tokens for index in range(14))
    assert sum(entry.get("supervised_tokens", 0) for entry in metrics(tmp_path / "out")) == 3 * learned


def test_evaluating_and_saving_once_an_epoch(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"evaluation_strategy": "epoch", "save_strategy": "epoch", "eval_steps": None}
    finetune(flags(material, out, max_steps=-1, num_train_epochs=1.5, gradient_accumulation_steps=2, **options))
    # 15 examples, 4 batches, 2 steps an epoch
    assert [entry["step"] for entry in metrics(out) if "eval_loss" in entry] == [2, 3]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert metrics(out)[-1]["epoch"] == 1.5


def test_files_of_others_are_kept(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (out / "train.log").write_text("a log beside the run is no reason to refuse")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, but no checkpoint"):
        finetune(flags(material, out, lora=True))
    assert {path.name for path in out.iterdir()} == {"thesis.txt", "train.log"}
    finetune(flags(material, out, lora=True, overwrite_output_dir=True, save_strategy="no"))
    assert (out / "thesis.txt").read_text() == "mine" and not list(out.glob("checkpoint-*"))
    with pytest.raises(ConfigError, match="but no checkpoint"):
        finetune(flags(material, out, lora=True))
    finetune(flags(material, out, overwrite_output_dir=True, max_steps=2))
    names = {path.name for path in out.iterdir()}
    assert "model.safetensors" in names and "adapter_model.safetensors" not in names and "thesis.txt" in names
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        finetune(flags(material, tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be created"):
        finetune(flags(material, tmp_path / "file" / "below"))


def test_a_checkpoint_that_cannot_be_written_leaves_earlier_ones(
    material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"

    def full_disk(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    saved = CheckpointWriter.write_learned
    monkeypatch.setattr(
        CheckpointWriter,
        "write_learned",
        lambda self, directory: saved(self, directory) if "checkpoint-4" not in directory.name else full_disk(),
    )
    with pytest.raises(CheckpointError, match="No space left"):
        finetune(flags(material, out, lora=True))
    assert [path.name for path in out.iterdir() if "checkpoint" in path.name] == ["checkpoint-2"]
    monkeypatch.undo()
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))
    for directory in (out, whole):
        finetune(flags(material, directory, lora=True))
    assert_same_file(out / "adapter_model.safetensors", whole / "adapter_model.safetensors")


def test_going_back_to_a_checkpoint(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(flags(material, out, lora=True))
    result = finetune(flags(material, out, lora=True, max_steps=5, resume_from_checkpoint=str(out / "checkpoint-2")))
    assert result.step == 5
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert [entry["step"] for entry in metrics(out) if "loss" in entry] == [1, 2, 3, 4, 5]
    elsewhere = tmp_path / "elsewhere"
    chosen = str(out / "checkpoint-4")
    finetune(flags(material, elsewhere, lora=True, max_steps=5, resume_from_checkpoint=chosen))
    assert_same_file(elsewhere / "adapter_model.safetensors", out / "adapter_model.safetensors")
    finetune(flags(material, elsewhere, lora=True, max_steps=7, resume_from_checkpoint=chosen))
    assert (elsewhere / "checkpoint-7").is_dir()
    for bad, message in (("model", "is not a checkpoint"), ("absent", "no such directory")):
        with pytest.raises(ConfigError, match=message):
            finetune(flags(material, elsewhere, resume_from_checkpoint=str(material / bad)))
    (out / "checkpoint-4" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is damaged"):
        finetune(flags(material, elsewhere, lora=True, resume_from_checkpoint=chosen))


def test_changed_flags_are_reported_on_resuming(
    material: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    finetune(flags(material, out, lora=True, max_steps=2))
    finetune(flags(material, out, lora=True, max_steps=4, learning_rate=0.5))
    error = capfd.readouterr().err
    assert (
        "resuming from" in error and "--learning_rate was 0.01, is 0.5" in error and "--max_steps was 2, is 4" in error
    )
    before = (out / "run.yaml").read_text()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        finetune(flags(material, out, lora=True, r=7, max_steps=6))
    assert (out / "run.yaml").read_text() == before


def test_python_api_runs_the_same(material: Path, tmp_path: Path) -> None:
    config = flags(material, tmp_path / "api", lora=True)
    result = bloomlm.finetune(**vars(config))
    assert isinstance(result, FinetuneResult)
    finetune(flags(material, tmp_path / "direct", lora=True))
    name = "adapter_model.safetensors"
    assert_same_file(tmp_path / "api" / name, tmp_path / "direct" / name)


def test_batches_by_tokens_and_profile(material: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = finetune(flags(material, out, max_steps=-1, num_train_epochs=2.0, max_tokens_per_batch=40, profile=True))
    assert result.train_metrics is not None
    # 15 examples of at most 24 positions, rounded up to 32 in a plan: a batch holds one or two of them
    assert 2 * 8 <= result.step <= 2 * 15
    assert {path.name for path in (out / "profile").iterdir()} == {"trace.json", "operations.txt"}
    assert 0 < result.train_metrics["model_flops_utilisation"] < 1
    assert result.train_metrics["memory_bytes"]["weights"] > 0
