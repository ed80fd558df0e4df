"""The openvino format: the ONNX file, converted by OpenVINO.

Matrices stay in fp32, because OpenVINO has its own tools for quantisation.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bloomlm.errors import ProgramError
from bloomlm.export.formats.base import ExportFormat, ExportJob
from bloomlm.export.formats.onnx import write_onnx, write_virtual_tokens
from bloomlm.runtime.formats.onnx import onnx_file
from bloomlm.runtime.formats.openvino import openvino_file


def _write(job: ExportJob, directory: Path) -> Mapping[str, Any]:
    """Write PREFIX.xml and PREFIX.bin."""
    job.on_stage("tracing", 0.0)
    try:
        import openvino
    except ImportError as error:
        raise ProgramError(
            "--format openvino needs OpenVINO; install it with pip install 'bloomlm[openvino]'"
        ) from error
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        write_onnx(Path(temporary), job.prefix, job.model)
        converted = openvino.convert_model(Path(temporary) / onnx_file(job.prefix))
        openvino.save_model(converted, directory / openvino_file(job.prefix), compress_to_fp16=False)
    write_virtual_tokens(directory, job.prefix, job.model)
    return {}


OPENVINO = ExportFormat(name="openvino", write=_write, dtypes=(torch.float32,), quantizations=("none",))
