"""The onnx format, written by torch.onnx.

Matrices stay in fp32, because ONNX runtimes have their own tools for quantisation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from bloomlm.checkpoint.safetensors_file import write_safetensors
from bloomlm.errors import ProgramError
from bloomlm.export.formats.base import ExportFormat, ExportJob
from bloomlm.export.graph import Step, library_product
from bloomlm.export.weight_formats import Plain
from bloomlm.export.weights import named_tensors, virtual_tokens
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime.formats.onnx import onnx_file
from bloomlm.runtime.manifest import VIRTUAL
from bloomlm.runtime.step import input_names, output_names, virtual_file

_MOST = 1 << 24


def write_onnx(directory: Path, prefix: str, model: BloomForCausalLM) -> None:
    """Write PREFIX.onnx and its weights into a directory; a prefix adapter's virtual tokens are not part of them.

    Raises:
        ProgramError: a library that torch.onnx needs is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ProgramError(
            f"writing ONNX needs {error.name}; install it with pip install 'bloomlm[onnx]' (or [openvino])"
        ) from error
    step = _step(model)
    arguments, shapes = _example(model.config)
    num_blocks = model.config.n_layer
    with torch.no_grad():
        program = torch.onnx.export(
            step,
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=input_names(num_blocks),
            output_names=output_names(num_blocks),
            verbose=False,
        )
    assert program is not None
    program.save(str(directory / onnx_file(prefix)), external_data=True)


def _step(model: BloomForCausalLM) -> Step:
    weights = Plain(torch.float32)
    step = Step(model.config, weights, product=library_product).eval()
    for name, tensor in named_tensors(model, weights):
        name, _, layer = name.partition("@")
        held = tensor.detach().float()
        if not layer:
            step.tensors[name] = held
            continue
        blocks = step.tensors.setdefault(name, [])
        assert isinstance(blocks, list)
        blocks.append(held)
    return step


def _example(config: BloomConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    rows, new, slots = Dim("B", min=1, max=_MOST), Dim("T", min=1, max=_MOST), Dim("S", min=0, max=_MOST)
    cache: list[Tensor] = [torch.zeros(2, config.n_head, 4, config.head_dim) for _ in range(2 * config.n_layer)]
    arguments = (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([0, 2]), cache)
    return arguments, ({0: rows, 1: new}, {0: rows}, [{0: rows, 2: slots}] * len(cache))


def write_virtual_tokens(directory: Path, prefix: str, model: BloomForCausalLM) -> None:
    """Write the keys and values that a prefix adapter puts before every prompt; nothing without such an adapter."""
    virtual = virtual_tokens(model)
    if virtual is not None:
        write_safetensors(directory / virtual_file(prefix), {VIRTUAL: virtual}, {})


def _write(job: ExportJob, directory: Path) -> Mapping[str, Any]:
    job.on_stage("tracing", 0.0)
    write_onnx(directory, job.prefix, job.model)
    write_virtual_tokens(directory, job.prefix, job.model)
    return {}


ONNX = ExportFormat(name="onnx", write=_write, dtypes=(torch.float32,), quantizations=("none",))
