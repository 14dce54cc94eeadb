"""Exporters, one file each: from a quantized model to a file.

An exporter writes to the given path and nothing else; the pipeline passes a temporary path, verifies the file, and
renames it. To add one, write ``saqcli/export/NAME.py`` and add a line to the table below.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from saqcli.export.exact import ExactExporter
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.qdq import QdqExporter, VnniExporter
from saqcli.export.qonnx import QonnxExporter
from saqcli.export.safetensors import SafetensorsExporter
from saqcli.export.trt import TrtExporter


class Exporter(Protocol):
    """Writes one kind of file."""

    @property
    def suffix(self) -> str:
        """The suffix of its files."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """Codes of hazards (``verify.hazards``) that its files may have; the verdict names them as conditions."""

    def export(self, model: nn.Module, example: Tensor, path: Path, metadata: ModelMetadata) -> None:
        """Write the quantized ``model``, in eval mode, to ``path``."""


EXPORTERS: dict[str, Callable[[], Exporter]] = {
    "safetensors": SafetensorsExporter,
    "qdq": QdqExporter,
    "qdq-vnni": VnniExporter,
    "exact": ExactExporter,
    "trt": TrtExporter,
    "qonnx": QonnxExporter,
}
STYLES = tuple(name for name in EXPORTERS if name != "safetensors")  # of ONNX files

__all__ = ["EXPORTERS", "STYLES", "Exporter", "ModelMetadata"]
