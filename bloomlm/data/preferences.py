"""Rows that say which answers to a prompt are better.

| fields                    | form                                                                       |
|---------------------------|----------------------------------------------------------------------------|
| prompt, chosen, rejected  | a pair: chosen is preferred                                                |
| prompt, completion, label | an answer with a judgement: true or 1 is desirable, false or 0 undesirable |

The texts may be lists of messages, see message_answers.py. A prompt template builds the prompt of texts instead.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from bloomlm.data.answer_batch import ComparedExample
from bloomlm.data.example import Example, divide
from bloomlm.data.example_set import ExampleSet, SetReport
from bloomlm.data.examples import LoadReport, PairForm, load_examples
from bloomlm.data.files import Row, RowSource
from bloomlm.data.rows import (
    JUDGED_FIELDS,
    PAIR_FIELDS,
    PromptTemplate,
    TextPair,
    filled,
    require_fields,
    text_field,
)
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError

NO_REFERENCE = (float("nan"), float("nan"))

Scores = npt.NDArray[np.float64]


class AnswerReport(SetReport, Protocol):
    """What a loader of answers says about them."""

    @property
    def left_out(self) -> tuple[int, ...]:
        """Numbers of the rows, from 0, that have no example."""
        ...


Answers = ExampleSet[AnswerReport]
AnswerLoader = Callable[[tuple[str, ...]], Answers]
"""Reads the answers in rows with the fields PAIR_FIELDS (two a row, the chosen one first) or JUDGED_FIELDS."""


class ComparedSet(ABC):
    """Answers beside other answers to the same prompts, by index.

    Args:
        answers: answers with their prompts.
        reference: [len, 2] log-probabilities of each answer and of the other one under the reference model.
    """

    def __init__(self, answers: Answers, reference: Scores | None = None) -> None:
        self.answers = answers
        self.reference = reference

    @classmethod
    @abstractmethod
    def load(cls, rows: RowSource, load: AnswerLoader) -> Self:
        """Read rows.

        Args:
            rows: source of the rows.
            load: reads their answers.

        Raises:
            ConfigError, DataError: as `load`; a single row, which is too few for KTO; a label that is none.
        """

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ComparedExample:
        index = range(len(self))[index]
        own, other, is_desirable = self._compared(index)
        reference = NO_REFERENCE if self.reference is None else tuple(map(float, self.reference[index]))
        return ComparedExample(
            **vars(own), other=other, is_desirable=is_desirable, reference=(reference[0], reference[1])
        )

    def __iter__(self) -> Iterator[ComparedExample]:
        return map(self.__getitem__, range(len(self)))

    @property
    @abstractmethod
    def lengths(self) -> npt.NDArray[np.int64]:
        """One more than the number of positions that each index adds to a batch."""

    @property
    def name(self) -> str:
        """Where the rows come from."""
        return self.answers.name

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all answers, each with its prompt."""
        return self.answers.num_tokens

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens of all answers."""
        return self.answers.num_supervised_tokens

    @property
    @abstractmethod
    def unit(self) -> str:
        """What an index has, in the plural."""

    def describe(self) -> tuple[str, ...]:
        """Nothing else."""
        return ()

    def hold_out(self, most: int) -> tuple[Self, Self]:
        """See TrainingSet."""
        return divide(self, most)

    @abstractmethod
    def part(self, start: int, stop: int) -> Self:
        """What the indices from start to stop - 1 have."""

    @abstractmethod
    def with_reference(self, reference: Scores) -> Self:
        """The same answers with their log-probabilities, [len, 2], under the reference model."""

    @abstractmethod
    def _compared(self, index: int) -> tuple[Example, Example, bool]:
        """An answer, the other answer, and whether the first one is desirable."""


class AnswerPairs(ComparedSet):
    """Pairs of answers: the answers of the set are a chosen and a rejected one in turn."""

    @classmethod
    def load(cls, rows: RowSource, load: AnswerLoader) -> Self:
        """Read rows with prompt, chosen and rejected."""
        return cls(load(PAIR_FIELDS))

    def __len__(self) -> int:
        return len(self.answers) // 2

    @property
    def unit(self) -> str:
        """A pair."""
        return "pairs"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """One more than the number of positions of a pair, as for other examples."""
        return self.answers.lengths.reshape(-1, 2).sum(axis=1) - 1

    def part(self, start: int, stop: int) -> Self:
        """The pairs from start to stop - 1."""
        reference = None if self.reference is None else self.reference[start:stop]
        return type(self)(self.answers.part(2 * start, 2 * stop), reference)

    def with_reference(self, reference: Scores) -> Self:
        """The same pairs with log-probabilities."""
        return type(self)(self.answers, reference)

    def _compared(self, index: int) -> tuple[Example, Example, bool]:
        return self.answers[2 * index], self.answers[2 * index + 1], True


class JudgedAnswers(ComparedSet):
    """Answers that are desirable or not.

    The other answer of each is that of an earlier row, or for the first ones of the last row. From them KTO estimates
    how far the model has moved from its reference.

    Args:
        all_answers: the answers of all rows with their prompts.
        labels: [all_answers] bool: which ones are desirable.
        answers_per_row: 2 if the rows are pairs.
        places: the answers that belong to this set; None: all.
        reference: as in ComparedSet.

    Raises:
        DataError: there is only one row.
    """

    def __init__(
        self,
        all_answers: Answers,
        labels: npt.NDArray[np.bool_],
        answers_per_row: int,
        places: range | None = None,
        reference: Scores | None = None,
    ) -> None:
        if len(all_answers) <= answers_per_row:
            raise DataError(
                f"{all_answers.name}: KTO compares answers of different rows, and there is one row; give more"
            )
        self._places = range(len(all_answers)) if places is None else places
        super().__init__(all_answers.part(self._places.start, self._places.stop), reference)
        self._all_answers, self._labels, self._answers_per_row = all_answers, labels, answers_per_row

    @classmethod
    def load(cls, rows: RowSource, load: AnswerLoader) -> Self:
        """Read rows with prompt, completion and label, or pairs."""
        first = next(iter(rows.rows()), None)
        if first is not None and "chosen" in first.fields:
            answers = load(PAIR_FIELDS)
            return cls(answers, np.arange(len(answers)) % 2 == 0, 2)
        answers = load(JUDGED_FIELDS)
        left_out = set(answers.report.left_out)
        labels = [_label(row) for number, row in enumerate(rows.rows()) if number not in left_out]
        return cls(answers, np.array(labels), 1)

    def __len__(self) -> int:
        return len(self.answers)

    @property
    def unit(self) -> str:
        """An answer."""
        return "answers"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each answer with its prompt."""
        return self.answers.lengths

    def part(self, start: int, stop: int) -> Self:
        """The answers from start to stop - 1."""
        reference = None if self.reference is None else self.reference[start:stop]
        return self._with(self._places[start:stop], reference)

    def with_reference(self, reference: Scores) -> Self:
        """The same answers with log-probabilities."""
        return self._with(self._places, reference)

    def _with(self, places: range, reference: Scores | None) -> Self:
        return type(self)(self._all_answers, self._labels, self._answers_per_row, places, reference)

    def _compared(self, index: int) -> tuple[Example, Example, bool]:
        place = self._places[index]
        own, earlier = self._all_answers[place], self._all_answers[place - self._answers_per_row]
        tokens = np.concatenate([own.prompt_tokens, earlier.tokens[earlier.num_source_tokens :]])
        return own, Example.pair(tokens, own.num_source_tokens), bool(self._labels[place])


