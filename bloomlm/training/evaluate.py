"""Evaluation during and after training: the objective's metrics, and on request the scores of generated answers."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bloomlm.data.example import Example, Examples
from bloomlm.data.loader import BatchLoader
from bloomlm.data.mixture import Mixture
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.answer_scores import score_generations
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import reshard
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.training.evaluate_text import TextPart, text_metrics, text_parts
from bloomlm.training.objectives.base import Objective
from bloomlm.training.precision import Precision
from bloomlm.training.run_plan import EvaluationPlan


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a model in its current state; every rank must make each call, and gets the whole result."""

    model: BloomForCausalLM
    """May be in training."""
    tokenizer: Tokenizer
    examples: Examples
    """At least one example."""
    plan: EvaluationPlan
    objective: Objective[Any]
    precision: Precision
    """Number formats for the loss; answers are generated in the precision of the weights."""
    mesh: Mesh = ALONE
    """The ranks among which the model is divided."""

    @property
    def example_prompt(self) -> str:
        """The prompt of the first example."""
        return self.examples[0].source_text

    def run(self) -> dict[str, Any]:
        """Metrics over all examples; their names begin with eval_."""
        start = time.perf_counter()
        if isinstance(self.examples, Mixture):
            metrics = text_metrics(self._text_parts, self._score)
        else:
            metrics = self._score(self.examples)
        if self.plan.scores_answers:
            examples = [self.examples[index] for index in range(len(self.examples))]
            scores = score_generations(self._answers(examples), [example.target_text for example in examples])
            metrics |= {f"eval_{name}": value for name, value in scores.numbers().items()}
            metrics["eval_bleu4_signature"] = scores.bleu4_signature
        seconds = time.perf_counter() - start
        metrics["eval_runtime"] = round(seconds, 4)
        metrics["eval_samples_per_second"] = round(len(self.examples) / seconds, 3)
        return metrics

    def _score(self, examples: Examples) -> dict[str, Any]:
        """The objective's metrics over all examples."""
        # a new loader each time, because every evaluation makes one pass over the examples
        batches = BatchLoader(
            examples,
            self.plan.batch_size,
            shuffle=False,
            dp_degree=self.mesh.degrees.dp,
            dp_rank=self.mesh.dp_rank,
            collate=self.objective.collate,
        )
        return dict(self.objective.evaluate(self.model, batches, self.precision, self.mesh))

    @cached_property
    def _text_parts(self) -> tuple[TextPart, ...]:
        assert isinstance(self.examples, Mixture)
        return text_parts(self.examples, self.tokenizer)

    def answer_rows(self, count: int) -> list[dict[str, str]]:
        """Prompt, target and generated answer of the first examples, with the keys of infer_result.json."""
        examples = [self.examples[index] for index in range(min(count, len(self.examples)))]
        return [
            {"instruction": example.source_text, "answer": example.target_text, "output": answer}
            for example, answer in zip(examples, self._answers(examples), strict=True)
        ]

    def _answers(self, examples: Sequence[Example]) -> list[str]:
        """The model's answer to each example's prompt."""
        size = self.plan.batch_size
        texts: list[str] = []
        for start in range(0, len(examples), size):
            prompts = [example.prompt_tokens.tolist() for example in examples[start : start + size]]
            results = generate(self.model, prompts, self.plan.decoding, first_sequence=start)
            texts += [self.tokenizer.decode(result.tokens) for result in results]
        reshard(self.model)
        return texts
