"""What a run will do, as small frozen values. `resolve` makes them from the flags; everything below it reads them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bloomlm.adapters.base import Adapter
from bloomlm.checkpoint.formats import ForeignReading
from bloomlm.data.loader import TokenBudget
from bloomlm.generation.config import GenerationConfig
from bloomlm.parallel.mesh import Degrees
from bloomlm.training.config import TrainingConfig
from bloomlm.training.optimizer import AdamWConfig, ScheduleConfig
from bloomlm.training.precision import Precision
from bloomlm.training.step import StepConfig


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """The model to start from, and how it computes."""

    name_or_path: str
    """builtin:NAME, a directory, or a name on the Hugging Face hub."""
    device: torch.device
    """Where it lies."""
    int8: bool
    """The weights that do not learn are rounded to 8 bits."""
    recompute: bool
    """Activations are computed again in the backward pass instead of kept."""
    compiles_blocks: bool
    """torch.compile fuses the small operations of each block."""

    @property
    def name_for_adapter(self) -> str:
        """The base model in an adapter's files: a directory by its full path, so that PEFT finds it from anywhere."""
        path = Path(self.name_or_path).expanduser()
        return str(path.resolve()) if path.is_dir() else self.name_or_path


@dataclass(frozen=True, kw_only=True)
class DataPlan:
    """Where the examples are and how they become tokens."""

    dataset_name_or_path: str | None
    """A data set with several splits."""
    train_file: str | None
    """A file with the training split."""
    eval_file: str | None
    """A file with the evaluation split."""
    prompt_template: str | None
    """Builds prompts from the fields of rows; None: the form of the rows decides."""
    src_length: int
    """Maximum tokens of a prompt."""
    tgt_length: int
    """Maximum tokens of a target, </s> included."""
    show_progress: bool
    """A bar while tokenising."""

    @property
    def name(self) -> str:
        """The data as messages name it."""
        return self.dataset_name_or_path or self.train_file or self.eval_file or "the data"


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How the processes of the job divide the work."""

    degrees: Degrees
    """Ranks along each axis."""
    reshard_after_forward: bool
    """Ranks that share weights gather each block's again for the backward pass (stage 3)."""


@dataclass(frozen=True)
class Interval:
    """How often something happens in training: every so many steps, or once an epoch."""

    steps: int | None
    """None: once an epoch."""

    def in_steps(self, steps_per_epoch: int) -> int:
        """The interval in steps of a run whose epoch has this many."""
        return steps_per_epoch if self.steps is None else self.steps


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How the model learns."""

    batch_size: int | TokenBudget
    """Examples or tokens of a microbatch."""
    num_train_epochs: float
    """Passes through the examples, where max_steps does not say the length of the run."""
    max_steps: int | None
    """Steps of the run."""
    step: StepConfig
    """What turns gradients into an update."""
    optimizer: AdamWConfig
    """AdamW without its learning rate."""
    schedule: ScheduleConfig
    """The learning rate, for a run of any length."""
    logging_steps: int
    """Steps between two entries of the log."""
    evaluate_every: Interval | None
    """None: never during training."""
    save_every: Interval | None
    """None: a checkpoint is written only when the run is stopped."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is measured, and which checkpoint is the best."""

    evaluates: bool
    """Whether the evaluation examples are scored."""
    batch_size: int
    """Examples computed at once."""
    scores_answers: bool
    """An evaluation generates answers too, and compares them with the targets."""
    decoding: GenerationConfig
    """How answers are generated."""
    num_written_answers: int
    """Answers written to a file at the end of the run."""
    best_metric: str
    """The metric that decides which checkpoint is the best."""
    greater_is_better: bool
    """Its direction."""


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """What is written where, and what a run resumes from."""

    directory: Path
    """Holds everything that the run writes."""
    overwrites: bool
    """What an earlier run left there is removed."""
    resume_from: Path | None
    """A checkpoint-N chosen by the user; None: the newest in the directory, if there is one."""
    save_total_limit: int | None
    """Checkpoints to keep; None: all."""
    ends_with_best: bool
    """The run ends with its best checkpoint instead of its last step."""
    merges_adapter: bool
    """The model with its adapter merged in is written too."""
    max_shard_size_bytes: int
    """Largest weight file."""


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """What a run shows."""

    show_bar: bool
    """A progress bar on a terminal."""
    use_tensorboard: bool
    """TensorBoard's event files are written."""
    profile: bool
    """The time of a few steps is profiled."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run."""

    flags: TrainingConfig
    """As resolved, for run.yaml and for telling what changed when a run resumes; nothing else reads them."""
    notices: tuple[str, ...]
    """One line for each flag that does nothing, and each thing that was decided for the user."""
    seed: int
    """Of the adapter's fresh weights."""
    model: ModelPlan
    adapter: Adapter
    """What learns."""
    trains_new_tokens: bool
    """With the adapter learn the rows of the embedding that were added to the model; LoRA only."""
    precision: Precision
    """Number formats."""
    parallelism: ParallelPlan
    data: DataPlan
    training: TrainingPlan | None
    """None: the model is evaluated as it is."""
    evaluation: EvaluationPlan
    output: OutputPlan
    report: ReportPlan
    reading: ForeignReading
    """How files of another program are to be read, where they do not say."""
