"""The onnx and openvino formats: one function that takes new tokens and a cache, and gives the grown cache back.

Prompts are read one by one, without pads, and decoded together, padded on the left.

Shapes: B rows, T new tokens, S slots in use, L blocks, H heads, K head_dim, P virtual tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bloomlm.errors import BackendMissingError, ProgramError
from bloomlm.runtime.manifest import VIRTUAL, Manifest

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], list[Array]]
"""[tokens [B, T], starts [B], cache ...] -> [logits [B, V], grown cache ...]."""


def onnx_file(prefix: str) -> str:
    """Name of an ONNX file."""
    return f"{prefix}.onnx"


def openvino_file(prefix: str) -> str:
    """Name of an OpenVINO file."""
    return f"{prefix}.xml"


def virtual_file(prefix: str) -> str:
    """Name of the file of a prefix adapter's keys and values."""
    return f"{prefix}.virtual.safetensors"


def input_names(num_blocks: int) -> list[str]:
    """What the function takes."""
    return ["tokens", "starts", *(f"past.{index}" for index in range(2 * num_blocks))]


def output_names(num_blocks: int) -> list[str]:
    """What it gives."""
    return ["logits", *(f"present.{index}" for index in range(2 * num_blocks))]


class StepModel:
    """A program of these formats, as the decoding loop wants it."""

    def __init__(self, manifest: Manifest, directory: Path, prefix: str) -> None:
        """Load the function.

        Raises:
            ProgramError: its runtime cannot load the file.
            BackendMissingError: its runtime is not installed.
        """
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.eos_token_id = manifest.special_tokens.get("eos_token_id")
        open_function = _open_onnx if manifest.format == "onnx" else _open_openvino
        self._run = open_function(directory, prefix, manifest)
        self._virtual = _read_virtual(directory / virtual_file(prefix), manifest)

    def prefill(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple["StepBatch", Tensor]:
        """Read the prompts, one after another."""
        num_slots = self.manifest.num_virtual_tokens + max(map(len, prompts))
        starts = [num_slots - self.manifest.num_virtual_tokens - len(prompt) for prompt in prompts]
        shape = (len(prompts), self.manifest.n_head, num_slots, self.manifest.head_dim)
        cache = [np.zeros(shape, dtype=np.float32) for _ in range(2 * self.manifest.n_layer)]
        logits = []
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            given = [np.array([prompt]), np.zeros(1, dtype=np.int64), *self._virtual]
            first, *grown = self._run(given)
            logits.append(first)
            for target, part in zip(cache, grown, strict=True):
                target[row, :, start:] = part[0]
        batch = StepBatch(self._run, cache, np.array(starts, dtype=np.int64))
        return batch, torch.from_numpy(np.concatenate(logits))


class StepBatch:
    """Rows and their cache."""

    def __init__(self, run: Run, cache: list[Array], starts: Array) -> None:
        self._run = run
        self._cache = cache
        self._starts = starts

    def decode_step(self, tokens: Tensor) -> Tensor:
        """Give every row one more token."""
        logits, *self._cache = self._run([tokens.numpy()[:, None], self._starts, *self._cache])
        return torch.from_numpy(logits)

    def reorder(self, rows: Tensor) -> None:
        """Keep the given rows."""
        chosen = rows.numpy()
        self._cache = [part[chosen] for part in self._cache]
        self._starts = self._starts[chosen]


def _open_onnx(directory: Path, prefix: str, manifest: Manifest) -> Run:
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
    except Exception as error:  # its errors share no base of their own
        raise ProgramError(f"{path} cannot be loaded by onnxruntime: {_first_line(error)}") from error
    names = input_names(manifest.n_layer)

    def run(given: list[Array]) -> list[Array]:
        out: list[Array] = session.run(None, dict(zip(names, given, strict=True)))
        return out

    return run


def _open_openvino(directory: Path, prefix: str, manifest: Manifest) -> Run:
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
    except Exception as error:  # its errors share no base of their own
        raise ProgramError(f"{path} cannot be loaded by OpenVINO: {_first_line(error)}") from error
    # a copy: the arrays it gives are its own memory, which the next step overwrites
    return lambda given: [np.array(part) for part in request.infer(given).values()]


def _read_virtual(path: Path, manifest: Manifest) -> list[Array]:
    """The cache before a prompt: virtual tokens' keys and values by block, [1, H, P, K]; P may be 0."""
    if not manifest.num_virtual_tokens:
        shape = (1, manifest.n_head, 0, manifest.head_dim)
        return [np.zeros(shape, dtype=np.float32) for _ in range(2 * manifest.n_layer)]
    try:
        with safe_open(path, framework="np") as file:
            virtual = file.get_tensor(VIRTUAL)
    except (OSError, SafetensorError) as error:
        raise ProgramError(f"{path} cannot be opened as the virtual tokens of this program: {error}") from error
    return [np.ascontiguousarray(part)[None] for part in virtual.reshape(-1, *virtual.shape[2:])]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
