"""The C++ of this directory as one text, for compilers."""

from collections.abc import Sequence
from importlib.resources import files

_BEFORE = (
    "level.h",
    "tensors.h",
    "matrix.h",
    "small_products.h",
    "product.h",
    "scalar.h",
    "attend.h",
    "causal.h",
    "gelu.h",
    "adamw.h",
)
_AFTER = ("few_rows.h", "many_rows.h", "product.cpp", "attend.cpp")
_OF_MODEL = ("pieces.h", "block.cpp", "gradient.cpp", "causal_operands.h", "causal.cpp", "gelu.cpp", "adamw.cpp")
"""The operators that only the model uses."""
_LEVELS = {
    "avx2": ("avx2,fma,f16c", "vectors_256.h"),
    "avxvnni": ("avx2,fma,f16c,avxvnni", "vectors_256.h"),
    "avx512": ("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni", "vectors_512.h"),
    "avx512_bf16": ("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16", "vectors_512.h"),
}
"""Namespace of the code for a level of instructions -> the instructions, as GCC names them, and their vectors."""
_OF_EACH_LEVEL = ("finish_rows.h", "rows.h", "attend_rows.h", "causal_rows.h", "gelu_rows.h", "adamw_rows.h")


def cpp_source() -> str:
    """The C++ of compiled programs as one text."""
    return _assembled(_AFTER)


def library_source() -> str:
    """The C++ as a library for PyTorch, with the operators that only the model uses."""
    text = _assembled((*_AFTER, *_OF_MODEL, "library.cpp"))
    # the compiler of programs includes this header itself
    return f"#include <torch/csrc/inductor/aoti_runtime/utils.h>\n{text}"


def _assembled(after: Sequence[str]) -> str:
    """All files, with the code of each level of instructions in turn, and then some."""
    levels = []
    for name, (instructions, vectors) in _LEVELS.items():
        levels += [
            "#pragma GCC push_options",
            f'#pragma GCC target("{instructions}")',
            "#define VNNI" if "vnni" in instructions else "#undef VNNI",
            "#define BFLOAT16" if "bf16" in instructions else "#undef BFLOAT16",
            f"namespace bloomlm::{name} {{",
            *_lines(vectors, *_OF_EACH_LEVEL),
            "}",
            "#pragma GCC pop_options",
        ]
    return "\n".join([*_lines(*_BEFORE), *levels, *_lines(*after)])


def _lines(*names: str) -> list[str]:
    """The lines of files, without the includes of each other."""
    directory = files("bloomlm.kernels")
    lines = [line for name in names for line in directory.joinpath(name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if not line.startswith('#include "')]
