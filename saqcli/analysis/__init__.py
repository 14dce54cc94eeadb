"""Instruments that measure a quantized model, one file each.

An instrument is a function of an analysis input, settings and a session; it returns a reading. To add one, write
``saqcli/analysis/NAME.py`` and add it to the table below.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings
from saqcli.analysis.distributions import DistributionsReading, measure_distributions
from saqcli.analysis.eigenvalue import EigenvalueReading, measure_eigenvalue
from saqcli.analysis.flips import FlipsReading, measure_flips
from saqcli.analysis.hessian_trace import TraceReading, measure_trace
from saqcli.analysis.landscape import LandscapeReading, measure_landscape
from saqcli.analysis.loss_sharpness import SharpnessReading, measure_sharpness
from saqcli.analysis.sensitivity import SensitivityReading, measure_sensitivity
from saqcli.plugins import Plugins


class Instrument(NamedTuple):
    """An instrument in the table.

    Attributes:
        measure: maps analysis input, settings and session to a reading.
        reading: type of its reading.
        settings: names of the settings that its reading depends on.
        quick: whether it runs by default.
        resumable: whether it passes unfinished readings to the session and can resume from them.
    """

    measure: Callable[[AnalysisInput, Settings, Session], Reading]
    reading: type[Reading]
    settings: tuple[str, ...]
    quick: bool = True
    resumable: bool = False


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    return None if isinstance(plugin, Instrument) else f"it is a {type(plugin).__name__}, not an Instrument"


_OURS = {
    "sharpness": Instrument(measure_sharpness, SharpnessReading, ("rho", "rho_unit")),
    "eigenvalue": Instrument(
        measure_eigenvalue, EigenvalueReading, ("seed", "starts", "tolerance", "iterations")
    ),
    "flips": Instrument(measure_flips, FlipsReading, ("rho", "rho_unit")),
    "distributions": Instrument(measure_distributions, DistributionsReading, ("seed",)),
    "trace": Instrument(measure_trace, TraceReading, ("seed", "samples"), quick=False),
    "sensitivity": Instrument(measure_sensitivity, SensitivityReading, ("seed", "candidates"), quick=False),
    "landscape": Instrument(
        measure_landscape, LandscapeReading, ("seed", "grid", "span"), quick=False, resumable=True
    ),
}
INSTRUMENTS: Plugins[Instrument] = Plugins("instruments", "instrument", _OURS, _problem)

__all__ = ["INSTRUMENTS", "AnalysisInput", "Instrument", "Reading", "Session", "Settings"]
