"""The page that compares several runs: accuracy over bit-operations, figures side by side, bits where they differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saqcli.errors import ConfigError
from saqcli.quant.bits import LayerBits
from saqcli.report.page import charts
from saqcli.report.page.contents import Contents
from saqcli.report.page.layers import bars_of, layer_rows
from saqcli.report.page.sections import date_of
from saqcli.units import counted

MOST_RUNS = 24


def compared(runs: Sequence[Contents]) -> dict[str, Any]:
    """The values of the page of several runs.

    Raises:
        ConfigError: there are too many.
    """
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"{counted(len(runs), 'run')} do not fit on a page: give {MOST_RUNS} at most")
    names = short_names([run.path for run in runs])
    models = list(dict.fromkeys(run.model for run in runs))
    rows = [_row(name, run) for name, run in zip(names, runs, strict=True)]
    labelled = all(row["top1"] is not None for row in rows)
    accuracies = [row["top1"] if labelled else row["agreement"] for row in rows]
    known = [(row, value) for row, value in zip(rows, accuracies, strict=True) if value is not None]
    best = max(known, key=lambda pair: (pair[1], -pair[0]["bops"]))[0] if known else None
    floats = {row["float_top1"]: f"float {row['model']}" for row in rows if row["float_top1"] is not None}
    picture = None
    if len(known) > 1:
        picture = charts.runs_picture(
            [charts.RunPoint(row["name"], row["bops"], value) for row, value in known],
            [(name if len(models) > 1 else "float", top) for top, name in floats.items()] if labelled else [],
            "top-1, %" if labelled else "same answer as float, %",
        )
    return {
        "title": models[0] if len(models) == 1 else f"{len(models)} networks",
        "count": counted(len(runs), "run"),
        "rows": rows,
        "best": best,
        "labelled": labelled,
        "picture": picture,
        "policies": _policies(names, runs) if len(models) == 1 else [],
        "pictures": [
            {"name": name, "picture": charts.policy_picture(bars_of(layer_rows(run)[0]))}
            for name, run in zip(names, runs, strict=True)
        ],
        "names": names,
    }


def short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the paths."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _row(name: str, run: Contents) -> dict[str, Any]:
    """The figures of a run; a search has those of its choice on its scoring images."""
    found, searched = run.quantized, run.searched
    row: dict[str, Any] = {"name": name, "model": run.model, "date": date_of(run.manifest.started)}
    if found is not None:
        size, training = found.size_bytes, run.config.training
        stages = [stage.stage for stage in found.stages] or ["calibrated"]
        how = ", ".join(stages) + (
            f" ({training.method}, {counted(training.epochs, 'epoch')})" if found.epochs else ""
        )
        seconds = sum(run.manifest.seconds.values()) or None
        return row | {
            "top1": found.top1, "top5": found.top5, "agreement": found.agreement, "float_top1": found.float_top1,
            "change": None if found.top1 is None or found.float_top1 is None else found.top1 - found.float_top1,
            "bops": found.bops, "size": size, "seconds": seconds, "how": how,
        }  # fmt: skip
    assert searched is not None
    return row | {
        "top1": searched.scoring_top1, "top5": None, "agreement": None, "float_top1": None, "change": None,
        "bops": searched.bops, "size": searched.size_bytes, "seconds": searched.seconds,
        "how": f"searched ({searched.searcher})",
    }  # fmt: skip


def _policies(names: Sequence[str], runs: Sequence[Contents]) -> list[dict[str, Any]]:
    """The layers whose bits differ between runs of one network, with the bits in every run."""
    layers = [name for name in runs[0].policy if all(name in run.policy for run in runs)]
    rows = []
    for layer in layers:
        bits: list[LayerBits] = [run.policy[layer] for run in runs]
        if len(set(bits)) > 1:
            rows.append({"layer": layer, "bits": bits})
    return rows
