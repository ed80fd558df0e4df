"""How gradients become an update of the weights: after the backward pass, or within it.

An update after the backward pass can use the norm of all gradients (clipping), add up microbatches and ranks, and leave
out a step as a whole. An update within it (fused) uses and frees each gradient as soon as it is complete, so that the
gradients of all weights never exist at once. Its results are the same, bit for bit. The embedding, which is also the
head, is updated at its end, a block of rows at a time.

Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import add_up_gradients, global_norm
from bloomlm.parallel.mesh import Mesh
from bloomlm.parallel.vocabulary_head import memory_for
from bloomlm.training.adamw_8bit import AdamW8bit
from bloomlm.training.one_pass_adamw import one_pass_adamw
from bloomlm.training.optimizer import RowwiseAdamW
from bloomlm.training.precision import LearnedParameters, Precision

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
        model: the model.
        learned: its parameters that learn.
        optimizer: over learned.optimized.
        precision: of the run.
        mesh: the ranks, whose gradients are added up.
        gradient_memory: tensors that are not needed any more, for the gradient of the embedding's master.
    """

    when_skipped: ClassVar[str] = "the weights were not updated"

    def __init__(
        self,
        model: BloomForCausalLM,
        learned: LearnedParameters,
        optimizer: RowwiseAdamW | AdamW8bit,
        precision: Precision,
        mesh: Mesh,
        gradient_memory: list[Tensor],
    ) -> None:
        self._learned = learned
        self._optimizer = optimizer
        self._mesh = mesh
        self._memory = gradient_memory
        self._one_pass = one_pass_adamw(optimizer, learned.masters, precision.compute_dtype)
        learned.move_gradients()
        embedding = model.transformer.word_embeddings
        self._embedding = learned.masters.get(embedding.weight)
        # FSDP reduces a gradient in half precision, which cannot be summed in place, so autograd adds the rows
        embedding.choose_gradient(in_place=not learned.masters)
        collects = self._embedding is not None and mesh.degrees.dp_shard == 1
        self._parts = embedding.collect_gradient() if collects else None

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss; gradients add up."""
        loss.backward()
        if self._parts is None:
            return
        assert self._embedding is not None
        is_new = self._embedding.grad is None
        total = memory_for(self._embedding, self._embedding.dtype, self._memory) if is_new else self._embedding.grad
        assert total is not None
        self._parts.add_to(total, _ROWS_AT_ONCE[loss.device.type], overwrite=is_new)
        self._embedding.grad = total

    def norm(self) -> Tensor:
        """Add up the gradients of data-parallel ranks, and return the norm of all."""
        add_up_gradients(self._learned.gradients(), self._mesh)
        return global_norm(self._learned.named_gradients(), self._mesh)

    def finish(self, factor: float) -> None:
        """Update the weights by the gradients times a factor."""
        self._learned.scale_gradients(factor)
        if self._one_pass is None:
            self._optimizer.step()
            self._learned.copy_to_model()
            return
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._one_pass.update_rows(group, parameter, slice(None), parameter.grad)
                    self._optimizer.state[parameter]["step"] += 1


class FusedUpdate:
    """Each weight is updated within the backward pass, of one microbatch in one process, without a factor.

    Args:
        model: all of its parameters learn.
        learned: its parameters.
        optimizer: over learned.optimized.
        precision: of the run.
    """

    when_skipped: ClassVar[str] = "only the weights whose gradients came before the first such one were updated"

    def __init__(
        self,
        model: BloomForCausalLM,
        learned: LearnedParameters,
        optimizer: RowwiseAdamW | AdamW8bit,
        precision: Precision,
    ) -> None:
        self._learned = learned
        self._optimizer = optimizer
        self._groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self._norms: dict[str, Tensor] = {}
        self._blocked = torch.zeros((), device=next(model.parameters()).device)
        """1 after the first gradient of a step that is not finite; a tensor, so that a GPU need not be waited for."""
        self._embedding = model.transformer.word_embeddings.weight
        self._parts = model.transformer.word_embeddings.collect_gradient()
        self._rows_at_once = _ROWS_AT_ONCE[self._blocked.device.type]
        self._one_pass = one_pass_adamw(optimizer, learned.masters, precision.compute_dtype)
        for name, parameter in model.named_parameters():
            if parameter is self._embedding:
                self._embedding_name = name
            else:
                if self._one_pass is not None and not learned.masters and hasattr(parameter, "grad_dtype"):
                    parameter.grad_dtype = None  # PyTorch 2.10 and later: a gradient in bf16 is not copied in fp32
                parameter.register_post_accumulate_grad_hook(self._hook(name))

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
        gradients = self._parts.take(self._rows_at_once, self._embedding.grad)
        self._update(self._embedding_name, self._embedding, gradients)
        if self._learned.masters:  # an fp32 gradient's memory is used again
            self._embedding.grad = None

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
        def update(parameter: Tensor) -> None:
            if parameter.grad is None:  # nothing depends on the parameter
                return
            gradient = parameter.grad
            in_blocks = self._one_pass is None and gradient.dtype is not torch.float32
            self._update(name, parameter, self._blocks(gradient) if in_blocks else [(slice(None), gradient)])
            parameter.grad = None

        return update

    def _blocks(self, gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of a gradient in half precision, which are copied in fp32."""
        for start in range(0, len(gradient), self._rows_at_once):
            rows = slice(start, start + self._rows_at_once)
            yield rows, gradient[rows]

    @torch.no_grad()
    def _update(self, name: str, parameter: Tensor, gradients: Iterable[tuple[slice, Tensor]]) -> None:
        optimized, norms = self._learned.optimized[name], []
        group, in_one_pass = self._groups[optimized], self._one_pass
        for rows, part in gradients:
            gradient = part if in_one_pass is not None else part.to(optimized.dtype)
            norms.append(torch.linalg.vector_norm(gradient) if in_one_pass is None else in_one_pass.norm(gradient))
            self._blocked.logical_or_(~torch.isfinite(norms[-1]))
            if in_one_pass is None:
                self._optimizer.update_rows(group, optimized, rows, gradient, self._blocked)
                if optimized is not parameter:
                    parameter[rows].copy_(optimized[rows])
            elif not self._blocked:
                in_one_pass.update_rows(group, optimized, rows, gradient)
        count = self._optimizer.state[optimized]["step"]
        count += (1.0 - self._blocked).to(count.device)
        self._norms[name] = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
