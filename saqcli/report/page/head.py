"""The head of the page of a run: what came out in a sentence, its figures, and the table of stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saqcli.report.accuracy import accuracy_lines
from saqcli.report.page.contents import Contents, QuantizeFigures
from saqcli.report.page.layers import LayerRow, means_of
from saqcli.report.run_report import SCORED_ON
from saqcli.report.search_report import SearchResults
from saqcli.tasks.classification import Score, noise
from saqcli.units import counted, format_duration, format_quantity


def images_text(figures: QuantizeFigures) -> str:
    """``8,000 validation images``: what the figures of a run are of."""
    if figures.scored_on == "validation":
        return counted(figures.images, "validation image")
    return SCORED_ON[figures.scored_on].format(counted(figures.images, "image"))


def times(ratio: float) -> str:
    """``12.3`` or ``129``: a factor with three digits."""
    return f"{ratio:.3g}" if ratio < 100 else f"{ratio:,.0f}"


def headline(run: Contents, layers: Sequence[LayerRow]) -> str:
    """What came out, in one or two sentences."""
    weights, inputs = means_of(layers)
    at = f"With {weights:.2g}-bit weights and {inputs:.2g}-bit inputs on average, it"
    found = run.quantized
    if found is None:
        assert run.searched is not None
        spent = format_quantity(run.searched.bops, "BOPs")
        return (
            f"Searcher {run.searched.searcher} chose bits for {counted(len(layers), 'layer')}: {weights:.2g} for "
            f"weights and {inputs:.2g} for inputs on average, {spent} for an image."
        )
    cost = (
        f"It needs {times(found.float_bops / max(found.bops, 1))} times fewer bit-operations and "
        f"{times(found.float_size_bytes / max(found.size_bytes, 1))} times fewer bytes."
    )
    if found.top1 is None:
        agrees = "" if found.agreement is None else f"{found.agreement:.2f} % of "
        return f"{at} gives the float network's answer on {agrees}{images_text(found)}. {cost}"
    beside = "" if found.float_top1 is None else f"; the float network {found.float_top1:.2f} %"
    return f"{at} is right on {found.top1:.2f} % of {images_text(found)}{beside}. {cost}"


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    name: str
    figure: str
    unit: str
    note: str


def tiles_of(run: Contents) -> list[Tile]:
    """The figures at the head of the page of a run."""
    if run.quantized is not None:
        return _tiles_of_quantized(run.quantized)
    assert run.searched is not None
    return _tiles_of_search(run.searched)


def _tiles_of_quantized(found: QuantizeFigures) -> list[Tile]:
    tiles = []
    if found.top1 is not None:
        beside = ""
        if found.float_top1 is not None:
            beside = f"float {found.float_top1:.2f} %, {points(found.top1 - found.float_top1)}"
        tiles.append(Tile("Top-1", f"{found.top1:.2f}", "%", beside))
    if found.agreement is not None:
        tiles.append(Tile("Same answer as float", f"{found.agreement:.2f}", "%", f"of {images_text(found)}"))
    fewer = times(found.float_bops / max(found.bops, 1))
    beside = f"float {format_quantity(found.float_bops)}, {fewer} times fewer"
    tiles.append(Tile("Bit-operations", *_split(found.bops, ""), beside))
    smaller = times(found.float_size_bytes / max(found.size_bytes, 1))
    beside = f"float {format_quantity(found.float_size_bytes, 'B')}, {smaller} times smaller"
    return [*tiles, Tile("Size", *_split(found.size_bytes, "B"), beside)]


def _tiles_of_search(found: SearchResults) -> list[Tile]:
    tiles = []
    if found.scoring_top1 is not None:
        beside = "calibrated, held-out training images"
        tiles.append(Tile("Top-1", f"{found.scoring_top1:.2f}", "%", beside))
    beside = _budget(found.bops, found.budget_bops, "BOPs") or "for one image"
    tiles.append(Tile("Bit-operations", *_split(found.bops, ""), beside))
    beside = _budget(found.size_bytes, found.budget_bytes, "B") or "of the network"
    tiles.append(Tile("Size", *_split(found.size_bytes, "B"), beside))
    return [*tiles, Tile("Search", format_duration(found.seconds), "", f"searcher {found.searcher}")]


def _split(value: float, unit: str) -> tuple[str, str]:
    figure, _, unit = format_quantity(value, unit).partition(" ")
    return figure, unit


def _budget(spent: int, budget: int | None, unit: str) -> str:
    """Which share of a budget is spent; empty without one."""
    if not budget:
        return ""
    return f"{100 * spent / budget:.2f} % of the budget of {format_quantity(budget, unit)}"


def points(change: float) -> str:
    """``−1.10 points``, with a real minus."""
    return f"{change:+.2f} points".replace("-", "\N{MINUS SIGN}")


def stage_rows(found: QuantizeFigures, run: Contents) -> list[dict[str, Any]]:
    """The rows of the table of stages."""
    seconds = run.manifest.seconds
    float_loss = next((line.loss for line in run.metrics if line.phase == "float"), None)
    rows = [
        {
            "name": "float",
            "top1": found.float_top1,
            "top5": found.float_top5,
            "loss": float_loss,
            "agreement": 100.0 if found.agreement is not None else None,
            "bops": found.float_bops,
            "size": found.float_size_bytes,
        }
    ]
    stages = [stage.model_dump() for stage in found.stages] or [
        {"stage": "calibrated", "top1": found.calibrated_top1}
    ]
    for stage in stages:
        took = seconds.get(stage["stage"], stage.get("seconds"))
        rows.append(
            {**stage, "name": stage["stage"], "bops": found.bops, "size": found.size_bytes, "seconds": took}
        )
    rows[-1]["exported"] = True
    if found.epochs and found.best_epoch and found.exported_epoch not in (found.best_epoch,):
        rows.insert(
            -1, {"name": f"best epoch ({found.best_epoch} of {found.epochs})", "top1": found.best_top1}
        )
    keys = ("top1", "top5", "loss", "agreement", "bops", "size", "seconds")
    return [{"exported": False} | dict.fromkeys(keys) | row for row in rows]


def notes_of(run: Contents) -> list[str]:
    """What a reader should know of the figures."""
    found = run.quantized
    if found is None:
        accuracy = run.searched.accuracy if run.searched else None
        return [_sentence(line) for line in accuracy_lines(accuracy.model_dump())] if accuracy else []
    notes = []
    if found.top1 is not None and found.float_top1 is not None:
        one, other = (Score(found.images, top1=top) for top in (found.top1, found.float_top1))
        chance = 2 * noise(one, other)
        notes.append(f"On {images_text(found)}, differences below about {chance:.1f} points can be chance.")
    elif found.top1 is None:
        notes.append(
            "There were no labels, so accuracy was not measured: both networks may agree on a wrong class."
        )
    if found.budget_bops:
        notes.append(f"The bits use {_budget(found.bops, found.budget_bops, 'BOPs')}.")
    if found.budget_bytes:
        notes.append(f"The bits use {_budget(found.size_bytes, found.budget_bytes, 'B')}.")
    if found.accuracy is not None:
        notes += [_sentence(line) for line in accuracy_lines(found.accuracy.model_dump())]
    if found.advice:
        notes.append(_sentence(found.advice))
    return notes


def _sentence(line: str) -> str:
    return f"{line[:1].upper()}{line[1:]}."
