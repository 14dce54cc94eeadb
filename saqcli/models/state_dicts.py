"""Which tensors of a checkpoint are the weights of a network, and what else it says: averages, prefixes, classes.

Training scripts save several sets of weights side by side (raw and averaged, student and teacher) under keys of their
own, and wrappers put prefixes before the name of every parameter. The set is chosen by the first rule that applies:

1. The key that was given: a dotted path of keys, which may end in a prefix of names.
2. What timm's loader takes: ``state_dict_ema``, then ``model_ema``.
3. Other averaged weights: a key with ``ema``, ``swa`` or ``averaged`` in it.
4. Raw weights: ``state_dict``, ``model_state_dict``, ``model``, ``net``, ...
5. The file itself where it holds nothing but tensors; else the one key that holds tensors.

Where a rule finds several sets the user has to choose. A prefix is removed only if the names do not fit the network as
they are and every name of the network is there without it.
"""

import json
import re
from argparse import Namespace
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from saqcli.errors import ConfigError
from saqcli.serialization import printable

TIMM = ("state_dict_ema", "model_ema")  # timm.models.load_state_dict takes these first, in this order
RAW = (
    *("state_dict", "model_state_dict", "model", "net", "model_state", "network", "module", "weights"),
    *("params", "parameters"),
)
CLASS_KEYS = {
    *("class_names", "classes", "class_to_idx", "idx_to_class", "class_list", "categories", "names"),
    *("labels", "label_names", "label2id", "id2label"),
}
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|polyak)(?![a-z])")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # the seams of CamelCase
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loops|^amp$", re.IGNORECASE)
_NOT_NEEDED = (".num_batches_tracked", "._extra_state")  # endings of names that a file may lack
_DEEPEST = 5  # levels of keys that are searched
_LISTED = 5  # names that a message lists before it counts
_MOST_NAME = 300  # characters of a class name
_MOST_CLASSES = 2**20

Path = tuple[str, ...]


@dataclass(frozen=True)
class StateDict:
    """A set of tensors in a checkpoint, as chosen.

    Attributes:
        values: by name, as the file has them.
        key: dotted path to them; empty for the file itself.
        others: keys of the other sets in the file.
        notes: what was decided for the user, one line each.
    """

    values: Mapping[Any, Any]
    key: str = ""
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose(content: Mapping[Any, Any], key: str | None, source: str) -> StateDict:
    """The weights in ``content`` by the rules above; what they hold is not checked.

    Args:
        content: of the file.
        key: that was given, such as ``state_dict_ema``.
        source: what errors call the file.

    Raises:
        ConfigError: no tensors under ``key``; or several sets of which none is known to be the weights.
    """
    sets = dict(_sets(content))
    nested = [path for path in sets if path]
    if key is not None:
        return _asked(content, key, nested, source)
    averaged = [] if _keeps_averages_in_state_dict(content) else list(filter(is_averaged, nested))
    rules: tuple[list[Path], ...] = (
        [path for name in TIMM for path in nested if path[0] == name][:1],
        averaged,
        sorted((path for path in nested if set(path) <= set(RAW)), key=_rank)[:1],
        [()] if all(isinstance(value, Tensor) for value in content.values()) else [],
        nested,
    )
    found: list[Path] = next((rule for rule in rules if rule), [()])
    if len(found) > 1:
        raise ConfigError(
            f"weights {source} hold {len(found)} sets of tensors ({_listed(map(_dotted, found))}): choose one with "
            "`model.weights_key`"
        )
    (path,) = found
    if path and not is_averaged(path) and (unnamed := next(_unnamed_averages(content), None)):
        raise ConfigError(
            f"weights {source} hold averaged weights without names under {_dotted(unnamed)!r}, beside those in "
            f"{_dotted(path)!r}: save the averaged state_dict(), or use `model.weights_key={_dotted(path)}` for "
            "the others"
        )
    chosen = StateDict(
        sets.get(path, content), _dotted(path), tuple(_dotted(other) for other in nested if other != path)
    )
    kind = "averaged weights" if is_averaged(path) else "weights"
    if _never_updated(chosen.values):
        kind += " (of no update: n_averaged is 0)"
    if chosen.others or (path and not set(path) <= set(RAW)):
        more = (
            f"; it also holds {_listed(chosen.others)}: `model.weights_key` chooses" if chosen.others else ""
        )
        chosen = replace(chosen, notes=(f"{kind} taken from {_quoted(chosen.key)}{more}",))
    return chosen


