"""What ``saq analyze`` measured, as a short table for the eye; the whole of it is in the files."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from saqcli.cli.tables import print_table, say
from saqcli.units import counted, format_figure
from saqcli.workflows.pictures.canvas import titles

MARGIN = 4  # columns between the cells of a row
MOST_LAYERS = 5  # named in a line; all of them are in the files


def show_analysis(result: dict[str, Any]) -> None:
    """A column a model, a row a figure; then the files."""
    console = Console()
    models = [result, *([result["against"]] if result["against"] else [])]
    names = titles([model["target"] for model in models])
    rows = [_rows(model) for model in models]
    figures = list(dict.fromkeys(name for row in rows for name in row))
    say(console, f"{result['model']} on {counted(result['images'], 'image')}")
    columns = names
    if len(names) > 1 and sum(map(len, names)) + max(map(len, figures)) > console.width - MARGIN:
        columns = list("AB")
        for letter, name in zip(columns, names, strict=True):
            say(console, f"{letter}: {name}")
    print_table(console, ("", *columns), [[name, *(row.get(name, "") for row in rows)] for name in figures])
    for name, model in zip(names, models, strict=True):
        for line in _lines(model["instruments"]):
            where = f"{name}: " if len(models) > 1 else ""
            say(console, f"{where}{line}")
    counts = Counter(Path(path).suffix for path in result["files"])
    drawn = f", and {counted(counts['.png'], 'picture')} as PNG and SVG" if counts[".png"] else ""
    say(console, f"wrote {counted(counts['.json'], 'reading')} as JSON{drawn} to {result['out']}")


def _rows(model: dict[str, Any]) -> dict[str, str]:
    """Figures of one model by what they are called."""
    rows = {"loss": format_figure(model["loss"], ".4f"), "top-1": format_figure(model["top1"], ".2f", " %")}
    for name, reading in model["instruments"].items():
        rows |= _FIGURES.get(name, _nothing)(reading)
    return rows


def _nothing(reading: dict[str, Any]) -> dict[str, str]:
    return {}


def _sharpness(reading: dict[str, Any]) -> dict[str, str]:
    unit = "deviations" if reading["rho_unit"] == "deviation" else "absolute"
    rise = reading["sharpness"]
    return {
        "sharpness": format_figure(math.nan if rise is None else rise, ".4f"),
        f"  rho {reading['rho']:g}, {unit}": f"top-1 {reading['perturbed_top1']:.2f} %",
    }


def _eigenvalue(reading: dict[str, Any]) -> dict[str, str]:
    ended = [start["converged"] for start in reading["starts"]]
    return {
        "largest Hessian eigenvalue": format_figure(reading["eigenvalue"]),
        f"  spread over {counted(len(ended), 'start')}": format_figure(reading["spread"], ".2g")
        + ("" if all(ended) else f", {ended.count(False)} not converged"),
    }


def _trace(reading: dict[str, Any]) -> dict[str, str]:
    return {"Hessian trace": f"{reading['trace']:.4g} ± {reading['standard_error']:.2g}"}


def _flips(reading: dict[str, Any]) -> dict[str, str]:
    if reading["reason"] is not None:
        return {"weights that flip (Case 2)": "not measured"}
    return {
        "weights that flip (Case 2)": f"{100 * reading['share']:.3f} %",
        "  moving Q(w), in norms of e": format_figure(reading["norm_ratio"], ".1f"),
    }


def _distributions(reading: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for kind in ("weights", "inputs"):
        found = [layer[kind] for layer in reading["layers"] if layer[kind]]
        values = sum(one["values"] for one in found)
        if values:
            share = sum(one["clipped"] * one["values"] for one in found) / values
            rows[f"{kind} clipped"] = f"{100 * share:.2f} %"
    return rows


def _landscape(reading: dict[str, Any]) -> dict[str, str]:
    found = [value for row in reading["loss"] for value in row if value is not None] or [math.nan]
    size = f"{reading['grid']} x {reading['grid']}, span {reading['span']:g}"
    return {
        "landscape, least loss": format_figure(min(found)),
        f"  {size}": f"up to {format_figure(max(found))}",
    }


_FIGURES: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    "sharpness": _sharpness,
    "eigenvalue": _eigenvalue,
    "trace": _trace,
    "flips": _flips,
    "distributions": _distributions,
    "landscape": _landscape,
}


def _lines(instruments: dict[str, Any]) -> list[str]:
    """What a table has no room for."""
    lines = []
    if "flips" in instruments and instruments["flips"]["reason"]:
        lines.append(f"flips were not measured: {instruments['flips']['reason']}")
    if "sensitivity" in instruments:
        layers = instruments["sensitivity"]["layers"]
        least = min(candidate["bits"] for layer in layers for candidate in layer["candidates"])
        changes = [
            (candidate["loss_change"], layer["name"])
            for layer in layers
            for candidate in layer["candidates"]
            if candidate["bits"] == least
        ]
        named = ", ".join(
            f"{name} ({change:+.3g})" for change, name in sorted(changes, reverse=True)[:MOST_LAYERS]
        )
        lines.append(f"most sensitive at {least} bits (change of the loss): {named}")
    if "trace" in instruments:
        traces = [(layer["per_weight"], layer["name"]) for layer in instruments["trace"]["layers"]]
        named = ", ".join(
            f"{name} ({value:.3g})" for value, name in sorted(traces, reverse=True)[:MOST_LAYERS]
        )
        lines.append(f"largest trace per weight: {named}")
    return lines
