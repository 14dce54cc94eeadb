"""Write RESULTS.md from the result files in ``results/``, what ``--json`` printed.

    python benchmarks/step_time.py --json > benchmarks/results/step_time-resnet20.json
    python benchmarks/results.py

A step is given as a ratio first, since only ratios can be compared between machines.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from step_time import METHODS, MODES

FOLDER = Path(__file__).parent
PAGE = FOLDER / "RESULTS.md"
DEFAULT = "default"
FUSED = "with fused kernels"  # in ``ran_as``
Result = dict[str, Any]

HEAD = """# Results

Written by `python benchmarks/results.py` from the files in [results](results): edit neither by hand.
[README.md](README.md) says how to run the scripts. A cell of a step is its time relative to the float step *of the same
mode*, with milliseconds in brackets; the figure is the fastest of the rounds, in which all variants take turns. Memory
is the peak of one step above weights, optimizer and images. In `kernels` the network is eager and every quantizer one
fused kernel: float is the eager step there, and the goals for eager steps are judged there. Goals that are met are in
bold; none is shown where two steps were computed in different ways.
"""
# (title, largest ratio wanted, what is divided by what)
GOALS = (
    ("QAT / float", 1.10, "qat", "float"),
    ("SAQ / QAT", 1.6, "saq", "qat"),
    ("`--efficient` / QAT", 1.2, "efficient", "qat"),
)
GOAL_OF_MEMORY = 1.15


def page() -> str:
    """The text of RESULTS.md."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("results/*.json"))]
    steps = [r for r in found if r["benchmark"] == "step_time"]
    peers = [r for r in found if r["benchmark"].startswith("peers/")]
    targets = [r for r in found if r["benchmark"] in ("targets", "openvino_files")]
    others = [r for r in found if r not in steps and r not in peers and r not in targets]
    sections = [HEAD, *map(steps_section, steps)]
    if peers:
        sections.append(peers_section(peers))
    sections += map(targets_section, targets)
    sections += map(other_section, others)
    return "\n".join(sections)


def steps_section(result: Result) -> str:
    """Times, goals and memory of one run of ``step_time.py``."""
    modes = [mode for mode in (DEFAULT, *MODES) if any(key(m, mode) in result for m in METHODS)]
    methods = [method for method in METHODS if any(key(method, mode) in result for mode in modes)]
    parts = [
        f"## {result['model']}, {result['side']} pixels, batch {result['batch_size']}, {result['bits']} bits",
        origin(result),
        table(
            ["step, relative to float", *modes],
            ([method, *(cell(result, method, mode) for mode in modes)] for method in methods),
        ),
        table(["goal", "at most", *modes], goals(result, modes)),
        table(
            ["peak memory, MB", *modes],
            (
                [method, *(number(result["peak_mb"].get(key(method, mode)), ".0f") for mode in modes)]
                for method in methods
            ),
        ),
    ]
    defaults = [f"{method} {result['ran_as'][method]}" for method in methods if method in result["ran_as"]]
    if defaults:
        parts.insert(2, f"By default ran: {'; '.join(defaults)}.")
    if result["errors"]:
        parts.append("\n".join(f"- `{name}` did not run: {why}" for name, why in result["errors"].items()))
    return "\n\n".join(parts) + "\n"


def peers_section(results: Sequence[Result]) -> str:
    """Every peer beside the steps of its own run."""
    first = results[0]
    rows = []
    for result in results:
        peer = result["reason"] or ratio(result, "peer", "float_eager")
        peak = result["peak_mb"]
        rows.append(
            [
                f"{result['name']} {result['version']}",
                result["bits"],
                peer,
                ratio(result, "qat_eager", "float_eager"),
                number(peak.get("peer"), ".0f"),
                number(peak["qat_eager"], ".0f"),
                result["date"],
            ]
        )
    head = "peer, bits, step / float, QAT of saq / float, MB, MB of saq, date".split(", ")
    title = f"## Peers: {first['model']}, {first['side']} pixels, batch {first['batch_size']}, eager"
    return f"{title}\n\n{origin(first)}\n\n{table(head, rows)}\n"


def targets_section(result: Result) -> str:
    """The files of one network for ONNX Runtime."""
    batches = list(map(str, result["batch_sizes"]))
    runtime = "ONNX Runtime" if "onnxruntime" in result else "OpenVINO"
    head = ["file", "operators on integers, in float", "top-1", *(f"batch {each}" for each in batches)]
    rows = [
        [
            name,
            in_integers(file),
            number(file["top1"], ".2f"),
            *(speed(file["times"][each]) for each in batches),
        ]
        for name, file in result["files"].items()
    ]
    rows += [[name, why, "", *("" for _ in batches)] for name, why in result["errors"].items()]
    scored = f"top-1 of {result['images']} images" if result["images"] else "random weights"
    version = result.get("onnxruntime") or result["openvino"].partition("-")[0]
    title = f"## Files for {runtime} {version}: {result['model']}, {scored}"
    note = f"Times faster than float, fastest of {result['rounds']} rounds (median; milliseconds)."
    return f"{title}\n\n{origin(result)}\n\n{note}\n\n{table(head, rows)}\n"


def in_integers(file: Result) -> str:
    """How many operators, or layers in OpenVINO, run on integers and in floating point."""
    if "kernels" in file:
        return f"{file['kernels']['integer']}, {file['kernels']['floating']}"
    return f"{file['integer']}, {file['products'] - file['integer']} layers"


def speed(times: dict[str, float]) -> str:
    """``fastest (median; milliseconds)``."""
    return f"{times['speedup_least']:.2f} ({times['speedup']:.2f}; {times['least_ms']:.2f})"


def other_section(result: Result) -> str:
    """The figures of any other script: every object of numbers is a column."""
    columns = {
        name: values
        for name, values in result.items()
        if isinstance(values, dict) and values and all(isinstance(v, int | float) for v in values.values())
    }
    rows = list(dict.fromkeys(row for values in columns.values() for row in values))
    cells = [[row, *(number(values.get(row), ".3g") for values in columns.values())] for row in rows]
    title = ", ".join(str(result[name]) for name in ("benchmark", "model") if name in result)
    head = ["", *(name.replace("_", " ") for name in columns)]
    return f"## {title}\n\n{origin(result)}\n\n{table(head, cells)}\n"


def origin(result: Result) -> str:
    """Command, date and machine of a result."""
    versions = ", ".join(f"{name} {result[name]}" for name in ("torch", "torchvision", "timm"))
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    load = f", load average {result['load']}" if result.get("load") is not None else ""
    where = (
        f"{result['cpu']} ({', '.join(result['isa'])}), {threads}, {result.get('clock', 'wall')} clock{load}"
    )
    at = f" at {result['commit']}" if result.get("commit") else ""
    return f"`{result['command']}`, {result['date']}{at}. {where}; {versions}."


def key(method: str, mode: str) -> str:
    """The variant's name."""
    return method if mode == DEFAULT else f"{method}_{mode}"


def base_of(method: str, mode: str) -> str:
    """The variant of ``method`` that those of ``mode`` are relative to: without quantizers there is nothing to fuse."""
    if method != "float" or not mode.startswith("kernels"):
        return key(method, mode)
    return key(method, mode.removeprefix("kernels").removeprefix("_") or "eager")


def cell(result: Result, method: str, mode: str) -> str:
    """A variant's time relative to float; empty if it was not measured."""
    return ratio(result, key(method, mode), base_of("float", mode))


def ratio(result: Result, name: str, base: str) -> str:
    """``ratio (milliseconds)``, without the ratio where the base was not measured."""
    seconds, of = result.get(name), result.get(base)
    if seconds is None:
        return ""
    milliseconds = f"{1000 * seconds:.0f} ms"
    return f"{seconds / of:.2f} ({milliseconds})" if of else milliseconds


def goals(result: Result, modes: Sequence[str]) -> list[list[str]]:
    """The measured ratios for which there is a goal, in bold where it is met; empty where two ways differ."""
    peak = result["peak_mb"]
    wanted = [(result, *goal) for goal in GOALS]
    wanted.append((peak, "memory of QAT / float", GOAL_OF_MEMORY, "qat", "float"))
    rows = []
    for values, title, most, name, base in wanted:
        pairs = [(key(name, mode), base_of(base, mode)) for mode in modes]
        cells = [
            reached(values.get(one), values.get(other), most) if comparable(result, one, other) else ""
            for one, other in pairs
        ]
        rows.append([title, f"{most:.2f}", *cells])
    return rows


def comparable(result: Result, name: str, base: str) -> bool:
    """Whether both compute in the same way; the defaults choose by timing, each for itself.

    A float step has no quantizers, so that it does not matter which kernels these have.
    """
    ways = [result["ran_as"].get(one) for one in (name, base)]
    if base.startswith("float") and None not in ways:
        ways = [{*way.split(", ")} - {FUSED, "as written"} for way in ways]
    return bool(ways[0] == ways[1])


def reached(value: float | None, base: float | None, most: float) -> str:
    """The ratio, in bold where it is at most ``most``."""
    if value is None or not base:
        return ""
    text = f"{value / base:.2f}"
    return f"**{text}**" if float(text) <= most else text


def number(value: float | None, form: str) -> str:
    """``value`` as text; empty for None."""
    return "" if value is None else format(value, form)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|--" * len(head) + "|")
    return "\n".join(lines)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
