"""What a builder of networks may be told: plain JSON of moderate size, and nothing that reaches beyond the network.

timm and torchvision take much with ``**kwargs`` that no architecture has: where weights come from, a file to load,
a wrapper for features, global switches. The same rules hold for what a user types and for what a file says, so that
every network that can be quantized can be loaded again.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from saqcli.errors import ConfigError

MOST_NUMBER = 2**16  # of an integer: widths, depths, sides
MOST_VALUES = 1000
MOST_NESTED = 4

_WEIGHTS, _SWITCH = "use `model.weights`", "saq sets such switches itself, remove it"
RESERVED = {  # builder arguments that are ours to set
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
    """Refuse arguments that are no matter of the architecture ``name``.

    Raises:
        ConfigError: names the first.
    """
    for argument in RESERVED.keys() & kwargs.keys():
        raise ConfigError(f"{name} cannot take {argument} as a model argument: {RESERVED[argument]}")
    for count, (argument, value) in enumerate(_leaves(name, kwargs, ()), start=1):
        if problem := _problem(value):
            raise ConfigError(f"{name} cannot take {argument} as a model argument: {problem}")
        if count > MOST_VALUES:
            raise ConfigError(
                f"{name} cannot take more than {MOST_VALUES} model arguments: correct `model.kwargs`"
            )


def _leaves(name: str, value: Any, place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Everything that is no list and no object, and where it stands."""
    if len(place) > MOST_NESTED:
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
    """What is wrong with a single value; empty if nothing is."""
    if isinstance(value, int) and abs(value) > MOST_NUMBER:
        return f"{value if abs(value) < 10**20 else 'it'} is beyond {MOST_NUMBER}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a number"
    if isinstance(value, str) and not _TEXT.fullmatch(value):
        return "it may be text of letters, digits and . , + = - alone"
    if not (value is None or isinstance(value, bool | int | float | str)):
        return f"a {type(value).__name__} is not a plain value"
    return ""
