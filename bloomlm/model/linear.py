"""Linear layers, with the order of the matrix product that is fast for a few rows on a CPU.

Decoding several sequences multiplies a weight of millions of elements with 4 to 48 rows. In fp32 on a CPU the product
W x^T takes down to 0.6 times as long as x W^T (benchmarks/decode.py shows what that is worth), and the activations then
stay column by column through the MLP. A single row is read at the memory's speed either way.

Shapes: N rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = range(4, 49)
"""Numbers of rows for which W x^T was faster on AVX2 processors (torch's MKL)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out]; for a few rows on a CPU outside training its memory order may be column by column.
    """
    if x.dim() == 2 and len(x) in FEW_ROWS and _is_plain_cpu(x):
        columns = x.t().contiguous()
        product = weight @ columns if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)
        return product.t()
    return F.linear(x, weight, bias)


def _is_plain_cpu(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype is not torch.float32:
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)
