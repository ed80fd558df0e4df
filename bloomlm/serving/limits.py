"""What a server can serve: requests and options that can never work are refused before they wait."""

import logging
from dataclasses import dataclass, replace

from bloomlm.errors import ConfigError, GenerationError
from bloomlm.generation.language_model import LanguageModel
from bloomlm.row_memory import RowFeatures
from bloomlm.serving.job import blocks_per_row
from bloomlm.serving.memory import KvBudget
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest
from bloomlm.serving.scheduler import BLOCK_TOKENS

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a model and of the memory that it is served with."""

    vocab_size: int
    features: RowFeatures
    options: EngineOptions
    budget: KvBudget

    def check(self, request: GenerationRequest, num_virtual_tokens: int) -> None:
        """Refuse a request that could never be served.

        Args:
            request: the request.
            num_virtual_tokens: virtual tokens before each of its sequences, which take memory but count in no other
                limit.

        Raises:
            GenerationError: an empty prompt, an unknown id, too many tokens or sequences, or scores of a prompt where
                the program cannot give them.
        """
        config, num_tokens = request.config, len(request.prompt)
        if not request.prompt:
            raise GenerationError("the prompt has no tokens; a continuation needs at least one")
        ids = (*request.prompt, *config.stop_token_ids, *(token for token, _ in config.logit_bias))
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.vocab_size:
                raise GenerationError(f"token id {token} is unknown: the model has ids 0 to {self.vocab_size - 1}")
        num_new = 0 if request.score_only else config.max_new_tokens
        if num_tokens + num_new > self.options.max_model_len:
            raise GenerationError(
                f"the prompt has {num_tokens} tokens and {num_new} new ones are asked for, but this server has room "
                f"for {self.options.max_model_len} tokens of a sequence (--max_model_len)"
            )
        if config.num_rows > self.budget.num_rows:
            raise GenerationError(
                f"{config.num_rows} sequences of one prompt are asked for, but this server continues at most "
                f"{self.budget.num_rows} at once (--max_num_seqs)"
            )
        needed = config.num_rows * blocks_per_row(request, num_virtual_tokens)
        found = self.budget.num_blocks
        virtual = f" and {num_virtual_tokens} virtual ones" if num_virtual_tokens else ""
        if needed > found:
            raise GenerationError(
                f"{config.num_rows} sequences of {num_tokens + num_new} tokens{virtual} need {needed * BLOCK_TOKENS} "
                f"places for keys and values, but this server has "
                f"{found * BLOCK_TOKENS} (--kv_cache_gb); ask for fewer sequences or fewer tokens"
            )
        if request.prompt_log_probs is not None and not self.features.scores_chunks:
            raise GenerationError("this program cannot score prompts; serve the model, or a pt2 program of it")


def supported_options(options: EngineOptions, model: LanguageModel) -> EngineOptions:
    """The options without those that the model cannot follow, which are named in the log."""
    features = model.features
    if options.prefix_caching and not features.blocks:
        _LOG.warning("this program's format cannot save keys and values: every prompt is read whole")
        options = replace(options, prefix_caching=False)
    if options.prompt_lookup and not (features.scores_chunks and features.truncates):
        raise ConfigError("--prompt_lookup needs a model or a pt2 program; this program's format cannot check guesses")
    return options
