"""`bloomlm infer`: complete prompts with an exported program.

It imports no code of the model or of checkpoints, and runs wherever bloomlm.runtime does.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from bloomlm.cli.completion import CompletionFlags, run_completions
from bloomlm.cli.options import config_command
from bloomlm.cli.prompts import NO_PROMPTS, Prompts
from bloomlm.errors import ConfigError
from bloomlm.flags import REQUIRED, Flags, flag
from bloomlm.generation.config import GenerationConfig
from bloomlm.runtime.formats import FORMATS
from bloomlm.runtime.manifest import Manifest
from bloomlm.runtime.program import Program


@dataclass(frozen=True, kw_only=True)
class _ProgramFlags(Flags):
    """Which program to run, and how; --help lists these flags first."""

    model_dir: Path = flag("program", REQUIRED, "directory that `bloomlm export` wrote the program into")
    model_prefix: str = flag("program", "bloom", "name of the program in that directory")
    backend: str = flag(
        "program",
        "auto",
        "library that runs the program; auto chooses the one for its format",
        choices=("auto", *(form.backend for form in FORMATS.values())),
    )
    device: Literal["cpu", "gpu"] = flag("program", "cpu", "programs run on the CPU; gpu is refused")
    verify_weights: bool = flag("program", False, "before anything runs, read all weights and compare their checksums")


@dataclass(frozen=True, kw_only=True)
class InferConfig(CompletionFlags, _ProgramFlags):
    """The flags of `bloomlm infer`."""

    max_new_tokens: int | None = flag(
        "decoding",
        None,
        "maximum tokens to generate, including </s>  [default: as exported]",
        aliases=("max_length", "tgt_length"),
    )
    cpu_threads: int | None = flag("computing", None, "threads to compute with  [default: all cores]", minimum=1)


def infer(config: InferConfig) -> None:
    """Run `bloomlm infer`.

    Raises:
        BloomlmError: flags, files or prompts that cannot be used.
    """
    if config.device == "gpu":
        raise ConfigError("--device gpu: exported programs run on the CPU; use bloomlm predict on a GPU")
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    path = config.model_dir / config.model_prefix
    manifest = Manifest.read(config.model_dir / f"{config.model_prefix}.json")
    asked = config.max_new_tokens
    generation = config.generation_of(manifest.max_new_tokens if asked is None else asked)
    found = config.read_prompts()
    if found is None:
        raise ConfigError(NO_PROMPTS)
    program = Program(path, backend=config.backend, verify_weights=config.verify_weights)
    prompts = found.of(program.tokenizer)
    run_completions(config, generation, program, prompts, identity=_identity(config, generation, prompts, manifest))


def _identity(config: InferConfig, generation: GenerationConfig, prompts: Prompts, manifest: Manifest) -> str:
    """Everything that decides the completions, as text."""
    return json.dumps([manifest.to_json(), config.src_length, asdict(generation), prompts.texts])


command = config_command(
    "infer",
    InferConfig,
    infer,
    help="""Complete prompts with an exported program.

    The prompts come from --prompt, --data_file, --messages_file or, one on each line, through a pipe.

    \b
    bloomlm infer --model_dir inference --model_prefix bloom --prompt "The history of"
    """,
)
