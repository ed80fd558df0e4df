"""The examples of a run: which sets its flags name, and what is trained on and what is evaluated."""

import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.data.conversations import load_conversations
from bloomlm.data.example import TrainingSet
from bloomlm.data.examples import load_examples
from bloomlm.data.files import RowSource
from bloomlm.data.message_answers import COMPLETION_FIELDS, holds_messages, load_message_answers
from bloomlm.data.messages import has_messages
from bloomlm.data.mixture import Mixture
from bloomlm.data.preferences import Answers, ComparedSet, load_text_answers
from bloomlm.data.rows import JUDGED_FIELDS, has_target
from bloomlm.data.splits import resolve_splits
from bloomlm.data.text_sources import (
    MIXTURE_SUFFIXES,
    TextSources,
    is_text_path,
    load_mixture,
    read_mixture,
    sources_of_path,
    sources_of_rows,
)
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, counted
from bloomlm.training.config import default_of
from bloomlm.training.data_checks import check_best_metric, check_texts
from bloomlm.training.objectives.base import Objective
from bloomlm.training.run_plan import DataPlan, RunPlan

_LOG = logging.getLogger(__name__)

MOST_HELD_OUT = 1000
PAIR_FLAGS = ("src_length", "tgt_length", "prompt_template")
"""The flags that act on pairs of a source and a target, which are also options of load_examples."""
MESSAGE_FLAGS = ("max_length", "tgt_length")
"""The flags that act on messages; tgt_length limits generated answers."""


