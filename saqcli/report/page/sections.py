"""The parts of the page of a run, as plain values for its template."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from saqcli.analysis.distributions import DistributionsReading, Operand
from saqcli.analysis.eigenvalue import EigenvalueReading
from saqcli.analysis.flips import FlipsReading
from saqcli.analysis.hessian_trace import TraceReading
from saqcli.analysis.landscape import LandscapeReading
from saqcli.analysis.loss_sharpness import SharpnessReading
from saqcli.analysis.sensitivity import SensitivityReading
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.report.accuracy import accuracy_lines
from saqcli.report.answers import Answers
from saqcli.report.calibrated import OperandFit
from saqcli.report.page import charts
from saqcli.report.page.contents import Analyzed, Contents, QuantizeFigures
from saqcli.report.page.proofs import proof_of
from saqcli.report.run_report import SCORED_ON
from saqcli.tasks.classification import Score, noise
from saqcli.units import counted, format_duration, format_quantity

MOST_CLASSES = 10  # that lost most
READS = {  # which runtimes a file of a style is for; every other style runs in ONNX Runtime
    "qdq": ("ort", "openvino"),
    "qdq-vnni": ("ort", "openvino"),
    "trt": ("tensorrt",),
    "qonnx": ("finn",),
}


@dataclass(frozen=True)
class LayerRow:
    """A line of the table of layers; None is unknown or in floating point.

    Attributes:
        name: of the layer.
        kind: class of its module.
        bits: of weights and inputs.
        pinned: whether its bits were fixed beforehand.
        share: of the network's bit-operations, 0 to 1.
        size: bytes of the weight.
        weights: fit of the weights' grid.
        inputs: fit of the inputs' grid.
        sensitivity: rise of a loss with this layer alone at the fewest bits.
        trace: curvature of the loss for a weight.
        flips: share of weights whose code a perturbation changes.
        pictures: distributions of weights and of inputs.
    """

    name: str
    kind: str
    bits: LayerBits
    pinned: bool
    share: float | None = None
    macs: int = 0
    size: int | None = None
    weights: OperandFit | None = None
    inputs: OperandFit | None = None
    sensitivity: float | None = None
    trace: float | None = None
    flips: float | None = None
    pictures: tuple[Any, Any] | None = None


def sections(run: Contents) -> dict[str, Any]:
    """The values of the page of a run."""
    layers, notes = layer_rows(run)
    found = {
        "title": run.model,
        "run": str(run.path),
        "date": date_of(run.manifest.started),
        "versions": run.manifest.versions,
        "headline": _headline(run, layers),
        "tiles": _tiles(run),
        "stages": _stages(run.quantized, run.manifest.seconds) if run.quantized else None,
        "notes": _notes(run),
        "policy": _policy(run, layers),
        "curves": _curves(run),
        "layers": layers,
        "most_share": max((layer.share or 0.0 for layer in layers), default=0.0) or 1.0,
        "layer_notes": notes,
        "front": _front(run),
        "analysis": analysis(run.analyzed) if run.analyzed else None,
        "classes": _classes(run),
        "answers": run.answers,
        "pictures": _pictures(run.answers) if run.answers else [],
        "proofs": [proof_of(verdict) for verdict in run.verdicts],
        "deploy": _deploy(run),
        "repeat": _repeat(run),
        "facts": _facts(run),
    }
    return found


def date_of(started: str) -> str:
    """``29 November 2026`` of an ISO time; the text itself if it is none."""
    try:
        day = datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{day.day} {day:%B %Y}"


def images_text(figures: QuantizeFigures) -> str:
    """``8,000 validation images``: what the figures of a run are of."""
    if figures.scored_on == "validation":
        return counted(figures.images, "validation image")
    return SCORED_ON[figures.scored_on].format(counted(figures.images, "image"))


def times(ratio: float) -> str:
    """``12.3`` or ``129``: a factor with three digits."""
    return f"{ratio:.3g}" if ratio < 100 else f"{ratio:,.0f}"


def _headline(run: Contents, layers: Sequence[LayerRow]) -> str:
    """What came out, in one or two sentences."""
    weights, inputs = _means(layers)
    at = f"With {weights:.2g}-bit weights and {inputs:.2g}-bit inputs on average, it"
    found = run.quantized
    if found is None:
        assert run.searched is not None
        spent = format_quantity(run.searched.bops, "BOPs")
        return f"Searcher {run.searched.searcher} chose bits for {counted(len(layers), 'layer')}: {weights:.2g} for weights and {inputs:.2g} for inputs on average, {spent} for an image."
    cost = (
        f"It needs {times(found.float_bops / max(found.bops, 1))} times fewer bit-operations and "
        f"{times(found.float_size_bytes / max(found.size_bytes, 1))} times less memory."
    )
    if found.top1 is None:
        agrees = "" if found.agreement is None else f"{found.agreement:.2f} % of "
        return f"{at} gives the float network's answer on {agrees}{images_text(found)}. {cost}"
    beside = "" if found.float_top1 is None else f"; the float network {found.float_top1:.2f} %"
    return f"{at} is right on {found.top1:.2f} % of {images_text(found)}{beside}. {cost}"


def _means(layers: Sequence[LayerRow]) -> tuple[float, float]:
    macs = {layer.name: layer.macs or 1 for layer in layers}
    return mean_bits({layer.name: layer.bits for layer in layers}, macs)


@dataclass(frozen=True)
class Tile:
    """A figure at the head of the page."""

    name: str
    figure: str
    unit: str
    note: str


def _tiles(run: Contents) -> list[Tile]:
    found, searched = run.quantized, run.searched
    if found is None:
        assert searched is not None
        tiles = [Tile("Bit-operations", *_split(searched.bops, ""), _budget(searched.bops, searched.budget_bops, "BOPs"))]
        if searched.scoring_top1 is not None:
            tiles.insert(0, Tile("Top-1", f"{searched.scoring_top1:.2f}", "%", "calibrated, held-out training images"))
        return [*tiles, Tile("Search", format_duration(searched.seconds), "", f"searcher {searched.searcher}")]
    tiles = []
    if found.top1 is not None:
        note = "" if found.float_top1 is None else f"float {found.float_top1:.2f} %, {points(found.top1 - found.float_top1)}"
        tiles.append(Tile("Top-1", f"{found.top1:.2f}", "%", note))
    if found.agreement is not None:
        tiles.append(Tile("Same answer as float", f"{found.agreement:.2f}", "%", f"of {images_text(found)}"))
    ratio, smaller = found.float_bops / max(found.bops, 1), found.float_size_bytes / max(found.size_bytes, 1)
    tiles.append(Tile("Bit-operations", *_split(found.bops, ""), f"float {format_quantity(found.float_bops)}, {times(ratio)} times fewer"))
    tiles.append(Tile("Size", *_split(found.size_bytes, "B"), f"float {format_quantity(found.float_size_bytes, 'B')}, {times(smaller)} times smaller"))
    return tiles


def _split(value: float, unit: str) -> tuple[str, str]:
    figure, _, unit = format_quantity(value, unit).partition(" ")
    return figure, unit


def _budget(spent: int, budget: int | None, unit: str) -> str:
    if not budget:
        return "for one image"
    return f"{100 * spent / budget:.2f} % of the budget of {format_quantity(budget, unit)}"


def points(change: float) -> str:
    """``−1.10 points``, with a real minus."""
    return f"{change:+.2f} points".replace("-", "\N{MINUS SIGN}")


def _stages(found: QuantizeFigures, seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """The rows of the table of stages."""
    rows = [{"name": "float", "top1": found.float_top1, "top5": found.float_top5, "agreement": 100.0 if found.agreement is not None else None, "bops": found.float_bops, "size": found.float_size_bytes}]
    stages = [stage.model_dump() for stage in found.stages] or [{"stage": "calibrated", "top1": found.calibrated_top1}]
    for stage in stages:
        took = seconds.get(stage["stage"], stage.get("seconds"))
        rows.append({**stage, "name": stage["stage"], "bops": found.bops, "size": found.size_bytes, "seconds": took})
    rows[-1]["exported"] = True
    if found.epochs and found.best_epoch and found.exported_epoch not in (found.best_epoch,):
        rows.insert(-1, {"name": f"best epoch ({found.best_epoch} of {found.epochs})", "top1": found.best_top1})
    keys = ("top1", "top5", "loss", "agreement", "bops", "size", "seconds")
    return [{"exported": False} | dict.fromkeys(keys) | row for row in rows]


def _notes(run: Contents) -> list[str]:
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
        notes.append("There were no labels, so accuracy was not measured: both networks may agree on a wrong class.")
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


def layer_rows(run: Contents) -> tuple[list[LayerRow], list[str]]:
    """The table of layers, and what its columns are of, as far as the run recorded them."""
    policy = run.policy
    calibrated = {layer.name: layer for layer in run.network.layers} if run.network else {}
    searched = {layer.name: layer for layer in run.searched.layers} if run.searched else {}
    readings = run.analyzed.readings if run.analyzed else {}
    notes = []
    distributions = readings.get("distributions")
    measured = {one.name: one for one in distributions.layers} if isinstance(distributions, DistributionsReading) else {}
    if measured or calibrated:
        when = "in the final network, by saq analyze" if measured else "at calibration, before any training"
        notes.append(
            f"Error: squared error of rounding, of the squared values. Clipped: values beyond the outermost code. Codes: "
            f"those in use. All {when}."
        )
    sensitivity, note = _sensitivity(run, readings.get("sensitivity"))
    notes += [note] if note else []
    trace, flips = readings.get("trace"), readings.get("flips")
    traces = {one.name: one.per_weight for one in trace.layers} if isinstance(trace, TraceReading) else {}
    if traces:
        notes.append("Curvature: trace of the Hessian, for a weight.")
    flipped = {one.name: one.share for one in flips.layers} if isinstance(flips, FlipsReading) else {}
    if flipped:
        notes.append("Flips: weights whose code changes if they are perturbed within the radius of training.")
    total = run.quantized.bops if run.quantized else run.searched.bops if run.searched else 0
    rows = []
    for name, bits in policy.items():
        layer, cost = calibrated.get(name), searched.get(name)
        bops = layer.bops if layer else cost.bops if cost else None
        one = measured.get(name)
        rows.append(
            LayerRow(
                name=name,
                kind=layer.kind if layer else "",
                bits=bits,
                pinned=layer.pinned if layer else cost.pinned if cost else False,
                share=bops / total if bops is not None and total else None,
                macs=layer.macs if layer else cost.macs if cost else 0,
                size=layer.bytes if layer else None,
                weights=OperandFit.of(one.weights) if one else layer.weight_fit if layer else None,
                inputs=OperandFit.of(one.inputs) if one else layer.input_fit if layer else None,
                sensitivity=sensitivity.get(name),
                trace=traces.get(name),
                flips=flipped.get(name),
                pictures=(_spark(one.weights, name, "weights"), _spark(one.inputs, name, "inputs")) if one else None,
            )
        )
    return rows, notes


def _spark(operand: Operand | None, name: str, what: str) -> Any:
    return "" if operand is None else charts.histogram(operand.histogram, f"Distribution of the {what} of {name}")


def _sensitivity(run: Contents, reading: object) -> tuple[dict[str, float], str | None]:
    """The sensitivity of every layer, by analysis or by the search, and what it is."""
    if isinstance(reading, SensitivityReading) and reading.layers:
        lowest = min(one.bits for one in reading.layers[0].candidates)
        found = {
            layer.name: one.loss_change
            for layer in reading.layers
            for one in layer.candidates
            if one.bits == lowest and one.loss_change is not None
        }
        return found, f"Sensitivity: rise of the loss with this layer alone at {lowest} bits."
    if run.scores is not None:
        found = {name: max(losses.values()) - min(losses.values()) for name, losses in run.scores.losses.items()}
        return found, (
            f"Sensitivity: what searcher {run.scores.searcher} counts for this layer at its fewest bits, above that at "
            "its most; layers that share their bits have it once."
        )
    return {}, None


def _policy(run: Contents, layers: Sequence[LayerRow]) -> Any:
    bars = [charts.LayerBar(each.name, each.bits, each.share, each.macs, each.pinned) for each in layers]
    return charts.policy_picture(bars) if bars else None


def _curves(run: Contents) -> dict[str, Any] | None:
    found = run.quantized
    if found is None:
        return None
    before = [line for line in run.metrics if line.phase in ("calibrated", "compensated", "reconstructed")]
    start = before[-1] if before else None
    floating = next((line for line in run.metrics if line.phase == "float"), None)
    pictures = [
        charts.curves(
            run.metrics,
            figure=figure,
            start=getattr(start, figure) if start else None,
            floating=getattr(floating, figure) if floating else None,
        )
        for figure in ("top1", "loss")
    ]
    blocks = next((line.blocks for line in run.metrics if line.blocks), [])
    known = [picture for picture in pictures if picture is not None]
    if not known and not blocks:
        return None
    return {"pictures": known, "blocks": charts.blocks_picture(blocks) if blocks else None}


def _front(run: Contents) -> dict[str, Any] | None:
    front = run.front
    if front is None or not front.points:
        return None
    rows = sorted((p for p in front.points if p.on_front or p.kind == "chosen"), key=lambda p: p.cost)
    return {
        "picture": charts.front_picture(front),
        "images": counted(front.images, "held-out image"),
        "searcher": front.searcher,
        "float": front.float_top1,
        "rows": rows,
        "tried": len(front.points),
    }


def analysis(analyzed: Analyzed) -> dict[str, Any]:
    """The part about sharpness, curvature and landscape."""
    readings = analyzed.readings
    landscape = readings.get("landscape")
    eigenvalue, sharpness = readings.get("eigenvalue"), readings.get("sharpness")
    trace, flips = readings.get("trace"), readings.get("flips")
    facts = []
    if isinstance(sharpness, SharpnessReading) and sharpness.sharpness is not None:
        facts.append(
            (
                "Sharpness",
                f"{sharpness.sharpness:.4g}",
                f"The loss rises from {sharpness.loss:.4g} to {sharpness.perturbed_loss:.4g} within radius {sharpness.rho:g}; "
                f"top-1 falls from {sharpness.top1:.2f} to {sharpness.perturbed_top1:.2f} %.",
            )
        )
    if isinstance(eigenvalue, EigenvalueReading):
        facts.append(
            ("Largest eigenvalue", f"{eigenvalue.eigenvalue:.4g}", "Curvature of the loss along its steepest direction.")
        )
    if isinstance(trace, TraceReading):
        facts.append(
            ("Trace", f"{trace.trace:.4g}", f"Curvature summed over all directions, ± {trace.standard_error:.2g}.")
        )
    if isinstance(flips, FlipsReading) and flips.reason is None:
        facts.append(
            ("Flips", f"{100 * flips.share:.3g} %", f"Weights whose code changes within radius {flips.rho:g}.")
        )
    picture = charts.landscape_picture(landscape) if isinstance(landscape, LandscapeReading) else None
    known = [v for row in landscape.loss for v in row if v is not None] if isinstance(landscape, LandscapeReading) else []
    return {
        "images": counted(analyzed.subject.images, f"{'training' if analyzed.subject.split == 'train' else 'validation'} image"),
        "facts": facts,
        "landscape": picture,
        "lowest": min(known, default=None),
        "highest": max(known, default=None),
        "span": landscape.span if isinstance(landscape, LandscapeReading) else None,
    }


def _classes(run: Contents) -> list[dict[str, Any]]:
    """The classes that lost most, in percent of their images."""
    rows = []
    for each in run.answers.classes if run.answers else []:
        before, now = 100 * each.float_right / each.images, 100 * each.right / each.images
        rows.append({"name": each.name, "images": each.images, "before": before, "now": now, "change": now - before})
    rows.sort(key=lambda row: (row["change"], row["name"]))
    return [row for row in rows if row["change"] < 0][:MOST_CLASSES]


def _pictures(answers: Answers) -> list[dict[str, Any]]:
    """The images with another answer, in groups."""
    if answers.lost is None or answers.won is None:
        groups = {"Other answer than before": (answers.shown, answers.changed)}
    else:
        lost = [image for image in answers.shown if image.before == image.label]
        won = [image for image in answers.shown if image.after == image.label]
        rest = [image for image in answers.shown if image not in lost and image not in won]
        groups = {
            "Right before, wrong now": (lost, answers.lost),
            "Wrong before, right now": (won, answers.won),
            "Wrong both times": (rest, answers.changed - answers.lost - answers.won),
        }
    return [
        {"title": title, "images": images, "shown": len(images), "total": total}
        for title, (images, total) in groups.items()
        if images
    ]


def _deploy(run: Contents) -> list[dict[str, Any]]:
    """For every exported file the runtimes that it is for; nothing where the preprocessing is not recorded."""
    if run.network is None:
        return []
    known = run.network.preprocessing
    channels, height, width = known["input_size"]
    scaled = round(max(height, width) / known["crop_pct"])
    return [
        {
            "path": str(run.path / "artifacts" / verdict.file),
            "file": verdict.file,
            "style": verdict.style,
            "runtime": runtime,
            "channels": channels,
            "height": height,
            "width": width,
            "scaled": scaled,
            "square": known["crop_mode"] == "squash",
            "mean": [round(value, 6) for value in known["mean"]],
            "std": [round(value, 6) for value in known["std"]],
            "filter": str(known["interpolation"]).upper(),
        }
        for verdict in run.verdicts
        for runtime in READS.get(verdict.style, ("ort",))
    ]


def _repeat(run: Contents) -> dict[str, str]:
    program, *arguments = run.manifest.command or ["saq"]
    name = "saq" if Path(program).name in ("saq", "__main__.py", "saq.exe") else program
    return {
        "command": shlex.join([name, *arguments]),
        "rerun": shlex.join(["saq", "rerun", str(run.path)]),
        "verb": run.manifest.verb,
        "directory": run.manifest.circumstances[0].directory if run.manifest.circumstances else "",
    }


def _facts(run: Contents) -> list[tuple[str, str]]:
    """Settings, data, hardware and versions."""
    config, manifest = run.config, run.manifest
    training = config.training
    found = [("Seed", str(config.run.seed)), ("Recipe", config.recipe)]
    if manifest.verb == "quantize" and training.epochs:
        found.append(("Training", f"{training.method}, {counted(training.epochs, 'epoch')}, {training.optimizer}, learning rate {training.lr:g}"))
    if run.searched is not None:
        found.append(("Searcher", run.searched.searcher))
    weights = config.model.weights or ("published" if config.model.pretrained else "random")
    found.append(("Float weights", str(weights)))
    if config.data.path:
        found.append(("Data", str(config.data.path)))
    if config.data.calibration:
        found.append(("Calibration images", str(config.data.calibration)))
    for name, line in manifest.images.items():
        count, _, digest = line.partition(":")
        found.append((f"Images, {name}", f"{int(count):,}, fingerprint {digest[:16]}" if count.isdigit() else line))
    for where in manifest.circumstances[-1:]:
        found.append(("Processor", f"{where.cpu}, {where.instructions}"))
        found.append(("Device", f"{where.device}, {counted(where.threads, 'thread')}, {counted(where.processes, 'process')}"))
        if where.training is not None:
            found.append(("Passes", str(where.training)))
    found.append(("Versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())))
    found.append(("Started", manifest.started))
    return found
