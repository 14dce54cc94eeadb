"""Tables of ``saq analyze`` and ``saq eval --bench``."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from saqcli.analysis import INSTRUMENTS
from saqcli.cli.screens.tables import print_table, print_text
from saqcli.report.analysis_file import images_of
from saqcli.report.canvas import titles
from saqcli.units import counted, format_figure, format_quantity, with_error
from saqcli.verify.kernels import Operator, summary

MARGIN = 4  # columns between the cells of a row
MOST_LAYERS = 5  # listed on a line; the files hold all
SMALLER_NOT_FASTER = (
    "Fewer than 8 bits make the file smaller but not faster: "
    "this runtime has no integer kernels below 8 bits."
)


def show_analysis(result: dict[str, Any]) -> None:
    """Print one column per model and one row per figure, then the files."""
    console = Console()
    models = [result, *([result["against"]] if result["against"] else [])]
    names = titles([model["target"] for model in models])
    rows = [_rows(model, result["split"]) for model in models]
    figures = list(dict.fromkeys(name for row in rows for name in row))
    print_text(console, f"{result['model']} on {images_of(result['images'], result['split'])}")
    columns = names
    if len(names) > 1 and sum(map(len, names)) + max(map(len, figures)) > console.width - MARGIN:
        columns = list("AB")
        for letter, name in zip(columns, names, strict=True):
            print_text(console, f"{letter}: {name}")
    print_table(console, ("", *columns), [[name, *(row.get(name, "") for row in rows)] for name in figures])
    for name, model in zip(names, models, strict=True):
        for line in _lines(model["instruments"]):
            where = f"{name}: " if len(models) > 1 else ""
            print_text(console, f"{where}{line}")
    counts = Counter(Path(path).suffix for path in result["files"])
    plots = f" and {counted(counts['.png'], 'plot')} (PNG, SVG)" if counts[".png"] else ""
    print_text(console, f"wrote {counted(counts['.json'], 'reading')} (JSON){plots} to {result['out']}")
    if result["page"]:
        print_text(console, f"wrote {result['page']}")


def _rows(model: dict[str, Any], split: str) -> dict[str, str]:
    """Figures of one model by title."""
    on = images_of(2, split).removeprefix("2 ")
    rows = {
        f"loss on {on}": format_figure(model["loss"], ".4f"),
        f"top-1 on {on}": format_figure(model["top1"], ".2f", " %"),
    }
    for name, reading in model["instruments"].items():
        rows |= _figures(name, reading)
    return rows


def _figures(name: str, reading: dict[str, Any]) -> dict[str, str]:
    """Figures of a reading by title; the plain numbers of an instrument that declares no table."""
    if name in _FIGURES:
        return _FIGURES[name](reading)
    table = INSTRUMENTS[name].table
    if table is not None:
        with INSTRUMENTS.blamed(name):
            return dict(table(reading))
    numbers = {key: value for key, value in reading.items() if type(value) in (int, float)}
    return {f"{name}, {key.replace('_', ' ')}": format_figure(value) for key, value in numbers.items()}


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
    value, spread = with_error(reading["eigenvalue"], reading["spread"], " ").split()
    return {
        "largest Hessian eigenvalue": value,
        f"  spread over {counted(len(ended), 'start')}": spread
        + ("" if all(ended) else f", {ended.count(False)} not converged"),
    }


def _trace(reading: dict[str, Any]) -> dict[str, str]:
    return {"Hessian trace": with_error(reading["trace"], reading["standard_error"])}


def _flips(reading: dict[str, Any]) -> dict[str, str]:
    if reading["reason"] is not None:
        return {"weights that flip (Case 2)": "not measured"}
    return {
        "weights that flip (Case 2)": f"{100 * reading['share']:.3f} %",
        "  change of Q(w) / norm of e": format_figure(reading["norm_ratio"], ".1f"),
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
        "landscape, lowest loss": format_figure(min(found)),
        f"  {size}": f"highest {format_figure(max(found))}",
    }


_FIGURES: dict[str, Callable[[dict[str, Any]], dict[str, str]]] = {
    "sharpness": _sharpness,
    "eigenvalue": _eigenvalue,
    "trace": _trace,
    "flips": _flips,
    "distributions": _distributions,
    "sensitivity": _nothing,
    "landscape": _landscape,
}


def _lines(instruments: dict[str, Any]) -> list[str]:
    """The figures that do not fit into the table."""
    lines = []
    if "flips" in instruments and instruments["flips"]["reason"]:
        lines.append(f"flips not measured: {instruments['flips']['reason']}")
    if "sensitivity" in instruments:
        layers = instruments["sensitivity"]["layers"]
        least = min(candidate["bits"] for layer in layers for candidate in layer["candidates"])
        changes = [
            (math.inf if candidate["loss_change"] is None else candidate["loss_change"], layer["name"])
            for layer in layers
            for candidate in layer["candidates"]
            if candidate["bits"] == least
        ]
        named = ", ".join(
            f"{name} ({change:+.3g})" for change, name in sorted(changes, reverse=True)[:MOST_LAYERS]
        )
        lines.append(f"most sensitive at {least} bits (change of the loss): {named}")
    if "trace" in instruments:
        layers = instruments["trace"]["layers"]
        layers = sorted(layers, key=lambda layer: (layer["per_weight"], layer["name"]), reverse=True)
        named = ", ".join(
            f"{layer['name']} ({with_error(layer['per_weight'], layer['standard_error'] / layer['weights'])})"
            for layer in layers[:MOST_LAYERS]
        )
        lines.append(f"largest trace per weight: {named}")
    return lines


def show_bench(bench: dict[str, Any]) -> None:
    """Print the benchmark, ``bench`` of ``saq eval --bench --json``."""
    console = Console()
    size = "x".join(map(str, bench["input_size"]))
    print_text(console, f"{bench['model']}, input {size}, on {bench['cpu']['name']}\n")
    print_table(console, ("", "size", "integer kernels", "float kernels"), _bench_targets(bench["rows"]))
    console.print()
    columns = ("", "batch", "threads", "ms/batch", "spread", "images/s", "relative")
    print_table(console, columns, _timings(bench["rows"]))
    console.print()
    print_text(
        console,
        f"Medians of {counted(bench['repeats'], 'run')} (interleaved); spread is the interquartile range.",
    )
    print_text(console, f"Relative is the throughput relative to {bench['baseline']}.")
    for name, operators in bench.get("operators", {}).items():
        for line in summary(tuple(Operator(**each) for each in operators)):
            print_text(console, f"{name} {line}.")
    for note in bench["notes"]:
        print_text(console, f"{note[0].upper()}{note[1:]}.")
    if bench["few_bits"]:
        print_text(console, SMALLER_NOT_FASTER)


def _bench_targets(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Sizes and kernels, which do not depend on the case."""
    return [
        [
            name,
            format_quantity(row["size_bytes"], "B"),
            *("" if row[kind] is None else str(row[kind]) for kind in ("integer_kernels", "float_kernels")),
        ]
        for name, row in {row["name"]: row for row in rows}.items()
    ]


def _timings(rows: list[dict[str, Any]]) -> list[list[str]]:
    """One row per target in every case, and a blank line between cases."""
    milliseconds = _places(row["latency_ms"] for row in rows)
    rate = _places(row["images_per_second"] for row in rows)
    table: list[list[str]] = []
    for _, case in groupby(rows, key=lambda row: (row["threads"], row["batch_size"])):
        table += [[]] if table else []
        table += [
            [
                row["name"],
                str(row["batch_size"]),
                str(row["threads"]),
                f"{row['latency_ms']:.{milliseconds}f}",
                f"{row['spread_ms']:.{milliseconds}f}",
                f"{row['images_per_second']:.{rate}f}",
                f"{row['relative']:.2f}",
            ]
            for row in case
        ]
    return table


def _places(values: Iterable[float]) -> int:
    """Decimal places that give the smallest of ``values`` three significant digits; at most 3."""
    return min(max(2 - math.floor(math.log10(min(values))), 0), 3)
