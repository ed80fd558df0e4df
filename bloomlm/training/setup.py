"""What a run needs before its first step: the model with its adapter, the tokenizer and the examples."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.checkpoint.main_rank import main_first
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.examples import Example, ExampleSet, load_examples
from bloomlm.data.files import RowSource
from bloomlm.data.loader import Examples
from bloomlm.data.splits import resolve_splits
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import check_agreement
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.evaluate import Evaluator
from bloomlm.training.resume import ResumePoint, read_resume_point, with_recorded_adapter
from bloomlm.training.run_plan import DataPlan, RunPlan
from bloomlm.training.summary import describe_parameters
from bloomlm.version import __version__
from bloomlm.vocabulary.new_tokens import NEW_TOKENS_FILE, read_new_tokens

MOST_HELD_OUT = 1000


@dataclass(frozen=True, kw_only=True)
class RunSetup:
    """A run that is ready to begin."""

    plan: RunPlan
    """With an adapter that another program began as it was recorded."""
    mesh: Mesh
    """The ranks."""
    model: BloomForCausalLM
    """With its adapter; divided among the ranks."""
    tokenizer: Tokenizer
    train_examples: Examples | None
    """To learn; None if nothing is trained."""
    evaluator: Evaluator
    """Of the evaluation examples, or where there are none of the training examples."""
    resume_point: ResumePoint
    """What the run resumes from."""
    console: Console
    """Where progress is shown."""


def set_up(plan: RunPlan, checkpoint: Path | None, console: Console, mesh: Mesh) -> RunSetup:
    """Load everything that the plan names, and say what was found.

    Args:
        plan: of the run.
        checkpoint: to resume from; None: a fresh run.
        console: where to say it.
        mesh: the ranks, all of which must come here.

    Raises:
        ConfigError: flags that contradict the checkpoint or the data.
        CheckpointError, DataError: files that cannot be used.
    """
    source = resolve_source(plan.model.name_or_path).directory
    tokenizer = Tokenizer.from_directory(source, as_gpt2=plan.reading.tokenization)
    resume_point = read_resume_point(plan, source, checkpoint)
    plan = with_new_tokens(with_recorded_adapter(plan, resume_point), source, resume_point)
    # the main rank first: it tokenises, and the others find the result in the cache
    examples = main_first(lambda: load_run_examples(plan, tokenizer), mesh)
    check_agreement({"examples": examples.fingerprint, "version": __version__}, mesh)
    model = load_to_train(plan, source, resume_point, mesh)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"{plan.model.name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding only "
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
    """The plan with an adapter that trains the added rows of the model's embedding, where the plan says so.

    Args:
        plan: of the run.
        source: directory of the model to start from.
        resume_point: what the run resumes from.

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
    if resume_point.structure is not None:
        raise ConfigError(
            "--train_new_tokens: another program began this adapter and did not train rows of the embedding; leave "
            "the flag out to go on, or start anew in another --output_dir"
        )
    # only LoRA has the flag, and its configuration the field
    adapter: Adapter = replace(cast(Any, plan.adapter), trained_tokens=tuple(tokens))
    return replace(plan, adapter=adapter)


def load_to_train(plan: RunPlan, source: Path, resume_point: ResumePoint, mesh: Mesh = ALONE) -> BloomForCausalLM:
    """The model with its adapter installed; a fully tuned one that resumes is read from its checkpoint.

    Args:
        plan: of the run.
        source: directory of the model to start from.
        resume_point: what the run resumes from.
        mesh: the ranks to divide the model among.
    """
    device = plan.model.device
    generator = torch.Generator(device).manual_seed(plan.seed)

    def install(model: BloomForCausalLM) -> None:
        if resume_point.structure is not None:
            resume_point.structure.install(model, device)
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


@dataclass(frozen=True)
class ExampleSlice:
    """Some neighbouring examples of a set."""

    examples: ExampleSet
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int, /) -> Example:
        assert 0 <= index < len(self)
        return self.examples[self.start + index]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example."""
        return self.examples.lengths[self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class RunExamples:
    """The examples of a run; None for a set that it does not need."""

    train: Examples | None
    dev: Examples | None
    descriptions: tuple[str, ...]
    """One line about each set."""

    @property
    def fingerprint(self) -> tuple[int, ...]:
        """Numbers that almost surely differ between ranks that read different data: sizes and a checksum of samples."""
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

    Where an evaluation is wanted and the data has no evaluation split, the last 5 % of the training examples, at most
    1000, are excluded from training and evaluated.

    Args:
        plan: of the run.
        tokenizer: of the model.

    Raises:
        ConfigError, DataError: see resolve_splits and load_examples.
    """
    data, trains, evaluates = plan.data, plan.training is not None, plan.evaluation.evaluates
    splits = resolve_splits(
        dataset_name_or_path=data.dataset_name_or_path, train_file=data.train_file, eval_file=data.eval_file
    )
    if trains and splits.train is None:
        raise ConfigError(f"{data.name} has no training examples; give --train_file or another data set")
    wants_dev = evaluates or plan.evaluation.num_written_answers > 0
    holds_out = evaluates and splits.dev is None
    if holds_out and splits.train is None:
        raise ConfigError(f"{data.name} has no examples to evaluate on; give --eval_file")
    train = _load(splits.train, data, tokenizer) if splits.train is not None and (trains or holds_out) else None
    dev = _load(splits.dev, data, tokenizer) if splits.dev is not None and wants_dev else None
    descriptions = [] if train is None or not trains else [_describe_training(train)]
    if dev is not None:
        descriptions.append(f"evaluation: {len(dev):,} examples from {dev.report.name}")
    examples = RunExamples(train=train, dev=dev, descriptions=tuple(descriptions))
    return _held_out(examples, train, data) if holds_out and train is not None else examples


def _held_out(examples: RunExamples, train: ExampleSet, data: DataPlan) -> RunExamples:
    """The same with the last examples of the training set kept for evaluation."""
    num_held_out = max(1, min(MOST_HELD_OUT, len(train) // 20))
    split = len(train) - num_held_out
    if split < 1:
        raise ConfigError(f"{data.name} has one example, too few to train and evaluate; give --eval_file")
    line = (
        f"evaluation: no examples of its own, so the last {num_held_out} of the training file are kept from training "
        "and used; --eval_file names others"
    )
    return replace(
        examples,
        train=ExampleSlice(train, 0, split),
        dev=ExampleSlice(train, split, len(train)),
        descriptions=(*examples.descriptions, line),
    )


def _load(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> ExampleSet:
    return load_examples(
        rows,
        tokenizer,
        src_length=data.src_length,
        tgt_length=data.tgt_length,
        prompt_template=data.prompt_template,
        show_progress=data.show_progress,
    )


def _describe_training(examples: ExampleSet) -> str:
    return (
        f"training: {len(examples):,} examples from {examples.report.name}, {examples.num_tokens:,} tokens, "
        f"{examples.num_supervised_tokens:,} of them learned"
    )
