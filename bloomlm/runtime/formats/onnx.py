"""The onnx format, run by onnxruntime."""

from pathlib import Path

import torch

from bloomlm.errors import BackendMissingError, ProgramError, first_line
from bloomlm.generation.language_model import LanguageModel
from bloomlm.runtime.formats.base import ProgramFormat
from bloomlm.runtime.manifest import Manifest
from bloomlm.runtime.step import Array, StepModel, input_names


def onnx_file(prefix: str) -> str:
    """Name of the file with the function."""
    return f"{prefix}.onnx"


def weights_file(prefix: str) -> str:
    """Name of the file with the weights, as torch.onnx names it."""
    return f"{prefix}.onnx.data"


def _open(manifest: Manifest, directory: Path, prefix: str) -> LanguageModel:
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendMissingError(
            "backend onnx_runtime needs onnxruntime; install it with pip install 'bloomlm[onnx]'"
        ) from error
    path = directory / onnx_file(prefix)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        raise ProgramError(f"{path} cannot be loaded by onnxruntime: {first_line(error)}") from error
    names = input_names(manifest.n_layer)

    def run(given: list[Array]) -> list[Array]:
        out: list[Array] = session.run(None, dict(zip(names, given, strict=True)))
        return out

    return StepModel(manifest, directory, prefix, run)


ONNX = ProgramFormat(name="onnx", backend="onnx_runtime", large_file=weights_file, open=_open)
