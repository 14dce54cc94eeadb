"""What a run would do, as a short list: a subject a line, and what was looked at."""

import textwrap
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.text import Text

from saqcli.cli.flags import as_flags
from saqcli.cli.tables import say, width_of
from saqcli.units import counted, format_quantity

NAMED = 5  # classes or layers that are named, before they are counted
PINNED_BITS = 8  # of layers that read the image or give the classes, unless they are pinned otherwise
SUBJECT = 11  # columns


def show_plan(plan: dict[str, Any]) -> None:
    """Print what ``--dry-run --json`` holds."""
    console = Console()
    config, profile = plan["config"], plan["profile"]
    size = "x".join(map(str, profile["input_size"]))
    floor, ceiling = (
        f"{format_quantity(profile[f'{end}_bops'], 'BOPs')} and {format_quantity(profile[f'{end}_size_bytes'], 'B')}"
        for end in ("floor", "ceiling")
    )
    files = ", ".join(str(PurePath(path).relative_to(plan["run_dir"])) for path in plan["writes"])
    say(console, f"Plan of `saq {plan['verb']}`; nothing was written.\n")
    subjects = {
        "model": [f"{plan['model']}, {counted(profile['num_classes'], 'class')}, input {size}"],
        "weights": [plan["weights"]],
        "data": _data(plan),
        "device": [plan["device"]],
        "bits": _bits(plan),
        "reachable": [f"{floor} to {ceiling}"],
        "search": _search(plan),
        "training": _training(plan) if plan["verb"] == "quantize" else [],
        "run": [f"{plan['run_dir']}, {'resumed' if plan['resume'] else 'new'}"],
        "writes": [files],
        "settings": [f"recipe {config['recipe']}, seed {config['run']['seed']}; all of them with --json"],
    }
    for subject, lines in subjects.items():
        for index, line in enumerate(lines):
            _print("" if index else subject, line, console)
    if plan["data"] is None:
        say(console, f"\nMissing: --data DIR, without which `saq {plan['verb']}` does not start.")


def _print(subject: str, line: str, console: Console) -> None:
    """One line, wrapped between words."""
    line, width = as_flags(line), width_of(console)
    parts = [line]
    if width is not None:
        room = max(width - SUBJECT, SUBJECT)
        parts = textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False)
    for part in parts:
        head = Text(subject.ljust(SUBJECT), style="bold")
        console.print(head + Text(part), highlight=False, soft_wrap=True, markup=False, emoji=False)
        subject = ""


def _data(plan: dict[str, Any]) -> list[str]:
    """A line a split."""
    if plan["data"] is None:
        return ["none given"]
    lines = []
    for split in plan["data"].values():
        names = split["classes"]
        classes = f" in {counted(len(names), 'class')}: {_some(names)}" if names else ""
        lines.append(f"{split['name']}: {counted(split['images'], 'image')}{classes}")
    return lines


def _some(names: list[str]) -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _bits(plan: dict[str, Any]) -> list[str]:
    """What was asked for, and what it costs."""
    profile = plan["profile"]
    free = {
        (layer["weight_bits"], layer["activation_bits"]) for layer in profile["layers"] if not layer["pinned"]
    }
    kept = [
        layer["name"]
        for layer in profile["layers"]
        if layer["pinned"] and layer["weight_bits"] == layer["activation_bits"] == PINNED_BITS
    ]
    uniform = "w{}a{}".format(*free.copy().pop()) if len(free) == 1 else "mixed bits"
    cost = (
        f"{format_quantity(profile['bops'], 'BOPs')}, {profile['float_bops'] / profile['bops']:.1f} times fewer than "
        f"float; {format_quantity(profile['size_bytes'], 'B')}, "
        f"{profile['float_size_bytes'] / profile['size_bytes']:.1f} times smaller"
    )
    lines = [f"{plan['bits']}: {cost}"]
    if plan["budget_bops"] is not None or plan["budget_bytes"] is not None:
        bounds = ((plan["budget_bops"], "BOPs"), (plan["budget_bytes"], "B"))
        wanted = " and ".join(format_quantity(bound, unit) for bound, unit in bounds if bound is not None)
        lines = [f"{plan['bits']}: {wanted} at most", f"the most uniform bits that fit: {uniform}, {cost}"]
    if kept:
        lines.append(f"{PINNED_BITS} bits in {_some(kept)}, which read the image or give the classes")
    return lines


def _search(plan: dict[str, Any]) -> list[str]:
    """Which searcher, and what it chooses among."""
    if plan["searcher"] is None:
        return []
    config = plan["config"]
    widths = config["quantization"]["candidates"]
    text = f"{plan['searcher']}, {counted(plan['decisions'], 'decision')}, candidates {', '.join(map(str, widths))}"
    inputs = config["quantization"]["activation_candidates"]
    if inputs is not None:
        text += f", for inputs {', '.join(map(str, inputs))}"
    if config["search"]["epochs"] is not None:
        text += f", {counted(config['search']['epochs'], 'epoch')}"
    if config["search"]["pareto"]:
        text += f"; a front at {counted(config['search']['pareto'], 'budget')}"
    return [text]


def _training(plan: dict[str, Any]) -> list[str]:
    """How long and by which method."""
    training, data = plan["config"]["training"], plan["config"]["data"]
    if not training["epochs"]:
        return ["none: calibration only"]
    steps = plan["steps_per_epoch"]
    length = counted(training["epochs"], "epoch")
    if steps is not None:
        images = min(data["batch_size"], plan["data"]["train"]["images"])
        length += f" of {counted(steps, 'step')}, {counted(images, 'image')} each"
    rho = "" if training["rho"] is None else f", rho {training['rho']:g}"
    return [
        f"{training['method']}{rho}, {length}; {training['optimizer']}, learning rate {training['lr']:g}, "
        f"{training['schedule']} schedule"
    ]
