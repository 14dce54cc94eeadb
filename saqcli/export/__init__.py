"""Exporters: from a quantized model to a file, of tensors or in one of the ONNX styles.

An exporter writes to the given path and nothing else; the pipeline passes a temporary path, verifies the file, and
renames it. To add a style, write ``saqcli/export/NAME.py`` with a class derived from ``OnnxStyle``, which declares what
the proof and the commands need, and add a line to the table of styles. The contract tests run over that table.
"""

from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from saqcli.export.exact import ExactExporter
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.ort import OrtExporter, OrtVnniExporter
from saqcli.export.qdq import QdqExporter, VnniExporter
from saqcli.export.qonnx import QonnxExporter
from saqcli.export.safetensors import SafetensorsExporter
from saqcli.export.style import OnnxStyle, declaration_problem
from saqcli.export.trt import TrtExporter
from saqcli.plugins import Plugins


class Exporter(Protocol):
    """Writes one kind of file."""

    @property
    def suffix(self) -> str:
        """The suffix of its files."""

    def export(self, model: nn.Module, example: Tensor, path: Path, metadata: ModelMetadata) -> None:
        """Write the quantized ``model``, in eval mode, to ``path``."""


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    if not (isinstance(plugin, type) and issubclass(plugin, OnnxStyle)):
        shown = plugin.__name__ if isinstance(plugin, type) else f"a {type(plugin).__name__}"
        return f"it is {shown}, not a class derived from OnnxStyle"
    return declaration_problem(plugin)


_OURS = {
    "qdq": QdqExporter,
    "qdq-vnni": VnniExporter,
    "exact": ExactExporter,
    "trt": TrtExporter,
    "qonnx": QonnxExporter,
    "ort": OrtExporter,
    "ort-vnni": OrtVnniExporter,
}
STYLES: Plugins[type[OnnxStyle]] = Plugins("styles", "export style", _OURS, _problem, named=True)
# All kinds of files; what is no style is a format of its own.
EXPORTERS: Mapping[str, Callable[[], Exporter]] = ChainMap[str, Any](
    {"safetensors": SafetensorsExporter}, STYLES
)


def exporter_of(kind: str) -> Exporter:
    """The exporter of ``safetensors`` or of a style.

    Raises:
        ConfigError: there is no such style, or it is broken.
    """
    return SafetensorsExporter() if kind == "safetensors" else STYLES.find(kind)()


def is_bit_equal(style: str) -> bool:
    """Whether the files of a style equal PyTorch bit for bit; False if its package is not installed."""
    return style in STYLES and STYLES[style].bit_equal


__all__ = ["EXPORTERS", "STYLES", "Exporter", "ModelMetadata", "OnnxStyle", "exporter_of", "is_bit_equal"]
