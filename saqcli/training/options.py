"""Checks of the options of minimizers and searchers; each error is one clear line."""

import math

from saqcli.errors import ConfigError


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among ``choices``."""
    if value not in choices:
        raise ConfigError(f"{option} {value!r} is not known: choose from {', '.join(choices)}")


def check_number(option: str, value: object, least: float) -> None:
    """Refuse what is no finite number, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ConfigError(f"{option} {value!r} is not possible: give a number from {least} on")


def check_count(option: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option} {value!r} is not possible: give a whole number from {least} on")


def check_flag(option: str, value: object) -> None:
    """Refuse what is neither true nor false; any word would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{option} {value!r} is neither: give true or false")
