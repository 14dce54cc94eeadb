"""Result tables on stdout; names are never truncated."""

import os
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from saqcli.cli.flags import as_flags
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.target import Operand, Target
from saqcli.units import counted, format_figure, format_quantity

if TYPE_CHECKING:
    from saqcli.models.catalogue import Entry

BLOCK = "■"
# Low to high, one for each quarter of the largest share: readable on dark and light backgrounds; colour-blind readers
# distinguish them by brightness and by the number next to them.
COLOURS = ("#3B86D1", "#8A83C6", "#D18A2C", "#DC4A3D")
PINNED = " (pinned)"
PIPED = 200  # columns when stdout is not a terminal
GAP = 2  # columns between two cells
NAMED = 3  # modules named for each reason to stay in floating point
COVERED = {True: Text("yes"), False: Text("no", style="red"), None: Text("-")}


def show_policy(
    policy: Mapping[str, Mapping[str, int | None]],
    layers: Sequence[Mapping[str, Any]],
    *,
    bops: int | None = None,
) -> None:
    """Print the bits of every layer.

    Args:
        policy: ``weight`` and ``activation`` bits by layer name; None is floating point.
        layers: in execution order, as in ``saq profile --json``, at the bits of ``policy``.
        bops: BOPs of the whole network; None is the sum over the layers.
    """
    console = Console()
    total = (sum(layer["bops"] for layer in layers) if bops is None else bops) or 1
    most = max((layer["bops"] for layer in layers), default=0) or 1
    rows = []
    for layer in layers:
        bits = policy[layer["name"]]
        colour = COLOURS[min(int(len(COLOURS) * layer["bops"] / most), len(COLOURS) - 1)]
        style = "dim" if layer["pinned"] else ""
        rows.append(
            [
                Text(str(layer["name"]) + (PINNED if layer["pinned"] else ""), style=style),
                _bar(bits["weight"], colour, style),
                _bar(bits["activation"], colour, style),
                Text(format_quantity(layer["bops"]), style=style),
                Text(f"{100 * layer['bops'] / total:.1f} %", style=style),
            ]
        )
    print_table(console, ("layer", "weights", "inputs", "BOPs", "share"), rows, left=(0, 1, 2))
    colours = "; colours by share of BOPs" if console.color_system else ""
    print_text(console, _summary(policy, layers) + colours)


def _bar(bits: int | None, colour: str, style: str) -> Text:
    """One block per bit, then the number of bits."""
    text = Text(style=style)
    if bits is None:
        return text.append("float", style=colour)
    return text.append(BLOCK * bits, style=colour).append(f" {bits}", style="default")


def _summary(policy: Mapping[str, Mapping[str, int | None]], layers: Sequence[Mapping[str, Any]]) -> str:
    """Mean bits, as in the plots."""
    bits = {
        name: LayerBits(weight=one["weight"], activation=one["activation"]) for name, one in policy.items()
    }
    macs = {str(layer["name"]): int(layer["macs"]) for layer in layers}
    weights, inputs = mean_bits({name: bits[name] for name in macs}, macs)
    return f"\nmean bits, weighted by MACs: weights {weights:.2f}, inputs {inputs:.2f}"


def print_text(console: Console, text: str, *, markup: bool = False) -> None:
    """Print a line without wrapping; ``markup`` must be off if the text may contain a path."""
    console.print(as_flags(text), highlight=False, soft_wrap=True, markup=markup, emoji=False)


def print_sentence(console: Console, text: str) -> None:
    """Print text, wrapped between words on a terminal; words, such as paths, stay whole."""
    width = width_of(console)
    for line in as_flags(text).split("\n"):
        parts = (
            [line]
            if width is None
            else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        )
        for part in parts or [""]:
            console.print(part, highlight=False, soft_wrap=True, markup=False, emoji=False)


