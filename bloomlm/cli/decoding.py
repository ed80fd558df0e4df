"""Flags that say how a completion is decoded."""

import logging
from dataclasses import dataclass
from typing import Any

from bloomlm.flags import Flags, flag, unescaped
from bloomlm.generation.config import GenerationConfig

_LOG = logging.getLogger(__name__)
# Passed on to GenerationConfig unless they are None.
_OPTIONS = ("min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, kw_only=True)
class DecodingFlags(Flags):
    """How the tokens of one completion are chosen."""

    min_new_tokens: int | None = flag(
        "decoding", None, "minimum tokens before </s>, and behind which a stop text must end  [default: 0]"
    )
    stop: tuple[str, ...] = flag(
        "decoding", (), r"text at which a completion ends (\n: line end); give the flag again for more", repeatable=True
    )
    repetition_penalty: float | None = flag(
        "decoding", None, "above 1, tokens that have occurred become less likely  [default: 1, off]"
    )
    no_repeat_ngram_size: int | None = flag(
        "decoding", None, "no sequence of this many tokens occurs twice  [default: 0, off]"
    )
    temperature: float | None = flag(
        "sampling", None, "below 1, likely tokens become even likelier; above 1, less so  [default: 1]"
    )
    top_k: int | None = flag("sampling", None, "sample from the k most likely tokens  [default: 0, all]")
    top_p: float | None = flag(
        "sampling", None, "sample from the most likely tokens of this total probability  [default: 1, all]"
    )
    min_p: float | None = flag(
        "sampling", None, "sample from the tokens that are this fraction as likely as the likeliest  [default: 0, all]"
    )
    seed: int | None = flag("sampling", None, "seed of the random numbers  [default: 20]")

    def generation_with(self, *, decode_strategy: str, max_new_tokens: int, **options: Any) -> GenerationConfig:
        """How to complete prompts.

        Args:
            decode_strategy, max_new_tokens: the values of these flags, which each verb declares for itself.
            options: options of GenerationConfig.from_options that are not flags here.

        Raises:
            GenerationError: a value out of range, or a flag without effect under the strategy.
        """
        seed = self.seed
        if seed is not None and decode_strategy != "sampling":
            # Old commands for infer_generation.py always give one.
            _LOG.warning("--seed has no effect with --decode_strategy %s", decode_strategy)
            seed = None
        return GenerationConfig.from_options(
            decode_strategy=decode_strategy,
            seed=seed,
            max_new_tokens=max_new_tokens,
            stop=[unescaped(text) for text in self.stop],
            **{name: getattr(self, name) for name in _OPTIONS},
            **options,
        )
