"""Formatting of quantities."""

import pytest

from saqcli.units import with_error


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
