"""The openvino format, run by OpenVINO."""

from pathlib import Path

import numpy as np
import torch

from bloomlm.errors import BackendMissingError, ProgramError, first_line
from bloomlm.generation.language_model import LanguageModel
from bloomlm.runtime.formats.base import ProgramFormat
from bloomlm.runtime.manifest import Manifest
from bloomlm.runtime.step import StepModel


def openvino_file(prefix: str) -> str:
    """Name of the file with the function."""
    return f"{prefix}.xml"


def weights_file(prefix: str) -> str:
    """Name of the file with the weights, as OpenVINO names it."""
    return f"{prefix}.bin"


def _open(manifest: Manifest, directory: Path, prefix: str) -> LanguageModel:
    try:
        import openvino
    except ImportError as error:
        raise BackendMissingError(
            "backend openvino needs OpenVINO; install it with pip install 'bloomlm[openvino]'"
        ) from error
    path = directory / openvino_file(prefix)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    try:
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    except Exception as error:  # OpenVINO's errors have no common base class
        raise ProgramError(f"{path} cannot be loaded by OpenVINO: {first_line(error)}") from error
    # copies, because the next step overwrites the memory of the arrays that OpenVINO returns
    return StepModel(
        manifest, directory, prefix, lambda given: [np.array(part) for part in request.infer(given).values()]
    )


OPENVINO = ProgramFormat(name="openvino", backend="openvino", large_file=weights_file, open=_open)
