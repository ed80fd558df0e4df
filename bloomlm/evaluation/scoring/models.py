"""Scores windows and generates answers with any language model: a BLOOM with its weights, or an exported program."""

from collections.abc import Iterator, Mapping, Sequence

from bloomlm.evaluation.scoring.batches import BatchLimit, own_share
from bloomlm.evaluation.scoring.eager_scorer import EagerScorer
from bloomlm.evaluation.scoring.step_scorer import StepScorer
from bloomlm.evaluation.scoring.windows import WindowScorer
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Generation, generate
from bloomlm.generation.language_model import LanguageModel
from bloomlm.generation.sequences import DecodeText
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh


def window_scorer(model: LanguageModel, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> WindowScorer:
    """The scorer of windows for this kind of model.

    Args:
        model: to evaluate.
        max_batch_tokens: tokens in memory at once; changes the speed, not the results.
        mesh: the ranks.
    """
    if isinstance(model, BloomForCausalLM):
        return EagerScorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)
    return StepScorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)


def generate_batches(
    model: LanguageModel,
    prompts: Mapping[int, Sequence[int]],
    config: GenerationConfig,
    *,
    batch_size: int,
    decode_text: DecodeText | None = None,
    mesh: Mesh = ALONE,
) -> Iterator[dict[int, Generation]]:
    """Continue this copy's share of the prompts, the longest first, fewer at once when memory runs out.

    Args:
        model: to run.
        prompts: number -> ids, at least one id; the same on all ranks.
        config: how to decode; what is drawn at random depends on the number of copies.
        batch_size: prompts at once.
        decode_text: ids to text, needed for stop texts.
        mesh: the ranks.

    Yields:
        Number -> continuation, batch by batch.

    Raises:
        ConfigError: a single prompt does not fit into memory, or a batch on ranks that share a model.
    """
    num_done = 0

    def compute(numbers: list[int]) -> list[Generation]:
        chosen = [prompts[number] for number in numbers]
        return generate(model, chosen, config, decode_text=decode_text, first_sequence=num_done)

    order = own_share(sorted(prompts, key=lambda number: len(prompts[number]), reverse=True), mesh)
    limit = BatchLimit(
        size=batch_size, unit="prompts", single="prompt", advice="--src_length or --tgt_length", mesh=mesh
    )
    for numbers, results in limit.batches(order, compute, len):
        num_done += len(numbers)
        yield dict(zip(numbers, results, strict=True))
