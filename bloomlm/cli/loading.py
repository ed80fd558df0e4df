"""From the flags that say which model is meant, and how its files are to be read, to the model."""

from typing import Protocol

import torch

from bloomlm.api import LoadedModel, load
from bloomlm.parallel.mesh import ALONE, Mesh


class ReadingFlags(Protocol):
    """What the configs of predict, export, merge and evaluate have in common; see bloomlm.load."""

    @property
    def model_name_or_path(self) -> str | None:
        """None only where a command found that none is needed."""
        ...

    @property
    def lora_path(self) -> str | None:
        """Adapter."""
        ...

    @property
    def prefix_layout(self) -> str | None:
        """Of a prefix adapter in PaddleNLP's files."""
        ...

    @property
    def trained_tensor_parallel_degree(self) -> int | None:
        """Ranks that trained such an adapter."""
        ...

    @property
    def paddle_tokenization(self) -> bool:
        """Cut words as PaddleNLP did."""
        ...


def load_named(
    flags: ReadingFlags,
    *,
    prefix_path: str | None = None,
    dtype: str | None = None,
    device: torch.device | str = "cpu",
    mesh: Mesh = ALONE,
) -> LoadedModel:
    """bloomlm.load with the flags, and what not every command has.

    Args:
        flags: with a model's name.
        prefix_path, dtype, device, mesh: as bloomlm.load's.

    Raises:
        BloomlmError: as bloomlm.load.
    """
    assert flags.model_name_or_path is not None
    return load(
        flags.model_name_or_path,
        lora_path=flags.lora_path,
        prefix_path=prefix_path,
        prefix_layout=flags.prefix_layout,
        trained_tensor_parallel_degree=flags.trained_tensor_parallel_degree,
        paddle_tokenization=flags.paddle_tokenization,
        dtype=dtype,
        device=device,
        mesh=mesh,
    )
