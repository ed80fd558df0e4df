"""What --device means."""

import torch

from bloomlm.errors import ConfigError


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
