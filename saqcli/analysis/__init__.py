"""Instruments that measure a quantized model, one file each.

An instrument is a function of an analysis input, settings and a session; it returns a reading. To add one, write
``saqcli/analysis/NAME.py`` and add it to the table below. Another package writes the same and an entry point:

    [project.entry-points."saqcli.instruments"]
    sparsity = "my_package.sparsity:ENTRY"      # ENTRY = Instrument(measure, SparsityReading, ...)

The contract, which the tests in ``tests/analysis/test_instruments.py`` check over the table:

- Whatever is changed in the model is restored bit for bit, and the model stays in eval mode; ``measure`` compares.
- The reading is equal for equal settings, images and seed. Figures that may be NaN or infinite are None in it.
- It names, in ``settings``, all shared settings that it depends on: a finished reading is kept as long as these, the
  instrument's own settings, the model and the images are the same.

``saq analyze --NAME`` measures it and writes ``NAME.json``. Everything in ``__all__`` is public, and so are the helpers
in ``saqcli.analysis.base`` (``seeded``, ``observe_inputs``, ``hessian_products``, ``finite_or_none``), the style of
pictures in ``saqcli.report.canvas``, and ``saqcli.report.readings.bars_by_layer``.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings
from saqcli.analysis.distributions import DistributionsReading, measure_distributions
from saqcli.analysis.eigenvalue import EigenvalueReading, measure_eigenvalue
from saqcli.analysis.flips import FlipsReading, measure_flips
from saqcli.analysis.hessian_trace import TraceReading, measure_trace
from saqcli.analysis.landscape import LandscapeReading, measure_landscape
from saqcli.analysis.loss_sharpness import SharpnessReading, measure_sharpness
from saqcli.analysis.sensitivity import SensitivityReading, measure_sensitivity
from saqcli.errors import ConfigError
from saqcli.plugins import Plugins
from saqcli.serialization import parse_object

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Painter = Callable[[list[tuple[str, Any]], str], "dict[str, Figure]"]


class Instrument(NamedTuple):
    """An instrument in the table.

    Attributes:
        measure: maps analysis input, settings (a ``schema``) and session to a reading.
        reading: type of its reading.
        settings: names of the shared settings that its reading depends on.
        quick: whether it runs by default.
        resumable: whether it passes unfinished readings to the session and can resume from them.
        description: one line. The help of ``saq analyze`` imports no plugin: for one of another package it shows the
            ``Summary`` of that package (``description`` in its ``pyproject.toml``) instead.
        schema: type of its settings: ``Settings``, or a class derived from it with settings of its own, all of which
            have defaults; on the command line ``NAME.KEY=VALUE`` sets them.
        paint: draws the readings of one model or of two, each with the model's name, measured on images such as "500
            training images"; returns figures by name, which is that of the instrument or starts with it and ``_``. The
            title says what is drawn, with the instrument's name, and on which images, unless it shows "Weights". None
            for no picture (those of our instruments are in ``saqcli.report.readings``).
        table: figures by title for the terminal, from the reading as in JSON; None prints its plain numbers.
    """

    measure: Callable[[AnalysisInput, Any, Session], Reading]
    reading: type[Reading]
    settings: tuple[str, ...] = ()
    quick: bool = True
    resumable: bool = False
    description: str = ""
    schema: type[Settings] = Settings
    paint: Painter | None = None
    table: Callable[[dict[str, Any]], dict[str, str]] | None = None

    @property
    def own(self) -> list[str]:
        """Names of the settings that no other instrument has."""
        return [name for name in self.schema.model_fields if name not in Settings.model_fields]

    def settings_with(
        self, shared: Settings, options: Mapping[str, Any], name: str = "", setting: str = "assignments"
    ) -> Settings:
        """Its settings: the shared ones, and ``options`` for its own; the others are for the message.

        Raises:
            ConfigError: an option that it does not have, or an invalid value.
        """
        for key, value in options.items():
            if key not in self.own:
                known = (
                    f"its settings are {', '.join(self.own)}" if self.own else "it has no settings of its own"
                )
                raise ConfigError(f"`{setting}={name}.{key}={value}`: {name} has no {key}: {known}")
        return parse_object(self.schema, {**shared.model_dump(), **options}, f"settings of {name}")


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    if not isinstance(plugin, Instrument):
        return f"it is a {type(plugin).__name__}, not an Instrument"
    for attribute, base in (("reading", Reading), ("schema", Settings)):
        kind = getattr(plugin, attribute)
        if not (isinstance(kind, type) and issubclass(kind, base)):
            return f"its `{attribute}` is not derived from {base.__name__}"
    unknown = [name for name in plugin.settings if name not in plugin.schema.model_fields]
    needed = [name for name in plugin.own if plugin.schema.model_fields[name].is_required()]
    if unknown or needed:
        return f"no setting is named {unknown[0]}" if unknown else f"its setting {needed[0]} has no default"
    return None


_OURS = {
    "sharpness": Instrument(
        measure_sharpness,
        SharpnessReading,
        ("rho", "rho_unit"),
        description="Rise of the loss within radius `training.rho`",
    ),
    "eigenvalue": Instrument(
        measure_eigenvalue,
        EigenvalueReading,
        ("seed", "starts", "tolerance", "iterations"),
        description="Largest eigenvalue of the Hessian",
    ),
    "flips": Instrument(
        measure_flips,
        FlipsReading,
        ("rho", "rho_unit"),
        description="Share of the weights whose code changes in Case 2",
    ),
    "distributions": Instrument(
        measure_distributions,
        DistributionsReading,
        ("seed",),
        description="Weights and inputs compared with their grids",
    ),
    "trace": Instrument(
        measure_trace,
        TraceReading,
        ("seed", "samples"),
        quick=False,
        description="Trace of every layer's Hessian block",
    ),
    "sensitivity": Instrument(
        measure_sensitivity,
        SensitivityReading,
        ("seed", "candidates"),
        quick=False,
        description="Loss and top-1 with one layer at a time at each of `quantization.candidates`",
    ),
    "landscape": Instrument(
        measure_landscape,
        LandscapeReading,
        ("seed", "grid", "span"),
        quick=False,
        resumable=True,
        description="Loss over a plane through the quantized weights",
    ),
}
INSTRUMENTS: Plugins[Instrument] = Plugins("instruments", "instrument", _OURS, _problem)


def measure(name: str, subject: AnalysisInput, settings: Settings, session: Session) -> Reading:
    """The reading of the instrument ``name``; one of another package is watched.

    Raises:
        PluginError: an instrument of another package failed, changed the model or returned something else than its
            reading.
    """
    instrument = INSTRUMENTS[name]
    if INSTRUMENTS.is_ours(name):
        return instrument.measure(subject, settings, session)
    before = {key: value.detach().clone() for key, value in _tensors(subject.model).items()}
    try:
        with INSTRUMENTS.blamed(name):
            reading = instrument.measure(subject, settings, session)
    finally:
        changed = _restore(subject.model, before)
    if changed:
        raise INSTRUMENTS.failure(name, f"it changed {changed} of the model, which was restored")
    if not isinstance(reading, instrument.reading):
        wanted, got = instrument.reading.__name__, type(reading).__name__
        raise INSTRUMENTS.failure(name, f"it returned a {got}, not a {wanted}")
    return reading


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> str | None:
    """Bring the tensors of ``model`` back to ``before``, and it to eval mode; what had been changed, or None."""
    after = _tensors(model)
    changed = [key for key in before.keys() & after.keys() if not _same_bits(after[key], before[key])]
    for key in changed:
        after[key].data = before[key]
    changed += before.keys() ^ after.keys()
    if any(module.training for module in model.modules()):
        model.eval()
        changed.append("training mode")
    return min(changed, default=None)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.detach().reshape(-1).view(torch.uint8) for each in (one, other)))


__all__ = [
    "INSTRUMENTS",
    "AnalysisInput",
    "Instrument",
    "Painter",
    "Reading",
    "Session",
    "Settings",
    "measure",
]
