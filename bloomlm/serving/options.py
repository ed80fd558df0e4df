"""The options of the engine, which are flags of `bloomlm serve`."""

from dataclasses import dataclass

from bloomlm.errors import ConfigError
from bloomlm.flags import Flags, flag
from bloomlm.generation.reading import MOST_SCORED


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Flags):
    """How much the engine computes at once, and how much it keeps.

    Raises:
        ConfigError: a value out of range, or a step too small for the sequences.
    """

    max_num_seqs: int = flag("engine", 64, "sequences that run at once; others wait", minimum=1)
    max_step_tokens: int = flag(
        "engine", 512, "most tokens computed in a step; a longer prompt is read in several steps", minimum=2
    )
    max_model_len: int = flag("engine", 2048, "most tokens of a sequence, prompt and new ones together", minimum=2)
    kv_cache_gb: float | None = flag(
        "engine",
        None,
        "memory for keys and values in GB (10^9 bytes)  [default: half of the free memory, nine tenths on a GPU]",
        above=0,
    )
    max_queue: int = flag("engine", 256, "requests that may wait; more are turned away", minimum=1)
    prompt_lookup: int = flag(
        "engine", 0, "tokens that a greedy sequence guesses from its own text in a step; 0 is off", minimum=0
    )
    prefix_caching: bool = flag("engine", True, "keep keys and values of prompts for requests that begin alike")

    def __post_init__(self) -> None:
        super().__post_init__()
        guesses = self.max_guesses
        if self.max_step_tokens <= self.max_num_seqs + guesses:
            of_guesses = f" and up to {guesses} guesses (--prompt_lookup {self.prompt_lookup})" if guesses else ""
            raise ConfigError(
                f"--max_step_tokens is {self.max_step_tokens}; expected more than the {self.max_num_seqs + guesses} "
                f"tokens that --max_num_seqs {self.max_num_seqs} sequences{of_guesses} take in a step, so that prompts "
                "can be read beside them"
            )

    @property
    def max_guesses(self) -> int:
        """Most tokens that all sequences together guess in a step."""
        return min(self.max_num_seqs * self.prompt_lookup, MOST_SCORED)
