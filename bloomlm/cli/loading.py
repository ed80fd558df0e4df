"""From the flags to a loaded model: ModelFlags say which and how to read its files, --device where it goes."""

import torch

from bloomlm.api import LoadedModel, load
from bloomlm.errors import ConfigError
from bloomlm.flags import ModelFlags, reading_flags
from bloomlm.parallel.mesh import ALONE, Mesh


def load_named(
    flags: ModelFlags, *, dtype: str | None = None, device: torch.device | str = "cpu", mesh: Mesh = ALONE
) -> LoadedModel:
    """Load the model and the adapter that the flags name.

    Args:
        flags: the model, its adapter, and how to read their files.
        dtype, device, mesh: as in bloomlm.load.

    Raises:
        BloomlmError: as bloomlm.load.
    """
    return load(
        flags.model_name_or_path,
        adapter_path=flags.adapter_path,
        lora_path=flags.lora_path,
        prefix_path=flags.prefix_path,
        **reading_flags(flags),
        dtype=dtype,
        device=device,
        mesh=mesh,
    )


def find_device(name: str | None) -> torch.device:
    """The device that a flag names.

    Args:
        name: cpu, gpu, cuda or cuda:NUMBER; None: a GPU if there is one.

    Raises:
        ConfigError: no such kind, or no GPU.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device("cuda" if name == "gpu" else name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: no such kind; expected cpu, gpu or cuda:NUMBER") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: PyTorch finds no GPU here; use --device cpu, or a PyTorch built for CUDA")
    return device
