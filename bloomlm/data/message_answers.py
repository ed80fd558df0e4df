"""Answers that are messages, with the messages of their prompts, as in TRL's conversational form.

| field                        | value                                                                     |
|------------------------------|---------------------------------------------------------------------------|
| prompt                       | messages; without it, both answers of a row begin with the same messages  |
| chosen, rejected; completion | the messages after them                                                   |

The chat template makes a text of the prompt, up to where an answer begins, and one of the prompt with each answer. Each
text is tokenised as a whole. An answer begins at the first token that differs from those of the prompt, and all that
follows belongs to it. Source: TRL 1.16, `_prepare_dataset` of DPOTrainer and KTOTrainer.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from bloomlm.data.cache import Arrays
from bloomlm.data.chat_template import ChatTemplate, chat_template_of
from bloomlm.data.conversations import warn_of_endless_answers
from bloomlm.data.example import Example
from bloomlm.data.example_set import ExampleSet, cached_arrays, example_arrays, in_chunks
from bloomlm.data.files import Row, RowSource
from bloomlm.data.messages import Message, read_messages_of
from bloomlm.data.rows import JUDGED_FIELDS, PAIR_FIELDS, require_fields
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError, counted

_LOG = logging.getLogger(__name__)

COMPLETION_FIELDS = JUDGED_FIELDS[:2]
_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class MessageAnswerReport:
    """Size of a set of answers, and how many were too long."""

    name: str
    num_examples: int
    num_cut: int
    left_out: tuple[int, ...]
    """Numbers of the rows, from 0, that were left out."""
    num_unlike_prompts: int
    """Number of answers before which the prompt ends otherwise than where an answer is generated."""
    max_length: int
    from_cache: bool

    def __str__(self) -> str:
        cuts = (
            f"{self.num_cut} cut to max_length {self.max_length} tokens with their prompts, and "
            f"{counted(len(self.left_out), 'rows')} left out, because the prompt alone is as long"
        )
        unlike = (
            f"; before {counted(self.num_unlike_prompts, 'answers')} the prompt ends otherwise than where an answer is "
            "generated, and the end of the latter is left out"
        )
        size = f"{self.name}: {counted(self.num_examples, 'answers')}"
        return (
            f"{size}, {cuts if self.num_cut or self.left_out else 'none cut'}"
            f"{unlike if self.num_unlike_prompts else ''}"
        )


def holds_messages(fields: Mapping[str, object]) -> bool:
    """Whether a prompt or an answer among these fields is a list, as messages are."""
    return any(isinstance(fields.get(name), list) for name in (*PAIR_FIELDS, *COMPLETION_FIELDS))


def load_message_answers(
    source: RowSource,
    tokenizer: Tokenizer,
    *,
    fields: tuple[str, ...],
    max_length: int,
    cache_dir: Path | None = None,
    show_progress: bool = True,
) -> ExampleSet[MessageAnswerReport]:
    """Tokenise answers by the chat template of the tokenizer, or read them from the cache.

    Args:
        source: source of the rows.
        tokenizer: tokenizer of the model, with a chat template.
        fields: PAIR_FIELDS, JUDGED_FIELDS or COMPLETION_FIELDS; a row of pairs gives its chosen answer and then its
            rejected one.
        max_length: maximum number of tokens of a prompt with an answer, which loses its end. A row whose prompt alone
            has as many is left out.
        cache_dir: directory of cached sets; None: default_cache_dir() / "examples".
        show_progress: whether a terminal shows a bar while texts are tokenised.

    Raises:
        ConfigError: the tokenizer has no chat template, or what it has is not a Jinja template.
        DataError: a row has other fields, holds no messages, or is not taken by the template; or there are no rows.
    """
    template = chat_template_of(tokenizer, f"{source.name} holds conversations")
    arrays, from_cache = cached_arrays(
        source,
        tokenizer,
        lambda: _tokenise(source, fields, tokenizer, template, max_length, show_progress=show_progress),
        settings=(template.text, fields, max_length, jinja2.__version__),
        modules=("chat_template.py", "message_answers.py", "messages.py", "rows.py"),
        cache_dir=cache_dir,
    )
    report = MessageAnswerReport(
        name=source.name,
        num_examples=len(arrays["token_offsets"]) - 1,
        num_cut=int(arrays["counts"][0]),
        left_out=tuple(arrays["left_out"].tolist()),
        num_unlike_prompts=int(arrays["counts"][1]),
        max_length=max_length,
        from_cache=from_cache,
    )
    is_changed = report.num_cut or report.left_out or report.num_unlike_prompts
    _LOG.log(logging.WARNING if is_changed else logging.INFO, "%s", report)
    examples = ExampleSet(arrays, report)
    if not report.num_cut:
        warn_of_endless_answers(examples[0], tokenizer)
    return examples


@dataclass(frozen=True, kw_only=True)
class _Talk:
    """The messages of a row."""

    prompt: list[Message]
    answers: list[list[Message]]
    where: str


def _read(row: Row, fields: tuple[str, ...]) -> _Talk:
    names = [name for name in fields[1:] if name != "label"]
    is_implicit = fields == PAIR_FIELDS and not isinstance(row.fields.get("prompt"), list)
    require_fields(row, fields[1:] if is_implicit else fields)
    answers = [read_messages_of(row, name) for name in names]
    if is_implicit:
        prompt = _common_beginning(row, *answers)
        answers = [messages[len(prompt) :] for messages in answers]
    else:
        prompt = read_messages_of(row, "prompt")
    for name, messages in zip(names, answers, strict=True):
        if all(message["role"] != "assistant" for message in messages):
            raise DataError(f"{row.where}: no message of {name!r} is the assistant's; expected its answer")
    return _Talk(prompt=prompt, answers=answers, where=row.where)


def _common_beginning(row: Row, chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages with which both answers begin; at least one message of each is left as the answer."""
    prompt = chosen[: _common_length(chosen[:-1], rejected[:-1])]
    if not prompt:
        raise DataError(
            f"{row.where}: 'chosen' and 'rejected' begin with different messages, and 'prompt' holds none; expected "
            "the messages of the prompt at the beginning of both, or in 'prompt'"
        )
    repeated = row.fields.get("prompt")  # some data sets also have the text of the prompt
    if repeated is not None and all(message["content"] != repeated for message in prompt):
        raise DataError(
            f"{row.where}: 'prompt' is {repeated!r:.40}, and no message with which 'chosen' and 'rejected' begin has "
            "this text; expected a list of messages in all three, or the prompt at the beginning of both"
        )
    return prompt


