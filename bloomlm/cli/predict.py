"""`bloomlm predict`: complete prompts with a BLOOM, with or without an adapter."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from bloomlm.api import LoadedModel, load
from bloomlm.checkpoint.main_rank import on_main
from bloomlm.checkpoint.merge import merge_to_directory, merged_bytes
from bloomlm.checkpoint.source import resolve_source
from bloomlm.cli.completion import CompletionFlags, run_completions
from bloomlm.cli.display import BytesDisplay
from bloomlm.cli.options import config_command
from bloomlm.cli.prompts import NO_PROMPTS, Prompts
from bloomlm.errors import ConfigError
from bloomlm.flags import DeviceFlags, ModelFlags, flag, reading_flags
from bloomlm.generation.config import GenerationConfig
from bloomlm.parallel.launch import find_device, joined_ranks, world_size
from bloomlm.parallel.mesh import Mesh, degrees_from_flags


@dataclass(frozen=True, kw_only=True)
class PredictConfig(CompletionFlags, DeviceFlags, ModelFlags):
    """The flags of `bloomlm predict`."""

    save_onepiece_model_path: Path | None = flag(
        "model", None, "also write the model, with its LoRA adapter merged in, to this directory"
    )
    max_new_tokens: int = flag("decoding", 200, "maximum tokens to generate, including </s>", aliases=("tgt_length",))
    tensor_parallel_degree: int = flag(
        "computing", -1, "processes that compute one copy of the model together; others have copies  [default: all]"
    )


def predict(config: PredictConfig) -> None:
    """Run `bloomlm predict`.

    Raises:
        BloomlmError: flags, files or prompts that cannot be used.
    """
    generation = config.generation_of(config.max_new_tokens)
    if config.save_onepiece_model_path is not None and config.prefix_path is not None:
        raise ConfigError(
            "--save_onepiece_model_path merges an adapter into the weights, which a prefix cannot be: its virtual "
            "tokens are no weights. Keep --prefix_path beside the model"
        )
    device = find_device(config.device)
    degrees = degrees_from_flags(
        world_size(),
        tensor_parallel_degree=world_size() if config.tensor_parallel_degree == -1 else config.tensor_parallel_degree,
    )
    if config.stream and degrees.dp > 1:
        raise ConfigError(
            "--stream shows one prompt after another; leave it out, or let all processes compute one copy of the model"
        )
    with joined_ranks(degrees, device.type) as mesh:
        _load_and_predict(config, generation, device, mesh)


def _load_and_predict(config: PredictConfig, generation: GenerationConfig, device: torch.device, mesh: Mesh) -> None:
    found = on_main(lambda: config.read_prompts(), mesh)
    if found is None and config.save_onepiece_model_path is None:
        raise ConfigError(NO_PROMPTS)
    loaded = load(config.model_name_or_path, **config.load_options(), dtype=config.dtype, device=device, mesh=mesh)
    if config.save_onepiece_model_path is not None:
        _save(config.save_onepiece_model_path, loaded)
    if found is not None:
        prompts = on_main(lambda: found.of(loaded.tokenizer), mesh)
        run_completions(
            config,
            generation,
            loaded,
            prompts,
            identity=_identity(config, generation, prompts),
            is_main=mesh.is_main,
            from_main=lambda done: on_main(lambda: done, mesh),
        )


def _save(directory: Path, loaded: LoadedModel) -> None:
    messages = Console(stderr=True, highlight=False, markup=False, quiet=not loaded.mesh.is_main)
    with BytesDisplay(messages) as display:
        merge_to_directory(
            loaded.model,
            directory,
            tokenizer=loaded.tokenizer,
            max_shard_size_bytes=sys.maxsize,
            report=display.phase("writing", merged_bytes(loaded.model)),
            mesh=loaded.mesh,
        )
    messages.print(f"the model is in {directory}, its weights in one file")


def _identity(config: PredictConfig, generation: GenerationConfig, prompts: Prompts) -> str:
    """Everything that decides the completions, as text; the sizes and dates of its files stand for the model."""
    files = []
    for name in (config.model_name_or_path, config.adapter):
        directory = None if name is None else resolve_source(name).directory
        if directory is not None:
            stats = [(path.name, path.stat()) for path in sorted(directory.iterdir())]
            files.append([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])
    reading = reading_flags(config)
    return json.dumps(
        [files, list(reading.values()), config.dtype, config.src_length, asdict(generation), prompts.texts]
    )


command = config_command(
    "predict",
    PredictConfig,
    predict,
    has_ranks=True,
    help="""Complete prompts with a BLOOM, with or without an adapter.

    The prompts come from --prompt, --data_file, --messages_file or, one on each line, through a pipe.

    \b
    bloomlm predict --model_name_or_path builtin:tiny --prompt "The history of" --max_new_tokens 30
    bloomlm predict --model_name_or_path builtin:tiny --lora_path demo --data_file builtin:dates \\
        --output_file answers.jsonl
    """,
)
