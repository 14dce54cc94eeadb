"""The plan of a dry run as a short list: model, data, bits, training, files."""

import textwrap
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.text import Text

from saqcli.cli.flags import as_flags
from saqcli.cli.screens.tables import print_text, times_fewer, width_of
from saqcli.units import counted, format_quantity

NAMED = 5  # classes or layers listed by name
PINNED_BITS = 8  # default of layers that read the image, and of classifiers
SUBJECT = 11  # columns
COMPARED = {  # without labels
    "held out": "no labels: compared with the float network on {} held out from calibration",
    "calibration": "no labels: compared with the float network on the calibration images, {}",
}


def show_plan(plan: dict[str, Any]) -> None:
    """Print the plan that ``--dry-run --json`` writes."""
    console = Console()
    config, profile = plan["config"], plan["profile"]
    size = "x".join(map(str, profile["input_size"]))
    reachable = ", ".join(
        f"{format_quantity(fewest, unit)} to {format_quantity(most, unit)}"
        for fewest, most, unit in _reachable(plan)
    )
    files = ", ".join(str(PurePath(path).relative_to(plan["run_dir"])) for path in plan["writes"])
    print_text(console, f"Dry run of `saq {plan['verb']}`: nothing was written.\n")
    subjects = {
        "model": [f"{plan['model']}, {counted(profile['num_classes'], 'class')}, input {size}"],
        "weights": [plan["weights"]],
        "data": _data(plan),
        "device": [plan["device"]],
        "bits": _bits(plan),
        "reachable": [reachable],
        "search": _search(plan),
        "stages": _stages(plan),
        "training": _training(plan) if plan["verb"] == "quantize" else [],
        "run": [f"{plan['run_dir']}, {'resumed' if plan['resume'] else 'new'}"],
        "writes": [files],
        "settings": [f"recipe {config['recipe']}, seed {config['run']['seed']} (--json prints all)"],
    }
    for subject, lines in subjects.items():
        for index, line in enumerate(lines):
            _print("" if index else subject, line, console)
    if plan["data"] is None:
        print_text(console, f"\nMissing: `saq {plan['verb']}` requires --data DIR or --calibration PATH.")


def _reachable(plan: dict[str, Any]) -> list[tuple[int, int, str]]:
    """Least and most of every cost, with its unit."""
    profile = plan["profile"]
    found = [
        (profile["floor_bops"], profile["ceiling_bops"], "BOPs"),
        (profile["floor_size_bytes"], profile["ceiling_size_bytes"], "B"),
    ]
    if plan.get("floor_cost") is not None:
        found[0] = (plan["floor_cost"], plan["ceiling_cost"], plan["cost_unit"])
    return found


def _print(subject: str, line: str, console: Console) -> None:
    """Print one line, wrapped between words."""
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
    """One line per split."""
    if plan["data"] is None:
        return ["none"]
    lines = []
    for split in plan["data"].values():
        names = split["classes"]
        classes = f" in {counted(len(names), 'class')}: {_some(names)}" if names else ""
        lines.append(f"{split['name']}: {counted(split['images'], 'image')}{classes}")
    if plan["scored_on"] in COMPARED:
        held = counted(plan["scored_images"], "image")
        lines.append(COMPARED[plan["scored_on"]].format(held))
    return lines


def _some(names: list[str]) -> str:
    """The first names, and the number of others."""
    more = f", ... ({len(names) - NAMED} more)" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _bits(plan: dict[str, Any]) -> list[str]:
    """The requested bits or budget, and their cost."""
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
        f"{format_quantity(profile['bops'], 'BOPs')} ({times_fewer(profile, 'bops')} fewer than float), "
        f"{format_quantity(profile['size_bytes'], 'B')} ({times_fewer(profile, 'size_bytes')} smaller)"
    )
    if "cost" in plan:
        cost = f"{format_quantity(plan['cost'], plan['cost_unit'])}, {cost}"
    bounds = (
        (plan["budget_bops"], "BOPs"),
        (plan.get("budget_cost"), plan.get("cost_unit", "")),
        (plan["budget_bytes"], "B"),
    )
    lines = [f"{plan['bits']}: {cost}"]
    if any(bound is not None for bound, _ in bounds):
        wanted = " and ".join(format_quantity(bound, unit) for bound, unit in bounds if bound is not None)
        lines = [f"{plan['bits']}: at most {wanted}", f"largest uniform bits that fit: {uniform}, {cost}"]
    elif plan.get("accuracy"):
        lines = [f"{plan['bits']}: the fewest bit-operations; at most {uniform}, {cost}"]
    if kept:
        lines.append(f"pinned to {PINNED_BITS} bits (input layers and classifiers): {_some(kept)}")
    return lines


def _search(plan: dict[str, Any]) -> list[str]:
    """The searcher and its candidates."""
    if plan["searcher"] is None:
        return []
    config = plan["config"]
    widths = config["quantization"]["candidates"]
    text = f"{plan['searcher']}, {counted(plan['decisions'], 'decision')}, candidates {', '.join(map(str, widths))}"
    inputs = config["quantization"]["activation_candidates"]
    words = {"same": "the same, chosen apart", "tied": "tied to weights"}
    text += f", inputs {words[inputs] if isinstance(inputs, str) else ', '.join(map(str, inputs))}"
    if plan["weight_error"] != 1:
        text += f", compared with {plan['weight_error']:g} of the error of weights"
    if config["search"]["epochs"] is not None:
        text += f", {counted(config['search']['epochs'], 'epoch')}"
    if config["search"]["pareto"]:
        text += f"; Pareto front at {counted(config['search']['pareto'], 'budget')}"
    return [text, *_accuracy(plan)]


def _accuracy(plan: dict[str, Any]) -> list[str]:
    """How often accuracy is measured for a budget of it."""
    accuracy = plan.get("accuracy")
    if not accuracy:
        return []
    text = f"accuracy is measured on held-out images, for about {accuracy['measurements']} configurations at most"
    if accuracy["trials"]:
        stages = " and ".join(plan["stages"][1:])
        text += f", then in up to {counted(accuracy['trials'], 'trial')}, each {stages} (`search.trials`)"
    return [text]


def _stages(plan: dict[str, Any]) -> list[str]:
    """The stages of the run, if there are more than calibration and fine-tuning."""
    stages = [stage for stage in plan["stages"] if stage not in ("calibrated", "fine-tuned")]
    return [", ".join(plan["stages"])] if stages else []


def _training(plan: dict[str, Any]) -> list[str]:
    """The method, length and optimizer of training."""
    training, data = plan["config"]["training"], plan["config"]["data"]
    if not training["epochs"]:
        stages = [stage for stage in plan["stages"] if stage != "calibrated"]
        return ["none: calibration only" if not stages else "none"]
    steps = plan["steps_per_epoch"]
    length = counted(training["epochs"], "epoch")
    if steps is not None:
        images = min(data["batch_size"], plan["data"]["train"]["images"])
        length += f" of {counted(steps, 'step')} with {counted(images, 'image')} each"
    rho = "" if training["rho"] is None else f", rho {training['rho']:g}"
    return [
        f"{training['method']}{rho}, {length}; {training['optimizer']}, learning rate {training['lr']:g}, "
        f"{training['schedule']} schedule"
    ]
