"""The flags of fine-tuning: PaddleNLP's command lines, and what flags mean together."""

import dataclasses
import importlib.resources
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bloomlm.adapters.base import FullTuning
from bloomlm.adapters.lora import LoraConfig
from bloomlm.cli.options import config_command, config_flags, join_values
from bloomlm.data.loader import TokenBudget
from bloomlm.errors import ConfigError
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.training.checks import DEFAULT_DATASET
from bloomlm.training.config import TrainingConfig
from bloomlm.training.output_dir import changed_flags, write_run_file
from bloomlm.training.precision import Precision
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.run_plan import Interval

CPU = Machine(has_cuda=False, has_matplotlib=True, has_metrics=True, trackers=frozenset({"tensorboard", "wandb"}))
GPU = dataclasses.replace(CPU, has_cuda=True)
BARE = Machine(has_cuda=False, has_matplotlib=False, has_metrics=False)

# The flags that PaddleNLP's documentation gives for one GPU, to which tests add those of an adapter.
PADDLENLP_FLAGS = """--model_name_or_path bigscience/bloom-560m --num_train_epochs 2 --learning_rate 3e-4
    --warmup_ratio 0.06 --weight_decay 0.1 --label_smoothing 0.1 --save_steps 1000 --logging_steps 1 --eval_steps 1000
    --output_dir ./checkpoints/bloom-560m --src_length 500 --tgt_length 100 --min_tgt_length 0
    --per_device_eval_batch_size 8 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --max_grad_norm 1.0
    --scale_loss 32768 --lr_scheduler_type linear --do_train --do_eval --fp16 --fp16_opt_level O2 --recompute"""


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(**{"output_dir": "out", "train_file": "train.jsonl", **options})


def resolved(machine: Machine = CPU, **options: Any) -> TrainingConfig:
    return resolve(config(**options), machine).flags


def notices(machine: Machine = CPU, **options: Any) -> str:
    return "\n".join(resolve(config(**options), machine).notices)


def decoding(**options: Any) -> GenerationConfig:
    return resolve(config(do_generation=True, **options), CPU).evaluation.decoding


def parse(line: str) -> TrainingConfig:
    seen: list[TrainingConfig] = []
    config_command("finetune", TrainingConfig, seen.append, help="x").main(shlex.split(line), standalone_mode=False)
    return seen[0]


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        ("--lora True --r 8", {"lora": True, "r": 8, "prefix_tuning": False}),
        ("--prefix True --num_prefix_tokens 64", {"prefix_tuning": True, "num_prefix_tokens": 64, "lora": False}),
    ],
)
@pytest.mark.parametrize("machine", [CPU, GPU])
def test_paddlenlp_command_lines_run_as_they_stand(adapter: str, expected: dict[str, Any], machine: Machine) -> None:
    plan = resolve(parse(f"{PADDLENLP_FLAGS} {adapter}"), machine)
    found, notes = plan.flags, plan.notices
    assert {name: getattr(found, name) for name in expected} == expected
    assert (found.fp16, found.fp16_opt_level, found.scale_loss, found.recompute) == (True, "O2", 32768.0, True)
    assert (found.learning_rate, found.warmup_ratio, found.label_smoothing) == (3e-4, 0.06, 0.1)
    assert (found.do_train, found.do_eval, found.evaluation_strategy, found.eval_steps) == (True, True, "steps", 1000)
    assert found.dataset_name_or_path == DEFAULT_DATASET and any(DEFAULT_DATASET in note for note in notes)
    assert found.device == ("gpu" if machine.has_cuda else "cpu")
    assert any("fp16 works on a CPU" in note for note in notes) is not machine.has_cuda
    assert len(notes) == (1 if machine.has_cuda else 2)


