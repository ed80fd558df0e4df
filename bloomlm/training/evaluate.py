"""Evaluation during and after training: loss, token accuracy, and on request the scores of generated answers."""

import time
from collections.abc import Sequence
from typing import Any

from bloomlm.data.examples import Example
from bloomlm.data.loader import BatchLoader, Examples
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.answer_scores import score_generations
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.losses import evaluate_loss
from bloomlm.training.precision import Precision
from bloomlm.training.run_plan import EvaluationPlan


class Evaluator:
    """Evaluates a model in its current state; every rank must make each call, and gets the whole result.

    Answers are generated in the precision of the weights, while the loss is computed in `precision`.
    """

    def __init__(
        self,
        model: BloomForCausalLM,
        tokenizer: Tokenizer,
        examples: Examples,
        plan: EvaluationPlan,
        precision: Precision,
        mesh: Mesh = ALONE,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._examples = examples
        self._plan = plan
        self._precision = precision
        self._mesh = mesh

    @property
    def example_prompt(self) -> str:
        """The prompt of the first example."""
        return self._examples[0].source_text

    def run(self) -> dict[str, Any]:
        """Metrics over all examples; their names begin with eval_."""
        start = time.perf_counter()
        # a new loader each time, because every evaluation makes one pass over the examples
        batches = BatchLoader(
            self._examples,
            self._plan.batch_size,
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
        if self._plan.scores_answers:
            examples = [self._examples[index] for index in range(len(self._examples))]
            scores = score_generations(self._answers(examples), [example.target_text for example in examples])
            metrics |= {f"eval_{name}": value for name, value in scores.numbers().items()}
            metrics["eval_bleu4_signature"] = scores.bleu4_signature
        seconds = time.perf_counter() - start
        metrics["eval_runtime"] = round(seconds, 4)
        metrics["eval_samples_per_second"] = round(len(self._examples) / seconds, 3)
        return metrics

    def answer_rows(self, count: int) -> list[dict[str, str]]:
        """Prompt, target and generated answer of the first examples, with the keys of infer_result.json."""
        examples = [self._examples[index] for index in range(min(count, len(self._examples)))]
        return [
            {"instruction": example.source_text, "answer": example.target_text, "output": answer}
            for example, answer in zip(examples, self._answers(examples), strict=True)
        ]

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        """The model's answer to each example's prompt."""
        size = self._plan.batch_size
        texts: list[str] = []
        for start in range(0, len(examples), size):
            prompts = [example.prompt_tokens.tolist() for example in examples[start : start + size]]
            results = generate(self._model, prompts, self._plan.decoding, first_sequence=start)
            texts += [self._tokenizer.decode(result.tokens) for result in results]
        reshard(self._model)
        return texts
