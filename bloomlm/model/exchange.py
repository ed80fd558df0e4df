"""What a layer exchanges with others around its products. On one device: nothing.

A layer that holds only a part of its weight (`parallel/` cuts it) needs others to make its result whole. It says so
here; the layers themselves compute with what they hold. The points of a linear layer, with LoRA's low-rank product:

    x -- enter -- weight ----------- leave -- + bias -->
      \\- lora_A -- between -- lora_B /
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""x W^T + b of x, weight, bias and scale: model/linear.py's linear."""


class Exchange:
    """The exchange of a layer that is whole: each step gives back what it gets."""

    sums_inputs = False
    """Whether `leave` adds up results, so that a bias must be added after it."""

    def enter(self, x: Tensor) -> Tensor:
        """What goes into the weight's product."""
        return x

    def multiply(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, product: Product
    ) -> Tensor:
        """`enter` and the weight's product in one, so that their gradients can be made side by side."""
        return product(self.enter(x), weight, bias, scale)

    def between(self, low_rank: Tensor) -> Tensor:
        """LoRA's product with lora_A, before the one with lora_B."""
        return low_rank

    def leave(self, y: Tensor) -> Tensor:
        """What came out of the weight's product; may be changed in place."""
        return y

    def input_randomness(self) -> AbstractContextManager[None]:
        """The context in which random numbers for the layer's input (dropout) are drawn."""
        return nullcontext()


class VocabularyExchange(Exchange):
    """The exchange of a word embedding that holds the whole vocabulary; `enter` and `leave` are those of the head."""

    def look_up(self, tokens: Tensor, lookup: Callable[[Tensor], Tensor]) -> Tensor:
        """[N] ids -> [N, D], where lookup gives rows of the weight that is here."""
        return lookup(tokens)


WHOLE = Exchange()
WHOLE_VOCABULARY = VocabularyExchange()
