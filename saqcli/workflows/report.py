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


def report_markdown(config: RunConfig, results: dict[str, Any]) -> str:
    """The report as Markdown."""
    budget = results["budget_bops"]
    share = f" ({100 * results['bops'] / budget:.2f} % of {format_quantity(budget)})" if budget else ""
    layers = "\n".join(
        f"| `{name}` | {bits['weight'] or 32} | {bits['activation'] or 32} |"
        for name, bits in results["policy"].items()
    )
    names, rows = results_table(results, fine_tuned=config.training.epochs > 0)
    rows[2][-1] += share
    table = "\n".join(f"| {' | '.join(row)} |" for row in (["", *names], ["--"] * (1 + len(names)), *rows))
    again = f"saq rerun {shlex.quote(results['run_dir'])}"
    return f"""# {results["model"]}, quantized

{table}

Evaluated on {counted(results["images"], "image")}. BOPs are reduced {
        results["bops_reduction"]:.1f} times. Every layer of the
ONNX file, fed what PyTorch feeds it, returns what PyTorch returns to {
        results["onnx_layers_error"]:.1e} of its range;
end to end it has the best class of the model in float64 on {100 * results["onnx_argmax_agreement"]:.2f} % of
{counted(results["onnx_images"], "image")}.

{_made(config)}, seed {config.run.seed}, recipe {config.recipe}. Run it again, and compare, with
`{again}`.

## Bits

| layer | weights | activations |
|--|--|--|
{layers}
"""


def results_table(results: dict[str, Any], *, fine_tuned: bool) -> tuple[list[str], list[list[str]]]:
    """The figures of a run side by side; without fine-tuning the calibrated model is the result.

    Args:
        results: as ``report_markdown``.
        fine_tuned: whether there was an epoch of training.

    Returns:
        Names of the columns behind the first one, and the rows: top-1, top-5, BOPs, size.
    """
    calibrated = f"{results['calibrated_top1']:.2f} %"
    last = [f"{results['top1']:.2f} %", f"{results['top5']:.2f} %"]
    last += [format_quantity(results["bops"]), format_quantity(results["size_bytes"], "B")]
    first = [f"{results['float_top1']:.2f} %", f"{results['float_top5']:.2f} %"]
    first += [format_quantity(results["float_bops"]), format_quantity(results["float_size_bytes"], "B")]
    columns = {"float": first}
    if fine_tuned:
        columns["calibrated"] = [calibrated, "", "", ""]
    columns["fine-tuned" if fine_tuned else "calibrated"] = last
    titles = ("top-1", "top-5", "BOPs", "size")
    return list(columns), [list(row) for row in zip(titles, *columns.values(), strict=True)]


def _made(config: RunConfig) -> str:
    """How the weights came about."""
    training = config.training
    if not training.epochs:
        return "Calibrated, not fine-tuned"
    return f"Method {training.method}, {counted(training.epochs, 'epoch')}, learning rate {training.lr:g}"