def fit_names(values: Mapping[str, Tensor], own: Collection[str], source: str) -> Iterator[StateDict]:
    """``values`` under names that may be those of the network, ``own``; the first that loads is right.

    If all names of the network are there behind one prefix, or none, that is the only answer; what lies outside of the
    prefix (counters, losses, another copy of the network) is left out. Of several copies the averaged one is taken.
    Otherwise layers may rename old parameters: the names as they are, then without the prefixes that all share.

    Raises:
        ConfigError: several copies, and it is not known which to take.
    """
    copies = _prefixes(values, own)
    averaged = [prefix for prefix in copies if is_averaged(tuple(prefix.split(".")))]
    if len(averaged) == 1:
        copies = averaged
    elif "" in copies:
        copies = [""]
    if len(copies) > 1:
        names = (prefix.rstrip(".") for prefix in copies)
        raise ConfigError(
            f"weights {source} hold {len(copies)} copies of the network ({_listed(names)}): choose one with "
            "`model.weights_key`"
        )
    found = StateDict(values)
    if copies:
        yield _without_prefix(found, copies[0], source) if copies[0] else found
        return
    yield found
    while prefix := _shared_prefix(found.values):
        found = _without_prefix(found, prefix, source)
        yield found


def _without_prefix(found: StateDict, prefix: str, source: str) -> StateDict:
    """The tensors whose names start with ``prefix``, without it; the others are left out."""
    values = {
        name.removeprefix(prefix): value for name, value in found.values.items() if name.startswith(prefix)
    }
    others = [name for name in found.values if not name.startswith(prefix)]
    note = f"{source}: prefix {printable(prefix, 60)!r} removed from the names of its tensors"
    if others:
        averages = any(is_averaged(tuple(name.split("."))) for name in others)
        note += f"; {len(others)} others ignored ({_listed(others)})"
        note += ", averaged weights among them" if averages else ""
    return StateDict(values, notes=(*found.notes, note))


def _shared_prefix(values: Mapping[str, Tensor]) -> str:
    """The first component of every name, with its dot; empty where they differ. Counters of averages do not count."""
    heads = {name.partition(".")[::2] for name in values if name != "n_averaged"}
    first = {head for head, _ in heads}
    return f"{first.pop()}." if len(first) == 1 and all(rest for _, rest in heads) else ""


def is_averaged(path: Path) -> bool:
    """Whether a key of ``path`` says that what is under it is an average of weights."""
    return any(_AVERAGED.search(_WORDS.sub("_", key).lower()) for key in path)