def print_next(console: Console, commands: Mapping[str, str]) -> None:
    """Print commands to copy, each with what it does."""
    print_text(console, "\nnext:")
    for command, purpose in commands.items():
        print_text(console, f"  {purpose}")
        print_text(console, f"    {command}")


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    title: str | None = None,
    left: Iterable[int] = (0,),
) -> None:
    """Print a table without truncating cells.

    If the terminal is too narrow for a row, its first cell is printed on a separate line above the others. An empty row
    prints a blank line.

    Args:
        console: output.
        columns: titles; the header is omitted if all are empty.
        rows: one cell per column.
        title: a line above the table.
        left: indices of left-aligned columns.
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
        print_text(console, title)
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
    """Width of the terminal in columns; None for a pipe or file, where nothing wraps."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else None


def plain_table(title: str | None = None) -> Table:
    """A table without borders and without columns."""
    return Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)


def _bits(value: int | None) -> str:
    return "float" if value is None else str(value)


def _of_junctions(result: dict[str, Any]) -> str:
    """The part of the bit-operations that quantized junctions have, where they count."""
    counted = result.get("junction_bops")
    return f", of which quantized junctions {format_quantity(counted, 'BOPs')}" if counted else ""


def show_profile(result: dict[str, Any]) -> None:
    """Print the costs of every layer, then the totals."""
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
        print_text(
            console,
            f"{counted(len(names), 'operation')} {'stays' if len(names) == 1 else 'stay'} in floating point: "
            f"{', '.join(names[:NAMED])}{more}; {reason}",
        )
    uncounted = sum(product["macs"] for product in result["products"] if product["bops"] is None)
    if uncounted:
        print_text(
            console,
            f"not counted: {format_quantity(uncounted, 'MACs')} of products of activations in floating point, as in "
            "attention; --quantize-attention quantizes and counts them",
        )
    print_text(
        console,
        f"\nMACs: {format_quantity(result['macs'], 'MACs')}\n"
        f"BOPs: {format_quantity(result['bops'], 'BOPs')}{_of_junctions(result)} "
        f"(float: {format_quantity(result['float_bops'], 'BOPs')}, {times_fewer(result, 'bops')} more)\n"
        f"size: {format_quantity(result['size_bytes'], 'B')} "
        f"(float: {format_quantity(result['float_size_bytes'], 'B')}, {times_fewer(result, 'size_bytes')} more)\n"
        f"reachable budgets: {format_quantity(result['floor_bops'], 'BOPs')} to "
        f"{format_quantity(result['ceiling_bops'], 'BOPs')}",
    )


def show_targets(targets: Sequence[Target]) -> None:
    """Print a line for every target."""
    console = Console()
    rows = [
        [each.name, ", ".join(each.styles) or "any", ", ".join(each.junctions) or "none"] for each in targets
    ]
    print_table(console, ("target", "styles", "also quantized"), rows, left=(0, 1, 2))
    for each in targets:
        print_text(console, f"{each.name}: {each.description}")
    print_text(console, "\nsaq targets NAME shows one in full; --target NAME quantizes for it.")


def show_target(target: Target) -> None:
    """Print all that is known of one target."""
    console = Console()
    print_text(console, f"{target.name}: {target.description}\n")
    scopes = f"per {' or '.join(target.weights.granularity)}"
    rows = [
        ["styles of files", ", ".join(target.styles) or "any"],
        ["weights", f"{_widths(target.weights)}, {scopes}"],
        [
            "inputs",
            f"{_widths(target.inputs)}, per tensor{'' if target.inputs.tables else ', uniform grids only'}",
        ],
        [
            "steps",
            "any"
            if target.short_steps is None
            else f"at most {counted(target.short_steps, 'significant bit')}",
        ],
        ["also quantized", target.adds or "nothing"],
        ["biases", "32-bit integers" if target.bias == "int32" else "floating point"],
        ["run as one", "; ".join(target.fused) or "unknown"],
        *(
            [
                f"default of {section}.{key}",
                ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            ]
            for section, values in target.settings.items()
            for key, value in values.items()
        ),
    ]
    for label, value in rows:
        print_text(console, f"{label}: {value}")
    for note in target.notes:
        print_text(console, f"note: {note}")