def _tokenise(
    source: RowSource,
    fields: tuple[str, ...],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    max_length: int,
    *,
    show_progress: bool,
) -> Arrays:
    talks = [_read(row, fields) for row in source.rows()]
    if not talks:
        raise DataError(f"{source.name}: it has no rows; expected at least one answer")
    kept, left_out = list[Example](), list[int]()
    num_cut = num_unlike = 0
    chunks = in_chunks(talks, _CHUNK_ROWS, show_progress=show_progress)
    encoded = (row for chunk in chunks for row in _encoded(chunk, tokenizer, template))
    for number, (prompt_text, prompt, answers, start) in enumerate(encoded):
        if start >= max_length:
            left_out.append(number)
            continue
        num_unlike += len(answers) * (start < len(prompt))
        num_cut += sum(len(answer) > max_length for answer in answers)
        for answer in answers:
            tokens = np.array(answer[:max_length], dtype=np.int32)
            answer_text = tokenizer.decode(tokens[start:])
            kept.append(Example.pair(tokens, start, source_text=prompt_text, target_text=answer_text))
    if not kept:
        raise DataError(f"{source.name}: every prompt has max_length {max_length} tokens or more; raise --max_length")
    counts = np.array([num_cut, num_unlike], dtype=np.int64)
    return {**example_arrays(kept), "counts": counts, "left_out": np.array(left_out, dtype=np.int64)}


def _encoded(
    talks: Sequence[_Talk], tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[str, list[int], list[list[int]], int]]:
    """For each row the text of the prompt, its tokens, those of it with each answer, and where the answers start."""
    texts = [_texts(talk, template) for talk in talks]
    encoded = iter(tokenizer.encode_batch([text for of_row in texts for text in of_row]))
    for talk, of_row in zip(talks, texts, strict=True):
        prompt, *answers = (next(encoded) for _ in of_row)
        start = min(_common_length(prompt, answer) for answer in answers)
        if any(len(answer) == start for answer in answers):
            raise DataError(f"{talk.where}: the chat template leaves out an answer")
        yield of_row[0], prompt, answers, start


def _texts(talk: _Talk, template: ChatTemplate) -> list[str]:
    """The prompt, and the prompt with each answer."""
    try:
        prompt = template.render(talk.prompt, add_generation_prompt=True)
        return [
            prompt,
            *(template.render([*talk.prompt, *answer], add_generation_prompt=False) for answer in talk.answers),
        ]
    except DataError as error:
        raise DataError(f"{talk.where}: {error}") from error


def _common_length(items: Sequence[object], others: Sequence[object]) -> int:
    """Number of items, tokens or messages, with which both begin."""
    pairs = enumerate(zip(items, others, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(items), len(others)))
