"""Results as tables for the eye, printed on stdout."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saqcli.units import format_quantity

PIPED = 200  # columns where nobody looks at a terminal, so that no name is cut
NAMED = 3  # modules that are left in floating point for one reason, before they are counted


def say(console: Console, text: str, *, markup: bool = False) -> None:
    """A line that wraps nowhere, so that it can be searched and cut; ``markup`` is for lines that name no path."""
    console.print(text, highlight=False, soft_wrap=True, markup=markup, emoji=False)


def _table(title: str, columns: Iterable[str], left: int = 1) -> Table:
    """A table whose first ``left`` columns are text and whose others are numbers."""
    table = plain_table(title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index >= left)
    return table


def plain_table(title: str | None = None) -> Table:
    """A table without lines, its columns still to be added."""
    return Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)


def _bits(value: int | None) -> str:
    return "float" if value is None else str(value)


def show_profile(result: dict[str, Any]) -> None:
    """Every layer with its costs, then the sums."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    size = "x".join(map(str, result["input_size"]))
    table = _table(
        f"{result['model']}, input {size}, {result['num_classes']} classes",
        ("layer", "kind", "group", "MACs", "weights", "inputs", "BOPs", "share"),
        left=3,
    )
    products: dict[str, list[dict[str, Any]]] = {}
    for product in result["products"]:
        if product["bops"] is not None:
            products.setdefault(product["follows"], []).append(product)
    for layer in result["layers"]:
        table.add_row(
            layer["name"] + (" (pinned)" if layer["pinned"] else ""),
            layer["kind"],
            layer["group"] if layer["group"] != layer["name"] else "",
            format_quantity(layer["macs"]),
            _bits(layer["weight_bits"]),
            _bits(layer["activation_bits"]),
            format_quantity(layer["bops"]),
            f"{100 * layer['bops'] / result['bops']:.1f} %",
        )
        for product in products.get(layer["name"], ()):
            table.add_row(
                product["name"],
                "product",
                product["follows"],
                format_quantity(product["macs"]),
                *[_bits(product["bits"])] * 2,
                format_quantity(product["bops"]),
                f"{100 * product['bops'] / result['bops']:.1f} %",
            )
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for left in result["unquantized"]:
        reasons.setdefault(left["reason"], []).append(left["name"])
    for reason, names in reasons.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        say(console, f"left in floating point: {', '.join(names[:NAMED])}{more}; {reason}")
    uncounted = sum(product["macs"] for product in result["products"] if product["bops"] is None)
    if uncounted:
        say(
            console,
            f"left in floating point and not counted: {format_quantity(uncounted, 'MACs')} of products of activations, "
            "as in attention; --quantize-attention quantizes and counts them",
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


def show_quantized(result: dict[str, Any]) -> None:
    """Float beside quantized, the budget, and the files written."""
    console = Console()
    table = _table(
        f"{result['model']} on {result['images']} images", ("", "float", "calibrated", "quantized")
    )
    table.add_row(
        "top-1",
        f"{result['float_top1']:.2f} %",
        f"{result['calibrated_top1']:.2f} %",
        f"[bold]{result['top1']:.2f} %[/bold]",
    )
    table.add_row("top-5", f"{result['float_top5']:.2f} %", "", f"{result['top5']:.2f} %")
    table.add_row("BOPs", format_quantity(result["float_bops"]), "", format_quantity(result["bops"]))
    table.add_row(
        "size",
        format_quantity(result["float_size_bytes"], "B"),
        "",
        format_quantity(result["size_bytes"], "B"),
    )
    console.print(table)
    reduction = f"{result['bops_reduction']:.1f} times fewer BOPs"
    if result["budget_bops"]:
        share = 100 * result["bops"] / result["budget_bops"]
        reduction += f", {share:.2f} % of the budget of {format_quantity(result['budget_bops'], 'BOPs')}"
    say(console, f"\n{reduction}")
    say(
        console,
        f"ONNX equals PyTorch layer by layer to {result['onnx_layers_error']:.1e}, and has the best class of "
        f"the model in float64 on {100 * result['onnx_argmax_agreement']:.2f} % of {result['onnx_images']} images",
    )
    for path in result["artifacts"].values():
        say(console, f"wrote {path}")


def show_evaluation(result: dict[str, Any]) -> None:
    """Accuracy in one line."""
    skipped = f", {result['skipped']} unreadable images left out" if result["skipped"] else ""
    say(
        Console(),
        f"[bold]top-1 {result['top1']:.2f} %[/bold], top-5 {result['top5']:.2f} %, loss {result['loss']:.4f} on "
        f"{result['images']} images ({result['images_per_second']:.0f} a second){skipped}",
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
    images = f"{result['images']:,} images"
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
    table.add_row("layer by layer", f"{result['layers']} layers, each fed PyTorch's codes")
    flipped = f"{result['flipped_codes']:,} on the edge between two"
    table.add_row("", f"{result['codes']:,} codes, {flipped}, none wrong")
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
    from saqcli.quant.cost import Budget, Cost

    show_policy(result["policy"], result["layers"])
    if result.get("front"):
        _show_front(result["front"])
    console = Console()
    cost = Cost(result["bops"], result["size_bytes"])
    shares = Budget(result["budget_bops"], result["budget_bytes"]).shares(cost)
    say(console, f"\nsearcher {result['searcher']}: {shares}, {result['seconds']:.0f} s")
    if result["scoring_top1"] is not None:
        say(
            console,
            f"top-1 {result['scoring_top1']:.2f} % on held-out training images, calibrated, not fine-tuned",
        )
    for path in result["artifacts"].values():
        say(console, f"wrote {path}")


def _show_front(front: dict[str, Any]) -> None:
    """What every budget buys, the chosen policy marked."""
    from saqcli.quant.cost import Budget

    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    in_float = "" if front["float_top1"] is None else f"; float {front['float_top1']:.2f}"
    say(console, "\naccuracy over cost; score: top-1 in %, calibrated, on")
    say(console, f"{front['images']:,} held-out training images{in_float}")
    table = plain_table()
    for column in ("budget", "BOPs", "size", "score", "on front", "searcher"):
        table.add_column(column, justify="left" if column == "searcher" else "right", no_wrap=True)
    for row in front["points"]:
        budget = Budget(row["budget_bops"], row["budget_bytes"])
        table.add_row(
            str(budget) if budget.bounds() else "",
            format_quantity(row["bops"]),
            format_quantity(row["size_bytes"], "B"),
            f"{row['top1']:.2f}",
            "yes" if row["on_front"] else "no",
            " ".join(filter(None, (row["searcher"], row["uniform"], "(chosen)" if row["chosen"] else None))),
        )
    console.print(table)


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
