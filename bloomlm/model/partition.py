"""How a layer's weight is divided among ranks, and what the layer exchanges for that around its products.

A layer that holds a part of its weight (`parallel/` cuts it) needs the other ranks to make its result whole. It
computes products with its own part, and calls its partition at fixed points. The points of a linear layer, with LoRA's
low-rank product:

    x -- enter -- weight ----------- leave -- + bias -->
      \\- lora_A -- between -- lora_B /
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""From x, weight, bias and scale to x W^T + b: `linear` of model/linear.py."""


class Partition:
    """The partition of a layer that holds its whole weight: every point returns its argument."""

    sums_inputs = False
    """Whether `leave` adds up partial results, so that a bias must be added after it."""

    def enter(self, x: Tensor) -> Tensor:
        """The input of the weight's product."""
        return x

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, product: Product
    ) -> Tensor:
        """`enter` and the weight's product in one call, so that their gradients can be computed at the same time."""
        return product(self.enter(x), weight, bias, scale)

    def between(self, low_rank: Tensor) -> Tensor:
        """The result of the product with lora_A, which is multiplied with lora_B next."""
        return low_rank

    def leave(self, y: Tensor) -> Tensor:
        """The result of the weight's product; may be changed in place."""
        return y

    def input_randomness(self) -> AbstractContextManager[None]:
        """The context in which random numbers for the layer's input (dropout) are drawn."""
        return nullcontext()


class VocabularyPartition(Partition):
    """The partition of a word embedding that holds the whole vocabulary; `enter` and `leave` act on the head."""

    first_token = 0
    """Token of the first row of the weight that is here."""

    def look_up(self, tokens: Tensor, lookup: Callable[[Tensor], Tensor]) -> Tensor:
        """[N] ids -> [N, D]; lookup returns rows of the part of the weight that is held here."""
        return lookup(tokens)


WHOLE = Partition()
WHOLE_VOCABULARY = VocabularyPartition()