def _load_pairs(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    return load_examples(rows, tokenizer, **_pair_options(data))


def _pair_options(data: DataPlan) -> dict[str, Any]:
    """The options of load_examples."""
    return {"show_progress": data.show_progress, **{name: getattr(data, name) for name in PAIR_FLAGS}}


def _load_completions(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    return load_message_answers(rows, tokenizer, fields=COMPLETION_FIELDS, **_message_options(data))


def _message_options(data: DataPlan) -> dict[str, Any]:
    """The options of load_message_answers."""
    return {"show_progress": data.show_progress, "max_length": data.max_length}


def _load_conversations(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    return load_conversations(
        rows,
        tokenizer,
        max_length=data.max_length,
        learn_last_turn=data.learn_last_turn,
        show_progress=data.show_progress,
    )


def _load_texts(source: RowSource | TextSources, data: DataPlan, tokenizer: Tokenizer) -> Mixture:
    texts = source if isinstance(source, TextSources) else sources_of_rows(source)
    return load_mixture(texts, tokenizer, data.max_length, show_progress=data.show_progress)


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


def _is_raw_text(fields: Mapping[str, object]) -> bool:
    return "text" in fields and not has_target(fields)


RAW_TEXT = DataForm(name="raw text", fits=_is_raw_text, load=_load_texts, flags=("max_length",))


def _preference_form(kind: type[ComparedSet], first: Mapping[str, object]) -> DataForm:
    """Preference data, which an objective asks for, whatever the fields of the first row are."""
    is_messages = holds_messages(first)

    def load(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
        def load_answers(fields: tuple[str, ...]) -> Answers:
            if is_messages:
                return load_message_answers(rows, tokenizer, fields=fields, **_message_options(data))
            return load_text_answers(rows, tokenizer, fields=fields, **_pair_options(data))

        return kind.load(rows, load_answers)

    name = f"preference data of {'messages' if is_messages else 'texts'}"
    return DataForm(name=name, fits=lambda fields: True, load=load, flags=MESSAGE_FLAGS if is_messages else PAIR_FLAGS)


def _refuse_answers(rows: RowSource, data: DataPlan, tokenizer: Tokenizer) -> TrainingSet:
    raise ConfigError(
        f"{rows.name}: its rows have chosen and rejected answers; to learn from them, add --preference dpo, orpo or kto"
    )


FORMS = (
    DataForm(
        name="chosen and rejected answers",
        fits=lambda fields: {"chosen", "rejected"} <= fields.keys(),
        load=_refuse_answers,
        flags=PAIR_FLAGS,
    ),
    DataForm(
        name="conversations",
        fits=has_messages,
        load=_load_conversations,
        flags=(*MESSAGE_FLAGS, "learn_last_turn"),
    ),
    DataForm(
        name="messages with a completion",
        fits=lambda fields: {*COMPLETION_FIELDS} <= fields.keys() and holds_messages(fields),
        load=_load_completions,
        flags=MESSAGE_FLAGS,
    ),
    RAW_TEXT,
    DataForm(
        name="pairs of a source and a target",
        fits=lambda fields: True,  # the last form says what a row may have
        load=_load_pairs,
        flags=PAIR_FLAGS,
    ),
)
"""The first form that fits the first row is that of all rows."""


def _load(
    source: RowSource | TextSources, data: DataPlan, tokenizer: Tokenizer, objective: Objective[Any]
) -> TrainingSet:
    if isinstance(source, TextSources):
        if objective.compared_set is not None:
            raise ConfigError(f"{source.name} is raw text; --preference needs rows of better and worse answers")
        _warn_of_unused(RAW_TEXT, source.name, data)
        return _load_texts(source, data, tokenizer)
    first: Mapping[str, object] = next((row.fields for row in source.rows()), {})
    kind = objective.compared_set
    form = next(form for form in FORMS if form.fits(first)) if kind is None else _preference_form(kind, first)
    _warn_of_unused(form, source.name, data)
    if kind is None and first.keys() >= {*JUDGED_FIELDS}:
        _LOG.warning("%s: without --preference kto its labels are not used: all answers are learned", source.name)
    return form.load(source, data, tokenizer)


def _warn_of_unused(form: DataForm, name: str, data: DataPlan) -> None:
    flags = dict.fromkeys(flag for other in FORMS for flag in other.flags if flag not in form.flags)
    if unused := [f"--{flag}" for flag in flags if getattr(data, flag) != default_of(flag)]:
        _LOG.warning("%s: not used, because the rows of %s are %s", ", ".join(unused), name, form.name)


def _open(data: DataPlan) -> tuple[RowSource | TextSources | None, RowSource | TextSources | None]:
    """The training data and the evaluation data that the flags name."""
    train = dev = None
    if data.mixture is not None:
        train = read_mixture(data.mixture)
    elif data.train_file is not None and is_text_path(data.train_file):
        train = sources_of_path(data.train_file)
    if data.eval_file is not None and Path(data.eval_file).suffix in MIXTURE_SUFFIXES:
        dev = read_mixture(data.eval_file, weighted=False)
    elif data.eval_file is not None and is_text_path(data.eval_file):
        dev = sources_of_path(data.eval_file)
    splits = resolve_splits(
        dataset_name_or_path=data.dataset_name_or_path,
        train_file=None if train else data.train_file,
        eval_file=None if dev else data.eval_file,
    )
    if dev is not None and splits.dev is not None:
        raise ConfigError(
            f"--eval_file {data.eval_file} and --dataset_name_or_path {data.dataset_name_or_path} both have evaluation "
            "data; give one of them"
        )
    return train or splits.train, dev or splits.dev


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
    train_source, dev_source = _open(data)
    if trains and train_source is None:
        raise ConfigError(f"{data.name} has no training examples; give --train_file, --mixture or another data set")
    holds_out = evaluates and dev_source is None
    if holds_out and train_source is None:
        raise ConfigError(f"{data.name} has no examples to evaluate on; give --eval_file")
    train = dev = None
    descriptions = []
    if train_source is not None and (trains or holds_out):
        train = _load(train_source, data, tokenizer, plan.objective)
    if dev_source is not None and (evaluates or plan.evaluation.num_written_answers > 0):
        dev = _load(dev_source, data, tokenizer, plan.objective)
    if isinstance(train if dev is None else dev, Mixture):
        check_texts(data, plan.evaluation)
    origin = ""
    if holds_out and train is not None:
        train, dev = train.hold_out(MOST_HELD_OUT)
        if not (len(train) and len(dev)):
            raise ConfigError(f"{data.name} has too few examples to train and evaluate; give --eval_file")
        which = "ones, which are" if len(dev) > 1 else "one, which is"
        origin = f", the last {which} not trained on; --eval_file names others"
    if trains and train is not None:
        descriptions += [
            f"training: {counted(len(train), train.unit)} from {train.name}, {counted(train.num_tokens, 'tokens')}, "
            f"{train.num_supervised_tokens:,} of them learned",
            *train.describe(),
        ]
    if dev is not None:
        descriptions.append(f"evaluation: {counted(len(dev), dev.unit)} from {dev.name}{origin}")
    if evaluates and dev is not None:
        check_best_metric(dev, plan.evaluation)
    return RunExamples(train=train, dev=dev, descriptions=tuple(descriptions))
