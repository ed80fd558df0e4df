"""A text that grows turn by turn, such as a conversation: what the model has read of it is not read again."""

from collections.abc import Callable, Sequence

from torch import Tensor

from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText, FinishReason
from bloomlm.generation.session import DecodeSession


class GrowingText:
    """Continues one prompt after another, and keeps the keys and values of the last one with its continuation.

    Only what a prompt has behind its longest common beginning with them is read. In float32 a continuation has the
    same tokens as that of `generate`. A model whose rows have no blocks (RowFeatures) reads every prompt whole.

    Args:
        model: what computes the logits.
        decode_text: ids to text, for stop texts.
    """

    def __init__(self, model: LanguageModel, decode_text: DecodeText) -> None:
        self._model = model
        self._decode_text = decode_text
        self._tokens: list[int] = []
        """What the model has read of the last prompt and its continuation."""
        self._memory: Tensor | None = None
        """The keys and values of these tokens; see ModelRows.read_block."""

    def extend(self, prompt: Sequence[int], config: GenerationConfig, on_token: Callable[[int], None]) -> FinishReason:
        """Continue a prompt by one sequence, greedily or by sampling.

        If it is stopped by an exception, the next prompt finds what this one has found.

        Args:
            prompt: ids, at least one.
            config: how to continue it.
            on_token: called with each new id as it comes.

        Returns:
            Why the continuation ended.

        Raises:
            GenerationError: see DecodeSession.open.
        """
        session = DecodeSession(
            self._model, max_rows=1, max_tokens=len(prompt) + config.max_new_tokens, decode_text=self._decode_text
        )
        (handle,) = session.open(prompt, config, blocks=self._known(prompt))
        tokens, reason = list(prompt), None
        while reason is None:
            for event in session.step():
                tokens.append(event.token)
                reason = event.finish_reason
                on_token(event.token)
        if self._model.features.blocks:
            num_read = session.num_read(handle)
            self._tokens, self._memory = [], None  # its memory is needed for the new one
            self._memory = session.read_block(handle, 0, num_read)
            self._tokens = tokens[:num_read]
        return reason

    def _known(self, prompt: Sequence[int]) -> list[Tensor]:
        """The keys and values of the first tokens of a prompt that need not be read."""
        most = min(len(self._tokens), len(prompt) - 1)  # the logits of the last one are needed
        count = next((place for place in range(most) if self._tokens[place] != prompt[place]), most)
        return [self._memory[..., :count, :]] if count > 0 and self._memory is not None else []
