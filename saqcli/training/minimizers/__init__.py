"""Minimizers, one optimization step each, over any torch optimizer.

A minimizer receives the model and the base optimizer, then a closure per step. To add one, derive a class from
``Minimizer`` (or from ``SharpnessAware``, to change a part of it) and add its line here, or an entry point of the group
``saqcli.minimizers`` in another package. The contract tests run over the table, and compare each with its
``reference``.
"""

from typing import Any

from saqcli.plugins import Plugins
from saqcli.training.minimizers.base import (
    Ascent,
    Chunk,
    MicroBatch,
    Minimizer,
    Passes,
    gradients_of,
    inner,
    orthogonal_part,
)
from saqcli.training.minimizers.cases import ASAQ, SAM, SAQ, Case1
from saqcli.training.minimizers.momentum import MSAM
from saqcli.training.minimizers.qat import QAT
from saqcli.training.minimizers.sharpness_aware import SharpnessAware


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no minimizer, or None."""
    if not (isinstance(plugin, type) and issubclass(plugin, Minimizer)):
        return "it is no class derived from saqcli.training.minimizers.Minimizer"
    if not plugin.description:
        return "its class has no description"
    if plugin.reference is Minimizer.reference:
        return "its class has no reference"
    return None


_OURS: dict[str, type[Minimizer]] = {
    "qat": QAT,
    "sam": SAM,
    "case1": Case1,
    "saq": SAQ,
    "asaq": ASAQ,
    "msam": MSAM,
}
MINIMIZERS: Plugins[type[Minimizer]] = Plugins("minimizers", "method", _OURS, _problem)

__all__ = [
    "ASAQ",
    "MINIMIZERS",
    "MSAM",
    "QAT",
    "SAM",
    "SAQ",
    "Ascent",
    "Case1",
    "Chunk",
    "MicroBatch",
    "Minimizer",
    "Passes",
    "SharpnessAware",
    "gradients_of",
    "inner",
    "orthogonal_part",
]
