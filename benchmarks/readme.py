"""Print README's table of measured accuracies from run directories.

    python benchmarks/readme.py RUN [RUN ...]

Prints Markdown, one row per run in the given order; cells that repeat the row above are empty.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from saqcli.runs.manifest import RunManifest
from saqcli.serialization import parse_json
from saqcli.units import format_quantity

HEAD = ("network, images", "setting", "top-1", "float", "BOPs", "weights")


def row(run: Path) -> list[str]:
    """Cells of a finished run."""
    config: dict[str, Any] = json.loads((run / "config.json").read_text())
    manifest = parse_json(RunManifest, (run / "manifest.json").read_text(), str(run))
    results: dict[str, Any] = manifest.results or {}
    if manifest.status != "finished":
        raise SystemExit(f"{run} is {manifest.status}, not finished")
    training = config["training"]
    bits, bops = config["quantization"]["bits"], config["quantization"]["bops"]
    setting = f"`--bits {bits}`" if bits else f"`--bops {bops}`"
    if config.get("reconstruction", {}).get("enabled"):
        setting += " `--recipe minutes`, no labels"
    elif training["epochs"] == 0:
        setting += ", calibrated only"
    else:
        setting += f" `--method {training['method']} --epochs {training['epochs']}`"
    if config["run"]["seed"]:
        setting += f" `--seed {config['run']['seed']}`"
    return [
        f"`{results['model']}`, {Path(config['data']['path']).name} ({results['images']:,})",
        setting.replace("` `", " "),
        f"{results['top1']:.2f}",
        f"{results['float_top1']:.2f}",
        f"{format_quantity(results['bops'])} of {format_quantity(results['float_bops'])}",
        f"{format_quantity(results['size_bytes'], 'B')} of {format_quantity(results['float_size_bytes'], 'B')}",
    ]


def table(runs: list[Path]) -> list[str]:
    """Lines of the table."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "--|" * len(HEAD)]
    above = [""] * len(HEAD)
    for cells in map(row, runs):
        same = cells[0] == above[0]
        shown = [
            "" if same and k in (0, 3, 4, 5) and cell == above[k] else cell for k, cell in enumerate(cells)
        ]
        lines.append("| " + " | ".join(shown) + " |")
        above = cells
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    print("\n".join(table(parser.parse_args().runs)))


if __name__ == "__main__":
    main()
