"""Sentences about a budget of accuracy: what is missed, by how much, and what would help."""

from typing import Any

from saqcli.report.accuracy import accuracy_lines, missed_line

MET: dict[str, Any] = {
    "max_drop": 1.0,
    "min_top1": None,
    "allowed_drop": 1.0,
    "held_out_images": 512,
    "held_out_drop": 0.5,
    "method": "calibrated",
    "met": True,
    "cost_unit": "BOPs",
    "budget_cost": None,
    "budget_bytes": None,
    "needed_cost": 840_000_000,
    "needed_bytes": 158_000,
    "shadow_price": [],
}
MISSED = MET | {"met": False, "held_out_drop": 5.5}


def test_missed_line_says_how_much_each_is_missed() -> None:
    assert missed_line(MET) is None
    both = MISSED | {"budget_cost": 300_000_000, "budget_bytes": 200_000}
    assert missed_line(both) == (
        "no configuration meets the bound of accuracy: the best configuration found within 300 MBOPs and 200 KB loses "
        "5.50 points, 4.50 more than asked; a drop of 1.00 takes 840 MBOPs (180.0 % more)"
    )


def test_missed_line_names_the_remedy() -> None:
    nothing = MISSED | {"needed_cost": None, "needed_bytes": None}
    assert "use a method that recovers accuracy" in str(missed_line(nothing))
    assert "no other budget helps" in str(missed_line(nothing | {"budget_cost": 300_000_000}))
    above_float = nothing | {"max_drop": None, "min_top1": 99.0, "allowed_drop": -7.33}
    assert "the float network itself is 7.33 points below the bound" in str(missed_line(above_float))


def test_worse_validation_is_said_with_a_remedy() -> None:
    lines = accuracy_lines(MET | {"validation_drop": 1.5})
    assert lines[0].endswith("held-out 0.50 (512 images, calibrated), validation 1.50")
    assert "leave a margin" in lines[1]
    assert len(accuracy_lines(MET | {"validation_drop": 0.9})) == len(lines) - 1
