"""Quantities with units, parsed and formatted: ``34G`` bit-operations, ``6MB``, ``5 MiB``, ``1 image``.

A number without a unit is an error if the unit is ambiguous: a budget of 34 could mean 34 or 34 billion, but 34e9 is
what it says. A percentage is a share of the cost of 8 bits in every layer. A unit of another quantity is an error too;
the message names the setting that takes it.
"""

import math
import re
from fractions import Fraction
from typing import Literal, NamedTuple

from saqcli.errors import ConfigError

Quantity = Literal["bops", "size"]

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # for bytes
_FACTORS = _PREFIXES | _BINARY
_ALL_PREFIXES = (
    *_FACTORS,
    "n",
    "u",
    "\u00b5",
    "\u03bc",
    "p",
    "e",
)  # with those of units that no setting takes
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,2})?)\s*([^\d\s.,][^\d]*?)?\s*")
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")


class _Unit(NamedTuple):
    """What a unit measures, its names in lower case, and the remedy if no setting takes it."""

    measures: str
    words: tuple[str, ...]
    remedy: str = "no setting bounds it"


_BY_BITS = "each costs weight bits x activation bits: give w4a4 for the cost of uniform 4 bits"
_BY_TABLE = "a table of each layer's costs bounds it, `quantization.cost=FILE.json`"
_UNITS = {
    "bops": _Unit(
        "a number of bit-operations", ("bops", "bop", "bitops", "bitop", "bit-ops", "bit-operations")
    ),
    "size": _Unit("a size in bytes", ("b", "byte", "bytes")),
    "macs": _Unit("a number of multiply-accumulates", ("macs", "mac", "madds", "mult-adds"), _BY_BITS),
    "flops": _Unit("a number of operations", ("flops", "flop", "ops", "op"), _BY_BITS),
    "time": _Unit(
        "a time", ("s", "sec", "secs", "second", "seconds", "min", "minutes", "h", "hours"), _BY_TABLE
    ),
    "rate": _Unit(
        "a rate",
        ("fps", "hz", "images/s", "b/s", "bps", "flops/s", "ops/s"),
        "no setting bounds it, `evaluate(bench=True)` measures it",
    ),
    "energy": _Unit("an energy", ("j", "joule", "joules", "wh"), _BY_TABLE),
    "power": _Unit("a power", ("w", "watt", "watts")),
    "bits": _Unit(
        "a number of bits",
        ("bit", "bits"),
        "use `quantization.bits=4` for the same bits everywhere, or `quantization.size=5MB` in bytes",
    ),
    "parameters": _Unit(
        "a number of parameters",
        ("params", "param", "parameters", "weights"),
        "use `quantization.size=5MB` in bytes",
    ),
    "share": _Unit(
        "a ratio",
        ("%", "percent", "x"),
        "give w4a4 for the cost of uniform 4 bits, or 50% of that of uniform 8 bits",
    ),
}
_KINDS = {word: kind for kind, unit in _UNITS.items() for word in unit.words}
_EXAMPLES = {"bops": "34G, 674.6M or 5e8", "size": "5MB, 900KB or 4MiB"}
_COSTS = {"bops": "what uniform 4 bits cost", "size": "the size at uniform 4 bits"}
_UNIFORM = {"bops": "what uniform 8 bits cost", "size": "the size at uniform 8 bits"}
_NAMES = {"bops": "budget", "size": "size"}
SETTINGS = {"bops": "quantization.bops", "size": "quantization.size"}

# Costs of tables are whole numbers of these units, so that sums are exact; shown with the prefix that fits.
FINE_UNITS = {"ps": "s", "pJ": "J"}
_FINE_PREFIXES = {"": 10**12, "m": 10**9, "u": 10**6, "n": 10**3, "p": 1}

PLAIN = (1e-4, 1e7)  # range of magnitudes written without an exponent
DIGITS = 4  # significant digits of a value without an error
MOST_DIGITS = 6  # maximum for a value with an error


