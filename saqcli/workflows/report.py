"""``report.md``: what a person reads first in a run directory."""

import shlex
from pathlib import Path
from typing import Any

from saqcli.config import RunConfig
from saqcli.io.files import write_text
from saqcli.units import counted, format_quantity


def write_report(path: Path, config: RunConfig, results: dict[str, Any]) -> None:
    """Write the report of a finished run.

    Args:
        path: of the Markdown file.
        config: of the run.
        results: the dictionary that ``saq quantize --json`` prints.
    """
    write_text(path, report_markdown(config, results))


def quantized_states(results: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    """Title to top-1 in percent, and whether it is exported: calibrated, after the last epoch, and the best of all."""
    last, best, epochs = results["last_top1"], results["best_top1"], results["epochs"]
    states = {"calibrated": (results["calibrated_top1"], epochs == 0)}
    if last is not None:
        states[f"last (epoch {epochs})"] = (last, results["exported_epoch"] == epochs)
    if epochs and best is not None:
        states[f"best (epoch {results['best_epoch']})"] = (best, results["exported_epoch"] != epochs)
    return states


def report_markdown(config: RunConfig, results: dict[str, Any]) -> str:
    """The report as Markdown."""
    budget = results["budget_bops"]
    share = f" ({100 * results['bops'] / budget:.2f} % of {format_quantity(budget)})" if budget else ""
    layers = "\n".join(
        f"| `{name}` | {bits['weight'] or 32} | {bits['activation'] or 32} |"
        for name, bits in results["policy"].items()
    )
    names, rows, exported = results_table(results)
    rows[2][exported] += share
    table = "\n".join(f"| {' | '.join(row)} |" for row in (["", *names], ["--"] * (1 + len(names)), *rows))
    note = f"\nNote: {results['advice']}.\n" if results["advice"] else ""
    again = f"saq rerun {shlex.quote(results['run_dir'])}"
    return f"""# {results["model"]}, quantized

{table}
{note}
Evaluated on {counted(results["images"], "image")}. BOPs are reduced {results["bops_reduction"]:.1f} times.

{_onnx(results)}

{_made(config)}, seed {config.run.seed}, recipe {config.recipe}. Run it again, and compare, with
`{again}`.

## Bits

| layer | weights | activations |
|--|--|--|
{layers}
"""


def results_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], int]:
    """The figures of a run side by side.

    Args:
        results: as ``report_markdown``.

    Returns:
        Names of the columns behind the first one, the rows (top-1, top-5, BOPs, size, ONNX file), and the place in a
        row of the state that was exported, which alone has all figures beside the float network.
    """
    states = quantized_states(results)
    exported = 2 + [taken for _, taken in states.values()].index(True)
    rows = [
        [
            "top-1",
            *(f"{top1:.2f} %" for top1 in (results["float_top1"], *(top1 for top1, _ in states.values()))),
        ]
    ]
    for title, before, after in (
        ("top-5", f"{results['float_top5']:.2f} %", f"{results['top5']:.2f} %"),
        ("BOPs", format_quantity(results["float_bops"]), format_quantity(results["bops"])),
        ("size", *(format_quantity(results[f"{key}size_bytes"], "B") for key in ("float_", ""))),
    ):
        rows.append([title, before, *(after if taken else "" for _, taken in states.values())])
    if results["onnx_size_bytes"] is not None:
        rows.append(["ONNX file", *("" for _ in range(1 + len(states)))])
        rows[-1][exported] = format_quantity(results["onnx_size_bytes"], "B")
    return ["float", *states], rows, exported


def _made(config: RunConfig) -> str:
    """How the weights came about."""
    training = config.training
    if not training.epochs:
        return "Calibrated, not fine-tuned"
    return f"Method {training.method}, {counted(training.epochs, 'epoch')}, learning rate {training.lr:g}"


def _onnx(results: dict[str, Any]) -> str:
    """How the ONNX file compares with the model, and why it is larger where it is."""
    if results["onnx_style"] is None:
        return "No ONNX file was written (`--no-export`)."
    count, available = results["onnx_images"], results["onnx_images_available"]
    images = counted(count, "image") + (f" (of {available})" if available and available > count else "")
    agreement = f"{100 * results['onnx_argmax_agreement']:.2f} % of {images}"
    if results["onnx_style"] == "exact":
        lines = [
            f"The ONNX file equals the model's exact form bit for bit, and has its best class on {agreement}."
        ]
    else:
        lines = [
            "Every layer of the ONNX file, fed what PyTorch feeds it, returns what PyTorch returns to "
            f"{results['onnx_layers_error']:.1e} of its range;",
            f"end to end it has the best class of the model in float64 on {agreement}.",
        ]
    notes = [results[name] for name in ("onnx_explanation", "onnx_size_note") if results[name]]
    return "\n".join([*lines, *(f"\n{note[0].upper()}{note[1:]}." for note in notes)])
