"""What `bloomlm evaluate` evaluates, loaded, and how the report names it: a model or an exported program."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.cli.loading import load_named
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.config import EvaluateConfig
from bloomlm.evaluation.evaluated import Evaluated
from bloomlm.parallel.mesh import Mesh
from bloomlm.runtime.program import Program


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its tokenizer, on this rank."""

    model: Evaluated
    tokenizer: Tokenizer
    mesh: Mesh
    description: Mapping[str, Any]
    """name, fingerprint, dtype, adapter; of a program its format too."""
    device: str


def load_subject(config: EvaluateConfig, device: torch.device, mesh: Mesh) -> Subject:
    """Load what the flags name; every rank must come here.

    Raises:
        BloomlmError: as bloomlm.load and runtime.Program.
    """
    return _load_model(config, device, mesh) if config.model_dir is None else _open_program(config, mesh)


def _load_model(config: EvaluateConfig, device: torch.device, mesh: Mesh) -> Subject:
    loaded = load_named(config, dtype=config.dtype, device=device, mesh=mesh)
    weight = loaded.model.transformer.word_embeddings.weight
    description = {
        "name": config.model_name_or_path,
        "fingerprint": model_fingerprint(loaded.model, mesh),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "adapter": config.lora_path or config.prefix_path,
    }
    return Subject(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        mesh=mesh,
        description=description,
        device=str(weight.device),
    )


def _open_program(config: EvaluateConfig, mesh: Mesh) -> Subject:
    """Every rank opens the program; they share its mapped weights and take different windows."""
    assert config.model_dir is not None
    path = config.model_dir / config.model_prefix
    program = Program(path)
    manifest = program.manifest
    description = {
        "name": str(path),
        "fingerprint": manifest.fingerprint,
        "dtype": manifest.dtype if manifest.quantization == "none" else manifest.quantization,
        "adapter": None,
        "program": manifest.format,
    }
    return Subject(model=program.model, tokenizer=program.tokenizer, mesh=mesh, description=description, device="cpu")
