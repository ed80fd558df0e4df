"""The options of a generation.

A strategy is a value with only the options that act under it, so an option without effect cannot be given.
`GenerationConfig.from_options` takes all options together, as flags and keyword arguments do, and refuses those without
effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from bloomlm.errors import GenerationError


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most likely token each time; among equally likely tokens, the one with the lowest id."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A random token each time. Sequence i of a run depends on (seed, i) and its own prompt only."""

    temperature: float = 1.0
    """Divides the logits: below 1 sharpens, above 1 flattens the distribution."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities add up to p; 1.0 keeps all."""
    min_p: float = 0.0
    """Keep the tokens that are at least this fraction as probable as the most likely one; 0 keeps all."""
    seed: int = 20
    """Seed of the random numbers."""

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "temperature", self.temperature, "a number above 0 (for 0, use greedy)")
        _check(self.top_k >= 0, "top_k", self.top_k, "an integer from 1, or 0 to keep every token")
        _check(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and up to 1.0, which keeps every token")
        _check(0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0, which keeps every token, to 1")
        _check(self.seed >= 0, "seed", self.seed, "an integer from 0")


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """The likeliest whole continuation found by following num_beams continuations at once."""

    num_beams: int = 4
    """Continuations followed at once."""
    length_penalty: float = 1.0
    """A continuation's score is its log-probability / length ** length_penalty: above 0 favours long ones."""

    def __post_init__(self) -> None:
        _check(self.num_beams >= 1, "num_beams", self.num_beams, "an integer from 1")


Strategy = Greedy | Sampling | BeamSearch

STRATEGIES: Mapping[str, type[Greedy] | type[Sampling] | type[BeamSearch]] = {
    "greedy": Greedy,
    "sampling": Sampling,
    "beam_search": BeamSearch,
}
"""The strategies by the names that --decode_strategy takes."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue prompts, and when to stop."""

    strategy: Strategy = Greedy()
    """How the next token is chosen."""
    max_new_tokens: int = 200
    """Tokens to generate at most, `</s>` included."""
    min_new_tokens: int = 0
    """Tokens before `</s>` and stop_token_ids are allowed, and behind which a stop text must end."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Ids and the numbers added to their logits, each id once."""
    repetition_penalty: float = 1.0
    """Above 1.0 makes tokens less likely that the prompt or the continuation contains already; 1.0 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the continuation contains it already; 0 is off."""
    presence_penalty: float = 0.0
    """Subtracted from a token's logit if the continuation contains it already; 0 is off."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens occurs twice, prompt included; 0 is off."""
    num_return_sequences: int = 1
    """Continuations of each prompt: samples, or the best beams."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; it is cut before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a continuation; it contains them."""
    ignore_eos: bool = False
    """Whether a continuation goes on after `</s>`."""
    num_log_probs: int | None = None
    """Report the log-probability of each token and of this many of the likeliest ones; None reports nothing."""

    def __post_init__(self) -> None:
        _check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "an integer from 1")
        _check(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"an integer from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        _check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "a number above 0")
        _check(self.no_repeat_ngram_size >= 0, "no_repeat_ngram_size", self.no_repeat_ngram_size, "0 or more")
        most, expected = float("inf"), "an integer from 1"
        if isinstance(self.strategy, Greedy):
            most, expected = 1, "1 with greedy decoding, which has one answer"
        elif isinstance(self.strategy, BeamSearch):
            most, expected = self.num_rows, f"an integer from 1 to num_beams ({self.num_rows})"
        _check(1 <= self.num_return_sequences <= most, "num_return_sequences", self.num_return_sequences, expected)
        _check(all(self.stop), "stop", self.stop, "texts that are not empty")
        ids = [token for token, _ in self.logit_bias]
        _check(len(set(ids)) == len(ids), "logit_bias", self.logit_bias, "pairs of different ids and numbers")
        expected = "an integer from 0, or None; with a beam search only None"
        allowed = self.num_log_probs is None or (self.num_log_probs >= 0 and not isinstance(self.strategy, BeamSearch))
        _check(allowed, "num_log_probs", self.num_log_probs, expected)

    @property
    def num_rows(self) -> int:
        """Sequences that are followed at once for one prompt: its samples, or its beams."""
        return self.strategy.num_beams if isinstance(self.strategy, BeamSearch) else self.num_return_sequences

    @classmethod
    def from_options(cls, *, decode_strategy: str = "greedy", **options: Any) -> "GenerationConfig":
        """Build a configuration from all options together, as flags give them; an option that is None is not given.

        Args:
            decode_strategy: greedy, sampling or beam_search.
            options: fields of this class, except strategy, and of the strategy's class; stop may be one text, and
                logit_bias a mapping.

        Raises:
            GenerationError: an unknown name, a value out of range, or an option without effect under the strategy.
        """
        given = {name: value for name, value in options.items() if value is not None}
        if decode_strategy not in STRATEGIES:
            raise GenerationError(f"decode_strategy is {decode_strategy!r}; it can be {', '.join(STRATEGIES)}")
        strategy_class = STRATEGIES[decode_strategy]
        own = {field.name for field in fields(strategy_class)}
        common = {field.name for field in fields(cls)} - {"strategy"}
        for name in given:
            if name not in own | common:
                raise GenerationError(_refusal(name, decode_strategy))
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        if isinstance(given.get("logit_bias"), Mapping):
            given["logit_bias"] = sorted(given["logit_bias"].items())
        given |= {name: tuple(given[name]) for name in ("stop", "stop_token_ids", "logit_bias") if name in given}
        return cls(
            strategy=strategy_class(**{name: given[name] for name in given if name in own}),
            **{name: given[name] for name in given if name in common},
        )


def _check(good: bool, name: str, found: object, expected: str) -> None:
    if not good:
        raise GenerationError(f"{name} is {found!r}; it must be {expected}")


def _refusal(name: str, decode_strategy: str) -> str:
    acts_under: Sequence[str] = [
        key for key, strategy in STRATEGIES.items() if name in {field.name for field in fields(strategy)}
    ]
    if acts_under:
        return (
            f"{name} has no effect with decode_strategy {decode_strategy}; "
            f"leave it out or choose decode_strategy {' or '.join(acts_under)}"
        )
    known = {field.name for strategy in (GenerationConfig, *STRATEGIES.values()) for field in fields(strategy)}
    return f"unknown generation option {name!r}; known: {', '.join(sorted(known - {'strategy'}))}"