def parse_quantity(text: str, quantity: Quantity = "bops") -> int:
    """Parse ``text`` as a number of bit-operations or bytes.

    Decimal prefixes K, M, G, T with or without the unit; bytes also as KiB, MiB, GiB, TiB, or without a prefix.
    Case is ignored, and a space may precede the unit. A number with an exponent needs no unit.

    Raises:
        ConfigError: no number, zero, no unit, or the unit of another quantity.

    Example:
        >>> parse_quantity("674.6M")
        674600000
        >>> parse_quantity("5e8")
        500000000
        >>> parse_quantity("4 MiB", "size")
        4194304
    """
    match = _NUMBER.fullmatch(text)
    prefix, kind = _split(match[2] or "", quantity) if match else ("", None)
    if match and not match[2] and "e" in match[1].lower():
        kind = quantity
    if match and kind is not None and kind != quantity:
        raise ConfigError(_meant(text, f"{match[1]}{prefix[:1].upper()}", kind, quantity))
    if match is None or kind is None or prefix not in (_FACTORS if quantity == "size" else _PREFIXES):
        missing = "add a unit" if match and not match[2] else "give a number with a unit"
        raise ConfigError(
            f"`{SETTINGS[quantity]}`: {text!r} is not a {_NAMES[quantity]}: {missing}, such as {_EXAMPLES[quantity]}, "
            f"w4a4 for {_COSTS[quantity]}, or 50% of {_UNIFORM[quantity]}"
        )
    exact = Fraction(match[1]) * _FACTORS[prefix]
    if exact < 1:
        raise ConfigError(f"`{SETTINGS[quantity]}`: {text!r} is zero: give a {_NAMES[quantity]} above zero")
    return math.floor(exact + Fraction(1, 2))


def parse_share(text: str, quantity: Quantity = "bops") -> Fraction | None:
    """``50%`` as a share of what 8 bits in every layer cost; None if ``text`` is no percentage.

    Raises:
        ConfigError: it is zero, or above 100 %.

    Example:
        >>> parse_share("50%"), parse_share("12.5 %"), parse_share("34G")
        (Fraction(1, 2), Fraction(1, 8), None)
    """
    match = _PERCENT.fullmatch(text)
    share = Fraction(match[1]) / 100 if match else None
    if share is not None and not 0 < share <= 1:
        raise ConfigError(
            f"`{SETTINGS[quantity]}`: {text!r} is a share of {_UNIFORM[quantity]}: give more than 0% and at most 100%"
        )
    return share


def _split(unit: str, quantity: Quantity) -> tuple[str, str | None]:
    """The prefix of a unit, and its quantity: ``quantity`` for a prefix alone, None if unknown."""
    unit = " ".join(unit.lower().split())
    if unit and unit in _FACTORS:
        return unit, "size" if unit in _BINARY else quantity
    for prefix in _ALL_PREFIXES:
        kind = _KINDS.get(unit[len(prefix) :].lstrip()) if unit.startswith(prefix) else None
        if kind is not None:
            return prefix, kind
    return "", None


def _meant(text: str, prefixed: str, kind: str, quantity: Quantity) -> str:
    """The error message for the unit of another quantity; names the setting that takes it, if any."""
    wanted, found = _UNITS[quantity], _UNITS[kind]
    remedy = found.remedy
    if kind in SETTINGS:
        remedy = f"use `{SETTINGS[kind]}={''.join(text.split())}`"
        if prefixed[-1] in "KMGT":
            remedy += f", or {prefixed} for {wanted.measures.rpartition(' ')[2]}"
    return f"`{SETTINGS[quantity]}`: {text!r} is {found.measures}, not {wanted.measures}: {remedy}"


