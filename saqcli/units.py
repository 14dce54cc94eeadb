"""Quantities with units, as people type and read them: ``34G`` bit-operations, ``6MB``.

A bare number is refused where the unit would be a guess: ``--bops 34`` could mean 34 or 34 billion.
"""

import math
import re

from saqcli.errors import ConfigError

_FACTORS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT])\s*(?:BOPS|B)?\s*", re.IGNORECASE)


def parse_quantity(text: str) -> int:
    """The integer that ``text`` stands for; decimal units K, M, G, T.

    Raises:
        ConfigError: no number, a negative one, or no unit.

    Example:
        >>> parse_quantity("674.6M")
        674600000
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"{text!r} is no quantity: give a number with a unit, such as 34G, 674.6M or 500K, "
            "or w4a4 for what uniform 4 bits cost"
        )
    whole, _, fraction = match[1].partition(".")
    digits = int(whole + fraction)
    scale: int = 10 ** len(fraction)
    value, remainder = divmod(digits * _FACTORS[match[2].upper()], scale)
    if value == 0:
        raise ConfigError(f"{text!r} is no quantity to work with: it must be above zero")
    return value + (1 if 2 * remainder >= scale else 0)


def format_quantity(value: float, unit: str = "") -> str:
    """``value`` with four significant digits and a decimal prefix.

    Example:
        >>> format_quantity(34714419200, "BOPs")
        '34.71 GBOPs'
    """
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


PLAIN = (1e-4, 1e7)  # magnitudes between these are written without an exponent
DIGITS = 4  # of a value without an error
MOST_DIGITS = 6  # of a value, however small its error is


def with_error(value: float, error: float, joint: str = " ± ") -> str:
    """``value`` and its error with the same decimals: two significant digits of the error decide.

    Args:
        value: any number.
        error: of it, in the same unit; not negative.
        joint: what stands between the two.

    Example:
        >>> with_error(892.7, 123.4)
        '893 ± 123'
        >>> with_error(0.0123, 0.00098)
        '0.01230 ± 0.00098'
        >>> with_error(1.5e9, 2.4e7)
        '1.500e+09 ± 0.024e+09'
    """
    largest = max(abs(value), abs(error))
    if not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.{DIGITS}g}{joint}{error:.2g}"
    if largest == 0:
        return f"0{joint}0"
    exponent = 0 if PLAIN[0] <= largest < PLAIN[1] else _exponent(largest)
    suffix = f"e{exponent:+03d}" if exponent else ""
    value, error = value / 10.0**exponent, error / 10.0**exponent
    decimals = 1 - _exponent(error) if error else DIGITS - 1 - _exponent(value)
    if value:
        decimals = min(decimals, MOST_DIGITS - 1 - _exponent(value))
    decimals = max(decimals, 0)
    return f"{value:.{decimals}f}{suffix}{joint}{error:.{decimals}f}{suffix}"


def _exponent(value: float) -> int:
    """Of ten, in scientific notation."""
    return math.floor(math.log10(abs(value)))
