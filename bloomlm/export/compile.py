"""From functions to files: torch.export with dynamic sizes, then AOTInductor's C++ where there is a compiler.

Shapes: B rows, S slots in use, M slots of the cache, N packed tokens.
"""

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from bloomlm.errors import ProgramError
from bloomlm.export.graph import DecodeStep, Prefill, Product, slot_attention
from bloomlm.export.kernels.operators import attend, compiler_options, decoded_of, few_rows_of
from bloomlm.export.weights import Multiply, WeightFormat, many_rows
from bloomlm.model.config import BloomConfig
from bloomlm.model.linear import product, uses_onednn
from bloomlm.runtime.formats.pt2 import graph_file, instruction_set, package_file

_LOG = logging.getLogger(__name__)

_MOST = 1 << 24
"""Upper bound that the dynamic sizes are given; a program has none of its own."""


def trace_all(
    config: BloomConfig, weights: WeightFormat, tensors: Mapping[str, Tensor], *, for_compiler: bool
) -> dict[str, ExportedProgram]:
    """Trace prefill and decode_step.

    Args:
        config: the model's shape.
        weights: how matrices are kept.
        tensors: the weights, in the order that programs take them.
        for_compiler: take the products that are the fastest here; else F.linear for all, which every PyTorch has.
    """
    has_kernels = for_compiler and compiler_options() is not None
    library = partial(
        many_rows,
        decode=decoded_of if has_kernels else weights.decode,
        multiply=_fastest_product() if for_compiler else F.linear,
    )
    few: Product = few_rows_of if has_kernels else library
    attention = attend if has_kernels else slot_attention
    functions: dict[str, tuple[nn.Module, Callable[..., Any]]] = {
        "prefill": (Prefill(config, weights, linear=library, head=few), _prefill_example),
        "decode_step": (DecodeStep(config, weights, linear=few, head=few, attention=attention), _decode_example),
    }
    traced = {}
    with torch.no_grad():
        for name, (module, example) in functions.items():
            arguments, sizes = example(config)
            shapes = (*sizes, dict.fromkeys(tensors))
            traced[name] = torch.export.export(module.eval(), (*arguments, dict(tensors)), dynamic_shapes=shapes)
    return traced


def save_graphs(traced: Mapping[str, ExportedProgram], directory: Path, prefix: str) -> list[str]:
    """Write functions uncompiled, without weights; returns the files' names."""
    for name, program in traced.items():
        program.example_inputs = None  # they hold the weights
        torch.export.save(program, directory / graph_file(prefix, name))
    return [graph_file(prefix, name) for name in traced]


def compile_package(
    traced: Mapping[str, ExportedProgram], directory: Path, prefix: str, on_share: Callable[[float], None]
) -> str:
    """Compile functions into one package; returns the instruction set that it needs.

    Args:
        traced: functions, written for the compiler.
        directory: where the package goes.
        prefix: its name.
        on_share: called after each function with the share of them that is done.

    Raises:
        ProgramError: the compiler fails.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package.package import package_aoti

    level = instruction_set()
    options = {"aot_inductor.package": True, "cpp.march": level, **(compiler_options() or {})}
    files: dict[str, Any] = {}
    try:
        with warnings.catch_warnings(), _onednn_takes_inputs():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch's to itself
            for name, program in traced.items():
                arguments = program.example_inputs
                assert arguments is not None
                files[name] = aot_compile(program.module(), arguments[0], options=options)
                on_share(len(files) / len(traced))
        package_aoti(str(directory / package_file(prefix)), files)
    except Exception as error:  # whatever the compiler stumbles over
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ProgramError(f"the program cannot be compiled: {first[0]}") from error
    return level


def _fastest_product() -> Multiply:
    """oneDNN's where the model itself multiplies with it (see model/linear.py)."""
    return product if uses_onednn(torch.zeros(1, 1), torch.zeros(1, 1)) else F.linear


@contextmanager
def _onednn_takes_inputs() -> Iterator[None]:
    """Let the compiler take oneDNN's product with any weight.

    It puts that operator in itself, for weights that are constants of a program, and insists on constants when it meets
    it. These weights are inputs, because they lie in a mapped file.
    """
    from torch._inductor import mkldnn_lowerings  # noqa: F401  (enters the operator into the table)
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import lowerings
    from torch._inductor.mkldnn_ir import LinearUnary

    if _fastest_product() is not product:
        yield
        return
    operator = torch.ops.mkldnn._linear_pointwise.default
    before = lowerings[operator]
    lowerings[operator] = lambda *arguments: TensorBox.create(LinearUnary.create(*arguments))
    try:
        yield
    finally:
        lowerings[operator] = before


def find_compiler() -> str | None:
    """The C++ compiler that PyTorch would call; None where there is none."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _prefill_example(config: BloomConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    lengths, num_slots = torch.tensor([5, 3]), 5
    tokens, rows, used = torch.arange(8), torch.tensor([0] * 5 + [1] * 3), torch.arange(num_slots)
    slots, starts = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4]), num_slots - lengths
    size_n, size_b, size_s = (Dim(name, min=1, max=_MOST) for name in ("N", "B", "S"))
    cache, cache_sizes = _cache_example(config, 2, size_b)
    sizes = ({0: size_n}, {0: size_n}, {0: size_n}, {0: size_b}, {0: size_b}, {0: size_s}, cache_sizes)
    return (tokens, rows, slots, lengths.cumsum(0) - 1, starts, used, cache), sizes


def _decode_example(config: BloomConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    size_b, size_s = (Dim(name, min=1, max=_MOST) for name in ("B", "S"))
    cache, cache_sizes = _cache_example(config, 3, size_b)
    arguments = (torch.arange(3), torch.tensor([0, 2, 1]), torch.arange(6), cache)
    return arguments, ({0: size_b}, {0: size_b}, {0: size_s}, cache_sizes)


def _cache_example(config: BloomConfig, num_rows: int, size_b: Dim) -> tuple[list[Tensor], list[dict[int, Dim]]]:
    shape = (num_rows, config.n_head, 9, config.head_dim)
    cache = [torch.zeros(shape) for _ in range(2 * config.n_layer)]
    return cache, [{0: size_b, 2: Dim("M", min=1, max=_MOST)}] * len(cache)
