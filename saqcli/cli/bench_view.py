"""How fast a network is, as two tables: what each way to run it multiplies with, and how long that takes."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console

from saqcli.cli.tables import print_table, say
from saqcli.units import counted, format_quantity

SMALLER_NOT_FASTER = (
    "Fewer than 8 bits make the file smaller, not faster, on this runtime: "
    "it has no integer kernels below 8 bits."
)


def show_bench(bench: dict[str, Any]) -> None:
    """Print what ``saq eval --bench --json`` holds under ``bench``."""
    console = Console()
    size = "x".join(map(str, bench["input_size"]))
    say(console, f"{bench['model']}, input {size}, on {bench['cpu']['name']}\n")
    print_table(console, ("", "size", "integer kernels", "float kernels"), _contenders(bench["rows"]))
    console.print()
    columns = ("", "batch", "threads", "ms a batch", "spread", "images/s", "relative")
    print_table(console, columns, _timings(bench["rows"]))
    console.print()
    say(
        console,
        f"Medians of {counted(bench['repeats'], 'run')}, in turns; spread is the interquartile range.",
    )
    say(console, f"Relative is images a second, with {bench['baseline']} as 1.")
    for note in bench["notes"]:
        say(console, f"{note[0].upper()}{note[1:]}.")
    if bench["few_bits"]:
        say(console, SMALLER_NOT_FASTER)


def _contenders(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Size and kernels, which are the same in every case."""
    return [
        [
            name,
            format_quantity(row["size_bytes"], "B"),
            *("" if row[kind] is None else str(row[kind]) for kind in ("integer_kernels", "float_kernels")),
        ]
        for name, row in {row["name"]: row for row in rows}.items()
    ]


def _timings(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row for every contender in every case, and a gap between cases."""
    milliseconds = _places(row["latency_ms"] for row in rows)
    rate = _places(row["images_per_second"] for row in rows)
    table: list[list[str]] = []
    for _, case in groupby(rows, key=lambda row: (row["threads"], row["batch_size"])):
        table += [[]] if table else []
        table += [
            [
                row["name"],
                str(row["batch_size"]),
                str(row["threads"]),
                f"{row['latency_ms']:.{milliseconds}f}",
                f"{row['spread_ms']:.{milliseconds}f}",
                f"{row['images_per_second']:.{rate}f}",
                f"{row['relative']:.2f}",
            ]
            for row in case
        ]
    return table


def _places(values: Iterable[float]) -> int:
    """Behind the point, so that the least of a column has three digits, or three places."""
    return min(max(2 - math.floor(math.log10(min(values))), 0), 3)
