"""Quantities with units, as people type and read them: ``34G`` bit-operations, ``6MB``.

A bare number is refused where the unit would be a guess: ``--bops 34`` could mean 34 or 34 billion.
"""

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
