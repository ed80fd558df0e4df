"""A digest of a model: the same weights give the same digest, from any files and on any number of ranks."""

import hashlib
import math

import torch
from torch import Tensor

from bloomlm.adapters.base import adapter_of
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.layout import own_bounds, whole_shape
from bloomlm.parallel.mesh import ALONE, Mesh

_SAMPLES = 256
"""Elements of each parameter that enter the digest, so that 176B parameters need not be read twice."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(model: BloomForCausalLM, mesh: Mesh = ALONE) -> str:
    """Hex digest of the configuration, the adapter's options, and evenly spread elements of every parameter.

    Two training runs of one model have different digests; a change of a few elements may go unnoticed.

    Args:
        model: whole, or cut among ranks, all of which must call this.
        mesh: the ranks.
    """
    config = {key: value for key, value in vars(model.config).items() if key not in ("extra", "dtype")}
    digest = hashlib.sha256(repr((sorted(config.items()), adapter_of(model))).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {whole_shape(name, parameter, mesh)} {parameter.dtype}".encode())
        digest.update(_sample(name, parameter.detach(), mesh).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    """The bits of some elements of the whole, as int64."""
    shape = whole_shape(name, tensor, mesh)
    # an odd step meets every column of a matrix whose width is a power of two
    step = max(1, math.prod(shape) // _SAMPLES) | 1
    places = torch.arange(0, math.prod(shape), step, device=tensor.device)[:_SAMPLES]
    coordinates = torch.unravel_index(places, shape)
    bounds = own_bounds(name, tensor, mesh)
    is_own = torch.ones_like(places, dtype=torch.bool)
    for coordinate, (start, stop) in zip(coordinates, bounds, strict=True):
        is_own &= (coordinate >= start) & (coordinate < stop)
    own = tensor[tuple(c[is_own] - start for c, (start, _) in zip(coordinates, bounds, strict=True))]
    bits = torch.zeros_like(places)
    bits[is_own] = own.view(_BITS[tensor.itemsize]).to(torch.int64)
    # each element of a cut parameter is on exactly one rank
    return bits if shape == tuple(tensor.shape) else mesh.sum_over(bits, ("tp",))