def class_lists(content: Any, depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Lists of class names, by index, that a checkpoint or its metadata carries; the outermost first."""
    entries = vars(content) if isinstance(content, Namespace) else content
    if not isinstance(entries, Mapping):
        return
    for key, value in entries.items():
        if isinstance(key, str) and key.lower() in CLASS_KEYS and (names := _class_names(value)):
            yield names
    for key, value in entries.items():
        if depth and isinstance(key, str) and not _NO_WEIGHTS.search(key):
            yield from class_lists(value, depth - 1)


def from_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a safetensors file with its JSON read, where it is JSON."""
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def _class_names(value: Any) -> tuple[str, ...]:
    """``value`` as names by index: a list of them, or a mapping from or to numbers; empty if it is neither."""
    names: Any = value
    if isinstance(value, Mapping):
        if all(isinstance(number, int) for number in value.values()):  # class_to_idx
            value = {number: name for name, number in value.items()}
        numbered = {int(key): name for key, name in value.items() if str(key).isdecimal()}
        names = [numbered.get(index) for index in range(len(value))]
    if not isinstance(names, list | tuple) or len(names) > _MOST_CLASSES:
        return ()
    fit = all(isinstance(name, str) and len(name) <= _MOST_NAME for name in names)
    return tuple(names) if fit else ()


def _sets(content: Mapping[Any, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[Any, Any]]]:
    """Everything in ``content`` that holds tensors by name, by its path."""
    if _is_set(content):
        yield path, content
    for key, value in content.items():
        inner = isinstance(value, Mapping) and len(path) < _DEEPEST
        if inner and isinstance(key, str) and not _NO_WEIGHTS.search(key):
            yield from _sets(value, (*path, key))


def _never_updated(content: Mapping[Any, Any]) -> bool:
    """Whether an average, as torch.optim.swa_utils keeps it, is still what the network started from."""
    count = content.get("n_averaged")
    return isinstance(count, Tensor) and count.numel() == 1 and int(count) == 0


def _unnamed_averages(content: Mapping[Any, Any], path: Path = ()) -> Iterator[Path]:
    """Lists of averaged weights without names, as torch_ema and diffusers save them."""
    for key, value in content.items():
        if not isinstance(key, str) or _NO_WEIGHTS.search(key):
            continue
        inner = (*path, key)
        listed = isinstance(value, list | tuple) and bool(value)
        if listed and is_averaged(inner) and all(isinstance(each, Tensor) for each in value):
            yield inner
        elif isinstance(value, Mapping) and len(path) < _DEEPEST:
            yield from _unnamed_averages(value, inner)


def _is_set(content: Mapping[Any, Any]) -> bool:
    return any(
        isinstance(key, str) and isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
        for key, value in content.items()
    )


def _asked(content: Mapping[Any, Any], key: str, nested: list[Path], source: str) -> StateDict:
    """What the given key names."""
    key = key.strip().strip(".")
    found = _under(content, key)
    if not found:
        with suppress(ConfigError):  # the prefix of names in the set that is taken by default
            found = _under(choose(content, None, source).values, key)
    if not found:
        known = (
            f"choose from {_listed(map(_dotted, nested))}" if nested else "remove it, the file holds one set"
        )
        raise ConfigError(
            f"weights {source} hold no tensors under `model.weights_key={_quoted(key)}`: {known}"
        )
    return StateDict(found, key, tuple(_dotted(path) for path in nested if _dotted(path) != key))


def _under(values: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    """The tensors that a dotted ``key`` leads to, through mappings and then prefixes of names; none if it does not."""
    while key:
        names = [
            name for name, value in values.items() if isinstance(name, str) and isinstance(value, Mapping)
        ]
        inner = max((name for name in names if f"{key}.".startswith(f"{name}.")), key=len, default=None)
        if inner is None:
            named = {name: value for name, value in values.items() if isinstance(name, str)}
            values = {
                name[len(key) + 1 :]: value for name, value in named.items() if name.startswith(f"{key}.")
            }
            break
        values, key = values[inner], key[len(inner) + 1 :]
    found = [inner for _, inner in _sets(values)]
    return found[0] if len(found) == 1 else values if _is_set(values) else {}


def _prefixes(values: Mapping[str, Tensor], own: Collection[str]) -> list[str]:
    """Every prefix under which ``values`` have all names of ``own``; the empty one if they fit as they are."""
    needed = [name for name in own if not name.endswith(_NOT_NEEDED)]
    anchor = max(needed, key=len, default="")
    found = [name.removesuffix(anchor) for name in values if name == anchor or name.endswith(f".{anchor}")]
    return [prefix for prefix in found if anchor and all(f"{prefix}{name}" in values for name in needed)]


def _keeps_averages_in_state_dict(content: Mapping[Any, Any]) -> bool:
    """Whether MMEngine wrote it, which swaps the two: ``ema_state_dict`` holds the raw weights."""
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _rank(path: Path) -> list[int]:
    return [RAW.index(key) for key in path]


def _dotted(path: Path) -> str:
    return ".".join(path)


def _quoted(key: str) -> str:
    return repr(printable(key, 100))


def _listed(names: Iterable[str]) -> str:
    quoted = [_quoted(name) for name in names]
    more = len(quoted) - _LISTED
    return ", ".join(quoted[:_LISTED]) + (f" and {more} more" if more > 0 else "")
