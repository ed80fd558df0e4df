"""ONNX, by torch.onnx, and OpenVINO, by its own converter from the ONNX file.

Both keep matrices in fp32: these runtimes quantise with tools of their own.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from bloomlm.errors import ProgramError
from bloomlm.export.graph import Step
from bloomlm.export.store import named_tensors
from bloomlm.export.weights import Plain, many_rows
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime.formats.onnx import onnx_file
from bloomlm.runtime.formats.openvino import openvino_file
from bloomlm.runtime.step import input_names, output_names

_MOST = 1 << 24


def write_onnx(directory: Path, prefix: str, model: BloomForCausalLM) -> None:
    """Write PREFIX.onnx and, beside it, its weights.

    Args:
        directory: where to.
        prefix: name of the program.
        model: plain, with LoRA, which is added in, or with a prefix, which the runtime puts into the cache.

    Raises:
        ProgramError: torch.onnx's own needs are missing, or it cannot write the model.
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


def write_openvino(directory: Path, prefix: str, model: BloomForCausalLM) -> None:
    """Write PREFIX.xml and PREFIX.bin.

    Args:
        directory, prefix, model: as write_onnx's.

    Raises:
        ProgramError: OpenVINO is missing, or it cannot convert the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise ProgramError(
            "--format openvino needs OpenVINO; install it with pip install 'bloomlm[openvino]'"
        ) from error
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        write_onnx(Path(temporary), prefix, model)
        converted = openvino.convert_model(Path(temporary) / onnx_file(prefix))
        openvino.save_model(converted, directory / openvino_file(prefix), compress_to_fp16=False)


def _step(model: BloomForCausalLM) -> Step:
    weights = Plain(torch.float32)
    library = partial(many_rows, decode=weights.decode)
    step = Step(model.config, weights, linear=library, head=library).eval()
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
