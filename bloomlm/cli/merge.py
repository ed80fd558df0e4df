"""`bloomlm merge`: merges a LoRA into its base model, joins shards, or changes the precision of a model."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bloomlm.api import dtype_of, load
from bloomlm.checkpoint.merge import merge_to_directory, merged_bytes
from bloomlm.checkpoint.writer import parse_size
from bloomlm.cli.display import BytesDisplay
from bloomlm.cli.options import config_command
from bloomlm.errors import ConfigError
from bloomlm.flags import REQUIRED, Dtype, ModelFlags, flag
from bloomlm.parallel.launch import joined_ranks, world_size
from bloomlm.parallel.mesh import Mesh, degrees_from_flags


@dataclass(frozen=True, kw_only=True)
class MergeConfig(ModelFlags):
    """The flags of `bloomlm merge`."""

    output_path: str = flag("output", REQUIRED, "directory to write; replaces an older model there")
    dtype: Dtype | None = flag("output", None, "precision to write  [default: that of the base model]")
    max_shard_size: str = flag("output", "5GB", "largest weight file; a larger model is split into several")


def merge(config: MergeConfig) -> None:
    """Write one plain Hugging Face directory.

    Raises:
        ConfigError: the output is the input, or --max_shard_size is no size.
        CheckpointError: files that cannot be read or written; AdapterError: files of the adapter.
    """
    output = Path(config.output_path)
    if output.resolve() == Path(config.model_name_or_path).resolve():
        raise ConfigError(f"--output_path {output} is the model itself; name another directory")
    with joined_ranks(degrees_from_flags(world_size(), tensor_parallel_degree=world_size()), "cpu") as mesh:
        _merge(config, output, parse_size(config.max_shard_size), mesh)


def _merge(config: MergeConfig, output: Path, max_shard_size_bytes: int, mesh: Mesh) -> None:
    loaded = load(config.model_name_or_path, **config.load_options(), mesh=mesh)
    dtype = dtype_of(config.dtype)
    with BytesDisplay(Console(stderr=True, quiet=not mesh.is_main)) as display:
        merge_to_directory(
            loaded.model,
            output,
            tokenizer=loaded.tokenizer,
            dtype=dtype,
            max_shard_size_bytes=max_shard_size_bytes,
            report=display.phase("writing", merged_bytes(loaded.model, dtype)),
            mesh=mesh,
        )
    size_bytes = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    adapter = f" with {config.adapter} added in" if config.adapter else ""
    console = Console(highlight=False, markup=False, quiet=not mesh.is_main)
    console.print(f"{config.model_name_or_path}{adapter} is in {output} ({size_bytes / 1e6:,.1f} MB)", soft_wrap=True)
    console.print(f"next: bloomlm predict --model_name_or_path {output} --prompt ...", soft_wrap=True)


command = config_command(
    "merge",
    MergeConfig,
    merge,
    has_ranks=True,
    help="""Write a model as a plain directory, with LoRA merged in, shards joined, or in another precision.

    With --num_processes each process holds a part of the model. A prefix adapter cannot be merged.

    \b
    bloomlm merge --model_name_or_path builtin:tiny --lora_path demo --output_path merged
    bloomlm merge --num_processes 8 --model_name_or_path bigscience/bloom --dtype float32 --output_path bloom-fp32
    """,
)