@pytest.mark.parametrize(("machine", "has_bf16", "slow"), [(CPU, True, False), (CPU, False, True), (GPU, False, False)])
def test_bf16_is_said_to_be_slow_where_the_processor_computes_it_and_lacks_it(
    machine: Machine, has_bf16: bool, slow: bool
) -> None:
    config = TrainingConfig(model_name_or_path="builtin:tiny", output_dir="o", train_file="t.jsonl", bf16=True)
    notes = resolve(config, dataclasses.replace(machine, has_bf16=has_bf16)).notices
    assert any("--bf16 will be slow" in note for note in notes) is slow


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tensor_parallel_degree": 4}, "tensor_parallel_degree 4 with 1 process.*--num_processes"),
        ({"pipeline_parallel_degree": 2}, "has no pipeline parallelism"),
        ({"sharding_parallel_degree": 0}, "sharding_parallel_degree is 0"),
        ({"sharding": "stage2"}, "here is one .*--num_processes"),
        ({"fp16": True, "bf16": True}, "choose one"),
        ({"lora": True, "prefix_tuning": True}, "one adapter"),
        ({"prefix_tuning": True, "merge_weights": True}, "impossible for the virtual tokens of a prefix"),
        ({"torch_compile": True}, "times slower"),
        ({"base_quantization": "int8"}, "add --lora"),
        ({"base_quantization": "int8", "prefix_tuning": True}, "add --lora"),
        ({"base_quantization": "nf4", "lora": True}, r"pip install 'bloomlm\[nf4\]'"),
        ({"device": "gpu"}, "--device cpu"),
        ({"do_train": False}, "nothing to do"),
        ({"do_eval": True, "do_train": False, "lora": True}, "fresh adapter"),
        ({"train_file": None, "eval_file": "e.jsonl"}, "needs training data"),
        ({"train_file": None, "do_generation": True}, "no data is named"),
        ({"dataset_name_or_path": "builtin:dates"}, "both name"),
        ({"evaluation_strategy": "epoch", "do_eval": False}, "contradict"),
        ({"do_generation": True, "do_eval": False}, "contradicts"),
        ({"load_best_model_at_end": True}, "add --do_eval"),
        ({"load_best_model_at_end": True, "evaluation_strategy": "epoch"}, "they must be equal"),
        ({"load_best_model_at_end": True, "do_eval": True, "eval_steps": 30, "save_steps": 50}, "not a multiple"),
        ({"do_eval": True, "metric_for_best_model": "rouge1"}, "it needs --do_generation|this run has"),
        ({"do_eval": True, "metric_for_best_model": "eval_bleu4"}, "it needs --do_generation"),
        ({"early_stopping_patience": 2}, "counts evaluations during training; add --do_train and --do_eval"),
        ({"do_generation": True, "select_topk": False}, "give --top_p"),
        ({"do_generation": True, "num_beams": 4, "top_p": 0.9}, "one kind of decoding"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "constant_with_warmup"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "out/checkpoint-3"}, "choose one"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; expected at least 0 and below 1"),
        ({"logging_steps": 0}, "logging_steps is 0; expected at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; expected at least 0 and at most 1"),
        ({"optim": "sgd"}, "optim is 'sgd'; expected one of adamw, adamw_8bit"),
        ({"prefix_layout": "newest"}, "prefix_layout is 'newest'; expected one of old, new"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"num_train_epochs": 0.0}, "num_train_epochs is 0.0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
        ({"tgt_length": 10, "min_tgt_length": 11}, "min_tgt_length 11 is above"),
        ({"adam_epsilon": 0.0}, "adam_epsilon"),
        ({"packing": False}, "would only waste time on padding"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0"),
        ({"report_to": "visualdl"}, "'visualdl' is none of tensorboard, wandb, mlflow, trackio"),
        ({"report_to": "wandb,all"}, "'all' is none of .* all and none stand alone"),
    ],
)
def test_what_cannot_act_is_refused_with_the_reason(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolved(**options)


def test_flags_for_one_process_are_refused_for_several() -> None:
    several = dataclasses.replace(GPU, world_size=2)
    for flag, options in {
        "--base_quantization int8": {"base_quantization": "int8", "lora": True},
        "--torch_compile": {"torch_compile": True},
    }.items():
        with pytest.raises(ConfigError, match=f"{flag}: needs a single process, and there are 2"):
            resolved(several, **options)
        assert resolved(GPU, **options).device == "gpu"


def test_missing_extras_are_named_before_training() -> None:
    with pytest.raises(ConfigError, match=r"bloomlm\[metrics\]"):
        resolved(BARE, do_generation=True)
    with pytest.raises(ConfigError, match=r"bloomlm\[tensorboard\]"):
        resolved(BARE, report_to="tensorboard")
    with pytest.raises(ConfigError, match=r"--report_to wandb,mlflow needs: pip install 'bloomlm\[mlflow\]'"):
        resolved(report_to="wandb,mlflow")
    assert resolved(BARE).report_to == "none"
    assert r"bloomlm[plots]" in notices(BARE) and "bloomlm[tensorboard]" in notices(BARE)
    assert resolved().report_to == "tensorboard"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 8}, "--r: not used without --lora"),
        ({"loraplus_lr_ratio": 16.0, "prefix_tuning": True}, "--loraplus_lr_ratio: not used without --lora"),
        ({"early_stopping_threshold": 0.1}, "--early_stopping_threshold is not used without --early_stopping_patience"),
        ({"train_new_tokens": True, "prefix_tuning": True}, "--train_new_tokens: not used without --lora"),
        ({"num_prefix_tokens": 3, "lora": True}, "--num_prefix_tokens: not used without --prefix_tuning"),
        ({"merge_weights": True}, "--merge_weights is not used"),
        ({"scale_loss": 1.0}, "--scale_loss 1 is not used"),
        ({"fp16_opt_level": "O2"}, "--fp16_opt_level O2 is not used"),
        ({"task_name": "dureader_qg"}, "--task_name dureader_qg is not used"),
        ({"dataloader_num_workers": 2}, "--dataloader_num_workers is not used"),
        ({"warmup_steps": 2, "warmup_ratio": 0.1}, "--warmup_ratio is not used"),
        (
            {"max_tokens_per_batch": 512, "per_device_train_batch_size": 4},
            "--per_device_train_batch_size 4 is not used",
        ),
        ({"lr_scheduler_type": "constant", "lr_decay_ratio": 0.5}, "--lr_decay_ratio is not used"),
        ({"num_beams": 5}, "--num_beams: not used without --do_generation"),
        ({"do_generation": True, "length_penalty": 0.7}, "--length_penalty is not used"),
        ({"do_generation": True, "select_topk": False, "top_p": 0.9, "top_k": 3}, "--top_k 3 is not used"),
        ({"eval_steps": 3}, "--eval_steps is not used"),
        ({"eval_file": "e.jsonl", "do_eval": False}, "--eval_file e.jsonl is not used"),
        ({"do_eval": True, "evaluation_strategy": "epoch", "eval_steps": 3}, "--eval_steps is not used"),
    ],
)
def test_flags_that_do_nothing_are_reported(options: dict[str, Any], words: str) -> None:
    assert words in notices(**options)


