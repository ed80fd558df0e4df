"""What can be evaluated: a BLOOM with its weights, or whatever prefills and decodes, such as an exported program."""

from collections.abc import Sequence

from bloomlm.evaluation.scoring.eager_scorer import Scorer
from bloomlm.evaluation.scoring.step_scorer import StepScorer
from bloomlm.evaluation.scoring.window_scorer import WindowScorer
from bloomlm.generation import decode, loop
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.loop import DecodeText, Generation, LanguageModel
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh

Evaluated = BloomForCausalLM | LanguageModel


def make_scorer(model: Evaluated, *, max_batch_tokens: int, mesh: Mesh = ALONE) -> WindowScorer:
    """What scores windows with this model.

    Args:
        model: to evaluate.
        max_batch_tokens: tokens in memory at once; changes the speed, not the results.
        mesh: the ranks.
    """
    if isinstance(model, BloomForCausalLM):
        return Scorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)
    return StepScorer(model, max_batch_tokens=max_batch_tokens, mesh=mesh)


def generate(
    model: Evaluated,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    decode_text: DecodeText | None = None,
    first_sequence: int = 0,
) -> list[Generation]:
    """Continue prompts, all in one batch; see loop.generate."""
    if isinstance(model, BloomForCausalLM):
        return decode.generate(model, prompts, config, decode_text=decode_text, first_sequence=first_sequence)
    return loop.generate(model, prompts, config, decode_text=decode_text, first_sequence=first_sequence)
