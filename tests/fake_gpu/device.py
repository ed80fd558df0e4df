"""A CUDA device without a GPU: tensors that have a device, a shape and a precision, and no values.

FakeTensorMode (https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html) refuses operations that mix devices or
precisions as a GPU would. A PyTorch that was built without CUDA lacks the object that switches devices, so a few lines of
C++ register PyTorch's own empty one. autograd's engine still does not run on such a device, so backward passes are left
out: they follow the devices of the forward pass, except those of bloomlm's own functions, which are called directly.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def register_guard(directory: Path) -> None:
    """Let this process compute with fake CUDA tensors."""
    if torch.version.cuda is not None:
        return
    library, source, root = directory / "guard.so", directory / "guard.cpp", Path(torch.__file__).parent
    source.write_text(GUARD)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
    ctypes.CDLL(str(library))


class _Waits(TorchDispatchMode):
    """Lists the operations for which the host waits for the GPU, and makes up values for their results."""

    def __init__(self, num_found: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self._num_found = num_found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            if args[0].is_cuda and self.names[-1:] != ["item"]:  # fake tensors do tolist() number by number
                self.names.append("item")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        if func is torch.ops.aten.nonzero.default and args[0].is_cuda:
            self.names.append("nonzero")
            return args[0].new_empty((self._num_found, args[0].dim()), dtype=torch.int64)
        if func is torch.ops.aten._unique2.default:
            if args[0].is_cuda:
                self.names.append("unique")
            return tuple(args[0].new_empty(self._num_found, dtype=torch.int64) for _ in range(3))
        result = func(*args, **kwargs)
        if func in _COPIES and args[0].is_cuda != result.is_cuda and not kwargs.get("non_blocking"):
            self.names.append("copy from the GPU" if args[0].is_cuda else "copy to the GPU")
        return result


def _enter_no_grad(context: torch.inference_mode) -> None:
    context.prev = torch.is_grad_enabled()
    torch.set_grad_enabled(not context.mode)


def _exit_no_grad(context: torch.inference_mode, *_: object) -> None:
    torch.set_grad_enabled(context.prev)


def to_fake_gpu(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the tensors of a model by fake ones on the GPU; Module.to cannot swap them."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype, device="cuda")
                module._parameters[name] = nn.Parameter(made, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")


def _made_up_gradients(model: nn.Module) -> Any:
    """What stands for Tensor.backward: every parameter that learns has a gradient."""

    def backward(loss: Tensor) -> None:
        assert loss.is_cuda
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)

    return backward


@contextmanager
def fake_gpu(*, num_found: int = 5, allow_real: bool = False) -> Iterator[list[str]]:
    """Tensors in this context are fake, and CUDA seems to be there, with autocast; no GPU is asked for anything.

    Args:
        num_found: number of rows that every nonzero() on the GPU finds, since that depends on values.
        allow_real: whether tensors with values, as a file gives them, may be copied to the GPU.

    Yields:
        What the host waited for the GPU for, in order.
    """
    waits = _Waits(num_found)
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        # fake tensors cannot be made on a GPU in inference mode
        mock.patch.object(torch.inference_mode, "__enter__", _enter_no_grad),
        mock.patch.object(torch.inference_mode, "__exit__", _exit_no_grad),
        FakeTensorMode(allow_non_fake_inputs=allow_real),
        waits,
    ):
        yield waits.names


@contextmanager
def made_up_gradients(model: nn.Module) -> Iterator[None]:
    """In this context backward() gives every parameter of the model that learns a gradient without computing it."""
    with mock.patch.object(Tensor, "backward", _made_up_gradients(model)):
        yield
