"""How the processes of a job are arranged: three named axes over all ranks.

    dp_replicate   copies of the model that learn from different examples
    dp_shard       the same, but the copies share out weights, gradients and optimizer state among themselves (FSDP)
    tp             ranks that compute one copy together, each with a part of every layer (tensor parallelism)

Ranks with successive numbers form one copy, because they exchange most, and a machine has successive numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bloomlm.errors import ConfigError
from bloomlm.model.config import BloomConfig

T = TypeVar("T")
AXES = ("dp_replicate", "dp_shard", "tp")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Number of ranks along each axis."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Copies of the model that learn from different examples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        """Number of all ranks."""
        return self.dp * self.tp

    def __str__(self) -> str:
        axes = {"tensor-parallel": self.tp, "sharded": self.dp_shard, "replicated": self.dp_replicate}
        return " x ".join(f"{size} {name}" for name, size in axes.items() if size > 1) + " ranks"


def degrees_from_flags(
    world_size: int, *, tensor_parallel_degree: int = -1, sharding_parallel_degree: int = -1, shards: bool = False
) -> Degrees:
    """The degrees that the flags describe.

    Args:
        world_size: number of ranks of the job.
        tensor_parallel_degree: ranks that compute one copy of the model; -1 means 1.
        sharding_parallel_degree: copies that share out their state; -1 means all copies if `shards`, otherwise 1.
        shards: whether copies share out their state.

    Raises:
        ConfigError: the ranks cannot be divided in this way; the message names degrees that would work.
    """
    for name, degree in (
        ("tensor_parallel_degree", tensor_parallel_degree),
        ("sharding_parallel_degree", sharding_parallel_degree),
    ):
        if degree < 1 and degree != -1:
            raise ConfigError(f"--{name} is {degree}; expected a number of ranks from 1, or -1 for the default")
    tp = max(1, tensor_parallel_degree)
    if world_size % tp:
        raise ConfigError(
            f"--tensor_parallel_degree {tp} with {_ranks(world_size)}: the ranks cannot be divided into groups of "
            f"{tp}. {_launch_hint(tp)}, or one of the degrees {_divisors_text(world_size)}"
        )
    dp = world_size // tp
    dp_shard = sharding_parallel_degree if sharding_parallel_degree > 0 else (dp if shards else 1)
    if dp % dp_shard:
        raise ConfigError(
            f"--sharding_parallel_degree {dp_shard} with {_ranks(world_size)} and tensor_parallel_degree {tp}: there "
            f"are {dp} data-parallel ranks, which cannot be divided into groups of {dp_shard}. "
            f"{_launch_hint(tp * dp_shard)}, or one of the degrees {_divisors_text(dp)}"
        )
    return Degrees(dp_replicate=dp // dp_shard, dp_shard=dp_shard, tp=tp)


def check_model_divides(config: BloomConfig, tp_degree: int) -> None:
    """Check that a tensor-parallel degree divides a model.

    Raises:
        ConfigError: it does not divide heads and vocabulary; the message names the degrees that do.
    """
    if config.n_head % tp_degree == 0 and config.vocab_size % tp_degree == 0:
        return
    common = math.gcd(config.n_head, config.vocab_size)
    what = f"{config.n_head} heads" if config.n_head % tp_degree else f"a vocabulary of {config.vocab_size}"
    raise ConfigError(
        f"--tensor_parallel_degree {tp_degree}: this model has {what}, which cannot be divided by {tp_degree}; "
        f"every rank takes an equal part. The degrees {_divisors_text(common)} would work"
    )


class Mesh:
    """The ranks of a job and the place of this process among them.

    Args:
        degrees: number of ranks along each axis.
        device_mesh: torch's mesh over AXES; None if this process is alone.
    """

    def __init__(self, degrees: Degrees, device_mesh: DeviceMesh | None = None) -> None:
        assert device_mesh is not None or degrees.world_size == 1
        self.degrees = degrees
        self.device_mesh = device_mesh
        self._state_mesh: DeviceMesh | None = None

    @classmethod
    def over_all_ranks(cls, degrees: Degrees, device_type: str) -> "Mesh":
        """Arrange the ranks of the default process group, with tensors on device_type; every rank must call this."""
        shape = (degrees.dp_replicate, degrees.dp_shard, degrees.tp)
        return cls(degrees, init_device_mesh(device_type, shape, mesh_dim_names=AXES))

    @property
    def is_alone(self) -> bool:
        """Whether there is only one rank."""
        return self.device_mesh is None

    @property
    def rank(self) -> int:
        """The number of this process among all ranks."""
        return 0 if self.device_mesh is None else dist.get_rank()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what is the same on all ranks."""
        return self.rank == 0

    def index(self, axis: str) -> int:
        """This rank's number along an axis."""
        return 0 if self.device_mesh is None else self.device_mesh.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this rank along an axis."""
        assert self.device_mesh is not None
        return self.device_mesh.get_group(axis)

    @property
    def tp_rank(self) -> int:
        """This rank's number among those that compute one copy of the model."""
        return self.index("tp")

    @property
    def dp_rank(self) -> int:
        """The number of this rank's copy of the model."""
        return self.index("dp_replicate") * self.degrees.dp_shard + self.index("dp_shard")

    @property
    def ranks_of_first_copy(self) -> list[int]:
        """The ranks that together hold one copy of the model and the optimizer state."""
        return [0] if self.device_mesh is None else self.device_mesh.mesh[0].flatten().tolist()

    @property
    def state_mesh(self) -> DeviceMesh:
        """The same ranks along (dp_replicate, tp, dp_shard), the order in which parameters are cut.

        Every rank must call this when one does for the first time.
        """
        assert self.device_mesh is not None
        if self._state_mesh is None:
            ranks = self.device_mesh.mesh.transpose(1, 2).contiguous()
            names = ("dp_replicate", "tp", "dp_shard")
            self._state_mesh = DeviceMesh(self.device_mesh.device_type, ranks, mesh_dim_names=names)
        return self._state_mesh

    def sum_over(self, tensor: Tensor, axes: Sequence[str] = AXES) -> Tensor:
        """Sum a tensor over axes, in place; every rank along them gets the sum."""
        if self.device_mesh is None:
            return tensor
        if tuple(axes) == AXES:
            dist.all_reduce(tensor)
            return tensor
        for axis in axes:
            if self.device_mesh.size(AXES.index(axis)) > 1:
                dist.all_reduce(tensor, group=self.group(axis))
        return tensor

    def gather_copies(self, value: T) -> list[T]:
        """The values of all copies of the model, in the order of the data-parallel ranks."""
        if self.device_mesh is None:
            return [value]
        found: list[T] = [value] * self.degrees.world_size
        dist.all_gather_object(found, value)
        return found[:: self.degrees.tp]


ALONE = Mesh(Degrees())
"""The mesh of a single process."""


def _divisors_text(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _ranks(world_size: int) -> str:
    return "1 process" if world_size == 1 else f"{world_size} processes"


def _launch_hint(group: int) -> str:
    return f"Start a multiple of {group} with --num_processes"
