"""Formatting of quantities."""

from fractions import Fraction
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saqcli.api.budgets import relative_bound
from saqcli.errors import ConfigError
from saqcli.units import Quantity, parse_cost, parse_quantity, parse_share, with_error

QUANTITIES = st.sampled_from(["bops", "size"])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (892.7, 123.4, "893 ± 123"),
        (233.2, 54.1, "233 ± 54"),
        (67.25, 0.012, "67.250 ± 0.012"),
        (0.00654, 0.0035, "0.0065 ± 0.0035"),
        (-3.14, 999.6, "-3 ± 1000"),
        (67.25, 0.0, "67.25 ± 0.00"),
        (0.0, 3.2, "0.0 ± 3.2"),
        (0.0, 0.0, "0 ± 0"),
        (5.0, 1e-12, "5.00000 ± 0.00000"),
        (1.5e9, 2.4e7, "1.500e+09 ± 0.024e+09"),
        (1.2e-9, 3e-10, "1.20e-09 ± 0.30e-09"),
        (float("nan"), 1.0, "nan ± 1"),
    ],
)
def test_value_and_error_have_equal_decimals(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


@given(st.integers(1, 99), st.integers(0, 14), QUANTITIES, st.sampled_from(["e", "E", "e+"]))
def test_exponents_need_no_unit(number: int, power: int, quantity: str, mark: str) -> None:
    kind = cast(Quantity, quantity)

    assert parse_quantity(f"{number}{mark}{power}", kind) == number * 10**power
    assert parse_quantity(f"{number}{mark}{power}K", kind) == number * 10 ** (power + 3)


@given(st.integers(1, 10**6), st.integers(0, 6), QUANTITIES)
def test_exponents_and_prefixes_agree(number: int, places: int, quantity: str) -> None:
    kind = cast(Quantity, quantity)
    text = f"{number // 10**places}.{number % 10**places:0{places}d}" if places else str(number)

    assert parse_quantity(f"{text}e9", kind) == parse_quantity(f"{text}G", kind)


@given(st.integers(1, 10_000), QUANTITIES)
def test_shares_are_exact(hundredths: int, quantity: str) -> None:
    text = f"{hundredths // 100}.{hundredths % 100:02d}%"

    assert parse_share(text, cast(Quantity, quantity)) == Fraction(hundredths, 10_000)
    assert relative_bound(text) == relative_bound(text.replace("%", " % "))


@pytest.mark.parametrize("text", ["0%", "100.1%", "250 %"])
def test_shares_outside_the_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="more than 0% and at most 100%"):
        parse_share(text)


@pytest.mark.parametrize(
    "text", ["5e", "e8", "5e8e8", "5e-8", "5 e8", "1e100", "-5%", "%", "5%%", "5", "5.5"]
)
def test_other_texts_are_no_quantities(text: str) -> None:
    assert text == "%%" or parse_share(text) is None
    with pytest.raises(ConfigError):
        parse_quantity(text)


def test_costs_of_tables_have_exponents_and_a_unit() -> None:
    assert parse_cost("1.8e3us", "ps") == parse_cost("1.8ms", "ps")
    assert parse_cost("2e1Mcycles", "cycles") == parse_cost("20M", "cycles")
    with pytest.raises(ConfigError, match="50% of what uniform 8 bits cost"):
        parse_cost("1e9", "ps")