def _widths(operand: Operand) -> str:
    """Widths of an operand: those in integer kernels, and the rest."""
    others = [width for width in operand.bits if width not in operand.integer]
    texts = []
    if operand.integer:
        texts.append(f"{', '.join(map(str, operand.integer))} bits in integer kernels")
    if others:
        texts.append(f"{', '.join(map(str, others))} bits computed in floating point")
    texts += [] if operand.float else ["never left in floating point"]
    return "; ".join([*texts, *([] if operand.asymmetric else ["symmetric grids only"])])


def times_fewer(result: dict[str, Any], cost: str) -> str:
    """``12.3x``: how many times a ``cost`` of the float network exceeds the quantized one."""
    return f"{result[f'float_{cost}'] / result[cost]:.1f}x"


def show_quantized(result: dict[str, Any]) -> None:
    """Print the accuracies and costs before and after, the budget, and the files written."""
    from saqcli.report.run_report import has_labels, results_table, scored_images, stages_table

    console = Console()
    columns, rows, exported = results_table(result)
    print_table(
        console,
        ("", *columns),
        [
            [
                Text(cell, style="bold" if (number, place) == (0, exported) else "")
                for place, cell in enumerate(row)
            ]
            for number, row in enumerate(rows)
        ],
        title=f"{result['model']} on {scored_images(result)}",
    )
    if not has_labels(result):
        print_text(console, "no labels: agreement with the float network in place of accuracy")
    print_text(console, "")
    names, stages = stages_table(result)
    print_table(console, names, stages)
    if result["advice"]:
        print_sentence(console, f"\nnote: {result['advice']}")
    reduction = f"{result['bops_reduction']:.1f}x fewer BOPs than float"
    if result["budget_bops"]:
        share = 100 * result["bops"] / result["budget_bops"]
        reduction += f"; {share:.2f} % of the budget of {format_quantity(result['budget_bops'], 'BOPs')}"
    print_text(console, f"\n{reduction}")
    if result["onnx_style"] is None:
        print_text(console, "no ONNX file was written (--no-export)")
    else:
        print_sentence(console, onnx_sentence(result))
    for note in ("onnx_explanation", "onnx_size_note"):
        if result[note]:
            print_sentence(console, upper_first(result[note]))
    _show_accuracy(result, console)
    for path in result["artifacts"].values():
        print_text(console, f"wrote {path}")
    run, onnx = shlex.quote(result["run_dir"]), result["artifacts"].get(result["onnx_style"])
    timed = {f"saq eval {shlex.quote(onnx)} --bench": "accuracy and speed of the file"} if onnx else {}
    labels = (
        {f"saq analyze {run}": "where the network is sharp, what its grids lose"}
        if has_labels(result)
        else {}
    )
    if timed or labels:
        print_next(console, timed | labels)


def _show_accuracy(result: dict[str, Any], console: Console) -> None:
    """Print what became of a budget of accuracy, if there was one."""
    from saqcli.report.accuracy import accuracy_lines

    for line in accuracy_lines(result["accuracy"]) if result.get("accuracy") else ():
        print_text(console, line)


def onnx_sentence(result: dict[str, Any]) -> str:
    """The comparison of a run's ONNX file with the model."""
    from saqcli.export import is_bit_equal

    agreement = f"on {100 * result['onnx_argmax_agreement']:.2f} % of {images_of(result, 'onnx_images')}"
    if is_bit_equal(result["onnx_style"]):
        return f"ONNX equals the model's exact form bit for bit; same top-1 class {agreement}"
    return (
        f"ONNX equals PyTorch layer by layer to {result['onnx_layers_error']:.1e}; same top-1 class as the model in "
        f"float64 {agreement}"
    )


def images_of(result: dict[str, Any], key: str = "images") -> str:
    """``500 images (of 8,000)``, or ``64 images`` if these are all."""
    count, available = result[key], result[f"{key}_available"]
    return counted(count, "image") + (f" (of {available:,})" if available and available > count else "")


