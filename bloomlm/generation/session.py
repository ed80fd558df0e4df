"""DecodeSession, the unit of generation: sequences are opened, take steps together, and leave one by one.

Each sequence has its own options, random numbers, stop texts and length. In float32 it gets the same tokens as if it
were alone, however its prompt is read. The session knows token ids only; for stop texts, the caller passes a function
from ids to text.

Shapes: B rows of a step, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bloomlm.errors import GenerationError
from bloomlm.generation.choosing import choose_next, scores_of
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.log_probs import PromptScores
from bloomlm.generation.reading import MOST_SCORED, Prompt, check_prompt, read_chunks
from bloomlm.generation.rows import SessionRows
from bloomlm.generation.sequences import DecodeText, Event, Sample, Search


class DecodeSession:
    """Sequences that a model continues together.

    If a step fails, for example because memory is full, the model's rows may be half written: all sequences are lost,
    and every later step raises GenerationError. Let go of the session before opening another, which needs its memory.

    Args:
        model: what computes the logits.
        max_rows: sequences at once; a sample takes one row, a beam search as many as it has beams.
        max_tokens: most tokens of a sequence, prompt and max_new_tokens together.
        decode_text: ids to text, needed for stop texts.
        prompt_lookup: most tokens to guess in a step for each greedy sequence without penalties, by looking up its last
            tokens in its own text; a step then gives it up to one more. 0 guesses none. The tokens are the same.

    Raises:
        GenerationError: the model cannot check guesses.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int,
        max_tokens: int,
        decode_text: DecodeText | None = None,
        prompt_lookup: int = 0,
    ) -> None:
        if prompt_lookup and not (model.features.scores_chunks and model.features.truncates):
            raise GenerationError(
                "this model cannot check several tokens in one pass, which prompt_lookup needs; leave it out"
            )
        self._num_guesses = prompt_lookup
        self._model = model
        self._max_tokens = max_tokens
        self._decode_text = decode_text
        with torch.inference_mode():
            self._rows = SessionRows(model, max_rows, max_tokens)
        self._prompts: dict[int, Prompt] = {}
        """First handle -> the prompt, until it is read."""
        self._scores: dict[int, PromptScores] = {}
        """First handle -> the scores of a prompt that is read, until they are fetched."""
        self._running: list[Sample | Search] = []
        self._ended: list[Prompt | Sample | Search] = []
        """Those that still have their rows."""
        self._unread: dict[int, int] = {}
        """Row -> its newest token, which the model has not read yet."""
        self._num_opened = 0
        self._has_failed = False

    @property
    def num_free_rows(self) -> int:
        """Number of rows that no sequence uses."""
        return self._rows.num_free + sum(len(sequence.rows) for sequence in self._ended)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence is left."""
        return not (self._running or self._prompts)

    @torch.inference_mode()
    def open(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        adapter: str | None = None,
        first_sequence: int = 0,
        prompt_log_probs: int | None = None,
        blocks: Sequence[Tensor] = (),
    ) -> list[int]:
        """Take rows for a prompt, which the next steps read.

        Args:
            prompt: ids, at least one.
            config: how to continue it.
            adapter: name of the adapter that it uses; None: the model alone.
            first_sequence: number of its first result within the caller's run; with the seed it decides the random
                numbers.
            prompt_log_probs: score the prompt's tokens and name this many of the likeliest ids at each position, for
                `prompt_scores`; None: do not.
            blocks: what `read_block` gave of a sequence with the same adapter and the same first tokens, from the first
                one on; the prompt has more tokens.

        Returns:
            A handle for each of its num_return_sequences results.

        Raises:
            GenerationError: an empty prompt, an id outside the vocabulary, too few free rows, a sequence longer than
                max_tokens, stop texts without decode_text, or blocks for all of the prompt or for one that is scored.
            AdapterError, ProgramError: the model has no such adapter, or no adapters or blocks.
        """
        handles = range(self._num_opened, self._num_opened + config.num_return_sequences)
        new = Prompt(
            tokens=prompt,
            handles=handles,
            config=config,
            first_sequence=first_sequence,
            num_top=prompt_log_probs,
            num_read=sum(block.shape[-2] for block in blocks),
        )
        check_prompt(new, self._model.vocab_size, self._max_tokens, can_decode=self._decode_text is not None)
        if config.num_rows > self.num_free_rows:
            raise GenerationError(f"the prompt needs {config.num_rows} rows, and {self.num_free_rows} are free")
        self._free_ended()
        new.rows = self._rows.take(config.num_rows, adapter, blocks)
        self._prompts[handles.start] = new
        self._num_opened = handles.stop
        return list(handles)

    def num_unread(self, handle: int) -> int:
        """Number of tokens of a prompt, named by its first handle, that the model has not read."""
        return self._prompts[handle].num_unread if handle in self._prompts else 0

    def num_read(self, handle: int) -> int:
        """Number of tokens, prompt and generated, that the model has read; of a beam search, the prompt's only.

        A sequence that ended in a step is known until the session's next change, by step, open or evict.

        Raises:
            GenerationError: the handle is unknown.
        """
        sequence = self._find(handle)
        if isinstance(sequence, Prompt):
            return sequence.num_read
        num_generated = len(sequence.tokens) - 1 if isinstance(sequence, Sample) else 0  # the newest one is not read
        return self._rows.history.num_prompt_tokens(sequence.rows[0]) + num_generated

    def read_block(self, handle: int, start: int, stop: int) -> Tensor:
        """What the model remembers of a sequence's tokens start .. stop, of which num_read exist; see ModelRows.

        Raises:
            GenerationError: the handle is unknown. ProgramError: the model has no blocks.
            ValueError: the model has not read these tokens.
        """
        return self._rows.model.read_block(self._find(handle).rows[0], start, stop)

    def prompt_scores(self, handle: int) -> PromptScores:
        """Hand over the scores of a prompt, named by its first handle, once it is read; evict drops them.

        Raises:
            GenerationError: it is not read yet, was opened without prompt_log_probs, or its scores were fetched.
        """
        if handle not in self._scores:
            raise GenerationError(
                f"there are no prompt scores for handle {handle}: they exist once the prompt is read, for a prompt "
                "opened with prompt_log_probs, until they are fetched"
            )
        return self._scores.pop(handle)

    @torch.inference_mode()
    def step(self, reads: Mapping[int, int] | None = None) -> list[Event]:
        """Read prompts, and give every sequence whose prompt is read its next token; those that end leave the session.

        Args:
            reads: first handle of a prompt -> number of its tokens to read in this step; None: all that is unread.

        Returns:
            The new tokens in the order of handles. A beam search decides on its tokens when it ends: its sequences have
            no events until then, and in that step one event for each token.

        Raises:
            GenerationError: reads name a handle that has nothing to read.
        """
        if reads is None:
            reads = {handle: prompt.num_unread for handle, prompt in self._prompts.items()}
        if unknown := reads.keys() - self._prompts.keys():
            raise GenerationError(f"reads names handle {min(unknown)}, which is not the first one of an unread prompt")
        if self._has_failed:
            raise GenerationError("an earlier step of this session failed, and its sequences are lost; open a new one")
        self._free_ended()
        self._has_failed = True
        events = self._step(reads)
        self._has_failed = False
        return events

    def evict(self, handles: Iterable[int]) -> None:
        """Remove sequences; the results of one beam search, and of a prompt that is still being read, leave together.

        Handles that have left already are ignored.
        """
        given = set(handles)
        for handle in given & self._scores.keys():
            del self._scores[handle]
        self._leave(given)
        self._free_ended()

    def _leave(self, given: set[int]) -> None:
        """Let sequences take no more steps."""
        leaving: list[Prompt | Sample | Search] = [
            sequence for sequence in (*self._prompts.values(), *self._running) if not given.isdisjoint(sequence.handles)
        ]
        for sequence in leaving:
            self._prompts.pop(sequence.handles[0], None)
            for row in sequence.rows:
                self._unread.pop(row, None)
        self._running = [sequence for sequence in self._running if sequence not in leaving]
        self._ended += leaving

    def _free_ended(self) -> None:
        for sequence in self._ended:
            self._rows.free(sequence.rows)
        self._ended = []

    def _step(self, reads: Mapping[int, int]) -> list[Event]:
        guesses = self._guess()
        unread = {row: [token, *guesses.get(row, ())] for row, token in sorted(self._unread.items())}
        step = self._rows.read_next(unread)
        self._unread = {}
        step |= self._read(reads)
        chosen = choose_next(step, self._running, self._rows.history, self._model.eos_token_id)
        tokens = {
            sample: sample.accept(guesses.get(sample.rows[0], ()), found) for sample, found in chosen.tokens.items()
        }
        scores = scores_of(tokens, step)
        events: list[Event] = []
        for sample, accepted in tokens.items():
            row, start = sample.rows[0], len(sample.tokens)
            events += sample.extend(accepted, scores.get(sample), self._model.eos_token_id)
            for token in sample.tokens[start:]:
                self._rows.history.append(row, token)
            self._unread[row] = sample.tokens[-1]
            if len(sample.tokens) - start < len(step[row]):  # guesses that are wrong, or behind the end, have been read
                self._rows.model.truncate(row, self.num_read(*sample.handles))
        for search, log_probs in chosen.beams.items():
            for source, target in search.advance(log_probs):
                self._rows.copy(source, target)
            if not search.state.is_open:
                events += search.events(self._model.eos_token_id)
                continue
            for row, token in zip(search.rows, search.state.newest(), strict=True):
                self._rows.history.append(row, token)
                self._unread[row] = token
        self._leave({event.handle for event in events if event.finish_reason is not None})
        return sorted(events, key=lambda event: event.handle)

    def _guess(self) -> dict[int, list[int]]:
        """Row -> the guessed tokens after its newest one."""
        samples = [sample for sample in self._running if isinstance(sample, Sample) and sample.lookup is not None]
        if not samples:
            return {}
        most = min(self._num_guesses, MOST_SCORED // len(samples))
        guesses = {sample.rows[0]: sample.guess(most) for sample in samples}
        return {row: tokens for row, tokens in guesses.items() if tokens}

    def _read(self, reads: Mapping[int, int]) -> dict[int, Tensor]:
        """Read tokens of prompts, and start the sequences of those that are read whole.

        Returns:
            Row of a new sequence -> the logits [1, V] of its first token.
        """
        counts = {self._prompts[handle]: count for handle, count in reads.items()}
        after_prompts: dict[int, Tensor] = {}
        for prompt, logits in read_chunks(self._rows.model, counts, self._model.features).items():
            del self._prompts[prompt.handles.start]
            if prompt.num_top is not None:
                self._scores[prompt.handles.start] = prompt.scores
            first_row, *copies = prompt.rows
            self._rows.history.start(first_row, prompt.tokens)
            for row in copies:
                self._rows.copy(first_row, row)
            after_prompts |= dict.fromkeys(prompt.rows, logits[None])
            self._running += prompt.start(
                self._model.eos_token_id, self._decode_text, logits.device, looks_up=self._num_guesses > 0
            )
        return after_prompts

    def _find(self, handle: int) -> Prompt | Sample | Search:
        for sequence in (*self._prompts.values(), *self._running, *self._ended):
            if handle in sequence.handles:
                return sequence
        raise GenerationError(f"handle {handle} names no sequence of this session, or one that has left it")
