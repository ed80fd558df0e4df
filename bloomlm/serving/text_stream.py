"""Text that appears token by token: never half a character, and no part of a stop text."""

from collections.abc import Sequence

from bloomlm.data.stream_decoder import StreamDecoder
from bloomlm.data.tokenizer import Tokenizer


class TextStream:
    """The text of one continuation while its tokens come.

    The joined results of push and finish equal the text of all ids, without special tokens, cut before the stop text
    that the last id completes.

    Args:
        tokenizer: decodes the ids.
        stop: texts at which the continuation ends.

    Raises:
        CheckpointError: the tokenizer is not byte-level, so single tokens cannot be decoded.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._held = ""
        self._has_stopped = False
        self.num_characters = 0
        """Whole characters of the tokens so far, including those that are held back or cut."""

    def push(self, token_id: int) -> str:
        """Add one id and return the text that is now certain, which may be empty."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """End the text and return what was held back. The next text can follow."""
        rest = self._release(self._decoder.finish()) + self._held
        self._held, self._has_stopped, self.num_characters = "", False, 0
        return rest

    def _release(self, piece: str) -> str:
        self.num_characters += len(piece)
        if self._has_stopped or not self._stop:
            return "" if self._has_stopped else piece
        text = self._held + piece
        ends = [text.index(stop) for stop in self._stop if stop in text]
        if ends:
            self._held, self._has_stopped = "", True
            return text[: min(ends)]
        # Hold back the longest end of the text that may be the beginning of a stop text.
        beginnings = (
            stop[:n] for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
        )
        self._held = max(beginnings, key=len, default="")
        return text.removesuffix(self._held)