def test_a_plain_run_needs_no_notice() -> None:
    assert resolve(config(lora=True, r=8, eval_file="e.jsonl"), CPU).notices == ()


def test_what_depends_on_other_flags_is_filled_in() -> None:
    assert (resolved().do_train, resolved().do_eval) == (True, False)
    found = resolved(eval_file="e.jsonl", logging_steps=7)
    assert (found.do_eval, found.evaluation_strategy, found.eval_steps) == (True, "steps", 7)
    assert (found.metric_for_best_model, found.greater_is_better) == ("eval_loss", False)
    found = resolved(do_generation=True, metric_for_best_model="rougeL")
    assert (found.metric_for_best_model, found.greater_is_better) == ("eval_rougeL", True)
    assert resolved(do_eval=True, metric_for_best_model="ppl").greater_is_better is False
    assert resolved(do_eval=True, metric_for_best_model="eval_loss", greater_is_better=True).greater_is_better is True
    found = resolved(do_eval=True, train_file=None, eval_file="e.jsonl")
    assert (found.do_train, found.evaluation_strategy) == (False, "no")
    assert resolved(GPU).device == "gpu" and resolved(GPU, device="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Greedy()),
        ({"num_beams": 1, "top_k": 0, "top_p": 0.0}, Greedy()),
        ({"top_k": 1}, Greedy()),
        ({"top_k": 4}, Sampling(top_k=4, top_p=1.0, seed=42)),
        ({"top_k": 4, "top_p": 0.9}, Sampling(top_k=4, top_p=0.9, seed=42)),
        ({"top_k": 4, "top_p": 0.9, "select_topk": False}, Sampling(top_k=0, top_p=0.9, seed=42)),
        ({"num_beams": 5}, BeamSearch(num_beams=5, length_penalty=1.0)),
        ({"num_beams": 5, "length_penalty": 0.7}, BeamSearch(num_beams=5, length_penalty=0.7)),
    ],
)
def test_decoding_is_greedy_unless_asked_otherwise(options: dict[str, Any], expected: object) -> None:
    found = decoding(tgt_length=9, min_tgt_length=2, **options)
    assert found.strategy == expected
    assert (found.max_new_tokens, found.min_new_tokens, found.no_repeat_ngram_size) == (9, 2, 0)
    assert decoding(no_repeat_ngram_size=3).no_repeat_ngram_size == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_generation": True, "top_k": 3, "lora": True, "target_modules": ("dense", "query_key_value")},
        {"eval_file": "e.jsonl", "load_best_model_at_end": True, "prompt_template": "{src}\n: #'\"", "bf16": True},
        {"train_file": None, "eval_file": "e.jsonl", "do_eval": True, "learning_rate": 1e-06},
    ],
)
def test_run_file_gives_the_same_run(options: dict[str, Any], tmp_path: Path) -> None:
    first = resolved(output_dir=str(tmp_path / "out"), **options)
    write_run_file(first)
    run_file = tmp_path / "out" / "run.yaml"
    again = TrainingConfig(**join_values(config_flags(TrainingConfig), {}, run_file))
    assert again == first
    assert resolve(again, CPU).flags == first
    assert changed_flags(again) is None
    changed = dataclasses.replace(again, learning_rate=0.5, disable_tqdm=True)
    assert changed_flags(changed) == f"--learning_rate was {first.learning_rate}, is 0.5"
    assert list(yaml.safe_load(run_file.read_text())) == [item.name for item in dataclasses.fields(TrainingConfig)]


