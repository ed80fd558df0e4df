"""Read the weights of an exported Paddle program: consecutive tensors in .pdiparams, their names in .pdiparams.info.

A tensor is: version (u32 0); number of LoD levels (u64) and each level (u64 size in bytes, data); version (u32 0); size
of the description (i32); the description, a protobuf of data type (field 1) and dimensions (field 2); the numbers.
The tensors are in the order of their sorted variable names.

Source: Paddle's DenseTensor serialisation (SerializeToStream, TensorToStream) and framework.proto, VarType.
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

from bloomlm.checkpoint.paddle.lazy import StoredFile, stored_array
from bloomlm.checkpoint.paddle.unpickler import load_paddle_pickle
from bloomlm.checkpoint.tensor_reader import LazyTensor
from bloomlm.errors import CheckpointError

# VarType.Type of framework.proto
DTYPES = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
}
MAX_DESCRIPTION_BYTES = 4096
WRAPPER_PREFIX = "model."  # of a base model inside a LoRA model


def read_program_weights(path: Path) -> dict[str, LazyTensor]:
    """Open an exported program's weights; no tensor is read.

    Args:
        path: a .pdiparams file; its .pdiparams.info lies beside it.

    Returns:
        Structured name, or variable name where the info has no other, -> tensor as stored.

    Raises:
        CheckpointError: the info is missing, or a file is damaged, or the files do not belong together.
    """
    names = _read_names(path.with_name(path.name + ".info"))
    tensors = list(_stored_tensors(StoredFile(path)))
    # parameters that the program does not use, such as LoRA's after it was merged, are named but not stored
    if len(names) != len(tensors):
        names = {variable: name for variable, name in names.items() if ".lora_" not in name}
    if len(names) != len(tensors):
        raise CheckpointError(
            f"{path} holds {len(tensors)} tensors and {path.name}.info names {len(names)}: they belong to different "
            "exports; put the files of one export together"
        )
    program: dict[str, LazyTensor] = {
        names[variable]: tensor for variable, tensor in zip(sorted(names), tensors, strict=True)
    }
    if lora := [name for name in program if ".lora_" in name]:
        raise CheckpointError(
            f"{path} holds the tensors of a LoRA that was not merged ({lora[0]}, ...), without their scaling; export "
            "the model with its adapter merged, or read the base model and the adapter"
        )
    return program


def _read_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: it names the tensors of {path.stem}, which cannot be told apart without it"
        )
    content = load_paddle_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(values, dict) for values in content.values()):
        raise CheckpointError(f"{path} is not a table of variables; expected what paddle.jit.save writes")
    return {
        str(variable): str(values.get("structured_name", variable)).removeprefix(WRAPPER_PREFIX)
        for variable, values in content.items()
    }


def _stored_tensors(stored: StoredFile) -> Iterator[LazyTensor]:
    offset = 0
    while offset < stored.size_bytes:
        tensor, offset = _stored_tensor(stored, offset)
        yield tensor


def _stored_tensor(stored: StoredFile, offset: int) -> tuple[LazyTensor, int]:
    """The tensor that begins at an offset, and the offset of its end."""
    version, levels = _unpack(stored, "<IQ", offset)
    offset += 12
    for _ in range(min(levels, stored.size_bytes)):
        offset += 8 + _unpack(stored, "<Q", offset)[0]
    tensor_version, length = _unpack(stored, "<Ii", offset)
    offset += 8
    if version or tensor_version or not 0 < length <= MAX_DESCRIPTION_BYTES:
        raise CheckpointError(
            f"{stored.path}: no tensor begins at byte {offset - 8} (versions {version} and {tensor_version}, a "
            f"description of {length} bytes); expected a .pdiparams file of version 0"
        )
    dtype, shape = _parse_description(stored, _bytes(stored, offset, length))
    offset += length
    end = offset + math.prod(shape) * dtype.itemsize
    if end > stored.size_bytes:
        raise CheckpointError(
            f"{stored.path} is cut short: a tensor of shape {list(shape)} ({dtype}) ends at byte {end} of "
            f"{stored.size_bytes}; fetch it again"
        )
    return stored_array(stored, offset, shape, dtype), end


def _parse_description(stored: StoredFile, description: bytes) -> tuple[torch.dtype, tuple[int, ...]]:
    """Data type and dimensions; dimensions may be packed (wire type 2) or not (wire type 0)."""
    data_type, shape, place = -1, [], 0
    try:
        while place < len(description):
            tag, place = _varint(description, place)
            value, place = _varint(description, place)
            match tag >> 3, tag & 7:
                case 1, 0:
                    data_type = value
                case 2, 0:
                    shape.append(value)
                case 2, 2:
                    end = place + value
                    while place < end:
                        size, place = _varint(description, place)
                        shape.append(size)
                case _:
                    raise ValueError(f"field {tag >> 3} of wire type {tag & 7}")
        if data_type not in DTYPES or any(size >= 1 << 63 for size in shape):
            raise ValueError(f"data type {data_type}, shape {shape}")
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{stored.path}: the description of a tensor is invalid: {error}") from error
    return DTYPES[data_type], tuple(shape)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _unpack(stored: StoredFile, form: str, offset: int) -> tuple[int, ...]:
    return struct.unpack(form, _bytes(stored, offset, struct.calcsize(form)))


def _bytes(stored: StoredFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    stored.read_into(memoryview(data), offset)
    return bytes(data)