def upper_first(text: str) -> str:
    """``text`` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def show_evaluation(result: dict[str, Any]) -> None:
    """Print the accuracy on one line."""
    skipped = f", {counted(result['skipped'], 'unreadable image')} skipped" if result["skipped"] else ""
    loss = format_figure(result["loss"], ".4f")
    print_text(
        Console(),
        f"[bold]top-1 {result['top1']:.2f} %[/bold], top-5 {result['top5']:.2f} %, loss {loss} on "
        f"{counted(result['images'], 'image')} ({result['images_per_second']:.0f} images/s){skipped}",
        markup=True,
    )


def show_export(result: dict[str, Any]) -> None:
    """Print the file and its verification."""
    from saqcli.export import is_bit_equal

    console = Console()
    size = format_quantity(result["size_bytes"], "B")
    print_text(console, f"wrote {result['onnx']} ({size}, style {result['style']}, opset {result['opset']})")
    table = plain_table()
    table.show_header = False
    table.add_column("what", no_wrap=True)
    table.add_column("found")
    count, available = result["images"], result["images_available"]
    if available is None:
        source = f"{count} {result['verified_on']}: give --data DIR to verify on real images"
    elif count < available:
        source = f"{count:,} of {available:,} images of {result['verified_on']}: --verify-images all uses all of them"
    else:
        source = f"{count:,} images of {result['verified_on']}"
    table.add_row("verified on", escape(source))
    table.add_row(
        "end to end", f"same top-1 class on {100 * result['argmax_agreement']:.2f} % of {count:,} images"
    )
    if is_bit_equal(result["style"]):
        table.add_row("", "every logit equals PyTorch's exact form bit for bit")
    else:
        table.add_row("", f"(reference: float64; PyTorch float32: {100 * result['pytorch_agreement']:.2f} %)")
        differences = f"{result['max_abs_diff']:.3g} (PyTorch float32: {result['pytorch_max_abs_diff']:.3g})"
        table.add_row("", f"largest logit difference: {differences}")
    for name, other in result["runtimes"].items():
        table.add_row("", f"{name}: {100 * other['argmax_agreement']:.2f} %")
    table.add_row("layer by layer", f"{counted(result['layers'], 'layer')}, given PyTorch's codes as input")
    flipped = f"{result['flipped_codes']:,} differ by rounding at an edge, 0 wrong"
    table.add_row("", f"{counted(result['codes'], 'code')}: {flipped}")
    table.add_row("", f"largest error: {result['layers_error']:.1e} of a layer's range")
    if "moved_codes" in result:
        moved = result["moved_codes"]
        farthest = f", by at most {moved['largest']}" if moved["differing"] else ""
        table.add_row(
            "biases in integers", f"{moved['differing']:,} of {moved['codes']:,} codes moved{farthest}"
        )
    for title, line in _twin_rows(result["twin"]):
        table.add_row(title, line)
    if result["largest_accumulator"] is not None:
        largest = f"at most {result['largest_accumulator']:,} (exact in float32 up to 16,777,216)"
        table.add_row("accumulators", largest)
    if result["split_layers"]:
        table.add_row("", f"split to stay below: {', '.join(result['split_layers'])}")
    table.add_row("hazards", "none (no pattern that ONNX Runtime's optimizations change)")
    for condition in result["conditions"]:
        table.add_row("condition", as_flags(condition))
    console.print(table)
    for note in ("explanation", "size_note"):
        if result[note]:
            print_text(console, upper_first(result[note]))
    print_text(console, f"verdict in {result['verdict']}")


def _twin_rows(twin: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What the comparison of a file with its twin found, for two columns."""
    if twin is None or twin["skipped"]:
        return []
    operators = counted(twin["operators"], "operator")
    if not twin["equal"]:
        unlike = ", ".join(twin["unlike"][:3]) or f"logits, by up to {twin['max_abs_diff']:.3g}"
        return [
            (
                "on codes",
                f"{operators}; other than ONNX Runtime's arithmetic as known to saq: {escape(unlike)}",
            )
        ]
    rows = [("on codes", f"{operators}, each bit by bit as predicted from the file")]
    if twin["codes"]:
        share = 100 * twin["differing_codes"] / twin["codes"]
        farthest = f", by at most {twin['largest_code_difference']}" if twin["differing_codes"] else ""
        rows.append(
            ("", f"{share:.2g} % of {counted(twin['codes'], 'code')} differ from PyTorch's{farthest}")
        )
    if twin["saturating"]:
        rows.append(("", f"{counted(len(twin['saturating']), 'operator')} may saturate on x86 without VNNI"))
    return rows


