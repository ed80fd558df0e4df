"""The examples a run learns from and is evaluated on."""

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bloomlm.data.examples import Example, ExampleSet, load_examples
from bloomlm.data.files import RowSource
from bloomlm.data.loader import Examples
from bloomlm.data.splits import resolve_splits
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig

MOST_HELD_OUT = 1000


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
        """Tokens of each."""
        return self.examples.lengths[self.start : self.stop]


@dataclass(frozen=True, kw_only=True)
class RunExamples:
    """What a run has; None for what it does not need."""

    train: Examples | None
    dev: Examples | None
    descriptions: tuple[str, ...]
    """A line about each."""

    @property
    def fingerprint(self) -> tuple[int, ...]:
        """Numbers that differ, almost surely, between ranks that read different data: sizes and a checksum of some."""
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


def load_run_examples(config: TrainingConfig, tokenizer: Tokenizer) -> RunExamples:
    """Load the examples that the flags name.

    Where an evaluation is wanted and the data has no evaluation split, the last 5 % of the training examples, at most
    1000, are kept from training and used for it.

    Args:
        config: resolved.
        tokenizer: of the model.

    Raises:
        ConfigError, DataError: see resolve_splits and load_examples.
    """
    splits = resolve_splits(
        dataset_name_or_path=config.dataset_name_or_path, train_file=config.train_file, eval_file=config.eval_file
    )
    if config.do_train and splits.train is None:
        raise ConfigError(f"{_named(config)} has no training examples; give --train_file or another data set")
    wants_dev = bool(config.do_eval) or config.generate_num > 0
    holds_out = bool(config.do_eval) and splits.dev is None
    if holds_out and splits.train is None:
        raise ConfigError(f"{_named(config)} has no examples to evaluate on; give --eval_file")
    train = None
    if splits.train is not None and (config.do_train or holds_out or (wants_dev and splits.dev is None)):
        train = _load(splits.train, config, tokenizer)
    dev = _load(splits.dev, config, tokenizer) if wants_dev and splits.dev is not None else None
    descriptions = [_describe("training", train)] if train is not None and config.do_train else []
    if dev is not None or not holds_out:
        if dev is not None:
            descriptions.append(_describe("evaluation", dev))
        return RunExamples(train=train, dev=dev, descriptions=tuple(descriptions))
    assert train is not None
    num_held_out = max(1, min(MOST_HELD_OUT, len(train) // 20))
    if len(train) <= num_held_out:
        raise ConfigError(f"{_named(config)} has one example, too few to train and evaluate; give --eval_file")
    split = len(train) - num_held_out
    descriptions.append(
        f"evaluation: no examples of its own, so the last {num_held_out} of the training file are kept from training "
        "and used; --eval_file names others"
    )
    return RunExamples(
        train=ExampleSlice(train, 0, split),
        dev=ExampleSlice(train, split, len(train)),
        descriptions=tuple(descriptions),
    )


def _load(rows: RowSource, config: TrainingConfig, tokenizer: Tokenizer) -> ExampleSet:
    return load_examples(
        rows,
        tokenizer,
        src_length=config.src_length,
        tgt_length=config.tgt_length,
        prompt_template=config.prompt_template,
        show_progress=not config.disable_tqdm,
    )


def _describe(use: str, examples: ExampleSet) -> str:
    return (
        f"{use}: {len(examples):,} examples from {examples.report.name}, {examples.num_tokens:,} tokens, "
        f"{examples.num_supervised_tokens:,} of them learned"
        if use == "training"
        else f"{use}: {len(examples):,} examples from {examples.report.name}"
    )


def _named(config: TrainingConfig) -> str:
    return config.dataset_name_or_path or config.train_file or config.eval_file or "the data"
