"""What became of a budget of accuracy, as sentences: asked and found, what was missed, and the shadow price."""

from typing import Any

from saqcli.units import counted, format_quantity


def accuracy_lines(accuracy: dict[str, Any]) -> list[str]:
    """Lines for a person.

    Args:
        accuracy: as in ``search.json`` or the results of a quantization.
    """
    lines = [_asked(accuracy)]
    if (missed := missed_line(accuracy)) is not None:
        lines.append(missed)
    elif _validation_is_worse(accuracy):
        lines.append(
            "the validation images lose more than the held-out training images, which float networks know by heart: "
            "ask for less of a drop to leave a margin"
        )
    return [*lines, *_prices(accuracy)]


def _asked(accuracy: dict[str, Any]) -> str:
    """As in ``asked at most 1.00 points, held-out 0.93 (2,048 images, calibrated), validation 1.12``."""
    asked = f"asked at most {accuracy['allowed_drop']:.2f} points"
    if accuracy["min_top1"] is not None:
        asked = f"asked at least {accuracy['min_top1']:.2f} %, at most {accuracy['allowed_drop']:.2f} points"
    images = counted(accuracy["held_out_images"], "image")
    text = (
        f"drop of top-1: {asked}, held-out {accuracy['held_out_drop']:.2f} ({images}, {accuracy['method']})"
    )
    if "validation_drop" in accuracy:
        text += f", validation {accuracy['validation_drop']:.2f}"
    return text


def _validation_is_worse(accuracy: dict[str, Any]) -> bool:
    if "validation_drop" not in accuracy:
        return False
    return bool(accuracy["validation_drop"] > max(accuracy["allowed_drop"], accuracy["held_out_drop"]))


def missed_line(accuracy: dict[str, Any]) -> str | None:
    """By how much a bound is missed; None if all hold."""
    if accuracy["met"]:
        return None
    drop, allowed = accuracy["held_out_drop"], accuracy["allowed_drop"]
    bounds = {
        "cost": (accuracy["budget_cost"], accuracy["cost_unit"]),
        "bytes": (accuracy["budget_bytes"], "B"),
    }
    bounds = {name: bound for name, bound in bounds.items() if bound[0] is not None}
    within = " and ".join(format_quantity(bound, unit) for bound, unit in bounds.values())
    found = f"the best configuration found{f' within {within}' if within else ''} loses {drop:.2f} points"
    line = f"no configuration meets the bound of accuracy: {found}, {drop - allowed:.2f} more than asked"
    if accuracy["needed_cost"] is None and allowed < 0:
        return f"{line}; it is kept: the float network itself is {-allowed:.2f} points below the bound, ask for less"
    if accuracy["needed_cost"] is None:
        return (
            f"{line}; no other budget helps, the most bits lose too much: allow a larger drop"
            if within
            else (f"{line}; it is kept: allow a larger drop, or use a method that recovers accuracy")
        )
    over = [
        f"{format_quantity(needed, unit)} ({100 * (needed / bound - 1):.1f} % more)"
        for name, (bound, unit) in bounds.items()
        if (needed := accuracy[f"needed_{name}"]) > bound
    ]
    return f"{line}; a drop of {allowed:.2f} takes {' and '.join(over)}" if over else line


def _prices(accuracy: dict[str, Any]) -> list[str]:
    """The shadow price of both bounds, one line a unit."""
    if not accuracy["shadow_price"]:
        return ["shadow price: unknown, accuracy does not rise with cost around this configuration"]
    return [
        f"shadow price: one point of top-1 costs about {format_quantity(price['per_point'], price['unit'])} here, "
        f"1 % more {'bytes' if price['unit'] == 'B' else price['unit']} gives about {price['per_percent']:.3f} points"
        for price in accuracy["shadow_price"]
    ]
