"""The private parts of PyTorch that programs need. No other file imports from torch._inductor or torch._C.

| here | private names | what for |
|---|---|---|
| open_package | torch._C._aoti.AOTIModelPackageLoader | to run compiled functions without the compiler's Python code |
| compile_package | torch._inductor.aot_compile, package.package_aoti | several functions in one package |
| c_function_options | torch._inductor.config.aot_inductor | C++ of our own as operators of a compiled program |
| find_compiler | torch._inductor.config.cpp.cxx | the C++ compiler that PyTorch would call |

If a PyTorch lacks the loader or the compiler, open_package and compile_package raise ProgramError. If its compiler
lacks the option for C functions, c_function_options returns None, and programs call libraries instead. Importing
torch._inductor takes a second, so every import is inside its function.
"""

import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from bloomlm.errors import ProgramError, first_line


def open_package(path: Path, name: str) -> Callable[[list[Tensor]], list[Tensor]]:
    """Load a compiled function: from a list of all its input tensors, which must be contiguous, to its outputs.

    Args:
        path: a package that compile_package wrote.
        name: name of the function in the package.

    Raises:
        ProgramError: the function cannot be loaded.
    """
    try:
        from torch._C._aoti import AOTIModelPackageLoader

        run: Callable[[list[Tensor]], list[Tensor]] = AOTIModelPackageLoader(str(path), name, False, 1, -1).boxed_run
    except (ImportError, RuntimeError) as error:
        raise ProgramError(f"{path} cannot be loaded: {first_line(error)}") from error
    return run


def compile_package(
    functions: Mapping[str, ExportedProgram],
    path: Path,
    *,
    instruction_set: str,
    options: Mapping[str, Any],
    on_share: Callable[[float], None],
) -> None:
    """Compile functions into one package.

    Args:
        functions: traced functions by name, with example inputs.
        path: the package to write.
        instruction_set: the instruction set, as GCC's -march names it.
        options: more options of the compiler, for example from c_function_options.
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
                files[name] = aot_compile(program.module(), arguments[0], options=options)
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
