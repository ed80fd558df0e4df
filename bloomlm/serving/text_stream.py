"""Text that appears token by token: never half a character, and no part of a stop text."""

from collections.abc import Sequence

from bloomlm.data.stream_decoder import StreamDecoder
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.sequences import find_stop


class TextStream:
    """The text of one continuation while its tokens come.

    The joined results of push and finish equal the text of all ids, without special tokens, cut before the stop text
    that the last id completes.

    Args:
        tokenizer: decodes the ids.
        stop: texts at which the continuation ends.
        min_tokens: number of ids behind whose text a stop text must end, as in generation.sequences.stop_test.

    Raises:
        CheckpointError: the tokenizer is not byte-level, so single tokens cannot be decoded.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._min_tokens = min_tokens
        self._begin()

    def _begin(self) -> None:
        self._held = ""
        self._has_stopped = False
        self._num_tokens = 0
        self._behind = 0
        """Characters of the first min_tokens ids, once these are there."""
        self.num_characters = 0
        """Whole characters of the tokens so far, including those that are held back or cut."""

    def push(self, token_id: int) -> str:
        """Add one id and return the text that is now certain, which may be empty."""
        text = self._release(self._decoder.push(token_id))
        self._num_tokens += 1
        if self._num_tokens == self._min_tokens:
            self._behind = self.num_characters + self._decoder.is_inside_character
        return text

    def finish(self) -> str:
        """End the text and return what was held back. The next text can follow."""
        rest = self._release(self._decoder.finish()) + self._held
        self._begin()
        return rest

    def _release(self, piece: str) -> str:
        self.num_characters += len(piece)
        if self._has_stopped or not self._stop:
            return "" if self._has_stopped else piece
        text = self._held + piece
        if self._num_tokens >= self._min_tokens:
            place = find_stop(text, self._stop, self._behind - (self.num_characters - len(text)))
            if place is not None:
                self._held, self._has_stopped = "", True
                return text[:place]
        # Hold back the longest end of the text that may be the beginning of a stop text.
        beginnings = (
            stop[:n] for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
        )
        self._held = max(beginnings, key=len, default="")
        return text.removesuffix(self._held)