def format_quantity(value: float, unit: str = "") -> str:
    """``value`` with four significant digits and a decimal prefix.

    Example:
        >>> format_quantity(34714419200, "BOPs"), format_quantity(1_800_000_000, "ps")
        ('34.71 GBOPs', '1.8 ms')
    """
    if unit in FINE_UNITS:
        prefix, fine = next(
            (each for each in _FINE_PREFIXES.items() if abs(value) >= each[1]), ("p" if value else "m", 1)
        )
        return f"{value / fine:.4g} {prefix}{FINE_UNITS[unit]}"
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def format_range(least: float, most: float, unit: str) -> str:
    """Two quantities of the same unit, which is written once if it has no fine prefixes.

    Example:
        >>> format_range(2e9, 5e9, "BOPs"), format_range(2e8, 5e9, "ps")
        ('2 G to 5 GBOPs', '200 us to 5 ms')
    """
    return f"{format_quantity(least, unit if unit in FINE_UNITS else '')} to {format_quantity(most, unit)}"


def fine_unit(unit: str) -> tuple[str, int]:
    """The unit in which costs given in ``unit`` are counted, and how many of these one ``unit`` is.

    Example:
        >>> fine_unit("ms"), fine_unit("uJ"), fine_unit("cycles")
        (('ps', 1000000000), ('pJ', 1000000), ('cycles', 1))
    """
    for fine, base in FINE_UNITS.items():
        if unit.endswith(base) and unit.removesuffix(base) in _FINE_PREFIXES:
            return fine, _FINE_PREFIXES[unit.removesuffix(base)]
    return unit, 1


def parse_cost(text: str, unit: str) -> int:
    """A budget of a cost, such as ``1.8ms``, as a number of ``unit``, rounded down.

    Args:
        text: the budget.
        unit: ``ps``, ``pJ`` or a word such as ``cycles``, which may be omitted after a prefix K, M, G or T.

    Raises:
        ConfigError: no number above zero, or another unit.

    Example:
        >>> parse_cost("1.8ms", "ps"), parse_cost("20M", "cycles")
        (1800000000, 20000000)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?)\s*(\D*?)\s*", text)
    given = (match[2] if match else "").replace("\u00b5", "u").replace("\u03bc", "u")
    fine, factor = fine_unit(given)
    if unit not in FINE_UNITS:
        prefix = given.lower().removesuffix(unit.lower()).strip()
        fine, factor = (unit, _PREFIXES[prefix]) if prefix in _PREFIXES and given else ("", 0)
    value = int(Fraction(match[1]) * factor) if match and fine == unit else 0
    if value <= 0:
        examples = {"ps": "1.8ms or 900us", "pJ": "3.2mJ or 800uJ"}.get(unit, f"20M{unit}")
        raise ConfigError(
            f"`{SETTINGS['bops']}`: {text!r} is not a budget in the unit of `quantization.cost`: give one such as "
            f"{examples}, w4a4 for what uniform 4 bits cost, or 50% of what uniform 8 bits cost"
        )
    return value


def format_figure(value: float | None, spec: str = ".4g", unit: str = "") -> str:
    """Format ``value`` with ``spec``; a dash for None, "not finite" for NaN and infinity.

    Example:
        >>> format_figure(91.668, ".2f", " %"), format_figure(None), format_figure(float("nan"), unit=" %")
        ('91.67 %', '-', 'not finite')
    """
    if value is None:
        return "-"
    return f"{value:{spec}}{unit}" if math.isfinite(value) else "not finite"


def format_duration(seconds: float) -> str:
    """Format a duration like a clock.

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
    """``number`` and ``thing``, a singular noun that becomes plural if needed.

    Example:
        >>> counted(1, "epoch"), counted(3, "epoch"), counted(1437, "training image"), counted(0, "batch")
        ('1 epoch', '3 epochs', '1,437 training images', '0 batches')
    """
    if number != 1:
        thing += "es" if thing.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{number:,} {thing}" if isinstance(number, int) else f"{number:g} {thing}"


def with_error(value: float, error: float, joint: str = " ± ") -> str:
    """``value`` and its error with the same number of decimals, from two significant digits of the error.

    Args:
        value: any number.
        error: of the value, in the same unit; not negative.
        joint: text between the two.

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
    """Decimal exponent in scientific notation."""
    return math.floor(math.log10(abs(value)))
