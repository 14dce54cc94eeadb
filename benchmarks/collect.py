"""Add what ``minimizers.py``, ``eigenvalues.py`` and ``searchers.py`` measured to the files that ``tables.py`` reads.

    python benchmarks/collect.py results/results.jsonl [FILE ...]

Rows of the first two go to ``results/minimizers.jsonl`` and ``results/eigenvalues.jsonl``. Of ``searchers.py``,
policies that were calibrated only go to ``results/searches.jsonl``, and those that were reconstructed or fine-tuned to
``results/trained.jsonl``. A row takes the place of an older one of the same network, settings
and seed; of searches those of seed 0 count.
"""

import argparse
from pathlib import Path
from typing import Any

from common import plain_parser, read

from saqcli.serialization import json_text, write_text

FOLDER = Path(__file__).parent / "results"
Line = dict[str, Any]
# What makes two rows the same measurement, by file.
KEYS = {
    "minimizers.jsonl": ("model", "bits", "precision", "epochs", "lr", "name", "seed"),
    "eigenvalues.jsonl": ("model", "bits", "precision", "epochs", "lr", "name", "seed"),
    "searches.jsonl": ("model", "budget", "name"),
    "trained.jsonl": ("model", "budget", "name", "stages", "epochs", "method", "seed"),
    "readme.jsonl": ("model", "options"),
}
ORIGIN = ("model", "date", "commit", "cpu", "threads", "command")
FIGURES = ("stages", "epochs", "method", "calibrated", "top1", "loss", "train_seconds", "seed")
POLICY = ("bops", "budget_bops", "cpu_seconds", "bits")


def collected(lines: list[Line]) -> dict[str, list[Line]]:
    """The rows of one file, by the file that they go to."""
    searched = [line for line in lines if line.get("kind") == "search" and not line["seed"]]
    trained = [line for line in lines if line.get("kind") == "train"]
    found: dict[str, list[Line]] = {name: [] for name in KEYS}
    for line in lines:
        if "kind" not in line:
            found["eigenvalues.jsonl" if "eigenvalue" in line else "minimizers.jsonl"].append(line)
    for search in searched:
        about = {name: search[name] for name in (*ORIGIN, "budget", "name", *POLICY)}
        for run in trained:
            if (run["model"], run["bits"]) != (search["model"], search["bits"]):
                continue
            if run["epochs"] or run["stages"]:
                found["trained.jsonl"].append(about | {name: run[name] for name in FIGURES})
            else:
                found["searches.jsonl"].append(about | {"calibrated": run["calibrated"]})
    return found


def merge(old: list[Line], new: list[Line], by: tuple[str, ...]) -> list[Line]:
    """``old`` with ``new`` in the place of rows of the same key, or behind the last row of the same network."""

    def key(line: Line) -> list[Any]:
        return [line[name] for name in by]

    rows = list(old)
    for line in new:
        same = next((index for index, row in enumerate(rows) if key(row) == key(line)), None)
        if same is not None:
            rows[same] = line
        else:
            behind = [index for index, row in enumerate(rows) if key(row)[:2] == key(line)[:2]]
            behind = behind or [index for index, row in enumerate(rows) if row["model"] == line["model"]]
            rows.insert(behind[-1] + 1 if behind else len(rows), line)
    return rows


def add(name: str, new: list[Line]) -> None:
    """Merge ``new`` into a file of ``results/``."""
    rows = merge(read(FOLDER / name), new, KEYS[name])
    write_text(FOLDER / name, "".join(json_text(row) + "\n" for row in rows))


def main() -> None:
    """Read the given files and write those of ``results/``."""
    options: argparse.ArgumentParser = plain_parser(__doc__)
    options.add_argument("files", nargs="+", type=Path)
    for path in options.parse_args().files:
        for name, new in collected(read(path)).items():
            if new:
                add(name, new)
                print(f"{path}: {len(new)} rows to results/{name}")


if __name__ == "__main__":
    main()
