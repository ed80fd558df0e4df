"""The pt2 format: traced functions, one weights file, and a package of compiled functions where there is a compiler.

Shapes: R rows of the cache, B of them in a call, S slots in use, M slots of the cache, N packed tokens.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bloomlm.export.attention import slot_attention
from bloomlm.export.calibration import calibrated_tensors, frequent_tokens
from bloomlm.export.formats.base import ExportFormat, ExportJob
from bloomlm.export.graph import DecodeStep, Prefill, library_product
from bloomlm.export.operators import attend_of, compiler_options, product_of
from bloomlm.export.weight_formats import WeightFormat, cache_dtype, weight_format
from bloomlm.export.weights import named_tensors, weight_entries, write_weights
from bloomlm.model.config import BloomConfig
from bloomlm.runtime.formats import pt2
from bloomlm.runtime.manifest import VIRTUAL
from bloomlm.runtime.torch_internals import compile_package, find_compiler

_LOG = logging.getLogger(__name__)

_MOST = 1 << 24
"""Upper bound of the dynamic sizes, which tracing requires; programs accept larger sizes."""
_NUMBERS_OF_THREAD = {"decode_step": 4096}
"""A norm of few rows takes less time than its threads need to wait for each other four times."""


def _write(job: ExportJob, directory: Path) -> Mapping[str, Any]:
    """Write weights, functions and, where there is a compiler, the package."""
    weights = weight_format(job.quantization, job.dtype)
    config, calibration = job.model.config, job.calibration
    num_frequent = 0 if calibration is None else len(frequent_tokens(calibration, config.vocab_size))
    entries = weight_entries(config, weights, job.model.transformer.num_virtual_tokens, num_frequent)
    path = directory / pt2.weights_file(job.prefix)
    if calibration is None:
        stored = named_tensors(job.model, weights, job.count_parameters())
    else:
        stored = calibrated_tensors(job.model, calibration, partial(job.on_stage, "calibrating"))
    write_weights(path, job.model, entries, stored)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in entries if name != VIRTUAL}
    job.on_stage("tracing", 0.0)
    for name, program in trace_all(config, weights, tensors, for_compiler=False).items():
        program.example_inputs = None  # they hold the weights
        torch.export.save(program, directory / pt2.graph_file(job.prefix, name))
    level = None
    if find_compiler() is None:
        _LOG.warning("no C++ compiler was found (g++ or clang++): the program is written uncompiled, which is slower")
    else:
        job.on_stage("compiling", 0.0)
        traced = trace_all(config, weights, tensors, for_compiler=True)
        level = pt2.instruction_set()
        compile_functions(traced, directory / pt2.package_file(job.prefix), level, partial(job.on_stage, "compiling"))
    described = {name: [str(entry.dtype).removeprefix("torch."), list(entry.shape)] for name, entry in entries.items()}
    cache = str(cache_dtype(weights)).removeprefix("torch.")
    return {"weights": described, "cache_dtype": cache, "instruction_set": level}


PT2 = ExportFormat(name="pt2", write=_write, calibrates=True)


def trace_all(
    config: BloomConfig, weights: WeightFormat, tensors: Mapping[str, Tensor], *, for_compiler: bool
) -> dict[str, ExportedProgram]:
    """Trace prefill and decode_step.

    Args:
        config: the model's shape.
        weights: how matrices are stored.
        tensors: the weights, in the order of the program's inputs.
        for_compiler: use our own operators where there can be any; otherwise those that every PyTorch has.
    """
    has_kernels = for_compiler and compiler_options() is not None
    product = product_of if has_kernels else library_product
    attention = attend_of if has_kernels else slot_attention
    prefill_attention = attend_of if has_kernels else None
    functions: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
        "prefill": (Prefill(config, weights, product=product, attention=prefill_attention), _prefill_example),
        "decode_step": (DecodeStep(config, weights, product=product, attention=attention), _decode_example),
    }
    traced = {}
    with torch.no_grad():
        for name, (module, example) in functions.items():
            arguments, sizes = example(config, cache_dtype(weights))
            shapes = (*sizes, dict.fromkeys(tensors))
            traced[name] = torch.export.export(module.eval(), (*arguments, dict(tensors)), dynamic_shapes=shapes)
    return traced


def compile_functions(
    traced: Mapping[str, ExportedProgram], path: Path, level: str, on_share: Callable[[float], None]
) -> None:
    """Compile functions into one package.

    Args:
        traced: functions by name, traced for the compiler.
        path: the package to write.
        level: the instruction set to compile for.
        on_share: called after each function with the share of them that is done.

    Raises:
        ProgramError: the compiler fails.
    """
    compile_package(
        traced,
        path,
        instruction_set=level,
        options=compiler_options() or {},
        numbers_of_thread=_NUMBERS_OF_THREAD,
        on_share=on_share,
    )


def _prefill_example(config: BloomConfig, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    tokens, chunks = torch.arange(8), torch.tensor([0] * 5 + [1] * 3)
    slots = torch.tensor([0, 1, 2, 3, 4, 4, 5, 6])
    wanted, rows, starts = torch.tensor([3, 4, 7]), torch.tensor([2, 0]), torch.tensor([0, 4])
    size_n, size_b, size_t, size_s = (Dim(name, min=1, max=_MOST) for name in ("N", "B", "T", "S"))
    size_w = Dim("W", min=0, max=_MOST)
    cache, cache_sizes = _cache_example(config, dtype)
    arguments = (tokens, chunks, slots, wanted, rows, starts, torch.arange(5), torch.arange(7), cache)
    sizes = [size_n, size_n, size_n, size_w, size_b, size_b, size_t, size_s]
    return arguments, (*({0: size} for size in sizes), cache_sizes)


def _decode_example(config: BloomConfig, dtype: torch.dtype) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    size_b, size_s = (Dim(name, min=1, max=_MOST) for name in ("B", "S"))
    cache, cache_sizes = _cache_example(config, dtype)
    arguments = (torch.arange(3), torch.tensor([3, 0, 2]), torch.tensor([5, 3, 4]), torch.arange(6), cache)
    return arguments, ({0: size_b}, {0: size_b}, {0: size_b}, {0: size_s}, cache_sizes)


def _cache_example(config: BloomConfig, dtype: torch.dtype) -> tuple[list[Tensor], list[dict[int, Dim]]]:
    shape = (4, config.n_head, 9, config.head_dim)
    cache = [torch.zeros(shape, dtype=dtype) for _ in range(2 * config.n_layer)]
    sizes = {0: Dim("R", min=1, max=_MOST), 2: Dim("M", min=1, max=_MOST)}
    return cache, [sizes] * len(cache)
