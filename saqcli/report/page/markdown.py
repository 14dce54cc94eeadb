"""The Markdown twins of pages: the same figures without pictures, for a review or a chat."""

from typing import Any

from saqcli._version import __version__
from saqcli.report.page.contents import Contents
from saqcli.report.page.head import points
from saqcli.report.run_report import markdown_table, percent, report_markdown
from saqcli.units import format_duration, format_quantity

MARK = "<!-- saq "  # of our files, which a new one may replace


def marked(text: str) -> str:
    """``text`` as a file of ours."""
    return f"{MARK}{__version__} -->\n\n{text}"


def of_run(run: Contents, values: dict[str, Any]) -> str:
    """The figures of a run; ``values`` are those of its page."""
    if run.quantized is not None:
        return report_markdown(run.config, run.manifest.results)
    tiles = [[tile.name, f"{tile.figure} {tile.unit}".strip(), tile.note] for tile in values["tiles"]]
    layers = [
        [
            f"`{row.name}`",
            row.bits.weight or "float",
            row.bits.activation or "float",
            "" if row.share is None else f"{100 * row.share:.1f} %",
        ]
        for row in values["layers"]
    ]
    notes = "".join(f"{note}\n\n" for note in values["notes"])
    return f"""# {values["title"]}, bits searched

{values["headline"]}

{markdown_table(["", "", ""], tiles)}

{notes}## Bits

{markdown_table(["layer", "weights", "inputs", "BOPs share"], layers)}

For `saq quantize`, the bits are in `{run.path}/policy.json`.
"""


def of_analysis(values: dict[str, Any]) -> str:
    """The readings in a folder; ``values`` are those of its page."""
    subject, analysis = values["subject"], values["analysis"]
    parts = [f"# {subject.model}, analyzed", f"Measured on {analysis['images']}."]
    for model in analysis["models"]:
        if len(analysis["models"]) > 1:
            parts.append(f"## {model['name']}")
        parts.append(markdown_table(["", "", ""], model["facts"]))
    return "\n\n".join(parts) + "\n"


def of_several(values: dict[str, Any]) -> str:
    """The comparison of several runs; ``values`` are those of its page."""
    best = values["best"]
    runs = [
        [
            f"**{row['name']}**" if row is best else row["name"],
            percent(row["top1"]),
            "" if row["change"] is None else points(row["change"]),
            percent(row["agreement"]),
            format_quantity(row["bops"]),
            format_quantity(row["size"], "B"),
            "" if row["seconds"] is None else format_duration(row["seconds"]),
            row["how"],
        ]
        for row in values["rows"]
    ]
    heads = ["run", "top-1", "from float", "as float", "BOPs", "size", "time", "how"]
    parts = [f"# {values['title']}, {values['count']} compared", markdown_table(heads, runs)]
    if not values["same_images"]:
        parts.append("These runs were not scored on the same images: their accuracies do not compare.")
    if values["policies"]:
        rows = [[f"`{row['layer']}`", *row["bits"]] for row in values["policies"]]
        parts += ["## Layers whose bits differ", markdown_table(["layer", *values["names"]], rows)]
        parts.append("w4a8: 4 bits for weights, 8 for inputs.")
    return "\n\n".join(parts) + "\n"
