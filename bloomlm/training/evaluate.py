"""What an evaluation computes: loss and token accuracy, and with do_generation answers from the prompts alone."""

import time
from collections.abc import Sequence
from typing import Any

from bloomlm.data.examples import Example
from bloomlm.data.loader import BatchLoader, Examples
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.answer_scores import score_generations
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling, Strategy
from bloomlm.generation.decode import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.config import TrainingConfig
from bloomlm.training.loop import evaluate_loss
from bloomlm.training.precision import Precision


class Evaluator:
    """Evaluates a model as it stands.

    Args:
        model: may be in training.
        tokenizer: turns answers into text.
        examples: to evaluate on, at least one.
        config: batch size, lengths, decoding.
        precision: of the loss, as in training; answers are generated in the precision of the weights.
        mesh: the ranks among which the model is divided, all of which must evaluate; each has the whole result.
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        tokenizer: Tokenizer,
        examples: Examples,
        config: TrainingConfig,
        precision: Precision,
        mesh: Mesh = ALONE,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._examples = examples
        self._config = config
        self._precision = precision
        self._mesh = mesh

    def run(self) -> dict[str, Any]:
        """The metrics of the whole set; names begin with eval_."""
        start = time.perf_counter()
        # One pass without shuffling; a loader is for one pass here.
        batches = BatchLoader(
            self._examples,
            self._config.per_device_eval_batch_size,
            shuffle=False,
            dp_degree=self._mesh.degrees.dp,
            dp_rank=self._mesh.dp_rank,
        )
        result = evaluate_loss(self._model, batches, self._precision, self._mesh)
        metrics: dict[str, Any] = {
            "eval_loss": result.loss,
            "eval_ppl": result.perplexity,
            "eval_accuracy": result.token_accuracy,
        }
        if self._config.do_generation:
            examples = [self._examples[index] for index in range(len(self._examples))]
            scores = score_generations(self.answers(examples), [example.target_text for example in examples])
            metrics |= {f"eval_{name}": value for name, value in scores.numbers().items()}
            metrics["eval_bleu4_signature"] = scores.bleu4_signature
        seconds = time.perf_counter() - start
        metrics["eval_runtime"] = round(seconds, 4)
        metrics["eval_samples_per_second"] = round(len(self._examples) / seconds, 3)
        return metrics

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """What the model says to each example's prompt alone."""
        config = generation_config(self._config)
        size = self._config.per_device_eval_batch_size
        texts: list[str] = []
        for start in range(0, len(examples), size):
            prompts = [example.prompt_tokens.tolist() for example in examples[start : start + size]]
            results = generate(self._model, prompts, config, first_sequence=start)
            texts += [self._tokenizer.decode(result.tokens) for result in results]
        reshard(self._model)
        return texts


def generation_config(config: TrainingConfig) -> GenerationConfig:
    """How the flags want answers decoded: greedily unless they ask for a beam search or for drawing.

    Args:
        config: resolved.
    """
    top_k = config.top_k or 0 if config.select_topk else 0
    top_p = config.top_p or 0.0
    strategy: Strategy = Greedy()
    if (config.num_beams or 1) > 1:
        assert config.num_beams is not None
        penalty = 1.0 if config.length_penalty is None else config.length_penalty
        strategy = BeamSearch(num_beams=config.num_beams, length_penalty=penalty)
    elif top_k > 1 or top_p > 0:
        # 0 means off in PaddleNLP's flags; to keep all is top_p 1.0 here
        strategy = Sampling(top_k=top_k, top_p=top_p or 1.0, seed=config.seed)
    return GenerationConfig(
        strategy=strategy,
        max_new_tokens=config.tgt_length,
        min_new_tokens=config.min_tgt_length,
        no_repeat_ngram_size=config.no_repeat_ngram_size or 0,
    )
