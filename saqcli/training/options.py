"""Checks of the options of minimizers and searchers; each error is one clear line."""

import inspect
import math
from collections.abc import Sequence
from numbers import Real
from typing import cast

from torch import Tensor

from saqcli.errors import ConfigError


def check_choice(option: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not among ``choices``."""
    if value not in choices:
        raise ConfigError(f"{option} {value!r} is not known: choose from {', '.join(choices)}")


def check_number(option: str, value: object, least: float) -> None:
    """Refuse what is no finite number, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise ConfigError(f"{option} {value!r} is not possible: give a number from {least} on")


def plain_number(option: str, value: object, least: float) -> float:
    """``value`` as a number of Python, also from numpy or a tensor of one element; refused as in ``check_number``."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    elif not isinstance(value, int | float) and isinstance(value, Real):
        value = float(value)
    check_number(option, value, least)
    return cast(float, value)


def check_count(option: str, value: object, least: int = 1) -> None:
    """Refuse what is no whole number, or below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option} {value!r} is not possible: give a whole number from {least} on")


def check_flag(option: str, value: object) -> None:
    """Refuse what is neither true nor false; any word would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{option} {value!r} is neither: give true or false")


def check_betas(option: str, value: object) -> None:
    """Refuse what is not two numbers from 0 to below 1, the decays of an optimizer like Adam."""
    if not (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in value)
    ):
        raise ConfigError(f"{option} {value!r} is not possible: give two numbers from 0 to below 1")


def check_ascending(option: str, value: object) -> None:
    """Refuse what is not a list of whole numbers from 1 on, each above the one before."""
    if not (
        isinstance(value, Sequence)
        and all(type(number) is int and number >= 1 for number in value)
        and list(value) == sorted(set(value))
    ):
        raise ConfigError(f"{option} {value!r} is not possible: give ascending whole numbers from 1 on")


def accepted(plugin: type, given: int = 2) -> tuple[list[str], list[str]]:
    """The options of a class, and those of them without a default.

    A constructor that passes ``**options`` on takes those of the next class as well.

    Args:
        plugin: the class.
        given: number of positional arguments that are no options.

    Example:
        >>> class Base:
        ...     def __init__(self, model, base, *, rho, unit="deviation"): ...
        >>> class Derived(Base):
        ...     def __init__(self, model, base, *, alpha=0.2, **options): ...
        >>> accepted(Derived)
        (['alpha', 'rho', 'unit'], ['rho'])
    """
    found: dict[str, inspect.Parameter] = {}
    for owner in plugin.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1 + given :]
        passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, parameter)
        if not passes_on:
            break
    return list(found), [name for name, parameter in found.items() if parameter.default is parameter.empty]
