"""How much memory there is for keys and values, and how it is divided into rows and blocks."""

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bloomlm.api import LoadedModel
from bloomlm.errors import ConfigError, format_bytes
from bloomlm.parallel.mesh import Mesh
from bloomlm.runtime.program import Program
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.scheduler import BLOCK_TOKENS, num_blocks_of
from bloomlm.system_memory import free_bytes

_LOG = logging.getLogger(__name__)

_CPU_SHARE, _GPU_SHARE = 0.5, 0.9
"""Parts of the free memory that keys and values may fill. The rest is for activations, logits and, on a CPU, for other
processes."""


@dataclass(frozen=True, kw_only=True)
class KvBudget:
    """Memory for keys and values."""

    num_rows: int
    """Sequences that run at once."""
    num_blocks: int
    """Blocks of running requests and of the prefix cache together."""
    num_allocated: int
    """Blocks that the rows occupy from the start, used or not; 0 where rows take memory when they are written."""


def find_budget(generator: LoadedModel | Program, options: EngineOptions, mesh: Mesh) -> KvBudget:
    """The memory that a model is served with: the smallest of all ranks, so that all of them admit the same requests.

    Raises:
        ConfigError: see kv_budget.
    """
    budget = kv_budget(
        options,
        bytes_per_token=generator.model.bytes_per_token,
        is_paged=generator.model.features.paged,
        device=_device_of(generator),
        num_virtual_tokens=_num_virtual_tokens(generator),
        mapped_bytes=_mapped_bytes(generator),
    )
    if mesh.is_alone:
        return budget
    found: list[KvBudget] = [budget] * mesh.degrees.world_size
    dist.all_gather_object(found, budget)
    return min(found, key=lambda other: (other.num_rows, other.num_blocks))


def kv_budget(
    options: EngineOptions,
    *,
    bytes_per_token: int,
    is_paged: bool,
    device: torch.device,
    num_virtual_tokens: int = 0,
    mapped_bytes: int = 0,
) -> KvBudget:
    """Divide the memory for keys and values.

    Args:
        options: kv_cache_gb, or None for a part of the free memory; max_num_seqs and max_model_len.
        bytes_per_token: keys and values of one token on this rank.
        is_paged: whether rows take memory only as they are written; otherwise all of it is allocated at once.
        device: where the rows are.
        num_virtual_tokens: virtual tokens for which every row takes memory.
        mapped_bytes: size of weights that are mapped files, which count as free memory although they are in use.

    Raises:
        ConfigError: not even one sequence of max_model_len tokens fits.
    """
    free = _free_bytes(device) - mapped_bytes
    share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
    given = options.kv_cache_gb
    total_bytes = share * free if given is None else given * 1e9
    if total_bytes > free:
        _LOG.warning(
            "--kv_cache_gb %s is more than the %s that are free: the system may end this process when requests fill it",
            given,
            format_bytes(max(0, free)),
        )
    num_blocks = int(total_bytes / (BLOCK_TOKENS * bytes_per_token))
    blocks_per_row = num_blocks_of(num_virtual_tokens + options.max_model_len)
    if num_blocks < blocks_per_row:
        raise _refusal(options, num_virtual_tokens, blocks_per_row * BLOCK_TOKENS * bytes_per_token, free, share)
    if is_paged:
        return KvBudget(num_rows=options.max_num_seqs, num_blocks=num_blocks, num_allocated=0)
    num_rows = min(options.max_num_seqs, num_blocks // blocks_per_row)
    if num_rows < options.max_num_seqs:
        _LOG.warning(
            "memory for keys and values holds %d sequences of --max_model_len %d tokens, so %d run at once instead of "
            "--max_num_seqs %d; a lower --max_model_len leaves room for more",
            num_rows,
            options.max_model_len,
            num_rows,
            options.max_num_seqs,
        )
    return KvBudget(num_rows=num_rows, num_blocks=num_blocks, num_allocated=num_rows * blocks_per_row)


def _refusal(options: EngineOptions, num_virtual: int, needed_bytes: int, free: int, share: float) -> ConfigError:
    """Says that not even one sequence fits."""
    found, hint = f"--kv_cache_gb is {options.kv_cache_gb}", "raise --kv_cache_gb"
    if options.kv_cache_gb is None:
        found = f"only {format_bytes(max(0, free))} are free"
        hint = f"set --kv_cache_gb (default: {share:.0%} of the free memory)"
    virtual = f" behind {num_virtual} virtual ones" if num_virtual else ""
    return ConfigError(
        f"one sequence of --max_model_len {options.max_model_len} tokens{virtual} needs {format_bytes(needed_bytes)} "
        f"for its keys and values, and {found}; lower --max_model_len, or {hint}"
    )


def _device_of(generator: LoadedModel | Program) -> torch.device:
    if isinstance(generator, LoadedModel):
        return generator.model.transformer.word_embeddings.weight.device
    return torch.device("cpu")


def _num_virtual_tokens(generator: LoadedModel | Program) -> int:
    """Virtual tokens for which every row takes memory: the model's own, and those of adapters if rows are allocated."""
    if isinstance(generator, Program):
        return generator.manifest.num_virtual_tokens
    model = generator.model
    if model.adapters is None or model.features.paged:
        return model.transformer.num_virtual_tokens
    return model.adapters.most_virtual


def _mapped_bytes(generator: LoadedModel | Program) -> int:
    """Size of the files that a program's memory is mapped to."""
    if isinstance(generator, LoadedModel):
        return 0
    path = generator.path
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}.*"))


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
