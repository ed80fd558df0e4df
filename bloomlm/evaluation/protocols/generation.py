"""Answers to held-out rows against the right ones: the prompts of fine-tuning, decoded greedily, scored as texts."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from bloomlm.data.examples import ExampleSet
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.evaluation.answer_scores import GenerationScores
from bloomlm.evaluation.copies import free_memory, is_out_of_memory, join_shares, own_share
from bloomlm.evaluation.evaluated import Evaluated, generate
from bloomlm.evaluation.metrics import Metric, mean
from bloomlm.evaluation.partial_file import PartialFile
from bloomlm.evaluation.plan import Protocol
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.loop import DecodeText, Generation
from bloomlm.parallel.mesh import ALONE, Mesh

_LOG = logging.getLogger(__name__)

PROTOCOL = Protocol(
    name="generation",
    version="1",
    source="the prompts of bloomlm finetune, greedy decoding; exact match, chrF and BLEU by sacrebleu, ROUGE F1",
)


def answer_all(
    model: Evaluated,
    tokenizer: Tokenizer,
    examples: ExampleSet,
    *,
    max_new_tokens: int,
    batch_size: int,
    limit: int | None = None,
    partial: PartialFile | None = None,
    on_progress: Callable[[int], None] | None = None,
    mesh: Mesh = ALONE,
) -> list[str]:
    """What the model says to each example's prompt.

    Args:
        model: to evaluate.
        tokenizer: turns answers into text.
        examples: of which the prompts are taken.
        max_new_tokens: of an answer, `</s>` included.
        batch_size: prompts computed at once.
        limit: examples to answer, from the first; None: all.
        partial: holds what an earlier run answered, and gets what this one does.
        on_progress: called at the start, after every batch and at the end with the number of answers there are.
        mesh: the ranks, all of which must come here; all get all answers.

    Raises:
        ConfigError: a single prompt does not fit into memory, or a batch on ranks that share a model.
    """
    count = len(examples) if limit is None else min(len(examples), limit)
    before = {} if partial is None else {number: str(result["answer"]) for number, result in partial.done.items()}
    prompts = {number: examples[number].prompt_tokens.tolist() for number in range(count) if number not in before}
    own: dict[int, str] = {}
    if on_progress is not None:
        on_progress(len(before))
    config = GenerationConfig(max_new_tokens=max_new_tokens)
    for results in generate_batches(model, prompts, config, batch_size=batch_size, mesh=mesh):
        batch = {number: tokenizer.decode(result.tokens) for number, result in results.items()}
        own |= batch
        if partial is not None:
            partial.add({number: {"answer": answer} for number, answer in batch.items()})
        num_done = len(before) + len(own) * mesh.degrees.dp  # the other copies are about as far
        if on_progress is not None and num_done < count:
            on_progress(num_done)
    answers = before | join_shares(own, mesh)
    if on_progress is not None:
        on_progress(count)
    return [answers[number] for number in range(count)]


def generate_batches(
    model: Evaluated,
    prompts: Mapping[int, Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    decode_text: DecodeText | None = None,
    mesh: Mesh = ALONE,
) -> Iterator[dict[int, Generation]]:
    """Continue this copy's share of prompts, longest first, fewer at once when memory runs out.

    Args:
        model: to run.
        prompts: number -> ids, at least one id; the same on all ranks.
        config: how; what is drawn at random depends on the number of copies.
        batch_size: prompts at once.
        decode_text: ids to text, needed for stop texts.
        mesh: the ranks.

    Yields:
        Number -> continuation, batch by batch.

    Raises:
        ConfigError: a single prompt does not fit into memory, or a batch on ranks that share a model.
    """
    waiting = own_share(sorted(prompts, key=lambda number: len(prompts[number]), reverse=True), mesh)
    num_done = 0
    while waiting:
        numbers = waiting[:batch_size]
        try:
            chosen = [prompts[number] for number in numbers]
            results = generate(model, chosen, config, decode_text=decode_text, first_sequence=num_done)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            batch_size = _halved(len(numbers), mesh, error)
            continue
        num_done += len(numbers)
        del waiting[: len(numbers)]
        yield dict(zip(numbers, results, strict=True))


def answer_metrics(answers: Sequence[str], references: Sequence[str], scores: GenerationScores) -> dict[str, Metric]:
    """Metrics of answers; only exact match, a mean over them, has a standard error.

    Args:
        answers: what the model said.
        references: what is right, at least one.
        scores: of all answers.
    """
    hits = [float(answer.strip() == right.strip()) for answer, right in zip(answers, references, strict=True)]
    metrics = {
        name: Metric(value=value, standard_error=None, higher_is_better=True)
        for name, value in scores.numbers().items()
    }
    return {**metrics, "exact_match": mean(hits, higher_is_better=True)}


def _halved(batch_size: int, mesh: Mesh, error: Exception) -> int:
    free_memory(f"{batch_size} prompts at once", mesh, error)
    if batch_size == 1:
        raise ConfigError(
            f"memory ran out on a single prompt; give a smaller --src_length or --tgt_length ({error})"
        ) from error
    _LOG.warning("memory ran out on %d prompts at once; going on with %d", batch_size, batch_size // 2)
    return batch_size // 2