def test_a_plan_has_the_values_of_the_flags() -> None:
    plan = resolve(
        config(
            eval_file="e.jsonl",
            evaluation_strategy="epoch",
            save_steps=7,
            max_tokens_per_batch=64,
            lora=True,
            r=3,
            merge_weights=True,
            bf16=True,
            fp16_opt_level="O2",
            prefix_layout=None,
            resume_from_checkpoint="out/checkpoint-2",
            max_shard_size="20KB",
        ),
        CPU,
    )
    training = plan.training
    assert training is not None
    assert (training.evaluate_every, training.save_every) == (Interval(None), Interval(7))
    assert [interval.in_steps(5) for interval in (Interval(None), Interval(7))] == [5, 7]
    assert (training.batch_size, training.max_steps, training.num_train_epochs) == (TokenBudget(64), None, 3.0)
    assert plan.adapter == LoraConfig(r=3)
    assert plan.precision == Precision(compute_dtype=torch.bfloat16, half_weights=True)
    assert plan.output.merges_adapter and plan.output.max_shard_size_bytes == 20_000
    assert plan.output.resume_from == Path("out/checkpoint-2")
    assert (plan.evaluation.evaluates, plan.evaluation.best_metric) == (True, "eval_loss")


def test_a_run_that_only_evaluates_has_no_training() -> None:
    plan = resolve(config(train_file=None, eval_file="e.jsonl", do_eval=True), CPU)
    assert plan.training is None and plan.adapter == FullTuning()


def test_only_resolve_reads_the_flags() -> None:
    directory = Path(str(importlib.resources.files("bloomlm.training")))
    users = {path.stem for path in directory.glob("*.py") if "TrainingConfig" in path.read_text(encoding="utf-8")}
    # run_plan keeps the flags for output_dir, which writes run.yaml and compares it when a run resumes
    planning = {"config", "checks", "data_checks", "objective_checks", "resolve", "sections", "run_plan", "output_dir"}
    assert users == planning | {"finetune", "learning_rate_range"}


def test_every_flag_has_a_help_text() -> None:
    for item in dataclasses.fields(TrainingConfig):
        assert 10 < len(item.metadata["help"]) < 125, item.name
        assert item.metadata["help"].isascii() and item.metadata["section"]
