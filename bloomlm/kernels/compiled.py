"""The C++ as operators of this process: compiled on first use, kept in a cache directory, and loaded from there.

The library is ~/.cache/bloomlm/kernels/HASH.so (see files/cache_directory.py). The hash covers the source, the compiler
and PyTorch, so none of them meets a library that was made for another one. A library appears under its name when it is
complete; processes that compile at the same time replace each other's equal files. PyTorch's stable interface for
libraries (library.cpp) keeps calls short: 2 microseconds, where oneDNN's operator takes 20 to prepare.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bloomlm.errors import CheckpointError
from bloomlm.files.atomic import atomic_write, directory_beside
from bloomlm.files.cache_directory import default_cache_dir
from bloomlm.kernels.source import library_source

_LOG = logging.getLogger(__name__)

_OPTIONS = ("-std=c++17", "-O3", "-march=x86-64-v3", "-fopenmp", "-fPIC", "-shared")
_COMPILE_SECONDS = 300


@dataclass(frozen=True)
class Operators:
    """The operators, for contiguous tensors on the CPU, outside autograd."""

    product: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]
    """x W^T + b, or with True its GELU -> [N, out] in x's dtype.

    It takes x [N, in] in fp32 or bf16, a weight [out, in] in fp32, fp16 or bf16, and a bias [out] in fp32 or bf16.
    """
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    """Attention of new tokens over the slots of their rows up to their own -> fp32 [B, H * K].

    It takes queries [B, H, K] in fp32, keys and values [R, H, M, K] in fp32 or bf16 with the same strides (all three
    may be views whose last dimension alone is contiguous), ALiBi's slopes [H], and the int64 row and slot [B] of each
    token.
    """
    decode_block: Callable[..., Tensor]
    """A block of the model for one new token of each row of a cache, which receives keys and values -> [B, D].

    All numbers are in fp32 or all in bf16, except ALiBi's slopes in fp32. model/plain_blocks.py calls it.
    """
    gelu: "GeluOperators"
    norm: Callable[[Tensor], float]
    """Of a tensor in fp32 or bf16, added up in fp64."""
    adamw: Callable[..., None]
    """(gradient, master, mean, squares, weight, kept, beta1, beta2, step_size, inverse_root, epsilon) updates masters
    and both moments in fp32, and weights in bf16 if there are any, by a gradient in fp32 or bf16; kernels/adamw.h has
    the constants."""
    causal: "CausalOperators | None" = None
    """None: PyTorch lacks the products that they need."""
    weight_gradient: Callable[[Tensor, Tensor, Tensor], None] | None = None
    """(gradients, x, result) writes the product of the transposed gradients [N, out], whose rows may be further apart,
    with x [N, in] into result [out, in], all in fp32. None: as above."""


@dataclass(frozen=True)
class GeluOperators:
    """GELU in its tanh form, for contiguous tensors in fp32 or bf16, into tensors that exist."""

    forward: Callable[[Tensor, Tensor], None]
    """(x, out)."""
    gradient: Callable[[Tensor, Tensor, Tensor], None]
    """(grad_out, x, grad_x)."""


@dataclass(frozen=True)
class CausalOperators:
    """Causal attention of whole documents, into tensors that exist.

    Fused [N, H, 3, K] is in fp32 or bf16, virtuals [2, H, P, K] and slopes [H] in fp32, starts of documents [D + 1] in
    int64.
    """

    forward: Callable[..., None]
    """(fused, virtuals, slopes, starts, out, log_sums) writes out [N, H * K], as fused, and log_sums [H, N] in fp32."""
    gradient: Callable[..., None]
    """(grad_out, fused, virtuals, slopes, starts, out, log_sums, grad_fused, grad_virtuals) writes the last two:
    grad_fused with the shape of fused, and grad_virtuals [D, 2, H, P, K], one for each document."""


def operators() -> Operators | None:
    """The operators if this process has loaded them; see load_operators."""
    return _loaded


_loaded: Operators | None = None


@cache
def load_operators() -> None:
    """Load the operators, and compile them if they are not in the cache, which takes some ten seconds.

    Where they cannot be had (no x86 processor with AVX2, no compiler, a directory that cannot be written, an error of
    the compiler), one line of the log says why, and `operators` stays None.
    """
    global _loaded
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return
    try:
        torch.ops.load_library(_library())
    except (OSError, subprocess.SubprocessError, CheckpointError) as error:
        _LOG.warning("PyTorch's operators are used, which are slower: %s", _reason(error))
        return
    namespace = torch.ops.bloomlm_kernels
    _loaded = Operators(
        product=namespace.product.default,
        attend=namespace.attend.default,
        decode_block=namespace.decode_block.default,
        gelu=GeluOperators(namespace.gelu.default, namespace.gelu_gradient.default),
        norm=namespace.norm.default,
        adamw=namespace.adamw.default,
    )
    one = torch.zeros(1, 1, 3, 1)
    try:
        namespace.causal(
            one, one.new_empty(2, 1, 0, 1), one.new_zeros(1), torch.tensor([0, 1]), one[0, 0, :1], one[0, 0, 1:]
        )
    except RuntimeError as error:
        _LOG.info("attention of whole documents uses PyTorch's operator: %s", error)
        return
    causal = CausalOperators(namespace.causal.default, namespace.causal_gradient.default)
    _loaded = replace(_loaded, causal=causal, weight_gradient=namespace.weight_gradient.default)


def load_operators_for(device: torch.device) -> None:
    """Load the operators if this is a CPU."""
    if device.type == "cpu":
        load_operators()


def _library() -> Path:
    """The compiled library.

    Raises:
        OSError: there is no compiler, or its temporary files cannot be written.
        subprocess.SubprocessError: the compiler fails.
        CheckpointError: the library cannot be written.
    """
    names = shlex.split(os.environ.get("CXX", "g++"))
    compiler = shutil.which(names[0]) if names else None
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler {' '.join(names)!r} was found; install g++, or set CXX")
    command = [compiler, *names[1:], *_OPTIONS]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS).stdout
    source = library_source()
    key = hashlib.sha256(repr((source, command, version, torch.__version__)).encode()).hexdigest()[:32]
    path = default_cache_dir() / "kernels" / f"{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        _compile(command, source, path)
        _LOG.warning("compiled operators in %.0f s into %s", time.monotonic() - started, path)
    return path


def _compile(command: list[str], source: str, path: Path) -> None:
    package = Path(torch.__file__).parent
    with directory_beside(path) as temporary:
        text, library = temporary / "kernels.cpp", temporary / "kernels.so"
        text.write_text(source, encoding="utf-8")
        places = [f"-I{package / 'include'}", f"-L{package / 'lib'}", "-ltorch_cpu"]
        arguments = [*command, str(text), *places, "-o", str(library)]
        subprocess.run(arguments, capture_output=True, check=True, timeout=_COMPILE_SECONDS)
        content = library.read_bytes()
    # Its name comes last: a process that finds it does not look for what a killed one has left.
    atomic_write(path, content)


def _reason(error: Exception) -> str:
    """One line about an error."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = error.stderr.decode(errors="replace").splitlines()
    found = next((line for line in lines if "error" in line), f"exit status {error.returncode}")
    return f"{error.cmd[0]} fails: {found}"
