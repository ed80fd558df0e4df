"""Pieces of choices -> JSON, in the format of /v1/completions or of /v1/chat/completions.

Sources: https://platform.openai.com/docs/api-reference/completions/object, .../chat/object, .../chat/streaming
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.serving.http.choices import Entry, Piece, TokenName


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """What a choice shows beside its text, and how."""

    tokenizer: Tokenizer
    """Knows the bytes of the tokens."""
    name: TokenName
    """Id -> the name of the token in log-probabilities."""
    has_log_probs: bool
    """Whether it shows log-probabilities."""
    has_ids: bool
    """Whether it shows ids."""

    chunk_object = answer_object = "text_completion"
    id_prefix = "cmpl"

    def has_news(self, piece: Piece) -> bool:
        """Whether a stream sends an event for a piece."""
        is_shown = self.has_ids or (self.has_log_probs and bool(piece.entries))
        return is_shown or bool(piece.text) or piece.finish_reason is not None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice of an event."""
        return self.answer([piece])

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All pieces of a choice as a choice of a whole answer."""
        entries = [entry for piece in pieces for entry in piece.entries]
        return {
            "index": pieces[0].index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._log_probs(entries) if self.has_log_probs else None,
            "finish_reason": pieces[-1].finish_reason,
            **self.ids(pieces),
        }

    def ids(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The fields with ids of the pieces, where they were asked for."""
        if not self.has_ids:
            return {}
        generated = [entry.token for piece in pieces if piece.prompt_ids is None for entry in piece.entries]
        return {"token_ids": generated, "prompt_token_ids": pieces[0].prompt_ids}

    def _log_probs(self, entries: Sequence[Entry]) -> dict[str, list[Any]]:
        return {
            "tokens": [self.name(entry.token) for entry in entries],
            "token_logprobs": [entry.log_prob for entry in entries],
            "top_logprobs": [self._alternatives(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
            # the lists above name tokens by their texts, which several tokens can share
            **({"content": self.content(entries)} if self.has_ids else {}),
        }

    def content(self, entries: Iterable[Entry]) -> list[dict[str, Any]]:
        """Log-probabilities in the format of chats, where ids were asked for with the id of each token."""
        return [
            {
                **self._named(entry.token, entry.log_prob),
                "top_logprobs": [self._named(*alternative) for alternative in entry.top or ()],
            }
            for entry in entries
        ]

    def _named(self, token: int, log_prob: float | None) -> dict[str, Any]:
        is_text = not self.tokenizer.is_special(token)
        return {
            "token": self.name(token),
            "logprob": log_prob,
            "bytes": list(self.tokenizer.token_bytes(token)) if is_text else [],
            **({"id": token} if self.has_ids else {}),
        }

    def _alternatives(self, entry: Entry) -> dict[str, float | None] | None:
        """Name -> log-probability; where two tokens have one name, the less likely one is named by its id."""
        if entry.log_prob is None:  # nothing precedes the first token of a prompt
            return None
        named: dict[str, float | None] = {}
        for token, log_prob in _with_chosen(entry):
            text = self.name(token)
            named[f"token_id:{token}" if text in named else text] = log_prob
        return named


@dataclass(frozen=True, kw_only=True)
class ChatFormat(AnswerFormat):
    """The format of /v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    answer_object = "chat.completion"
    id_prefix = "chatcmpl"

    def has_news(self, piece: Piece) -> bool:
        """Whether a stream sends an event for a piece."""
        return piece.prompt_ids is not None or super().has_news(piece)

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece as a choice of an event; the first one says who speaks."""
        role = {"role": "assistant"} if piece.prompt_ids is not None else {}
        return {"delta": {**role, "content": piece.text}, **self._common([piece])}

    def answer(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All pieces of a choice as a choice of a whole answer."""
        text = "".join(piece.text for piece in pieces)
        return {"message": {"role": "assistant", "content": text, "refusal": None}, **self._common(pieces)}

    def _common(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        entries = [entry for piece in pieces for entry in piece.entries]
        content = self.content(entries) if self.has_log_probs else None
        return {
            "index": pieces[0].index,
            "logprobs": None if content is None else {"content": content, "refusal": None},
            "finish_reason": pieces[-1].finish_reason,
            **self.ids(pieces),
        }


def _with_chosen(entry: Entry) -> list[tuple[int, float | None]]:
    """The alternatives of a token, likeliest first, and the token itself where it is none of them."""
    top: list[tuple[int, float | None]] = list(entry.top or ())
    return top if entry.token in dict(top) else [*top, (entry.token, entry.log_prob)]
