"""The table of ``saq profile --measure``."""

from pathlib import Path
from typing import Any

from rich.console import Console

from saqcli.cli.screens.tables import print_table, print_text
from saqcli.units import counted


def show_latency(result: dict[str, Any], out: Path | None) -> None:
    """Print milliseconds of every layer at every width, their sums, and the times of the whole files."""
    console, widths, about = Console(), result["widths"], result["about"]
    columns = result["columns"]
    rows = [[name, *(f"{columns[width][name]:.3f}" for width in widths)] for name in columns[widths[0]]]
    rows.append(["the rest", *(f"{result['rest_ms'][width]:.3f}" for width in widths)])
    rows.append(["sum", *(f"{result['sum_ms'][width]:.3f}" for width in widths)])
    rows.append(["whole file", *(f"{result['whole_file_ms'][width]:.3f}" for width in widths)])
    rows.append(["its least", *(f"{result['least_whole_file_ms'][width]:.3f}" for width in widths)])
    print_table(
        console,
        ("layer", *widths),
        rows,
        title=f"{result['model']}, milliseconds of {counted(about['batch_size'], 'image')}, style {about['style']}",
        left=(0,),
    )
    ratios = [result["sum_ms"][width] / result["whole_file_ms"][width] for width in widths]
    print_text(
        console,
        f"{about['cpu']}, {counted(about['threads'], 'thread')}, ONNX Runtime {about['versions']['onnxruntime']}, "
        f"medians of {counted(about['rounds'], 'round')}. Sums are {min(ratios):.2f} to {max(ratios):.2f} of the time "
        "of the whole file; far from 1, the machine is busy: measure again when it is idle.",
    )
    if out is not None:
        print_text(console, f"wrote {out}: a budget such as --cost {out} --budget {_example(result)}")


def _example(result: dict[str, Any]) -> str:
    """A budget between the fastest and the slowest quantized file."""
    sums = [value for width, value in result["sum_ms"].items() if width != "float"]
    return f"{(min(sums) + max(sums)) / 2:.3g}ms"
