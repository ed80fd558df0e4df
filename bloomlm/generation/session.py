"""DecodeSession, the unit of generation: sequences are admitted, take steps together, and leave one by one.

Each sequence has its own options, random numbers, stop texts and length. In float32 it gets the same tokens as if it
were alone. The session knows token ids only; for stop texts, the caller passes a function from ids to text.

Shapes: B rows of a step, V vocabulary.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.errors import GenerationError
from bloomlm.generation.beam import BeamSearchState
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sampling import choose, uniform_numbers
from bloomlm.generation.sequences import DecodeText, FinishReason, History, Sample, Search, group_of, stop_test


@dataclass(frozen=True, kw_only=True)
class Event:
    """One new token of one sequence."""

    handle: int
    """Handle of the sequence, from `admit`."""
    token: int
    """Its new id."""
    finish_reason: FinishReason | None
    """Why the sequence ends with this token; None where it goes on."""


class DecodeSession:
    """Sequences that a model continues together.

    Args:
        model: what computes the logits.
        max_rows: sequences at once; a sample takes one row, a beam search as many as it has beams.
        max_tokens: most tokens of a sequence, prompt and max_new_tokens together.
        decode_text: ids to text, needed for stop texts.
    """

    def __init__(
        self, model: LanguageModel, *, max_rows: int, max_tokens: int, decode_text: DecodeText | None = None
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._decode_text = decode_text
        with torch.inference_mode():
            self._rows = model.open_rows(max_rows, max_tokens)
        self._history = History(max_rows, max_tokens)
        self._free_rows = list(range(max_rows))
        self._running: list[Sample | Search] = []
        self._unread: dict[int, int] = {}
        """Row -> its newest token, which the model has not read yet."""
        self._logits: dict[int, Tensor] = {}
        """Row -> the logits [V] after its prompt, until the next step."""
        self._num_admitted = 0

    @property
    def num_free_rows(self) -> int:
        """Number of rows that no sequence uses."""
        return len(self._free_rows)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence is left."""
        return not self._running

    @torch.inference_mode()
    def admit(
        self, prompts: Sequence[Sequence[int]], configs: Sequence[GenerationConfig], *, first_sequence: int = 0
    ) -> list[int]:
        """Read prompts, all in one forward pass, and continue them from the next step on.

        Args:
            prompts: lists of ids, at least one id each.
            configs: how to continue each of them.
            first_sequence: number of the first of these sequences within the caller's run; with the seed it decides
                the random numbers.

        Returns:
            A handle for each sequence: num_return_sequences of the first prompt, then of the second, and so on.

        Raises:
            GenerationError: an empty prompt, an id outside the vocabulary, too few free rows, a sequence longer than
                max_tokens, or stop texts without decode_text.
        """
        self._check(prompts, configs)
        if not prompts:
            return []
        free = iter(self._free_rows)
        rows = [[next(free) for _ in range(config.num_rows)] for config in configs]
        logits = self._rows.prefill([first for first, *_ in rows], prompts)
        handles: list[int] = []
        for prompt, config, own_rows, prompt_logits in zip(prompts, configs, rows, logits, strict=True):
            first_row, *copies = own_rows
            self._history.start(first_row, prompt)
            for row in copies:
                self._copy_row(first_row, row)
            self._logits |= dict.fromkeys(own_rows, prompt_logits)
            new = range(self._num_admitted, self._num_admitted + config.num_return_sequences)
            self._start(config, new, own_rows, first_sequence + len(handles), logits.device)
            self._num_admitted = new.stop
            handles += new
        self._free_rows = list(free)
        return handles

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Give every sequence its next token; those that end leave the session.

        Returns:
            One event for each sequence, in the order of admission. A beam search decides on its tokens when it ends:
            its sequences have no events until then, and in that step one event for each token.
        """
        if not self._running:
            return []
        rows, logits = self._next_logits()
        place = {row: index for index, row in enumerate(rows)}
        groups: dict[GenerationConfig, list[Sample | Search]] = {}
        for sequence in self._running:
            groups.setdefault(sequence.group, []).append(sequence)
        events: list[Event] = []
        for config, members in groups.items():
            members.sort(key=lambda member: member.rows[0])
            own_rows = [row for member in members for row in member.rows]
            places = [place[row] for row in own_rows]
            scores = (logits if places == list(range(len(rows))) else logits[places]).float()
            if isinstance(config.strategy, BeamSearch):
                scores = scores.log_softmax(dim=-1)
            scores = self._history.adjust(scores, own_rows, config, self._model.eos_token_id)
            samples = [member for member in members if isinstance(member, Sample)]
            events += self._extend_samples(samples, scores, config) if samples else []
            searches = [member for member in members if isinstance(member, Search)]
            for index, search in enumerate(searches):
                count = len(search.rows)
                events += self._extend_search(search, scores[index * count : (index + 1) * count])
        self.evict(event.handle for event in events if event.finish_reason is not None)
        return sorted(events, key=lambda event: event.handle)

    def evict(self, handles: Iterable[int]) -> None:
        """Remove sequences; results of one beam search leave together. Handles that have left already are ignored."""
        given = set(handles)
        leaving = [sequence for sequence in self._running if not given.isdisjoint(sequence.handles)]
        for row in (row for sequence in leaving for row in sequence.rows):
            self._rows.free(row)
            self._unread.pop(row, None)
            self._logits.pop(row, None)
            insort(self._free_rows, row)
        self._running = [sequence for sequence in self._running if sequence not in leaving]

    def _next_logits(self) -> tuple[list[int], Tensor]:
        """The rows of all sequences, and the logits [B, V] of their next tokens."""
        rows = sorted(self._unread)
        parts = []
        if rows:
            tokens = torch.tensor([self._unread[row] for row in rows])
            parts.append(self._rows.decode_step(rows, tokens))
        if self._logits:
            rows += self._logits
            parts.append(torch.stack(list(self._logits.values())))
        self._unread, self._logits = {}, {}
        return rows, parts[0] if len(parts) == 1 else torch.cat(parts)

    def _start(
        self,
        config: GenerationConfig,
        handles: Sequence[int],
        rows: list[int],
        first_sequence: int,
        device: torch.device,
    ) -> None:
        stops = stop_test(config.stop, self._decode_text)
        if isinstance(config.strategy, BeamSearch):
            state = BeamSearchState(
                config.strategy.num_beams,
                config.max_new_tokens,
                eos_token_id=self._model.eos_token_id,
                length_penalty=config.strategy.length_penalty,
                device=device,
            )
            self._running.append(Search(handles, rows, config, group_of(config), stops, state))
            return
        for index, (handle, row) in enumerate(zip(handles, rows, strict=True)):
            uniforms: list[float] = []
            if isinstance(config.strategy, Sampling):
                numbers = uniform_numbers(config.strategy.seed, [first_sequence + index], config.max_new_tokens)
                uniforms = numbers[0].tolist()
            self._running.append(Sample([handle], [row], config, group_of(config), stops, uniforms))

    def _extend_samples(self, samples: Sequence[Sample], scores: Tensor, config: GenerationConfig) -> list[Event]:
        """Choose a token for each sequence by its scores [B, V]."""
        strategy = config.strategy if isinstance(config.strategy, Sampling) else None
        uniforms = None
        if strategy is not None:
            drawn = [sample.uniforms[len(sample.tokens)] for sample in samples]
            uniforms = torch.tensor(drawn, dtype=torch.float64, device=scores.device)
        events = []
        for sample, token in zip(samples, choose(scores, strategy, uniforms).tolist(), strict=True):
            (handle,), (row,) = sample.handles, sample.rows
            sample.tokens.append(token)
            self._history.append(row, token)
            self._unread[row] = token
            reason = sample.finish_reason(sample.tokens, self._model.eos_token_id)
            events.append(Event(handle=handle, token=token, finish_reason=reason))
        return events

    def _extend_search(self, search: Search, log_probs: Tensor) -> list[Event]:
        """Advance a beam search by its beams' log-probabilities [W, V]."""
        state = search.state
        parents, tokens = state.advance(log_probs, search.stops if search.config.stop else None)
        if state.is_open:
            search.rows = self._regrow(search.rows, parents.tolist())
            for row, token in zip(search.rows, tokens.tolist(), strict=True):
                self._history.append(row, token)
                self._unread[row] = token
            return []
        events = []
        for handle, found in zip(search.handles, state.best(len(search.handles)), strict=True):
            reasons = [None] * (len(found) - 1) + [search.finish_reason(found, self._model.eos_token_id)]
            pairs = zip(found, reasons, strict=True)
            events += [Event(handle=handle, token=token, finish_reason=reason) for token, reason in pairs]
        return events

    def _regrow(self, rows: Sequence[int], parents: Sequence[int]) -> list[int]:
        """The rows of the new beams, of which beam i continues beam parents[i].

        The first child of a beam keeps its row; the others get copies in the rows of beams without children.
        """
        unused = [row for beam, row in enumerate(rows) if beam not in parents]
        placed: list[int] = []
        for parent in parents:
            row = rows[parent]
            if row in placed:
                row = unused.pop()
                self._copy_row(rows[parent], row)
            placed.append(row)
        return placed

    def _copy_row(self, source: int, target: int) -> None:
        self._rows.copy_row(source, target)
        self._history.copy_row(source, target)

    def _check(self, prompts: Sequence[Sequence[int]], configs: Sequence[GenerationConfig]) -> None:
        vocab_size = self._model.vocab_size
        for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
            if not prompt:
                raise GenerationError(
                    f"prompt {index} has no tokens; a continuation needs at least one. To write from nothing, "
                    "start with BLOOM's first token, <s>"
                )
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                bad = min(prompt) if min(prompt) < 0 else max(prompt)
                raise GenerationError(
                    f"prompt {index} contains id {bad}, but the model has ids 0 to {vocab_size - 1}; "
                    "does the tokenizer belong to this model?"
                )
            if config.stop and self._decode_text is None:
                raise GenerationError("stop texts need decode_text, which turns ids into text (a tokenizer's decode)")
            if len(prompt) + config.max_new_tokens > self._max_tokens:
                raise GenerationError(
                    f"prompt {index} has {len(prompt)} tokens and may get {config.max_new_tokens} new ones; "
                    f"this session has room for {self._max_tokens} tokens of a sequence"
                )
        needed = sum(config.num_rows for config in configs)
        if needed > self.num_free_rows:
            raise GenerationError(f"the prompts need {needed} rows, and this session has {self.num_free_rows} free")