def show_searched(result: dict[str, Any]) -> None:
    """Print the policy, the front, and the cost."""
    from saqcli.quant.cost import Budget, Cost

    show_policy(result["policy"], result["layers"])
    if result.get("front"):
        _show_front(result["front"])
    console = Console()
    cost = Cost(result["bops"], result["size_bytes"])
    budget = Budget(result["budget_bops"], result["budget_bytes"])
    if "cost" in result:
        budget = replace(budget, bops=result["budget_cost"], unit=result["cost_unit"])
        cost = cost._replace(bops=result["cost"])
    shares = budget.shares(cost)
    print_text(console, f"\nsearcher {result['searcher']}: {shares}, {result['seconds']:.0f} s")
    if result["scoring_top1"] is not None:
        print_text(
            console,
            f"top-1 {result['scoring_top1']:.2f} % on held-out training images (calibrated, not fine-tuned)",
        )
    _show_accuracy(result, console)
    for path in result["artifacts"].values():
        print_text(console, f"wrote {path}")


def _show_front(front: dict[str, Any]) -> None:
    """Print the best policy for every budget; the chosen one is marked."""
    from saqcli.quant.cost import Budget

    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    in_float = "" if front["float_top1"] is None else f" (float: {front['float_top1']:.2f})"
    print_text(console, "\naccuracy over cost; the score is the top-1 in %, calibrated, on")
    print_text(console, f"{front['images']:,} held-out training images{in_float}")
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
    """Print what is identical and what differs, then the likely causes."""
    console = Console() if sys.stdout.isatty() else Console(width=PIPED)
    details = {difference["what"]: difference["detail"] for difference in result["differences"]}
    table = plain_table(escape(f"{result['run_dir']} compared with {result['reran']}"))
    table.add_column("", no_wrap=True)
    table.add_column("")
    for what in result["compared"]:
        table.add_row(what, escape(as_flags(details[what])) if what in details else "bit-identical")
    console.print(table)
    for reason in result["reasons"]:
        print_text(console, f"likely cause: {reason}", markup=False)
    if not result["reasons"]:
        for name, (then, now) in result["versions_differ"].items():
            print_text(console, f"identical although {name} was {then} and is {now}", markup=False)


def show_models(entries: "Sequence[Entry]") -> None:
    """Print one line per network: its default weights, and the number of others unless the names carry a tag."""
    console = Console()
    tagged = all("." in entry.name for entry in entries)
    rows: list[list[str | Text]] = [
        [
            entry.name,
            "-" if entry.parameters is None else format_quantity(entry.parameters),
            _pixels(entry.input_size),
            *([] if tagged else [_weights(entry.tags)]),
            COVERED[entry.covered],
        ]
        for entry in entries
    ]
    columns = ["network", "parameters", "input", *([] if tagged else ["weights"]), "covered"]
    print_table(console, columns, rows, left=(0, *(() if tagged else (3,)), len(columns) - 1))
    print_text(console, f"[dim]{_notes(entries, tagged)}[/dim]", markup=True)


def _pixels(size: tuple[int, int, int]) -> str:
    """Input size: one number for square images; with the number of channels unless it is 3."""
    channels, height, width = size
    sides = str(height) if height == width else f"{height}x{width}"
    return sides if channels == 3 else f"{channels}x{sides}"


def _weights(tags: tuple[str, ...]) -> Text:
    default, *others = tags or ("-",)
    return Text(default).append(f" +{len(others)}", style="dim") if others else Text(default)


def _notes(entries: "Sequence[Entry]", tagged: bool) -> str:
    """The number of networks, and how to list all weights of one."""
    notes = [counted(len(entries), "network")]
    most = max(entries, key=lambda entry: len(entry.tags))
    if not tagged and len(most.tags) > 1:
        notes.append(f"all weights of one: saq models '{most.name}.*'")
    return "; ".join(notes)
