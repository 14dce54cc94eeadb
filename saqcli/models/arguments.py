"""Model arguments: which keyword arguments a builder may receive.

Allowed is plain JSON of moderate size that describes the architecture only. The ``**kwargs`` of timm and torchvision
also accept sources of weights, files to load, feature wrappers and global switches; these are refused. The same rules
apply to the user's arguments and to those in a file, so every network that can be quantized can be loaded again.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from saqcli.errors import ConfigError

MAX_NUMBER = 2**16  # largest absolute value of an integer: widths, depths, sides
MAX_VALUES = 1000
MAX_NESTED = 4

_WEIGHTS, _SWITCH = "use `model.weights`", "saq sets such switches itself, remove it"
RESERVED = {  # builder arguments that saq sets itself
    "num_classes": "use `model.num_classes`",
    "pretrained": "use `model.pretrained` or `model.pretrained=False`",
    "features_only": "saq needs the classifier, remove it",
    "device": "use `run.device`",
    **dict.fromkeys(("weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"), _WEIGHTS),
    **dict.fromkeys(("weights_backbone", "pretrained_strict", "pretrained_filter_fn"), _WEIGHTS),
    **dict.fromkeys(("pretrained_model_args", "cache_dir", "progress", "pruned"), _WEIGHTS),
    **dict.fromkeys(("model_cfg", "feature_cfg", "feature_cls", "out_indices", "kwargs_filter"), _SWITCH),
    **dict.fromkeys(("scriptable", "exportable", "no_jit", "dtype", "model_name", "name"), _SWITCH),
}
_WORD = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_TEXT = re.compile(r"[\w .,+=-]{0,200}", re.ASCII)  # no path, no address


def check_arguments(name: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that do not describe the architecture ``name``.

    Raises:
        ConfigError: an argument is reserved, or its value is not allowed.
    """
    for argument in RESERVED.keys() & kwargs.keys():
        raise ConfigError(f"{name} cannot take {argument} as a model argument: {RESERVED[argument]}")
    for count, (argument, value) in enumerate(_leaves(name, kwargs, ()), start=1):
        if problem := _problem(value):
            raise ConfigError(f"{name} cannot take {argument} as a model argument: {problem}")
        if count > MAX_VALUES:
            raise ConfigError(
                f"{name} cannot take more than {MAX_VALUES} model arguments: correct `model.kwargs`"
            )


def _leaves(name: str, value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every scalar in ``value``, with the name of the argument that contains it."""
    if len(place) > MAX_NESTED:
        raise ConfigError(f"{name} cannot take {place[0]} as a model argument: it is nested too deep")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str) or not _WORD.fullmatch(key):
                raise ConfigError(f"{name} cannot take {key!r} as a model argument: it is not a name")
            yield from _leaves(name, inner, (*place, key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(name, inner, (*place, "an element"))
    else:
        yield place[0] if place else "it", value


def _problem(value: Any) -> str:
    """Why a scalar is not allowed; empty if it is."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"{value if abs(value) < 10**20 else 'it'} is beyond {MAX_NUMBER}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, str) and not _TEXT.fullmatch(value):
        return "text may only contain letters, digits and . , + = -"
    if not (value is None or isinstance(value, bool | int | float | str)):
        return f"a {type(value).__name__} is not a plain value"
    return ""
