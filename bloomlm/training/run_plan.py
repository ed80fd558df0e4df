"""What a run will do, as frozen values that `resolve` makes from the flags and all later code reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bloomlm.adapters.base import Adapter
from bloomlm.checkpoint.formats import ForeignReading
from bloomlm.data.loader import TokenBudget
from bloomlm.generation.config import GenerationConfig
from bloomlm.model.quantized import Quantization
from bloomlm.parallel.mesh import Degrees
from bloomlm.training.config import TrainingConfig
from bloomlm.training.early_stopping import EarlyStopping
from bloomlm.training.objectives.base import Objective
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """Which model to start from, and how it computes."""

    name_or_path: str
    """builtin:NAME, a directory, or a name on the Hugging Face hub."""
    device: torch.device
    """Where the model computes."""
    quantization: Quantization | None
    """How the weights that do not learn are quantised; None: they are floating point."""
    recompute: bool
    """Whether the backward pass computes activations again."""
    noise_alpha: float
    """Size of the noise on the embeddings in training (model/noise.py); 0: none."""
    compiles_blocks: bool
    """Whether torch.compile fuses the small operations of each block."""

    @property
    def name_for_adapter(self) -> str:
        """Name of the base model in an adapter's files; a directory has its full path there, so that PEFT finds it."""
        path = Path(self.name_or_path).expanduser()
        return str(path.resolve()) if path.is_dir() else self.name_or_path


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Where the examples are, and how they become tokens."""

    dataset_name_or_path: str | None
    """A data set with several splits."""
    train_file: str | None
    """A file with the training split."""
    mixture: str | None
    """A file that names several sources of raw text with their weights."""
    eval_file: str | None
    """A file with the evaluation split."""
    prompt_template: str | None
    """Builds prompts from the fields of rows; None: prompts follow from the form of the rows."""
    src_length: int
    """Maximum number of tokens of a prompt."""
    tgt_length: int
    """Maximum number of tokens of a target, </s> included."""
    max_length: int
    """Maximum number of tokens of a window of raw text or of a conversation."""
    chat_template: str | None
    """`plain`, or a file with the template of conversations; None: the template of the model."""
    learn_last_turn: bool
    """Whether only the last answer of a conversation is learned."""
    show_progress: bool
    """Whether a bar is shown while texts are tokenised."""

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return self.dataset_name_or_path or self.train_file or self.mixture or self.eval_file or "the data"


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How the processes of the job divide the work."""

    degrees: Degrees
    """Ranks along each axis."""
    reshard_after_forward: bool
    """Whether FSDP gathers the weights of each block again for the backward pass (stage 3)."""


@dataclass(frozen=True)
class Interval:
    """How often something happens in training."""

    steps: int | None
    """Number of steps; None: one epoch."""

    def in_steps(self, steps_per_epoch: int) -> int:
        """The interval in steps, for a run with this many steps per epoch."""
        return steps_per_epoch if self.steps is None else self.steps


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How the model learns."""

    batch_size: int | TokenBudget
    """Size of a microbatch, in examples or tokens."""
    num_train_epochs: float
    """Length of the run in passes through the examples, unless max_steps is given."""
    max_steps: int | None
    """Length of the run in steps."""
    step: StepConfig
    """How gradients become an update."""
    optimizer: AdamWConfig
    """AdamW without its learning rate."""
    schedule: ScheduleConfig
    """The learning rate, for a run of any length."""
    logging_steps: int
    """Number of steps between two entries of the log."""
    evaluate_every: Interval | None
    """None: never during training."""
    save_every: Interval | None
    """None: a checkpoint is written only after SIGTERM."""
    early_stopping: EarlyStopping | None
    """When the run ends before its last step; None: never."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """How a model is evaluated, and how the best checkpoint is chosen."""

    evaluates: bool
    """Whether the evaluation examples are scored."""
    batch_size: int
    """Number of examples that are computed at once."""
    scores_answers: bool
    """Whether an evaluation also generates answers and compares them with the targets."""
    decoding: GenerationConfig
    """How answers are generated."""
    num_written_answers: int
    """Number of answers that are written to a file at the end of the run."""
    best_metric: str
    """The metric that chooses the best checkpoint."""
    greater_is_better: bool
    """Whether a greater value of that metric is better."""


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """What is written where, and what a run resumes from."""

    directory: Path
    """Directory for everything that the run writes."""
    overwrites: bool
    """Whether files of an earlier run are removed."""
    resume_from: Path | None
    """A checkpoint that the user chose; None: the newest in the directory, if there is one."""
    save_total_limit: int | None
    """Number of checkpoints to keep; None: all."""
    ends_with_best: bool
    """Whether the result is the best checkpoint and not the last step."""
    merges_adapter: bool
    """Whether the model with its adapter merged into it is written too."""
    max_shard_size_bytes: int
    """Largest size of a weight file."""


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """What a run shows."""

    show_bar: bool
    """Whether a terminal shows a progress bar."""
    trackers: tuple[str, ...]
    """Names in training/reporters of the programs that record the metrics."""
    profile: bool
    """Whether a few steps are profiled."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run."""

    flags: TrainingConfig
    """The resolved flags, which only run.yaml and the list of changes of a resumed run use."""
    notices: tuple[str, ...]
    """One line for each flag that does nothing, and each value that was decided for the user."""
    seed: int
    """Seed of the initial weights of an adapter."""
    model: ModelPlan
    adapter: Adapter
    """What learns."""
    trains_new_tokens: bool
    """Whether rows that were added to the embedding learn together with a LoRA adapter."""
    precision: Precision
    """Number formats."""
    parallelism: ParallelPlan
    data: DataPlan
    objective: Objective[Any]
    """What is minimised, and evaluated."""
    training: TrainingPlan | None
    """None: the model is only evaluated."""
    evaluation: EvaluationPlan
    output: OutputPlan
    report: ReportPlan
    reading: ForeignReading
    """How to read files of another program that do not say it themselves."""
