"""``report.md``: what a person reads first in a run directory."""

from pathlib import Path
from typing import Any

from saqcli.config import RunConfig
from saqcli.io.files import write_text
from saqcli.units import format_quantity


def write_report(path: Path, config: RunConfig, results: dict[str, Any]) -> None:
    """Write the report of a finished run.

    Args:
        path: of the Markdown file.
        config: of the run.
        results: the dictionary that ``saq quantize --json`` prints.
    """
    write_text(path, report_markdown(config, results))


def report_markdown(config: RunConfig, results: dict[str, Any]) -> str:
    """The report as Markdown."""
    budget = results["budget_bops"]
    share = f" ({100 * results['bops'] / budget:.2f} % of {format_quantity(budget)})" if budget else ""
    layers = "\n".join(
        f"| `{name}` | {bits['weight'] or 32} | {bits['activation'] or 32} |"
        for name, bits in results["policy"].items()
    )
    onnx_size = ""
    if results["onnx_size_bytes"] is not None:
        onnx_size = f"\n| ONNX file |  |  | {format_quantity(results['onnx_size_bytes'], 'B')} |"
    return f"""# {results["model"]}, quantized

|  | float | calibrated | fine-tuned |
|--|--|--|--|
| top-1 | {results["float_top1"]:.2f} % | {results["calibrated_top1"]:.2f} % | {results["top1"]:.2f} % |
| top-5 | {results["float_top5"]:.2f} % |  | {results["top5"]:.2f} % |
| BOPs | {format_quantity(results["float_bops"])} |  | {format_quantity(results["bops"])}{share} |
| size | {format_quantity(results["float_size_bytes"], "B")} |  | {
        format_quantity(results["size_bytes"], "B")
    } |{onnx_size}

Evaluated on {results["images"]} images. BOPs are reduced {results["bops_reduction"]:.1f} times.

{_onnx(results)}

Method {config.training.method}, {config.training.epochs} epochs, learning rate {config.training.lr:g}, seed
{config.run.seed}, recipe {config.recipe}. Run it again, and compare, with `saq rerun RUN`.

## Bits

| layer | weights | activations |
|--|--|--|
{layers}
"""


def _onnx(results: dict[str, Any]) -> str:
    """How the ONNX file compares with the model, and why it is larger where it is."""
    if results["onnx_style"] is None:
        return "No ONNX file was written (`--no-export`)."
    count, available = results["onnx_images"], results["onnx_images_available"]
    images = f"{count} images" + (f" (of {available})" if available and available > count else "")
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
