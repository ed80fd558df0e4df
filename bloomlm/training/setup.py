"""What a run needs before its first step: the model with its adapter, tokenizer, examples, and the trainer."""

import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.checkpoint.main_rank import main_first
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.examples import ExampleSet, load_examples
from bloomlm.data.files import RowSource
from bloomlm.data.loader import Batches, BatchLoader, Examples
from bloomlm.data.splits import resolve_splits
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import check_agreement
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.evaluate import Evaluator
from bloomlm.training.precision import Precision
from bloomlm.training.resume import ResumePoint, read_resume_point, with_recorded_adapter
from bloomlm.training.run_plan import DataPlan, RunPlan, TrainingPlan
from bloomlm.training.step import Trainer, steps_per_epoch
from bloomlm.training.summary import describe_parameters
from bloomlm.version import __version__
from bloomlm.vocabulary.new_tokens import NEW_TOKENS_FILE, read_new_tokens

MOST_HELD_OUT = 1000


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """A run that is ready to begin."""

    plan: RunPlan
    """If another program began the adapter, with the adapter as that program recorded it."""
    mesh: Mesh
    """The ranks."""
    model: BloomForCausalLM
    """With its adapter, and divided among the ranks."""
    tokenizer: Tokenizer
    train_examples: ExampleSet | None
    """None if the run does not train."""
    evaluator: Evaluator
    """Uses the evaluation examples, or the training examples if there are none."""
    resume_point: ResumePoint
    """What the run resumes from."""
    console: Console
    """Where progress is shown."""


