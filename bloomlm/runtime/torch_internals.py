"""The private parts of PyTorch that programs need. No other file imports from torch._inductor or torch._C.

| here | private names | what for |
|---|---|---|
| open_package | torch._C._aoti's handles of tensors | to call compiled functions by their C interface |
| compile_package | torch._inductor.aot_compile, package.package_aoti | several functions in one package |
| c_function_options | torch._inductor.config.aot_inductor | C++ of our own as operators of a compiled program |
| find_compiler | torch._inductor.config.cpp.cxx | the C++ compiler that PyTorch would call |

If a PyTorch lacks the handles or the compiler, open_package and compile_package raise ProgramError. If its compiler
lacks the option for C functions, c_function_options returns None, and programs call libraries instead. Importing
torch._inductor takes a second, so every import is inside its function.
"""

import ctypes
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from ctypes import byref, c_char_p, c_size_t, c_void_p
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from torch import Tensor
from torch.export import ExportedProgram

from bloomlm.errors import ProgramError, first_line


def open_package(path: Path, name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a compiled function: from a list of all its input tensors, which must be contiguous, to its outputs.

    Other threads of Python run while it computes. PyTorch's own loader, AOTIModelPackageLoader, keeps the interpreter
    locked (https://github.com/pytorch/pytorch/issues/197516), so a server could not answer during a step. The
    function's C interface is that of torch/csrc/inductor/aoti_runtime/interface.h.

    Args:
        path: a package that compile_package wrote.
        name: name of the function in the package.

    Raises:
        ProgramError: the function cannot be loaded.
    """
    try:
        from torch._C._aoti import alloc_tensors_by_stealing_from_void_ptrs, unsafe_alloc_void_ptrs_from_tensors

        library = _load_library(path, name)
        container, num_outputs = c_void_p(), c_size_t()
        _check(library.AOTInductorModelContainerCreateWithDevice(byref(container), c_size_t(1), b"cpu", None))
        _check(library.AOTInductorModelContainerGetNumOutputs(container, byref(num_outputs)))
    except (AttributeError, ImportError, OSError, RuntimeError, StopIteration, BadZipFile) as error:
        raise ProgramError(f"{path} cannot be loaded: {first_line(error)}") from error
    address_of, capsule_of = _capsules()
    outputs_type = c_void_p * num_outputs.value

    def run(inputs: list[Tensor]) -> list[Tensor]:
        addresses = [address_of(capsule, None) for capsule in unsafe_alloc_void_ptrs_from_tensors(inputs)]
        handles, outputs = (c_void_p * len(addresses))(*addresses), outputs_type()
        # The call takes over the handles of the inputs, and hands over those of the outputs.
        _check(
            library.AOTInductorModelContainerRun(
                container, handles, c_size_t(len(addresses)), outputs, num_outputs, None, None
            )
        )
        return alloc_tensors_by_stealing_from_void_ptrs([capsule_of(address, None, None) for address in outputs])

    return run


def _load_library(path: Path, name: str) -> ctypes.CDLL:
    """The library of one function in a package. Calls of a CDLL release Python's lock."""
    with ZipFile(path) as package, tempfile.TemporaryDirectory() as directory:
        members = package.namelist()
        member = next(each for each in members if f"/aotinductor/{name}/" in each and each.endswith(".so"))
        return ctypes.CDLL(package.extract(member, directory))  # it stays loaded without its file


def _check(code: int) -> None:
    if code:
        raise RuntimeError("the compiled function failed; PyTorch has written the reason to standard error")


def _capsules() -> tuple[Callable[[Any, None], int], Callable[[int | None, None, None], Any]]:
    """Capsule -> the address in it, and address -> capsule, by Python's C interface."""
    address_of = ctypes.PYFUNCTYPE(c_void_p, ctypes.py_object, c_char_p)(("PyCapsule_GetPointer", ctypes.pythonapi))
    new = ctypes.PYFUNCTYPE(ctypes.py_object, c_void_p, c_char_p, c_void_p)(("PyCapsule_New", ctypes.pythonapi))
    return address_of, new


def compile_package(
    functions: Mapping[str, ExportedProgram],
    path: Path,
    *,
    instruction_set: str,
    options: Mapping[str, Any],
    numbers_of_thread: Mapping[str, int],
    on_share: Callable[[float], None],
) -> None:
    """Compile functions into one package.

    Args:
        functions: traced functions by name, with example inputs.
        path: the package to write.
        instruction_set: the instruction set, as GCC's -march names it.
        options: more options of the compiler, for example from c_function_options.
        numbers_of_thread: the fewest numbers that are worth a thread in the compiler's own loops, by function, judged
            by the example inputs; the compiler's default for others.
        on_share: called after each function with the share of them that is done.

    Raises:
        ProgramError: the compiler fails.
    """
    files: dict[str, Any] = {}
    options = {"aot_inductor.package": True, "cpp.march": instruction_set, **options}
    if instruction_set == "x86-64-v3":
        options["cpp.simdlen"] = 256  # the compiler would use the longest vectors of this machine
    try:
        from torch._inductor import aot_compile
        from torch._inductor.package.package import package_aoti

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's use of its own old names
            for name, program in functions.items():
                arguments = program.example_inputs
                assert arguments is not None
                chunk = {"cpp.min_chunk_size": numbers_of_thread[name]} if name in numbers_of_thread else {}
                files[name] = aot_compile(program.module(), arguments[0], options=options | chunk)
                on_share(len(files) / len(functions))
        package_aoti(str(path), files)
    except Exception as error:  # the compiler raises errors of every kind
        raise ProgramError(f"the program cannot be compiled: {first_line(error)}") from error


def c_function_options(operators: Sequence[Any], source: str) -> Mapping[str, Any] | None:
    """Compiler options by which compiled code calls C functions for operators.

    Args:
        operators: overloads of custom operators, such as torch.ops.bloomlm.attend.default.
        source: C++ that defines aoti_torch_cpu_NAME with C linkage for each operator.

    Returns:
        The options; None if this PyTorch has no such option.
    """
    from torch._inductor import config

    if not hasattr(config.aot_inductor, "custom_ops_to_c_shims"):
        return None
    # the compiler writes each text between `extern` and `;` inside a block of extern "C"
    definitions = f'"C++" {{\n{source}\n}}'
    return {
        "aot_inductor.custom_ops_to_c_shims": {operator: [] for operator in operators} | {operators[0]: [definitions]},
        # the optimisation level of the file that the definitions become part of
        "aot_inductor.compile_wrapper_opt_level": "O3",
    }


def find_compiler() -> str | None:
    """The C++ compiler that PyTorch would call; None where there is none."""
    from torch._inductor import config

    candidates = config.cpp.cxx if isinstance(config.cpp.cxx, (tuple, list)) else (config.cpp.cxx,)
    return next((found for name in candidates if name and (found := shutil.which(name))), None)
