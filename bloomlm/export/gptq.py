"""Rounding to int4 by which the outputs of a layer change least, where rounding to the nearest keeps its weights.

The columns of a matrix are rounded one after another, and what each rounding changes in the layer's outputs is made up
for, as far as possible, by the columns that are not rounded yet. The covariance of the layer's inputs on some text says
how. A group gets its scale when its first column is reached. Source: Frantar et al., GPTQ,
https://arxiv.org/abs/2210.17323.

Two additions. The inputs are those that the layer has in the program, behind rounded layers, and the outputs those that
the model has, so that a layer also makes up for what was rounded before it (as GPTAQ does,
https://arxiv.org/abs/2504.02692, here by least squares). And the mean of the error goes into the bias, so only
deviations from the mean count.

Shapes: N tokens, n outputs, D inputs, G groups.
"""

from functools import partial

import torch
from torch import Tensor

from bloomlm.errors import CheckpointError
from bloomlm.export.weight_formats import GROUP_SIZE, Int4, Representable, nearest_int4
from bloomlm.model.linear import Linear

DAMPING = 0.1
"""What is added to the variance of every input, as a share of their mean. With 0.01, as in GPTQ, or 0.001 the built-in
model has larger errors on texts that it was not calibrated on."""
_LAZY_COLUMNS = 128
"""Columns after which the rest of the matrix is corrected; before that, only the columns among them."""
_SMALLEST_VARIANCE = 1e-12


class Moments:
    """Sums over tokens of a layer's inputs and of the outputs that it should have, in fp64."""

    def __init__(self, num_in: int, num_out: int) -> None:
        self.count = 0
        self._inputs = torch.zeros(num_in, dtype=torch.float64)
        self._outputs = torch.zeros(num_out, dtype=torch.float64)
        self._squares = torch.zeros(num_in, num_in, dtype=torch.float64)
        self._products = torch.zeros(num_out, num_in, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add tokens: [N, D] and [N, n], in fp32."""
        self.count += len(inputs)
        self._inputs += inputs.sum(0)
        self._outputs += outputs.sum(0)
        self._squares += inputs.t() @ inputs
        self._products += outputs.t() @ inputs

    @property
    def input_mean(self) -> Tensor:
        """[D]."""
        return self._inputs / self.count

    @property
    def output_mean(self) -> Tensor:
        """[n]."""
        return self._outputs / self.count

    @property
    def covariance(self) -> Tensor:
        """[D, D] of the inputs."""
        return self._squares / self.count - torch.outer(self.input_mean, self.input_mean)

    @property
    def products(self) -> Tensor:
        """[n, D] covariance of the outputs with the inputs."""
        return self._products / self.count - torch.outer(self.output_mean, self.input_mean)


def round_linear(linear: Linear, moments: Moments, name: str) -> dict[str, Tensor]:
    """Round the weight of a layer and correct its bias, in place.

    The weight that is rounded minimises the mean of |y - W x|^2, where x and y are deviations of inputs and wanted
    outputs from their means, plus the damping times |W - weight|^2.

    Args:
        linear: a layer of the model, whose weight and bias are in fp32.
        moments: its inputs in the program and the outputs that it should have.
        name: of the weight, for messages.

    Returns:
        The weight in int4, which the layer has in fp32 now.

    Raises:
        CheckpointError: the weight or the inputs hold NaN or infinity.
    """
    covariance = moments.covariance
    damping = add_damping(covariance, DAMPING)
    lower = cholesky(covariance, name)
    wanted = moments.products + damping * linear.weight.data.double()
    parts = round_matrix(torch.cholesky_solve(wanted.t(), lower).t().float(), lower, name)
    linear.weight.data = Int4().decode(parts)
    linear.bias.data = (moments.output_mean - linear.weight.data.double() @ moments.input_mean).float()
    return parts


def add_damping(covariance: Tensor, share: float) -> float:
    """Add a share of the mean variance to every variance of [D, D], in place; returns what was added."""
    damping = share * max(float(covariance.diagonal().mean()), _SMALLEST_VARIANCE)
    covariance.diagonal().add_(damping)
    return damping


def cholesky(covariance: Tensor, name: str) -> Tensor:
    """The lower factor of a damped covariance [D, D] in fp64.

    Raises:
        CheckpointError: it holds NaN or infinity.
    """
    if not torch.isfinite(covariance).all():
        raise CheckpointError(f"the inputs of {name} on the calibration text hold NaN or infinite numbers")
    return torch.linalg.cholesky(covariance)


def round_matrix(matrix: Tensor, lower: Tensor, name: str) -> dict[str, Tensor]:
    """A matrix in int4, rounded so that its products with inputs change least.

    Args:
        matrix: [n, D].
        lower: what `cholesky` gives for the inputs.
        name: for messages.

    Raises:
        CheckpointError: the matrix holds NaN or infinity.
    """
    # row j of this factor of the inverse is, but for its scale, what the columns after j do for an error in column j
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    return Int4().encode_rows(matrix, name, partial(_round_rows, upper=upper))


def _round_rows(rows: Tensor, representable: Representable, upper: Tensor) -> tuple[Tensor, Tensor]:
    rest = rows.t().contiguous()  # [D, n], because a column is rounded at a time
    numbers, scales = torch.empty_like(rest), rest.new_empty(len(rest) // GROUP_SIZE, len(rows))
    for start in range(0, len(rest), _LAZY_COLUMNS):
        stop = min(start + _LAZY_COLUMNS, len(rest))
        errors = rest.new_empty(stop - start, len(rows))
        for column in range(start, stop):
            group, first = divmod(column, GROUP_SIZE)
            if first == 0:
                weights = rest[column : column + GROUP_SIZE].t()[:, None]
                scales[group] = nearest_int4(weights, representable)[1][:, 0]
            scale = scales[group]
            numbers[column] = (rest[column] / torch.where(scale == 0, 1.0, scale)).round_().clamp_(-8, 7)
            error = (rest[column] - numbers[column] * scale) / upper[column, column]
            rest[column + 1 : stop].addr_(upper[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        rest[stop:] -= upper[start:stop, stop:].t() @ errors
    return numbers.t().unflatten(1, (-1, GROUP_SIZE)), scales.t()
