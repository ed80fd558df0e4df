"""The formats of exported programs: one file for each, and their table. bloomlm.export.formats writes the programs."""

from collections.abc import Mapping

from bloomlm.runtime.formats.base import ProgramFormat
from bloomlm.runtime.formats.gguf import GGUF
from bloomlm.runtime.formats.onnx import ONNX
from bloomlm.runtime.formats.openvino import OPENVINO
from bloomlm.runtime.formats.pt2 import PT2

FORMATS: Mapping[str, ProgramFormat] = {form.name: form for form in (PT2, ONNX, OPENVINO, GGUF)}
"""Name -> format."""
