"""What a run needs before its first step: the model with its adapter, tokenizer, examples, and the trainer."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.checkpoint.main_rank import main_first
from bloomlm.checkpoint.reader import load_model, read_config
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.chat_template import with_given_template
from bloomlm.data.example import Examples, TrainingSet
from bloomlm.data.loader import Batches, BatchLoader, TokenBudget
from bloomlm.data.mixture import Mixture, MixtureOrder
from bloomlm.data.preferences import ComparedSet
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.kernels.compiled import load_operators_for
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import check_agreement
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.evaluate import Evaluator
from bloomlm.training.objectives.base import Objective
from bloomlm.training.precision import Precision
from bloomlm.training.reference import with_reference
from bloomlm.training.resume import ResumePoint, read_resume_point, with_recorded_adapter
from bloomlm.training.run_data import RunExamples, load_run_examples
from bloomlm.training.run_plan import RunPlan, TrainingPlan
from bloomlm.training.step import Trainer, steps_per_epoch
from bloomlm.training.summary import describe_parameters
from bloomlm.version import __version__
from bloomlm.vocabulary.new_tokens import NEW_TOKENS_FILE, read_new_tokens


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
    train_examples: TrainingSet | None
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
    tokenizer = with_given_template(tokenizer, plan.data.chat_template)
    resume_point = read_resume_point(plan, source, checkpoint)
    plan = with_new_tokens(with_recorded_adapter(plan, resume_point), source, resume_point)
    # the main rank comes first and tokenises; the others find the result in the cache
    examples = main_first(lambda: load_run_examples(plan, tokenizer), mesh)
    check_agreement({"examples": examples.fingerprint, "version": __version__}, mesh)
    vocab_size = read_config(source).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{plan.model.name_or_path}: its tokenizer has {tokenizer.vocab_size} tokens, but its embedding only "
            f"{vocab_size}; they belong to different models"
        )
    if plan.objective.uses_reference:
        examples = _with_reference(examples, plan, source, console, mesh)
    model = load_to_train(plan, source, resume_point, mesh)
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
        evaluator=Evaluator(model, tokenizer, to_evaluate, plan.evaluation, plan.objective, plan.precision, mesh),
        resume_point=resume_point,
        console=console,
    )


def _with_reference(examples: RunExamples, plan: RunPlan, source: Path, console: Console, mesh: Mesh) -> RunExamples:
    """The examples with log-probabilities under the model in `source`, which is freed before this returns."""
    sets = [answers for answers in (examples.train, examples.dev) if isinstance(answers, ComparedSet)]
    scored = iter(with_reference(sets, plan, source, lambda: _load(plan, source, mesh), console, mesh))
    train = None if examples.train is None else next(scored)
    return replace(examples, train=train, dev=None if examples.dev is None else next(scored))


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

    resumes_model = resume_point.checkpoint is not None and plan.adapter.trains_base
    model = _load(plan, resume_point.checkpoint if resumes_model else source, mesh, install)
    if mesh.is_alone:
        install(model)
    else:
        plan.adapter.start_from_weights(model)
    model.transformer.recompute = plan.model.recompute
    model.transformer.noise_alpha = plan.model.noise_alpha
    if plan.model.compiles_blocks:
        model.transformer.compile_blocks()
    return model


def _load(
    plan: RunPlan, directory: Path | None, mesh: Mesh, install: Callable[[BloomForCausalLM], None] | None = None
) -> BloomForCausalLM:
    """The model in a directory, in the plan's precision and divided among the ranks; `install` as in load_model."""
    assert directory is not None
    load_operators_for(plan.model.device)
    return load_model(
        directory,
        dtype=plan.precision.weights_dtype,
        device=plan.model.device,
        memory_map=False,
        quantization=plan.model.quantization,
        mesh=mesh,
        install_adapter=install,
        reshard_after_forward=plan.parallelism.reshard_after_forward,
        linear_dtype=plan.precision.linear_dtype(plan.model.device.type, learns=plan.adapter.trains_base),
    )


def load_batches(
    training: TrainingPlan, examples: Examples, objective: Objective[Any], mesh: Mesh = ALONE
) -> BatchLoader:
    """This rank's batches of the training examples."""
    batch_size, order = training.batch_size, None
    if isinstance(examples, Mixture):
        order = MixtureOrder(examples, training.step.seed)
        if isinstance(batch_size, TokenBudget):
            batch_size = examples.windows_per_batch(batch_size)
    return BatchLoader(
        examples,
        batch_size,
        shuffle=True,
        seed=training.step.seed,
        dp_degree=mesh.degrees.dp,
        dp_rank=mesh.dp_rank,
        collate=objective.collate,
        order=order,
    )


def build_trainer(
    training: TrainingPlan,
    model: BloomForCausalLM,
    batches: Batches,
    objective: Objective[Any],
    precision: Precision,
    mesh: Mesh = ALONE,
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
        objective=objective,
        mesh=mesh,
    )
