"""Decodes tokens one by one into whole characters."""

import codecs

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.tokenizer_files import TOKENIZER_FILE
from bloomlm.errors import CheckpointError


class StreamDecoder:
    """Decodes token by token into whole characters.

    The joined results of push and finish equal Tokenizer.decode of all ids.

    Args:
        tokenizer: decodes the ids.
        skip_special_tokens: as in Tokenizer.decode.

    Raises:
        CheckpointError: the tokenizer is not byte-level, so single tokens cannot be decoded.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        if not tokenizer.has_byte_decoder:
            raise CheckpointError(
                f"{tokenizer.name}: {TOKENIZER_FILE} does not have BLOOM's decoder, ByteLevel, so its text cannot be "
                "streamed. Decode the whole sequence instead"
            )
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add one id and return the text that is now complete, which may be empty."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    @property
    def is_inside_character(self) -> bool:
        """Whether the bytes so far end with a part of a character."""
        return bool(self._utf8.getstate()[0])

    def finish(self) -> str:
        """End the text: return U+FFFD if it ends inside a character, else "". The next text can follow."""
        return self._utf8.decode(b"", final=True)
