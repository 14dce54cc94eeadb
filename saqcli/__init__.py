"""Sharpness-aware quantization of pretrained vision models under a hard BOP budget.

The public names load on first use, so that ``import saqcli`` and the help stay quick.
"""

from importlib import import_module
from typing import Any

from saqcli._version import __version__

_PUBLIC = {
    "ASAQ": "saqcli.training.minimizers",
    "BitConfig": "saqcli.quant.bits",
    "Budget": "saqcli.quant.cost",
    "LayerBits": "saqcli.quant.bits",
    "Case1": "saqcli.training.minimizers",
    "QAT": "saqcli.training.minimizers",
    "SAM": "saqcli.training.minimizers",
    "SAQ": "saqcli.training.minimizers",
    "SaqError": "saqcli.errors",
    "load": "saqcli.pipelines.predictors",
    "load_model": "saqcli.models.load",
    "quantize": "saqcli.pipelines.quantize",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saqcli' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
