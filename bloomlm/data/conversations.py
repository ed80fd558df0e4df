"""From conversations to tokenised examples, in which the model learns what the assistant wrote.

A chat template makes one text of a conversation, which is tokenised as a whole, as transformers and TRL do. A
conversation that is too long loses its last turns.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from bloomlm.data.cache import Arrays
from bloomlm.data.chat_template import ChatTemplate, chat_template_of
from bloomlm.data.example import Example
from bloomlm.data.example_set import ExampleSet, cached_arrays, example_arrays, in_chunks
from bloomlm.data.files import FileRows, RowSource
from bloomlm.data.messages import Message, read_messages
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import DataError, counted

_LOG = logging.getLogger(__name__)

_CHUNK_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class ConversationReport:
    """Size of a set of conversations, and how many were too long."""

    name: str
    num_examples: int
    num_shortened: int
    num_left_out: int
    max_length: int
    from_cache: bool

    def __str__(self) -> str:
        cuts = (
            f"{self.num_shortened} lost their last turns and {self.num_left_out} more were left out, because they are "
            f"longer than max_length {self.max_length} tokens"
        )
        return f"{self.name}: {counted(self.num_examples, 'conversations')}, {cuts if self.any_cut else 'none cut'}"

    @property
    def any_cut(self) -> bool:
        """Whether any conversation lost a turn."""
        return self.num_shortened + self.num_left_out > 0


def load_conversations(
    rows: RowSource | str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    learn_last_turn: bool = False,
    cache_dir: Path | None = None,
    show_progress: bool = True,
) -> ExampleSet[ConversationReport]:
    """Tokenise conversations by the chat template of the tokenizer, or read them from the cache.

    Args:
        rows: source of the rows; a path stands for FileRows(path).
        tokenizer: tokenizer of the model, with a chat template.
        max_length: maximum number of tokens. A longer conversation loses its last turns, so that it ends with the last
            answer that fits; it is left out if none fits.
        learn_last_turn: learn the last answer of each conversation only.
        cache_dir: directory of cached sets; None: default_cache_dir() / "examples".
        show_progress: whether a terminal shows a bar while texts are tokenised.

    Raises:
        ConfigError: the tokenizer has no chat template, or what it has is not a Jinja template.
        DataError: a row is no conversation with an answer, the template does not take it, or there are no rows.
    """
    source: RowSource = FileRows(rows) if isinstance(rows, str | Path) else rows
    template = chat_template_of(tokenizer, f"{source.name} holds conversations")
    encoder = _Encoder(tokenizer, template, learn_last_turn=learn_last_turn)
    arrays, from_cache = cached_arrays(
        source,
        tokenizer,
        lambda: _tokenise(source, encoder, max_length, show_progress=show_progress),
        settings=(template.text, max_length, learn_last_turn, jinja2.__version__),
        modules=("chat_template.py", "conversations.py", "messages.py", "rows.py"),
        cache_dir=cache_dir,
    )
    report = ConversationReport(
        name=source.name,
        num_examples=len(arrays["token_offsets"]) - 1,
        num_shortened=int(arrays["num_cut"][0]),
        num_left_out=int(arrays["num_cut"][1]),
        max_length=max_length,
        from_cache=from_cache,
    )
    _LOG.log(logging.WARNING if report.any_cut else logging.INFO, "%s", report)
    examples = ExampleSet(arrays, report)
    warn_of_endless_answers(examples[0], tokenizer)
    return examples


def warn_of_endless_answers(example: Example, tokenizer: Tokenizer) -> None:
    """Warn unless the last answer of an example has the token at which generation stops."""
    start, stop = example.learned[-1]
    if tokenizer.eos_token_id not in example.tokens[start:stop]:
        _LOG.warning(
            "the chat template ends an answer without %s, at which generation stops, so answers will not end; write "
            "{{ eos_token }} at the end of {%% generation %%}",
            tokenizer.special_tokens["eos_token"],
        )


class _Encoder:
    """Conversations -> examples, of any length."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, learn_last_turn: bool) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._learn_last_turn = learn_last_turn

    def encode(self, conversations: Sequence[Sequence[Message]], places: Sequence[str]) -> list[Example]:
        """Tokenise conversations, which end with their last learned token: what follows would not be learned.

        Args:
            conversations: each with an answer.
            places: where each is, for messages.
        """
        rendered = [self._render(messages, where) for messages, where in zip(conversations, places, strict=True)]
        encoded = self._tokenizer.encode_batch_with_offsets([text for text, _ in rendered])
        return [
            self._example(text, answers, tokens, np.array(offsets, dtype=np.int64).reshape(-1, 2))
            for (text, answers), (tokens, offsets) in zip(rendered, encoded, strict=True)
        ]

    def _render(self, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
        try:
            text, answers = self._template.render_with_answers(messages)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if not answers:
            raise DataError(f"{where}: the chat template leaves out what the assistant wrote")
        return text, answers[-1:] if self._learn_last_turn else answers

    def _example(
        self, text: str, answers: Sequence[tuple[int, int]], tokens: Sequence[int], offsets: np.ndarray
    ) -> Example:
        """Learn each token that stands for a character of an answer.

        Args:
            text: the whole conversation.
            answers: (start, stop) of the characters of each answer.
            tokens: ids of the text.
            offsets: [tokens, 2]: the characters that each stands for.
        """
        learned: list[tuple[int, int]] = []
        for start, stop in answers:
            first = int(np.searchsorted(offsets[:, 1], start, side="right"))
            last = int(np.searchsorted(offsets[:, 0], stop, side="left"))
            learned.append((max(first, learned[-1][1] if learned else 0), last))
        ids = np.array(tokens[: learned[-1][1]], dtype=np.int32)
        return Example(
            tokens=ids,
            learned=tuple(span for span in learned if span[0] < span[1]),
            source_text=text[: answers[-1][0]],
            target_text=self._tokenizer.decode(ids[learned[-1][0] :]),
        )


def _tokenise(source: RowSource, encoder: _Encoder, max_length: int, *, show_progress: bool) -> Arrays:
    conversations = [(_answered(read_messages(row), row.where), row.where) for row in source.rows()]
    if not conversations:
        raise DataError(f"{source.name}: it has no rows; expected at least one conversation")
    kept: list[Example] = []
    num_cut = [0, 0]
    for chunk in in_chunks(conversations, _CHUNK_ROWS, show_progress=show_progress):
        examples = encoder.encode([messages for messages, _ in chunk], [where for _, where in chunk])
        for (messages, where), example in zip(chunk, examples, strict=True):
            fitting: Example | None = example
            if len(example.tokens) > max_length:
                fitting = _shortened(messages, where, encoder, max_length)
                num_cut[fitting is None] += 1
            if fitting is not None:
                kept.append(fitting)
    if not kept:
        raise DataError(
            f"{source.name}: no answer of a conversation ends within max_length {max_length} tokens; raise --max_length"
        )
    return {**example_arrays(kept), "num_cut": np.array(num_cut, dtype=np.int64)}


def _shortened(messages: Sequence[Message], where: str, encoder: _Encoder, max_length: int) -> Example | None:
    """The conversation up to the last answer that ends within max_length tokens; None if none does."""
    ends = [number + 1 for number, message in enumerate(messages) if message["role"] == "assistant"]

    def up_to(end: int) -> Example:
        return encoder.encode([messages[:end]], [where])[0]

    count = bisect_right(ends, max_length, key=lambda end: len(up_to(end).tokens))
    return up_to(ends[count - 1]) if count else None


def _answered(messages: list[Message], where: str) -> list[Message]:
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{where}: no message is the assistant's, so there is nothing to learn")
    return messages
