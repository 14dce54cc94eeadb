"""Add runs to the figures of README's table, ``results/readme.jsonl``, which ``tables.py`` writes into README.

    python benchmarks/readme.py RUN [RUN ...]

A run takes the place of an older one of the same network and options.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from collect import add
from common import plain_parser

from saqcli.runs.manifest import RunManifest
from saqcli.serialization import parse_json

LEFT_OUT = {
    "--weights",
    "--data",
    "--run-dir",
    "--model-kwargs",
    "--mean",
    "--std",
    "--calibration",
    "-q",
    "--json",
}


def row(run: Path) -> dict[str, Any]:
    """The figures of a finished run."""
    config: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
    manifest = parse_json(RunManifest, (run / "manifest.json").read_text(encoding="utf-8"), str(run))
    if manifest.status != "finished":
        raise SystemExit(f"{run} is {manifest.status}, not finished")
    results, where = manifest.results, manifest.circumstances[-1]
    figures = (
        "model",
        "images",
        "top1",
        "float_top1",
        "bops",
        "float_bops",
        "size_bytes",
        "float_size_bytes",
    )
    return {
        **{name: results[name] for name in figures},
        "data": Path(config["data"]["path"]).name,
        "options": options(manifest.command),
        "stage": results["stages"][-1]["stage"],
        "seed": config["run"]["seed"],
        "seconds": sum(manifest.seconds.values()),
        "cpu": where.cpu,
        "threads": where.threads,
        "saq": manifest.versions["saq"],
        "date": manifest.started[:10],
    }


def options(command: list[str]) -> str:
    """What was typed, without network, files and output."""
    found: list[list[str]] = []
    for word in command:
        if word.startswith("-"):
            found.append(word.split("=", 1))
        elif found and len(found[-1]) == 1:
            found[-1].append(word)
    return " ".join(" ".join(each) for each in found if each[0] not in LEFT_OUT)


def main() -> None:
    """Add the given runs."""
    parser: argparse.ArgumentParser = plain_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    add("readme.jsonl", [row(run) for run in parser.parse_args().runs])


if __name__ == "__main__":
    main()
