"""The formats of exported programs: one file for each, and their table. bloomlm.runtime.formats opens the programs."""

from collections.abc import Mapping

from bloomlm.export.formats.base import ExportFormat
from bloomlm.export.formats.gguf import GGUF
from bloomlm.export.formats.onnx import ONNX
from bloomlm.export.formats.openvino import OPENVINO
from bloomlm.export.formats.pt2 import PT2

FORMATS: Mapping[str, ExportFormat] = {form.name: form for form in (PT2, ONNX, OPENVINO, GGUF)}
"""Name -> format."""