def set_up(plan: RunPlan, checkpoint: Path | None, console: Console, mesh: Mesh) -> RunSetup:
    """Load everything that the plan names, and print what was found; every rank must call this.

    A checkpoint is what the run resumes from; None begins a fresh run.

    Raises:
        ConfigError: flags that contradict the checkpoint or the data.
        CheckpointError, DataError: files that cannot be used.
    """
    source = resolve_source(plan.model.name_or_path).directory
    tokenizer = Tokenizer.from_directory(source, as_gpt2=plan.reading.tokenization)
    resume_point = read_resume_point(plan, source, checkpoint)
    plan = with_new_tokens(with_recorded_adapter(plan, resume_point), source, resume_point)
    # the main rank comes first and tokenises; the others find the result in the cache
    examples = main_first(lambda: load_run_examples(plan, tokenizer), mesh)
    check_agreement({"examples": examples.fingerprint, "version": __version__}, mesh)
    model = load_to_train(plan, source, resume_point, mesh)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{plan.model.name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, but its embedding only "
            f"{model.config.vocab_size}; they belong to different models"
        )
    for line in (*examples.descriptions, describe_parameters(model, mesh)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    to_evaluate = examples.dev or examples.train
    assert to_evaluate is not None
    return RunSetup(
        plan=plan,
        mesh=mesh,
        model=model,
        tokenizer=tokenizer,
        train_examples=examples.train if plan.training is not None else None,
        evaluator=Evaluator(model, tokenizer, to_evaluate, plan.evaluation, plan.precision, mesh),
        resume_point=resume_point,
        console=console,
    )


def with_new_tokens(plan: RunPlan, source: Path, resume_point: ResumePoint) -> RunPlan:
    """The plan with an adapter that also trains the added rows of the embedding of the model in `source`, if wanted.

    Raises:
        ConfigError: the model has no added rows, or another program began the adapter.
        CheckpointError: the record of the added rows is damaged.
    """
    if not plan.trains_new_tokens:
        return plan
    tokens = read_new_tokens(source)
    if tokens is None:
        raise ConfigError(
            f"--train_new_tokens: {plan.model.name_or_path} has no {NEW_TOKENS_FILE}, in which `bloomlm extend` "
            "records the tokens that it added; extend the model first, or leave the flag out"
        )
    if resume_point.recorded_adapter is not None:
        raise ConfigError(
            "--train_new_tokens: another program began this adapter and did not train rows of the embedding; leave "
            "the flag out to continue, or start a new run in another --output_dir"
        )
    # LoRA alone has the flag, and its configuration has this field
    adapter: Adapter = replace(cast(Any, plan.adapter), trained_tokens=tuple(tokens))
    return replace(plan, adapter=adapter)


def load_to_train(plan: RunPlan, source: Path, resume_point: ResumePoint, mesh: Mesh = ALONE) -> BloomForCausalLM:
    """The model with its adapter, divided among the ranks.

    It is read from the directory `source`, or from the checkpoint of a run that resumes and trains the whole model.
    """
    device = plan.model.device
    generator = torch.Generator(device).manual_seed(plan.seed)

    def install(model: BloomForCausalLM) -> None:
        if resume_point.recorded_adapter is not None:
            resume_point.recorded_adapter.install(model, device)
        else:
            apply_adapter(model, plan.adapter, generator, device)

    model = load_model(
        resume_point.checkpoint if resume_point.checkpoint is not None and plan.adapter.trains_base else source,
        dtype=plan.precision.weights_dtype,
        device=device,
        memory_map=False,
        int8=plan.model.int8,
        mesh=mesh,
        install_adapter=install,
        reshard_after_forward=plan.parallelism.reshard_after_forward,
    )
    if mesh.is_alone:
        install(model)
    else:
        plan.adapter.start_from_weights(model)
    model.transformer.recompute = plan.model.recompute
    if plan.model.compiles_blocks:
        model.transformer.compile_blocks()
    return model


def load_batches(training: TrainingPlan, examples: Examples, mesh: Mesh = ALONE) -> BatchLoader:
    """This rank's batches of the training examples."""
    return BatchLoader(
        examples,
        training.batch_size,
        shuffle=True,
        seed=training.step.seed,
        dp_degree=mesh.degrees.dp,
        dp_rank=mesh.dp_rank,
    )


def build_trainer(
    training: TrainingPlan, model: BloomForCausalLM, batches: Batches, precision: Precision, mesh: Mesh = ALONE
) -> Trainer:
    """The trainer before its first step, with a schedule for the length of this run."""
    per_epoch = steps_per_epoch(len(batches), training.step.gradient_accumulation_steps)
    max_steps = training.max_steps or max(1, math.ceil(training.num_train_epochs * per_epoch))
    return Trainer(
        model,
        batches,
        optimizer=training.optimizer,
        schedule=training.schedule.over(max_steps),
        precision=precision,
        config=training.step,
        mesh=mesh,
    )


@dataclass(frozen=True, kw_only=True)
class RunExamples:
    """The examples of a run; None for a set that the run does not need."""

    train: ExampleSet | None
    dev: ExampleSet | None
    descriptions: tuple[str, ...]
    """One line about each set."""

    @property
    def fingerprint(self) -> tuple[int, ...]:
        """Sizes, and checksums of samples: they almost surely differ between ranks that read different data."""
        found: list[int] = []
        for examples in (self.train, self.dev):
            if examples is None:
                continue
            step = max(1, len(examples) // 1000)
            checksum = 0
            for index in range(0, len(examples), step):
                checksum = zlib.crc32(examples[index].tokens.tobytes(), checksum)
            found += [len(examples), checksum]
        return tuple(found)


def load_run_examples(plan: RunPlan, tokenizer: Tokenizer) -> RunExamples:
    """Load the examples that the plan names.

    If the run evaluates and the data has no evaluation split, the last 5 % of the training examples, at most 1000, are
    evaluated and not trained on.

    Raises:
        ConfigError, DataError: see resolve_splits and load_examples.
    """
    data, trains, evaluates = plan.data, plan.training is not None, plan.evaluation.evaluates
    splits = resolve_splits(
        dataset_name_or_path=data.dataset_name_or_path, train_file=data.train_file, eval_file=data.eval_file
    )
    if trains and splits.train is None:
        raise ConfigError(f"{data.name} has no training examples; give --train_file or another data set")
    holds_out = evaluates and splits.dev is None
    if holds_out and splits.train is None:
        raise ConfigError(f"{data.name} has no examples to evaluate on; give --eval_file")
    train = dev = None
    descriptions = []
    if splits.train is not None and (trains or holds_out):
        train = _load(splits.train, data, tokenizer)
        if trains:
            descriptions.append(
                f"training: {len(train):,} examples from {train.report.name}, {train.num_tokens:,} tokens, "
                f"{train.num_supervised_tokens:,} of them learned"
            )
    if splits.dev is not None and (evaluates or plan.evaluation.num_written_answers > 0):
        dev = _load(splits.dev, data, tokenizer)
        descriptions.append(f"evaluation: {len(dev):,} examples from {dev.report.name}")
    if holds_out and train is not None:
        train, dev = _hold_out(train, data)
        descriptions.append(
            f"evaluation: the data has no evaluation split, so the last {len(dev)} training examples are used for it "
            "and not trained on; --eval_file names others"
        )
    return RunExamples(train=train, dev=dev, descriptions=tuple(descriptions))


def _hold_out(examples: ExampleSet, data: DataPlan) -> tuple[ExampleSet, ExampleSet]:
    """Split a set into examples to train on and examples to evaluate on."""
    split = len(examples) - max(1, min(MOST_HELD_OUT, len(examples) // 20))
    if split < 1:
        raise ConfigError(f"{data.name} has one example, too few to train and evaluate; give --eval_file")
    return examples.part(0, split), examples.part(split, len(examples))


def _load(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> ExampleSet:
    return load_examples(
        rows,
        tokenizer,
        src_length=data.src_length,
        tgt_length=data.tgt_length,
        prompt_template=data.prompt_template,
        show_progress=data.show_progress,
    )
