"""The parts of the page of a run, as plain values for its template."""

import math
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from saqcli.analysis.eigenvalue import EigenvalueReading
from saqcli.analysis.flips import FlipsReading
from saqcli.analysis.hessian_trace import TraceReading
from saqcli.analysis.landscape import LandscapeReading
from saqcli.analysis.loss_sharpness import SharpnessReading
from saqcli.report.analysis_file import images_of
from saqcli.report.answers import Answers
from saqcli.report.canvas import model_names
from saqcli.report.page import charts
from saqcli.report.page.contents import Analyzed, Contents
from saqcli.report.page.head import headline, notes_of, stage_rows, tiles_of
from saqcli.report.page.layers import bars_of, layer_rows
from saqcli.report.page.proofs import proof_of
from saqcli.report.run_report import FROM_TEACHER
from saqcli.units import counted

MOST_CLASSES = 10  # that lost most
READS = {  # which runtimes a file of a style is for; every other style runs in ONNX Runtime
    "qdq": ("ort", "openvino"),
    "qdq-vnni": ("ort", "openvino"),
    "trt": ("tensorrt",),
    "qonnx": ("finn",),
}


def sections(run: Contents) -> dict[str, Any]:
    """The values of the page of a run."""
    layers, notes = layer_rows(run)
    return {
        "title": run.model,
        "run": str(run.path),
        "date": date_of(run.manifest.started),
        "versions": run.manifest.versions,
        "headline": headline(run, layers),
        "tiles": tiles_of(run),
        "stages": stage_rows(run.quantized, run) if run.quantized else None,
        "notes": notes_of(run),
        "policy": charts.policy_picture(bars_of(layers)) if layers else None,
        "curves": _curves(run),
        "layers": layers,
        "most_share": max((layer.share or 0.0 for layer in layers), default=0.0) or 1.0,
        "layer_notes": notes,
        "front": _front(run),
        "analysis": analysis(run.analyzed) if run.analyzed else None,
        "outdated": run.outdated,
        "classes": _classes(run),
        "answers": run.answers,
        "pictures": _pictures(run.answers) if run.answers else [],
        "proofs": [proof_of(verdict) for verdict in run.verdicts],
        "deploy": _deploy(run),
        "repeat": _repeat(run),
        "facts": _facts(run),
    }


def date_of(started: str) -> str:
    """``29 November 2026`` of an ISO time; the text itself if it is none."""
    try:
        day = datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{day.day} {day:%B %Y}"


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
    models = [analyzed, *([analyzed.against] if analyzed.against else [])]
    landscapes = [
        each if isinstance(each := model.readings.get("landscape"), LandscapeReading) else None
        for model in models
    ]
    known = [each for each in landscapes if each]
    losses = [loss for each in known for row in each.loss for loss in row if loss is not None]
    names = model_names([(each.subject.model, each.subject.target) for each in models])
    return {
        "images": images_of(analyzed.subject.images, analyzed.subject.split),
        "models": [
            {
                "name": name,
                "facts": [*(_score(model) if len(models) > 1 else ()), *_readings(model)],
                "landscape": charts.landscape_picture(landscape, known) if landscape else None,
            }
            for name, model, landscape in zip(names, models, landscapes, strict=True)
        ],
        "lowest": min(losses, default=None),
        "highest": max(losses, default=None),
        "span": known[0].span if known else None,
    }


def _score(analyzed: Analyzed) -> Iterator[tuple[str, str, str]]:
    subject = analyzed.subject
    yield "Loss", f"{subject.loss:.4g}", f"And top-1 {subject.top1:.2f} %, on these images."


def _readings(analyzed: Analyzed) -> Iterator[tuple[str, str, str]]:
    """Name, figure and meaning of every reading that is one number."""
    for reading in analyzed.readings.values():
        match reading:
            case SharpnessReading(sharpness=float(rise)):
                yield (
                    "Sharpness",
                    f"{rise:.4g}",
                    f"The loss rises from {reading.loss:.4g} to {reading.perturbed_loss:.4g} within radius "
                    f"{reading.rho:g}, and top-1 goes from {reading.top1:.2f} to {reading.perturbed_top1:.2f} %.",
                )
            case EigenvalueReading():
                meaning = "Curvature of the loss along its steepest direction."
                yield "Largest eigenvalue", f"{reading.eigenvalue:.4g}", meaning
            case TraceReading():
                meaning = (
                    f"Curvature summed over all directions, \N{PLUS-MINUS SIGN} {reading.standard_error:.2g}."
                )
                yield "Trace", f"{reading.trace:.4g}", meaning
            case FlipsReading(reason=None):
                meaning = f"Weights whose code changes within radius {reading.rho:g}."
                yield "Flips", f"{100 * reading.share:.3g} %", meaning
            case _:
                pass


def _classes(run: Contents) -> list[dict[str, Any]]:
    """The classes that lost most, in percent of their images."""
    lost = [each for each in run.answers.classes if each.right < each.float_right] if run.answers else []
    lost.sort(key=lambda each: ((each.right - each.float_right) / each.images, each.name))
    rows = []
    for each in lost[:MOST_CLASSES]:
        before, now = 100 * each.float_right / each.images, 100 * each.right / each.images
        rows.append(
            {"name": each.name, "images": each.images, "before": before, "now": now, "change": now - before}
        )
    return rows


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
    scaled = math.floor(max(height, width) / known["crop_pct"])
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
        "weights": run.config.model.weights or "",
        "data": run.config.data.path or "",
        "directory": run.manifest.circumstances[0].directory if run.manifest.circumstances else "",
    }


def _facts(run: Contents) -> list[tuple[str, str]]:
    """Settings, data, hardware and versions."""
    config, manifest = run.config, run.manifest
    training = config.training
    found = [("Seed", str(config.run.seed)), ("Recipe", config.recipe)]
    if manifest.verb == "quantize" and training.epochs:
        how = (
            training.method,
            *([FROM_TEACHER] if run.quantized and run.quantized.distilled else []),
            counted(training.epochs, "epoch"),
            training.optimizer,
            f"learning rate {training.lr:g}",
        )
        found.append(("Training", ", ".join(how)))
    if manifest.verb == "quantize" and config.reconstruction.enabled:
        found.append(("Reconstruction", counted(config.reconstruction.iterations, "iteration") + " a block"))
    bits = config.quantization
    asked = {
        "Bits": bits.bits,
        "Policy": bits.policy,
        "Budget of BOPs": bits.bops,
        "Budget of bytes": bits.size,
    }
    found += [(name, str(value)) for name, value in asked.items() if value is not None]
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
        found.append(
            (f"Images, {name}", f"{int(count):,}, fingerprint {digest[:16]}" if count.isdigit() else line)
        )
    for where in manifest.circumstances[-1:]:
        found.append(("Processor", f"{where.cpu}, {where.instructions}"))
        found.append(
            (
                "Device",
                f"{where.device}, {counted(where.threads, 'thread')}, {counted(where.processes, 'process')}",
            )
        )
        if where.training is not None:
            found.append(("Passes", str(where.training)))
    found.append(("Versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())))
    found.append(("Started", manifest.started))
    return found
