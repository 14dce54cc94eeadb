"""The page that compares several runs: accuracy over bit-operations, figures side by side, bits where they differ."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saqcli.errors import ConfigError
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
    labelled = any(row["top1"] is not None for row in rows)
    accuracies = [row["top1"] if labelled else row["agreement"] for row in rows]
    known = [(row, value) for row, value in zip(rows, accuracies, strict=True) if value is not None]
    scored = {
        _images_of(run) for run, row in zip(runs, rows, strict=True) if any(row is each for each, _ in known)
    }
    best = None
    if len(scored) == 1:
        best = max(known, key=lambda pair: (pair[1], -pair[0]["bops"]))[0]
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
        "same_images": len(scored) <= 1,
        "labelled": labelled,
        "picture": picture,
        "matrix": _matrix(names, runs) if len(models) == 1 else None,
        "policies": _policies(runs) if len(models) == 1 else [],
        "pictures": [
            {"name": name, "picture": charts.policy_picture(bars_of(layer_rows(run)[0]))}
            for name, run in zip(names, runs, strict=True)
        ]
        if len(models) > 1
        else [],
        "names": names,
    }


def short_names(paths: Sequence[Path]) -> list[str]:
    """The paths below the folder that they share."""
    found = [path.resolve() for path in paths]
    try:
        shared = Path(os.path.commonpath([path.parent for path in found]))
    except ValueError:  # on several drives
        return [str(path) for path in found]
    return [str(path.relative_to(shared)) for path in found]


def _row(name: str, run: Contents) -> dict[str, Any]:
    """The figures of a run; a search has those of its choice on its scoring images."""
    found, searched = run.quantized, run.searched
    row: dict[str, Any] = {"name": name, "model": run.model, "date": date_of(run.manifest.started)}
    if found is not None:
        size, training = found.size_bytes, run.config.training
        stages = [stage.stage for stage in found.stages] or ["calibrated"]
        how = ", ".join(stages) + (
            f" ({training.method}{' with teacher' if found.distilled else ''}, {counted(training.epochs, 'epoch')})"
            if found.epochs
            else ""
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


def _images_of(run: Contents) -> str:
    """The fingerprint of the images that a run was scored on; empty if unknown."""
    images = run.manifest.images
    return images.get("val") or images.get("calibration") or ""


def _shared_layers(runs: Sequence[Contents]) -> list[str]:
    return [name for name in runs[0].policy if all(name in run.policy for run in runs)]


def _matrix(names: Sequence[str], runs: Sequence[Contents]) -> Any:
    layers = _shared_layers(runs)
    return charts.matrix_picture(names, layers, [[run.policy[name] for name in layers] for run in runs])


def _policies(runs: Sequence[Contents]) -> list[dict[str, Any]]:
    """The layers whose bits differ between runs of one network, with the bits in every run."""
    rows = []
    for name in _shared_layers(runs):
        bits = [run.policy[name] for run in runs]
        if len(set(bits)) > 1:
            rows.append({"layer": name, "bits": bits})
    return rows
