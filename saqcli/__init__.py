"""Sharpness-aware quantization of pretrained vision models under a hard BOP budget.

The public names load on first use, so that ``import saqcli`` and the help stay quick.
"""

from importlib import import_module
from typing import Any

from saqcli._version import __version__

_PUBLIC = {
    "ASAQ": "saqcli.training.minimizers",
    "MSAM": "saqcli.training.minimizers",
    "BitConfig": "saqcli.quant.bits",
    "Budget": "saqcli.quant.cost",
    "Case1": "saqcli.training.minimizers",
    "FoundBits": "saqcli.api.searching",
    "LayerBits": "saqcli.quant.bits",
    "ModelInfo": "saqcli.api.info",
    "Profile": "saqcli.api.costs",
    "QAT": "saqcli.training.minimizers",
    "SAM": "saqcli.training.minimizers",
    "SAQ": "saqcli.training.minimizers",
    "SaqError": "saqcli.errors",
    "analyze": "saqcli.api.measuring",
    "bits": "saqcli.api.info",
    "bops": "saqcli.api.costs",
    "calibrate": "saqcli.api.quantizing",
    "check_export": "saqcli.api.exporting",
    "compensate": "saqcli.api.reconstructing",
    "evaluate": "saqcli.api.measuring",
    "export_onnx": "saqcli.api.exporting",
    "finetune": "saqcli.api.finetuning",
    "info": "saqcli.api.info",
    "load": "saqcli.api.files",
    "load_images": "saqcli.api.models",
    "load_model": "saqcli.api.models",
    "profile": "saqcli.api.costs",
    "quantize": "saqcli.pipelines.quantize",
    "quantize_model": "saqcli.api.quantizing",
    "reconstruct": "saqcli.api.reconstructing",
    "save": "saqcli.api.files",
    "search": "saqcli.api.searching",
    "summary": "saqcli.api.costs",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saqcli' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    if _PUBLIC[name].startswith("saqcli.api.") and not isinstance(value, type):
        value = import_module("saqcli.api.messages").with_parameters(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
