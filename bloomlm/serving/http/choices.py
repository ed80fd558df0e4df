"""Tokens of one choice -> pieces of its answer: text, ids, log-probabilities.

A whole answer is made of the same pieces as a stream, so both are equal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from bloomlm.data.stream_decoder import StreamDecoder
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.log_probs import PromptScores
from bloomlm.serving.request import TokenOutput
from bloomlm.serving.text_stream import TextStream

TokenName = Callable[[int], str]

FINISH_REASONS = {"eos": "stop", "stop": "stop", "stop_token": "stop", "length": "length"}
"""The engine's finish reasons -> OpenAI's."""


@dataclass(frozen=True)
class Entry:
    """One token of an answer."""

    token: int
    """Its id."""
    log_prob: float | None
    """Its log-probability; None for the first token of a prompt, and where none was asked for."""
    top: Sequence[tuple[int, float]] | None
    """The likeliest tokens at its place."""
    offset: int
    """Characters of the answer before it."""


@dataclass
class Piece:
    """What one token, or the prompt, adds to a choice."""

    index: int
    """Number of the choice."""
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish_reason: str | None = None
    """OpenAI's finish reason, in the last piece."""
    prompt_ids: list[int] | None = None
    """Ids of the prompt, in the first piece; the entries of that piece are those of the prompt."""


class Choice:
    """One choice while its tokens come.

    Args:
        index: its number in the answer.
        tokenizer: decodes the tokens.
        stop: texts at which it ends.
        min_tokens: tokens behind whose text a stop text must end.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str], min_tokens: int) -> None:
        self.index = index
        self.last_token_at: float | None = None
        """When its last token came, for the metrics."""
        self._tokenizer = tokenizer
        self._stream = TextStream(tokenizer, stop, min_tokens)
        self._num_echoed = 0

    def start(self, prompt: list[int], *, echo: bool, scores: PromptScores | None) -> Piece:
        """The first piece.

        Args:
            prompt: ids of the prompt.
            echo: whether the answer begins with the prompt; its special tokens are then written out.
            scores: log-probabilities of the prompt, where they are shown.
        """
        piece = Piece(self.index, prompt_ids=prompt)
        if echo:
            piece.text = self._tokenizer.decode(prompt, skip_special_tokens=False)
            self._num_echoed = len(piece.text)
        if scores is not None:
            for token, score, offset in zip(prompt, scores, _offsets(prompt, self._tokenizer), strict=True):
                log_prob, top = (None, None) if score is None else (score.log_prob, score.top_log_probs)
                piece.entries.append(Entry(token, log_prob, top, offset))
        return piece

    def push(self, output: TokenOutput) -> Piece:
        """What a new token adds."""
        offset = self._num_echoed + self._stream.num_characters
        entry = Entry(output.token, output.log_prob, output.top_log_probs, offset)
        text = self._stream.push(output.token)
        if output.finish_reason is None:
            return Piece(self.index, text, [entry])
        text += self._stream.finish()
        return Piece(self.index, text, [entry], FINISH_REASONS[output.finish_reason])


def token_names(tokenizer: Tokenizer, as_ids: bool) -> TokenName:
    """How tokens are named: by their text, by their bytes where these are not text, or by their ids.

    Args:
        tokenizer: knows the tokens.
        as_ids: whether all are named token_id:ID.

    Source of bytes:... : OpenAI's answers. Source of token_id:... : vLLM's return_tokens_as_token_ids.
    """

    def name(token: int) -> str:
        data = b"" if as_ids else tokenizer.token_bytes(token)
        if not data:
            return f"token_id:{token}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return name


def _offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Whole characters before each id, special tokens written out."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
    lengths = [0, *(len(decoder.push(token)) for token in ids)]
    return list(accumulate(lengths))[:-1]
