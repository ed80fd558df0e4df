"""Answers to held-out rows, generated greedily from the prompts of fine-tuning and compared with the right answers."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bloomlm.data.examples import load_examples
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.answer_scores import GenerationScores, score_generations
from bloomlm.evaluation.execution import Execution
from bloomlm.evaluation.metrics import Metric, mean
from bloomlm.evaluation.protocol import Definition, Outcome, Plan, Protocol, Task
from bloomlm.evaluation.scoring.batches import generate_batches
from bloomlm.flags import Flags, flag
from bloomlm.generation.config import GenerationConfig

DEFINITION = Definition(
    name="generation",
    version="1",
    source="the prompts of bloomlm finetune, greedy decoding; exact match, chrF and BLEU by sacrebleu, ROUGE F1",
)
DEFAULT_LENGTH = 512
"""Tokens of a prompt and of an answer, as in fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class RowOptions(Flags):
    """How rows become prompts, and how long answers may be."""

    src_length: int = flag("generation", DEFAULT_LENGTH, "maximum tokens of a prompt, as in training", minimum=1)
    tgt_length: int = flag("generation", DEFAULT_LENGTH, "maximum tokens of an answer, including </s>", minimum=1)
    prompt_template: str | None = flag(
        "generation", None, "builds the prompt of each row from its fields, as in training"
    )


@dataclass(frozen=True, kw_only=True)
class AnswerPlan(Plan):
    """A plan that generates answers."""

    prompts: Sequence[Sequence[int]]
    """Ids of each prompt."""
    references: Sequence[str]
    """The right answers."""

    def run(self, execution: Execution) -> Outcome:
        """Generate the answers and score them as texts."""
        subject = execution.subject
        config = GenerationConfig(max_new_tokens=self.settings["tgt_length"])

        def batches(done: Collection[int]) -> Iterator[dict[int, str]]:
            prompts = {number: prompt for number, prompt in enumerate(self.prompts) if number not in done}
            results = generate_batches(
                subject.model, prompts, config, batch_size=execution.batch_size, mesh=subject.mesh
            )
            for batch in results:
                yield {number: subject.tokenizer.decode(result.tokens) for number, result in batch.items()}

        started = time.perf_counter()
        answers, num_before = execution.collect(
            batches,
            len(self.prompts),
            encode=lambda answer: {"answer": answer},
            decode=lambda fields: str(fields["answer"]),
            summary=lambda: lambda answers: "",
        )
        run = {"seconds": time.perf_counter() - started, "answers_of_a_stopped_run": num_before}
        scores = score_generations(answers, self.references)
        return Outcome(
            metrics=answer_metrics(answers, self.references, scores),
            run=run,
            settings={"bleu4_signature": scores.bleu4_signature},
        )


def answer_rows(
    path: Path,
    tokenizer: Tokenizer,
    *,
    src_length: int = DEFAULT_LENGTH,
    tgt_length: int = DEFAULT_LENGTH,
    prompt_template: str | None = None,
    limit: int | None = None,
) -> AnswerPlan:
    """Answers to the rows of a file.

    Args:
        path: a file with rows, as for fine-tuning.
        tokenizer: that of the model.
        src_length: maximum tokens of a prompt; a longer one loses its end.
        tgt_length: maximum tokens of an answer, including `</s>`.
        prompt_template: builds the prompt of each row from its fields; None: the row's source.
        limit: number of rows to answer, from the first; None: all.

    Raises:
        ConfigError: lengths or a template that cannot be used.
        DataError: a row that cannot be used, or no rows.
    """
    examples = load_examples(
        path, tokenizer, src_length=src_length, tgt_length=tgt_length, prompt_template=prompt_template
    )
    count = len(examples) if limit is None else min(len(examples), limit)
    chosen = [examples[number] for number in range(count)]
    made = examples.report
    return AnswerPlan(
        definition=DEFINITION,
        task="generation",
        settings={"src_length": src_length, "tgt_length": tgt_length, "prompt_template": prompt_template},
        counts={"examples": count, "sources_cut": made.num_sources_cut},
        notices=(str(made),) if made.num_sources_cut else (),
        prompts=[example.prompt_tokens.tolist() for example in chosen],
        references=[example.target_text for example in chosen],
    )


def answer_metrics(answers: Sequence[str], references: Sequence[str], scores: GenerationScores) -> dict[str, Metric]:
    """Metrics of answers; only exact match, which is a mean over them, has a standard error.

    Args:
        answers: answers of the model.
        references: the right answers, at least one.
        scores: their scores.
    """
    hits = [float(answer.strip() == right.strip()) for answer, right in zip(answers, references, strict=True)]
    metrics = {
        name: Metric(value=value, standard_error=None, higher_is_better=True)
        for name, value in scores.numbers().items()
    }
    return {**metrics, "exact_match": mean(hits, higher_is_better=True)}


PROTOCOL = Protocol(
    name="generation",
    help="answers to rows of your own",
    tasks=(Task(name="generation", make_plan=answer_rows, options=RowOptions),),
)
