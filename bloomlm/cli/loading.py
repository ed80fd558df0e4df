"""From the flags that name a model, and say how to read its files, to the model."""

import torch

from bloomlm.api import LoadedModel, load
from bloomlm.flags import ModelFlags, reading_flags
from bloomlm.parallel.mesh import ALONE, Mesh


def load_named(
    flags: ModelFlags, *, dtype: str | None = None, device: torch.device | str = "cpu", mesh: Mesh = ALONE
) -> LoadedModel:
    """Load the model and the adapter that the flags name.

    Args:
        flags: they say how the files are to be read, too.
        dtype, device, mesh: as in bloomlm.load.

    Raises:
        BloomlmError: as bloomlm.load.
    """
    return load(
        flags.model_name_or_path,
        lora_path=flags.lora_path,
        prefix_path=flags.prefix_path,
        **reading_flags(flags),
        dtype=dtype,
        device=device,
        mesh=mesh,
    )
