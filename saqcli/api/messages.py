"""Parameters of Python in the place of settings in messages, as ``cli/flags.py`` puts flags.

Messages of the core name settings in backticks, as a configuration has them: ```quantization.size=5MB```. Who calls
``saqcli.search`` gives ``budget=saqcli.Budget(size=5000000)`` instead. ``saqcli/__init__.py`` wraps every public
function once.
"""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import ParamSpec, TypeVar

from saqcli.errors import ConfigError, SaqError
from saqcli.units import parse_quantity

P = ParamSpec("P")
T = TypeVar("T")

_SETTING = re.compile(r"`((?:[a-z]+\.){0,2}[a-z_]+)(?:=([^`]*))?`")
_COMMAND = re.compile(r"`(quantize|search|evaluate|export|analyze|report|reproduce)\(([^`]*)\)`")
_PLAIN = re.compile(r"[A-Z]+|True|False|None|[\d.]+|\(.*\)|\{.*\}")  # values that need no quotes

# What says nothing, or something else, without a run directory and settings.
PHRASES = {
    ", and `overwrite=True`; checkpoints/ holds the last good state": "",
    ", `model.mean`, `model.std` and `model.input_size`": " and the range of its inputs",
    "`export.styles=()` to write model.safetensors only": "`saqcli.save` to write a safetensors file only",
    "; `saq profile MODEL` lists them": "; saqcli.summary lists them",
}

# Settings whose parameter has the same name, by the function that takes it.
_SAME = {
    "load_model": (
        *("model.name", "model.weights", "model.weights_key", "model.pretrained", "model.num_classes"),
        *("model.new_head", "model.in_chans", "model.input_size", "model.mean", "model.std"),
    ),
    "load_images": ("data.path", "data.batch_size", "data.workers"),
    "quantize_model": (
        *("quantization.bits", "quantization.policy", "quantization.searcher", "quantization.candidates"),
        *("quantization.pins", "quantization.quantizer", "quantization.weight_quantizer"),
        *("quantization.activation_quantizer", "quantization.weight_grid", "quantization.granularity"),
        *("quantization.weight_normalization", "quantization.restore_deviation"),
        "quantization.quantize_attention",
        *("quantization.clip_init", "quantization.error_power", "quantization.short_steps"),
        *("quantization.balance_norms", "quantization.target"),
        *("quantization.correct_bias", "quantization.recalibrate_bn", "inplace"),
    ),
    "search": ("quantization.cost", "quantization.activation_candidates"),
    "finetune": ("training.epochs", "training.method", "training.lr", "training.rho"),
}
# Function and parameter of every setting that has one.
PARAMETERS = {
    setting: (function, setting.rpartition(".")[2])
    for function, settings in _SAME.items()
    for setting in settings
} | {
    "quantization.bops": ("quantize_model", "budget"),
    "quantization.size": ("quantize_model", "budget"),
    "model.kwargs": ("load_model", "kwargs"),
}


def with_parameters(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose errors name parameters in the place of settings; their types are unchanged."""
    taken = set(inspect.signature(function).parameters)

    @functools.wraps(function)
    def public(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except SaqError as error:
            for one in {id(each): each for each in (error, *error.parts)}.values():
                if one.args and isinstance(one.args[0], str):
                    one.args = (as_parameters(one.args[0], taken), *one.args[1:])
            raise

    return public


def as_parameters(text: str, taken: Collection[str]) -> str:
    """``text`` with parameters in place of settings in backticks.

    Args:
        text: a message of the core; unknown names in backticks are left unchanged.
        taken: parameters of the function that was called; those of another function are named with it.

    Example:
        >>> as_parameters("use `quantization.size=5MB`, or `model.weights=FILE`", {"budget"})
        'use `budget=saqcli.Budget(size=5000000)`, or `saqcli.load_model(weights=FILE)`'
    """
    for phrase, ours in PHRASES.items():
        text = text.replace(phrase, ours)
    text = _COMMAND.sub(lambda found: f"`saq {found[1].replace('evaluate', 'eval')}` ({found[2]})", text)
    return _SETTING.sub(lambda found: _parameter(found[1], found[2], taken) or found[0], text)


def _parameter(setting: str, value: str | None, taken: Collection[str]) -> str | None:
    """The parameter of a setting, in backticks; None if ``setting`` is none."""
    section, _, key = setting.rpartition(".")
    if setting == "style" and "style" not in taken and "export" in taken:
        return "`export`"
    if setting == "data.batch_size" and "batch_size" not in taken:
        return "batch size" if value is None else f"a batch size of {value}"
    function, name = PARAMETERS.get(setting, ("", ""))
    if section.startswith("training") and name not in taken:
        holder = next((each for each in ("settings", "options", "search") if each in taken), None)
        if holder:
            given = _python(key, value)
            for part in reversed(setting.split(".")[1:]):
                given = f'{{"{part}": {given}}}'
            return f"`{holder}={given}`"
    if not name:
        # Runs have settings that functions have not.
        return f"`{setting}{'' if value is None else f'={value}'}` of the command line" if section else None
    given = name if value is None else f"{name}={_python(key, value)}"
    if name in taken:
        return f"`{given}`"
    return f"`saqcli.{function}({given if value is not None else f'{name}=...'})`"


def _python(key: str, value: str | None) -> str:
    """A value of a setting as it is written in Python."""
    if value is None:
        return "..."
    if key == "size":
        with suppress(ConfigError):
            return f"saqcli.Budget(size={parse_quantity(value, 'size')})"
    if key == "pins" and "=" in value:
        pattern, _, rule = value.rpartition("=")
        return f'{{"{pattern}": "{rule}"}}'
    return value if _PLAIN.fullmatch(value) else f'"{value}"'