def load_text_answers(
    rows: RowSource, tokenizer: Tokenizer, *, fields: tuple[str, ...], **options: Any
) -> ExampleSet[LoadReport]:
    """Tokenise answers and prompts that are texts.

    Args:
        rows: source of the rows.
        tokenizer: tokenizer of the model.
        fields: PAIR_FIELDS or JUDGED_FIELDS.
        options: as for load_examples.

    Raises:
        ConfigError, DataError: as load_examples, and for a row with other fields.
    """
    form = PairForm(
        name=" ".join(fields),
        read=lambda row, template: _read_answers(row, template, fields),
        modules=("preferences.py",),
    )
    return load_examples(rows, tokenizer, form=form, **options)


def _read_answers(row: Row, template: PromptTemplate | None, fields: tuple[str, ...]) -> list[TextPair]:
    require_fields(row, fields if template is None else fields[1:])
    prompt = filled(text_field(row, "prompt") if template is None else template.fill(row), row, "prompt")
    names = [name for name in fields[1:] if name != "label"]
    return [TextPair(source=prompt, target=filled(text_field(row, name), row, repr(name))) for name in names]


def _label(row: Row) -> bool:
    label = row.fields["label"]
    judgement = {"true": True, "1": True, "false": False, "0": False}.get(str(label).lower())  # CSV has texts only
    if judgement is None:
        raise DataError(f"{row.where}: 'label' is {label!r:.40}, expected true or false, or 1 or 0")
    return judgement
