"""Results as tables for the eye, printed on stdout; no name is ever cut, however narrow the terminal."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saqcli.units import counted, format_figure, format_quantity

PIPED = 200  # columns where nobody looks at a terminal, so that no line wraps
GAP = 2  # columns between two cells
NAMED = 3  # modules that are left in floating point for one reason, before they are counted


def say(console: Console, text: str, *, markup: bool = False) -> None:
    """A line that wraps nowhere, so that it can be searched and cut; ``markup`` is for lines that name no path."""
    console.print(text, highlight=False, soft_wrap=True, markup=markup, emoji=False)


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    left: Iterable[int] = (0,),
) -> None:
    """Print a table whose cells are all shown in full.

    Where the terminal is too narrow, the first cell of a row that does not fit stands on a line of its own, above the
    others. An empty row is a blank line.

    Args:
        console: to print on.
        columns: their titles; none is printed where all are empty.
        rows: cells, as many as there are columns.
        title: a line above.
        left: indices of the columns that are aligned on the left.
    """
    left = set(left)
    lines = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    head = [Text(column, style="bold") for column in columns]
    widths = [
        max(cell.cell_len for cell in cells)
        for cells in zip(head, *(line for line in lines if line), strict=True)
    ]
    others = sum(widths[1:]) + GAP * (len(widths) - 1)
    if (most := width_of(console)) is not None and widths[0] + others > most:
        widths[0] = max(most - others, 0)
    if title is not None:
        say(console, title)
    for cells in [head, *lines] if any(columns) else lines:
        if cells and cells[0].cell_len > widths[0]:
            _print_line(console, [cells[0]])
            cells = [Text(), *cells[1:]]
        padded = []
        for index, cell in enumerate(cells):
            room = Text(" " * (widths[index] - cell.cell_len))
            padded.append(cell + room if index in left else room + cell)
        _print_line(console, padded)


def _print_line(console: Console, cells: list[Text]) -> None:
    line = Text(" " * GAP).join(cells)
    line.rstrip()
    console.print(line, highlight=False, soft_wrap=True, markup=False, emoji=False)


def width_of(console: Console) -> int | None:
    """Columns that a line should fit in; None for a pipe or a file, where nothing wraps."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else None


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its columns still to be added."""
    return Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)


def _bits(value: int | None) -> str:
    return "float" if value is None else str(value)


def show_profile(result: dict[str, Any]) -> None:
    """Every layer with its costs, then the sums."""
    console = Console()
    size = "x".join(map(str, result["input_size"]))
    products: dict[str, list[dict[str, Any]]] = {}
    for product in result["products"]:
        if product["bops"] is not None:
            products.setdefault(product["follows"], []).append(product)
    rows = []
    for layer in result["layers"]:
        shared = f" (same bits as {layer['group']})" if layer["group"] != layer["name"] else ""
        rows.append(
            [
                layer["name"] + (" (pinned)" if layer["pinned"] else "") + shared,
                layer["kind"],
                format_quantity(layer["macs"]),
                _bits(layer["weight_bits"]),
                _bits(layer["activation_bits"]),
                format_quantity(layer["bops"]),
                f"{100 * layer['bops'] / result['bops']:.1f} %",
            ]
        )
        for product in products.get(layer["name"], ()):
            rows.append(
                [
                    f"{product['name']} (same bits as {product['follows']})",
                    "product",
                    format_quantity(product["macs"]),
                    *[_bits(product["bits"])] * 2,
                    format_quantity(product["bops"]),
                    f"{100 * product['bops'] / result['bops']:.1f} %",
                ]
            )
    print_table(
        console,
        ("layer", "kind", "MACs", "weights", "inputs", "BOPs", "share"),
        rows,
        title=f"{result['model']}, input {size}, {counted(result['num_classes'], 'class')}",
        left=(0, 1),
    )
    reasons: dict[str, list[str]] = {}
    for left in result["unquantized"]:
        reasons.setdefault(left["reason"], []).append(left["name"])
    for reason, names in reasons.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        say(
            console,
            f"{counted(len(names), 'operation')} {'stays' if len(names) == 1 else 'stay'} in floating point: "
            f"{', '.join(names[:NAMED])}{more}; {reason}",
        )
    uncounted = sum(product["macs"] for product in result["products"] if product["bops"] is None)
    if uncounted:
        say(
            console,
            f"not counted, since they stay in floating point: {format_quantity(uncounted, 'MACs')} of products of "
            "activations, as in attention; --quantize-attention quantizes and counts them",
        )
    say(
        console,
        f"\n{format_quantity(result['macs'], 'MACs')}, {format_quantity(result['bops'], 'BOPs')} "
        f"of {format_quantity(result['float_bops'], 'BOPs')} in floating point "
        f"({result['float_bops'] / result['bops']:.1f} times fewer)\n"
        f"size {format_quantity(result['size_bytes'], 'B')} of {format_quantity(result['float_size_bytes'], 'B')}\n"
        f"reachable budgets: {format_quantity(result['floor_bops'])} to "
        f"{format_quantity(result['ceiling_bops'], 'BOPs')}",
    )


def show_quantized(result: dict[str, Any], *, fine_tuned: bool) -> None:
    """Float beside quantized, the budget, and the files written."""
    from saqcli.workflows.report import results_table

    console = Console()
    columns, rows = results_table(result, fine_tuned=fine_tuned)
    print_table(
        console,
        ("", *columns),
        [[*row[:-1], Text(row[-1], style="bold" if row[0] == "top-1" else "")] for row in rows],
        title=f"{result['model']} on {counted(result['images'], 'image')}",
    )
    reduction = f"{result['bops_reduction']:.1f} times fewer BOPs"
    if result["budget_bops"]:
        share = 100 * result["bops"] / result["budget_bops"]
        reduction += f", {share:.2f} % of the budget of {format_quantity(result['budget_bops'], 'BOPs')}"
    say(console, f"\n{reduction}")
    say(
        console,
        f"ONNX equals PyTorch layer by layer to {result['onnx_layers_error']:.1e}, and has the best class of "
        f"the model in float64 on {100 * result['onnx_argmax_agreement']:.2f} % of "
        f"{counted(result['onnx_images'], 'image')}",
    )
    for path in result["artifacts"].values():
        say(console, f"wrote {path}")


def show_evaluation(result: dict[str, Any]) -> None:
    """Accuracy in one line."""
    skipped = f", {counted(result['skipped'], 'unreadable image')} left out" if result["skipped"] else ""
    loss = format_figure(result["loss"], ".4f")
    say(
        Console(),
        f"[bold]top-1 {result['top1']:.2f} %[/bold], top-5 {result['top5']:.2f} %, loss {loss} on "
        f"{counted(result['images'], 'image')} ({result['images_per_second']:.0f} a second){skipped}",
        markup=True,
    )


def show_export(result: dict[str, Any]) -> None:
    """The file and how it was verified."""
    console = Console()
    size = format_quantity(result["size_bytes"], "B")
    say(console, f"wrote {result['onnx']} ({size}, style {result['style']}, opset {result['opset']})")
    table = plain_table()
    table.show_header = False
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    exact = result["style"] == "exact"
    images = counted(result["images"], "image")
    table.add_row(
        "end to end", f"the same best class on {100 * result['argmax_agreement']:.2f} % of {images}"
    )
    if exact:
        table.add_row("", "every logit equal to PyTorch's exact form, bit for bit")
    else:
        table.add_row(
            "", f"(as the model in float64; PyTorch in float32: {100 * result['pytorch_agreement']:.2f} %)"
        )
    for name, other in result["runtimes"].items():
        table.add_row("", f"with {name} on {100 * other['argmax_agreement']:.2f} %")
    table.add_row("layer by layer", f"{counted(result['layers'], 'layer')}, each fed PyTorch's codes")
    flipped = f"{result['flipped_codes']:,} on the edge between two"
    table.add_row("", f"{counted(result['codes'], 'code')}, {flipped}, none wrong")
    table.add_row("", f"largest error {result['layers_error']:.1e} of a layer's range")
    if result["largest_accumulator"] is not None:
        table.add_row("sums", f"at most {result['largest_accumulator']:,} (float32 counts to 16,777,216)")
    if result["split_layers"]:
        table.add_row("", f"cut into parts below that: {', '.join(result['split_layers'])}")
    table.add_row("hazards", "none of the patterns that ONNX Runtime changes")
    console.print(table)
    say(console, f"verdict in {result['verdict']}")


def show_searched(result: dict[str, Any]) -> None:
    """The policy as a picture, then what it costs."""
    from saqcli.cli.policy_view import show_policy

    show_policy(result["policy"], result["layers"])
    console = Console()
    costs = [format_quantity(result["bops"], "BOPs"), format_quantity(result["size_bytes"], "B")]
    bounds = [
        f"{100 * result[used] / result[bound]:.2f} % of the budget of {format_quantity(result[bound], unit)}"
        for used, bound, unit in (("bops", "budget_bops", "BOPs"), ("size_bytes", "budget_bytes", "B"))
        if result[bound]
    ]
    say(console, f"\n{result['searcher']} found {', '.join(costs)}: {' and '.join(bounds)}")
    if result["scoring_top1"] is not None:
        say(console, f"top-1 {result['scoring_top1']:.2f} % on the search's scoring images, not fine-tuned")
    for path in result["artifacts"].values():
        say(console, f"wrote {path}")


def show_rerun(result: dict[str, Any]) -> None:
    """What is the same and what is not, then likely reasons."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    details = {difference["what"]: difference["detail"] for difference in result["differences"]}
    table = plain_table(escape(f"{result['run_dir']} against {result['reran']}"))
    table.add_column("", no_wrap=True)
    table.add_column("")
    for what in result["compared"]:
        table.add_row(what, escape(details[what]) if what in details else "the same, bit for bit")
    console.print(table)
    for reason in result["reasons"]:
        say(console, f"likely reason: {reason}", markup=False)
    if not result["reasons"]:
        for name, (then, now) in result["versions_differ"].items():
            say(console, f"the same though {name} was {then} and is {now}", markup=False)
