"""How fast a network is, as two tables: what each way to run it multiplies with, and how long that takes."""

import math
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from saqcli.cli.tables import plain_table, say
from saqcli.units import format_quantity

SMALLER_NOT_FASTER = (
    "Fewer than 8 bits make the file smaller, not faster, on this runtime: "
    "it has no integer kernels below 8 bits."
)


def show_bench(bench: dict[str, Any]) -> None:
    """Print what ``saq eval --bench --json`` holds under ``bench``."""
    console = Console()
    size = "x".join(map(str, bench["input_size"]))
    say(console, f"{bench['model']}, input {size}, on {bench['cpu']['name']}\n")
    console.print(_contenders(bench["rows"]))
    console.print()
    console.print(_timings(bench["rows"]))
    console.print()
    say(console, f"Medians of {bench['repeats']} runs, in turns; spread is the interquartile range.")
    say(console, f"Relative is images a second, with {bench['baseline']} as 1.")
    for note in bench["notes"]:
        say(console, f"{note[0].upper()}{note[1:]}.")
    if bench["few_bits"]:
        say(console, SMALLER_NOT_FASTER)


def _numbers(first: str, others: Iterable[str]) -> Table:
    table = plain_table()
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _contenders(rows: list[dict[str, Any]]) -> Table:
    """Size and kernels, which are the same in every case."""
    table = _numbers("", ("size", "integer kernels", "float kernels"))
    for row in {row["name"]: row for row in rows}.values():
        kernels = (
            "" if row[kind] is None else str(row[kind]) for kind in ("integer_kernels", "float_kernels")
        )
        table.add_row(row["name"], format_quantity(row["size_bytes"], "B"), *kernels)
    return table


def _timings(rows: list[dict[str, Any]]) -> Table:
    """A row for every contender in every case, and a gap between cases."""
    table = _numbers("", ("batch", "threads", "ms a batch", "spread", "images/s", "relative"))
    milliseconds = _places(row["latency_ms"] for row in rows)
    rate = _places(row["images_per_second"] for row in rows)
    for index, (_, case) in enumerate(groupby(rows, key=lambda row: (row["threads"], row["batch_size"]))):
        if index:
            table.add_row()
        for row in case:
            table.add_row(
                row["name"],
                str(row["batch_size"]),
                str(row["threads"]),
                f"{row['latency_ms']:.{milliseconds}f}",
                f"{row['spread_ms']:.{milliseconds}f}",
                f"{row['images_per_second']:.{rate}f}",
                f"{row['relative']:.2f}",
            )
    return table


def _places(values: Iterable[float]) -> int:
    """Behind the point, so that the least of a column has three digits, or three places."""
    return min(max(2 - math.floor(math.log10(min(values))), 0), 3)
