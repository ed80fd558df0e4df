"""The examples of a run: which sets its flags name, and what is trained on and what is evaluated."""

import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bloomlm.data.conversations import load_conversations
from bloomlm.data.example import TrainingSet
from bloomlm.data.examples import load_examples
from bloomlm.data.files import RowSource
from bloomlm.data.messages import has_messages
from bloomlm.data.splits import resolve_splits
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.training.config import default_of
from bloomlm.training.run_plan import DataPlan, RunPlan

_LOG = logging.getLogger(__name__)

MOST_HELD_OUT = 1000


def _load_pairs(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    return load_examples(
        rows,
        tokenizer,
        src_length=data.src_length,
        tgt_length=data.tgt_length,
        prompt_template=data.prompt_template,
        show_progress=data.show_progress,
    )


def _load_conversations(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    return load_conversations(
        rows,
        tokenizer,
        max_length=data.max_length,
        learn_last_turn=data.learn_last_turn,
        show_progress=data.show_progress,
    )


@dataclass(frozen=True, kw_only=True)
class DataForm:
    """What the rows of a file may be, and how they become examples."""

    name: str
    """What such rows are called in messages."""

    fits: Callable[[Mapping[str, object]], bool]
    """Whether a row with these fields has this form."""
    load: Callable[[RowSource, DataPlan, Tokenizer], TrainingSet]
    """Reads all rows."""
    flags: tuple[str, ...]
    """The flags that act on this form, of those that do not act on all forms."""


FORMS = (
    DataForm(
        name="conversations",
        fits=has_messages,
        load=_load_conversations,
        flags=("max_length", "learn_last_turn", "tgt_length"),  # tgt_length limits generated answers
    ),
    DataForm(
        name="pairs of a source and a target",
        fits=lambda fields: True,  # the last form says what a row may have
        load=_load_pairs,
        flags=("src_length", "tgt_length", "prompt_template"),
    ),
)
"""The first form that fits the first row is that of all rows."""


def _load(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    first: Mapping[str, object] = next((row.fields for row in rows.rows()), {})
    form = next(form for form in FORMS if form.fits(first))
    names = dict.fromkeys(name for other in FORMS for name in other.flags if name not in form.flags)
    if unused := [f"--{name}" for name in names if getattr(data, name) != default_of(name)]:
        _LOG.warning("%s: not used, because the rows of %s are %s", ", ".join(unused), rows.name, form.name)
    return form.load(rows, data, tokenizer)


@dataclass(frozen=True, kw_only=True)
class RunExamples:
    """The examples of a run; None for a set that the run does not need."""

    train: TrainingSet | None
    dev: TrainingSet | None
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
                f"training: {len(train):,} examples from {train.name}, {train.num_tokens:,} tokens, "
                f"{train.num_supervised_tokens:,} of them learned"
            )
    if splits.dev is not None and (evaluates or plan.evaluation.num_written_answers > 0):
        dev = _load(splits.dev, data, tokenizer)
        descriptions.append(f"evaluation: {len(dev):,} examples from {dev.name}")
    if holds_out and train is not None:
        train, dev = _hold_out(train, data)
        descriptions.append(
            f"evaluation: the data has no evaluation split, so the last {len(dev)} training examples are used for it "
            "and not trained on; --eval_file names others"
        )
    return RunExamples(train=train, dev=dev, descriptions=tuple(descriptions))


def _hold_out(examples: TrainingSet, data: DataPlan) -> tuple[TrainingSet, TrainingSet]:
    """Split a set into examples to train on and examples to evaluate on."""
    split = len(examples) - max(1, min(MOST_HELD_OUT, len(examples) // 20))
    if split < 1:
        raise ConfigError(f"{data.name} has one example, too few to train and evaluate; give --eval_file")
    return examples.part(0, split), examples.part(split, len(examples))
