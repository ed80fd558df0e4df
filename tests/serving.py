"""A small model to serve, and what a request must get from it: what it gets alone."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from bloomlm.api import LoadedModel
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.serving.request import GenerationRequest

VOCAB_SIZE = 101


class NumberTokenizer:
    """Texts of numbers in angle brackets."""

    vocab_size = VOCAB_SIZE

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(number) for number in text.strip("<>").split("><")] for text in texts]


@cache
def small_model() -> LoadedModel:
    """A random model that ends now and then, whose attention reaches far back."""
    config = BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.5)
    model = BloomForCausalLM(config)
    model.init_weights(torch.Generator().manual_seed(4))
    with torch.no_grad():
        model.transformer.word_embeddings.weight[2] *= 1.6
    tokenizer: Any = NumberTokenizer()
    return LoadedModel(model.eval(), tokenizer)


class Alone:
    """What requests get from a model that serves nobody else."""

    def __init__(self, loaded: Any) -> None:
        self.model = loaded.model
        self._decode = loaded.tokenizer.decode
        self._found: dict[tuple[Any, ...], list[tuple[list[int], str]]] = {}

    def results(self, request: GenerationRequest) -> list[tuple[list[int], str]]:
        """Tokens and finish reason of each sequence."""
        config = replace(request.config, num_log_probs=None)
        key = (tuple(request.prompt), config, request.first_sequence)
        if key not in self._found:
            generations = generate(
                self.model,
                [request.prompt],
                config,
                decode_text=self._decode,
                first_sequence=request.first_sequence,
            )
            self._found[key] = [(result.tokens, result.finish_reason) for result in generations]
        return self._found[key]

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """[len(tokens) - 1, V] log-probabilities after each token but the last, each from a forward pass without a cache."""
        with torch.inference_mode():
            rows = [
                self.model.open_rows(1, count).prefill([0], [tokens[:count]])[0].float().log_softmax(-1)
                for count in range(1, len(tokens))
            ]
        return torch.stack(rows) if rows else torch.empty(0, self.model.vocab_size)
