"""Quantities with units, as people type and read them: ``34G`` bit-operations, ``6MB``, ``1 image``.

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


def format_figure(value: float | None, spec: str = ".4g", unit: str = "") -> str:
    """``value`` as ``format`` has it; a dash where nothing was measured, words where it is NaN or infinite.

    Example:
        >>> format_figure(91.668, ".2f", " %"), format_figure(None), format_figure(float("nan"), unit=" %")
        ('91.67 %', '-', 'not finite')
    """
    if value is None:
        return "-"
    return f"{value:{spec}}{unit}" if math.isfinite(value) else "not finite"


def format_duration(seconds: float) -> str:
    """Time as a person reads a clock.

    Example:
        >>> format_duration(7.6), format_duration(754), format_duration(3725)
        ('8 s', '12:34', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def counted(number: float, thing: str) -> str:
    """``number`` of ``thing``, named in the singular.

    Example:
        >>> counted(1, "epoch"), counted(3, "epoch"), counted(1437, "training image"), counted(0, "batch")
        ('1 epoch', '3 epochs', '1,437 training images', '0 batches')
    """
    if number != 1:
        thing += "es" if thing.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:,} {thing}" if isinstance(number, int) else f"{number:g} {thing}"
