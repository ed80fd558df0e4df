"""Comparison of a program with its model: logits and greedy tokens at every step of the same texts.

Prompts of unequal length are read in one batch, and the rest of each text is then forced token by token. So prefill,
pads, the cache and decode_step all take part, and both sides get a perplexity.

Shapes: B texts, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomlm.errors import ProgramError
from bloomlm.generation.language_model import LanguageModel

# Written for this comparison. A model need not predict them well; both sides have to agree.
TEXTS = (
    "The lighthouse stood at the end of a long breakwater, and every evening the keeper walked out to it "
    "with a can of oil, a loaf of bread and the newspaper of the day before. In winter the waves came over "
    "the stones and he had to count them: after the seventh there was always a pause that was just long "
    "enough to run.",
    "Pour faire un bon pain il faut de la farine, de l'eau, du sel et surtout du temps. On mélange le soir, "
    "on couvre la pâte d'un linge et on la laisse lever toute la nuit dans une pièce fraîche; le matin, le "
    "four doit être très chaud.",
    "El tren de las ocho salió con retraso porque en la vía había una vaca que no quería moverse. Los "
    "viajeros bajaron a mirar, el maquinista tocó el silbato y la vaca siguió comiendo hierba con mucha "
    "calma.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total "
    "/ len(values)\n\n\nprint(mean([1.0, 2.0, 3.5]))  # 2.1666666666666665\n",
    "春天到了，河边的柳树发了新芽，孩子们在草地上放风筝。老人坐在桥头下棋，谁也不着急回家。傍晚的时候，风停了，风筝一只一只地落下来。",
    "Dates: 1969-07-20, 1989-11-09, 2000-01-01. Sum of 17, 25 and 58: 100. The square of 12 is 144, its cube 1728.",
)
_PROMPT_TOKENS = (24, 3, 17, 9, 12, 1)
_FORCED_TOKENS = 48
"""Tokens of each text that are forced; with half as many, an int4 program's perplexity is off by several percent."""

LIMITS: Mapping[str, Mapping[str, float]] = {
    "float32": {"logits_error": 1e-4},
    "llama.cpp": {"logits_error": 5e-3},
    "float16": {"logits_error": 2e-2},
    "bfloat16": {"logits_error": 1e-1},
    "int8": {"perplexity_change": 0.01},
    "int4": {"perplexity_change": 0.05},
}
"""The largest differences that a program of each kind may have. In float32 only the order of sums differs, except that
llama.cpp takes GELU from a table of 16-bit numbers. Models in 16 bits round every activation and their programs do not.
int8 and int4 are limited in perplexity, which shows what they cost."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a program is from the model."""

    num_positions: int
    """Positions compared."""
    logits_error: float
    """Root mean square of the difference of the logits, over the standard deviation of the model's logits."""
    largest_difference: float
    """Largest absolute difference of a logit."""
    equal_tokens: float
    """Share of positions at which both sides have the same likeliest token."""
    clear_tokens_differ: int
    """Positions at which the tokens differ although the model's two best logits are further apart than twice the
    largest difference there."""
    model_perplexity: float
    """Perplexity of the model on the forced tokens."""
    program_perplexity: float
    """Perplexity of the program on them."""

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity; above 0 the program is worse."""
        return self.program_perplexity / self.model_perplexity - 1.0

    def check(self, kind: str) -> None:
        """Raise ProgramError if a difference exceeds LIMITS[kind]."""
        for name, limit in LIMITS[kind].items():
            found = getattr(self, name)
            if not found <= limit:  # NaN fails too
                raise ProgramError(
                    f"the exported program differs from the model: {name.replace('_', ' ')} is {found:.3g}, at most "
                    f"{limit:.3g} is allowed for {kind}; --no_verify writes it without this comparison"
                )
        if kind == "float32" and self.clear_tokens_differ:
            raise ProgramError(f"the exported program chooses other tokens at {self.clear_tokens_differ} positions")


def comparison_tokens(encoded: Sequence[Sequence[int]]) -> tuple[list[list[int]], Tensor]:
    """Prompts of unequal length, and the tokens that follow them.

    Args:
        encoded: ids of TEXTS.

    Returns:
        B prompts, and [B, F] ids.
    """
    chosen = [(list(ids), length) for ids, length in zip(encoded, _PROMPT_TOKENS, strict=True)]
    forced = [(ids * 2)[length : length + _FORCED_TOKENS] for ids, length in chosen]
    return [ids[:length] for ids, length in chosen], torch.tensor(forced)


def compare(model: LanguageModel, program: LanguageModel, prompts: Sequence[Sequence[int]], forced: Tensor) -> Parity:
    """Run a model and a program over the same tokens.

    Args:
        model: the model that was exported.
        program: the program's model.
        prompts: B lists of ids.
        forced: [B, F] ids that follow the prompts.
    """
    tally = _Tally()
    steps = forced.shape[1]
    rows = range(len(prompts))
    with torch.inference_mode():
        sides = [side.open_rows(len(prompts), max(map(len, prompts)) + steps) for side in (model, program)]
        logits = [side.prefill(rows, prompts).float() for side in sides]
        for step in range(steps):
            tally.add(logits[0], logits[1], forced[:, step])
            if step + 1 < steps:
                logits = [side.decode_step(rows, forced[:, step]).float() for side in sides]
    return tally.result()


class _Tally:
    """Sums over the steps of a comparison."""

    def __init__(self) -> None:
        self.positions = self.equal = self.clear_differ = 0
        self.squared_error = self.squared_size = self.largest = 0.0
        self.losses = [0.0, 0.0]

    def add(self, expected: Tensor, found: Tensor, targets: Tensor) -> None:
        """Add one step: logits [B, V] of both sides and the ids [B] that follow."""
        difference = found - expected
        self.squared_error += float(difference.double().square().sum())
        self.squared_size += float((expected - expected.mean(dim=1, keepdim=True)).double().square().sum())
        row_largest = difference.abs().amax(dim=1)
        self.largest = max(self.largest, float(row_largest.max()))
        same = expected.argmax(dim=1) == found.argmax(dim=1)
        best = expected.topk(2, dim=1).values
        self.positions += len(same)
        self.equal += int(same.sum())
        self.clear_differ += int((~same & (best[:, 0] - best[:, 1] > 2 * row_largest)).sum())
        for side, logits in enumerate((expected, found)):
            self.losses[side] += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    def result(self) -> Parity:
        """The comparison over all steps."""
        perplexities = [math.exp(min(loss / self.positions, 700.0)) for loss in self.losses]
        return Parity(
            num_positions=self.positions,
            logits_error=math.sqrt(self.squared_error / self.squared_size),
            largest_difference=self.largest,
            equal_tokens=self.equal / self.positions,
            clear_tokens_differ=self.clear_differ,
            model_perplexity=perplexities[0],
            program_perplexity=perplexities[1],
        )
