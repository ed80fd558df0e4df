"""How gradients become an update of the weights: after the backward pass, or within it.

An update after the backward pass can use the norm of all gradients (clipping), add up microbatches and ranks, and leave
out a step as a whole. An update within it (fused) uses and frees each gradient as soon as it is complete, so that the
gradients of all weights never exist at once. Its results are the same, bit for bit. The embedding, which is also the
head, is updated at its end, a block of rows at a time.

Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import add_up_gradients, global_norm
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.adamw_8bit import AdamW8bit
from bloomlm.training.optimizer import RowwiseAdamW
from bloomlm.training.precision import LearnedParameters

_ROWS_AT_ONCE = {"cpu": 4096, "cuda": 32768}
"""Rows of the embedding that are updated together. On a CPU their gradient stays in the cache; 4,096 rows are whole
blocks of the 8-bit moments for every width."""


class Update(Protocol):
    """From the losses of a step to new weights; the optimizer's learning rate is set before."""

    when_skipped: ClassVar[str]
    """What a gradient norm that is not finite means for the weights."""

    def backward(self, loss: Tensor) -> None:
        """Differentiate the loss of a microbatch."""
        ...

    def norm(self) -> Tensor:
        """The norm of the step's gradients, a scalar that is the same on every rank."""
        ...

    def finish(self, factor: float) -> None:
        """Complete the update, with the gradients times a factor."""
        ...


class GatheredUpdate:
    """Gradients are kept until the backward passes of all microbatches are done.

    Args:
        learned: the parameters that learn.
        optimizer: over learned.optimized.
        mesh: the ranks, whose gradients are added up.
    """

    when_skipped: ClassVar[str] = "the weights were not updated"

    def __init__(self, learned: LearnedParameters, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self._learned = learned
        self._optimizer = optimizer
        self._mesh = mesh

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss; gradients add up."""
        loss.backward()

    def norm(self) -> Tensor:
        """Add up the gradients of data-parallel ranks, and return the norm of all."""
        add_up_gradients(self._learned.gradients(), self._mesh)
        return global_norm(self._learned.named_gradients(), self._mesh)

    def finish(self, factor: float) -> None:
        """Update the weights by the gradients times a factor."""
        self._learned.scale_gradients(factor)
        self._optimizer.step()
        self._learned.copy_to_model()


class FusedUpdate:
    """Each weight is updated within the backward pass, of one microbatch in one process, without a factor.

    Args:
        model: all of its parameters learn.
        learned: its parameters.
        optimizer: over learned.optimized.
    """

    when_skipped: ClassVar[str] = "only the weights whose gradients came before the first such one were updated"

    def __init__(
        self, model: BloomForCausalLM, learned: LearnedParameters, optimizer: RowwiseAdamW | AdamW8bit
    ) -> None:
        self._learned = learned
        self._optimizer = optimizer
        self._groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self._norms: dict[str, Tensor] = {}
        self._blocked = torch.zeros((), device=next(model.parameters()).device)
        """1 after the first gradient of a step that is not finite; a tensor, so that a GPU need not be waited for."""
        self._embedding = model.transformer.word_embeddings.weight
        # gradients in half precision are added up by autograd (precision.py)
        self._parts = None if learned.masters else model.transformer.word_embeddings.collect_gradient()
        for name, parameter in model.named_parameters():
            if self._parts is None or parameter is not self._embedding:
                parameter.register_post_accumulate_grad_hook(self._hook(name))
            else:
                self._embedding_name = name

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss, and update each weight as soon as its gradient is complete.

        A loss that is not finite updates nothing. A gradient that is not finite updates nothing either, nor do those
        after it, so no weight becomes infinite or NaN.
        """
        self._norms.clear()
        self._blocked.zero_()
        if not math.isfinite(loss.item()):
            return
        loss.backward()
        if self._parts is not None:
            rows_at_once = _ROWS_AT_ONCE[self._blocked.device.type]
            self._update(self._embedding_name, self._parts.take(rows_at_once))

    def norm(self) -> Tensor:
        """The norm of all gradients; NaN if there are none."""
        if not self._norms:
            return torch.full_like(self._blocked, math.nan)
        # in the order of the parameters, in which another update adds them up
        norms = [self._norms[name] for name in self._learned.optimized if name in self._norms]
        return torch.linalg.vector_norm(torch.stack(norms))

    def finish(self, factor: float) -> None:
        """Nothing is left to do."""
        assert factor == 1.0

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        optimized = self._learned.optimized[name]

        def update(parameter: Tensor) -> None:
            if optimized.grad is None:  # nothing depends on the parameter
                return
            self._update(name, [(slice(None), optimized.grad)])
            optimized.grad = None
            if optimized is not parameter:
                with torch.no_grad():
                    parameter.copy_(optimized)

        return update

    @torch.no_grad()
    def _update(self, name: str, gradients: Iterable[tuple[slice, Tensor]]) -> None:
        parameter = self._learned.optimized[name]
        norms = []
        for rows, gradient in gradients:
            norms.append(torch.linalg.vector_norm(gradient))
            self._blocked.logical_or_(~torch.isfinite(norms[-1]))
            self._optimizer.update_rows(self._groups[parameter], parameter, rows, gradient, self._blocked)
        count = self._optimizer.state[parameter]["step"]
        count += (1.0 - self._blocked).to(count.device)
        self._norms[name] = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
