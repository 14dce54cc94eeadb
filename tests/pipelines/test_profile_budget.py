"""``saq profile`` under a budget: the most uniform bits within it, without data and weights."""

import pytest

from tests.support.command_line import answer, last_error, saq

NET = "saq/resnet8s"


def test_budget_of_uniform_bits_gives_these_bits() -> None:
    given, found = answer("profile", NET, "--bits", 4), answer("profile", NET, "--bops", "w4a4")

    assert found["layers"] == given["layers"]
    assert found["bops"] == given["bops"]


def test_share_bounds_both_costs() -> None:
    most = answer("profile", NET, "--bits", 8)

    found = answer("profile", NET, "--bops", "50%", "--size", "60%")

    assert found["bops"] <= 0.5 * most["bops"]
    assert found["size_bytes"] <= 0.6 * most["size_bytes"]
    assert len({layer["weight_bits"] for layer in found["layers"] if not layer["pinned"]}) == 1


def test_meaning_of_the_budget_is_noted() -> None:
    result = saq("profile", NET, "--bops", "50%")

    assert "--bops 50%: of the cost of w8a8 in every layer, " in result.stderr
    assert (
        f"the most uniform bits within {result.stderr.split('layer, ')[1].splitlines()[0]}" in result.stderr
    )


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--bops", "1e3"), 4, "meets 1 KBOPs"),
        (("--bops", "34G", "--bits", 4), 1, "--bits and --bops or --size each give the bits"),
        (("--bops", "34"), 1, "'34' is not a budget: add a unit, such as 34G, 674.6M or 5e8, w4a4"),
        (
            ("--bops", "34G", "--measure"),
            1,
            "--measure measures several widths: use --widths, and remove --bops",
        ),
    ],
)
def test_unusable_budgets_are_refused(options: tuple[object, ...], code: int, says: str) -> None:
    result = saq("profile", NET, *options)

    assert result.exit_code == code
    assert says in last_error(result)
