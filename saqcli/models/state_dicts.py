"""Choosing the weights, and reading the class names, of a checkpoint.

Training scripts save several sets of weights (raw and averaged, student and teacher) under different keys, and wrappers
prefix the name of every parameter. The set is chosen by the first rule that applies:

1. The given key: a dotted path of keys, which may end in a prefix of parameter names.
2. The keys of timm's loader: ``state_dict_ema``, then ``model_ema``.
3. Other averaged weights: a key that contains ``ema``, ``swa`` or ``averaged``.
4. Raw weights: ``state_dict``, ``model_state_dict``, ``model``, ``net``, ...
5. The file itself if it contains only tensors; otherwise the only key that contains tensors.

If a rule finds several sets, the user has to choose. A prefix is removed only if the names do not match the network
unchanged, and every name of the network is present without the prefix.
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

TIMM = ("state_dict_ema", "model_ema")  # the first keys of timm.models.load_state_dict, in this order
RAW = (
    *("state_dict", "model_state_dict", "model", "net", "model_state", "network", "module", "weights"),
    *("params", "parameters"),
)
CLASS_KEYS = {
    *("class_names", "classes", "class_to_idx", "idx_to_class", "class_list", "categories", "names"),
    *("labels", "label_names", "label2id", "id2label"),
}
_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|avg|averaged?|polyak)(?![a-z])")
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")  # word boundaries of CamelCase
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loops|^amp$", re.IGNORECASE)
_NOT_NEEDED = (".num_batches_tracked", "._extra_state")  # suffixes of names that may be missing in a file
_DEEPEST = 5  # levels of keys that are searched
_LISTED = 5  # names in a message before "and N more"
_MOST_NAME = 300  # characters of a class name
_MOST_CLASSES = 2**20

Path = tuple[str, ...]


@dataclass(frozen=True)
class StateDict:
    """The chosen set of tensors of a checkpoint.

    Attributes:
        values: tensors by their names in the file.
        key: dotted path to them; empty for the file itself.
        others: keys of the other sets in the file.
        notes: choices made for the user, one line each.
    """

    values: Mapping[Any, Any]
    key: str = ""
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def choose(content: Mapping[Any, Any], key: str | None, source: str) -> StateDict:
    """Choose the weights in ``content`` by the rules above; the tensors are not checked.

    Args:
        content: content of the file.
        key: the given key, such as ``state_dict_ema``.
        source: name of the file in errors.

    Raises:
        ConfigError: there are no tensors under ``key``, or a rule finds several sets.
    """
    sets = dict(_sets(content))
    nested = [path for path in sets if path]
    if key is not None:
        return _at_key(content, key, nested, source)
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
            f"weights {source} hold averaged weights without names under {_dotted(unnamed)!r}, and raw weights under "
            f"{_dotted(path)!r}: save the averaged state_dict(), or use `model.weights_key={_dotted(path)}` for "
            "the raw ones"
        )
    chosen = StateDict(
        sets.get(path, content), _dotted(path), tuple(_dotted(other) for other in nested if other != path)
    )
    kind = "averaged weights" if is_averaged(path) else "weights"
    if _never_updated(chosen.values):
        kind += " (never updated: n_averaged is 0)"
    if chosen.others or (path and not set(path) <= set(RAW)):
        more = (
            f"; it also holds {_listed(chosen.others)}: `model.weights_key` chooses" if chosen.others else ""
        )
        chosen = replace(chosen, notes=(f"{kind} taken from {_quoted(chosen.key)}{more}",))
    return chosen


def match_names(values: Mapping[str, Tensor], own: Collection[str], source: str) -> Iterator[StateDict]:
    """Candidates for ``values`` under the network's names, ``own``; the first one that loads is right.

    If all names of the network are present under one prefix, or without one, this is the only candidate; tensors
    outside of the prefix (counters, losses, another copy of the network) are dropped. Of several copies the averaged
    one is chosen. Otherwise, since layers may rename old parameters, the candidates are the unchanged names, then the
    names without each prefix that all of them share.

    Raises:
        ConfigError: there are several copies, and no rule selects one.
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
    """The tensors whose names start with ``prefix``, under names without it; the others are dropped."""
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
    """The first component of all names, with its dot; empty if they differ. ``n_averaged`` is ignored."""
    heads = {name.partition(".")[::2] for name in values if name != "n_averaged"}
    first = {head for head, _ in heads}
    return f"{first.pop()}." if len(first) == 1 and all(rest for _, rest in heads) else ""


def is_averaged(path: Path) -> bool:
    """Whether a key of ``path`` denotes averaged weights."""
    return any(_AVERAGED.search(_WORDS.sub("_", key).lower()) for key in path)


def class_lists(content: Any, depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Lists of class names, by index, in a checkpoint or its metadata; the outermost first."""
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
    """The metadata of a safetensors file, with JSON values parsed."""
    found: dict[str, Any] = {}
    for key, text in metadata.items():
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def _class_names(value: Any) -> tuple[str, ...]:
    """Names by index from a list, or from a mapping between names and numbers; empty for anything else."""
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
    """All mappings in ``content`` that contain tensors by name, with their paths."""
    if _is_set(content):
        yield path, content
    for key, value in content.items():
        inner = isinstance(value, Mapping) and len(path) < _DEEPEST
        if inner and isinstance(key, str) and not _NO_WEIGHTS.search(key):
            yield from _sets(value, (*path, key))


def _never_updated(content: Mapping[Any, Any]) -> bool:
    """Whether an average of torch.optim.swa_utils still equals the network's initial weights."""
    count = content.get("n_averaged")
    return isinstance(count, Tensor) and count.numel() == 1 and int(count) == 0


def _unnamed_averages(content: Mapping[Any, Any], path: Path = ()) -> Iterator[Path]:
    """Paths of lists of averaged weights without names, as saved by torch_ema and diffusers."""
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


def _at_key(content: Mapping[Any, Any], key: str, nested: list[Path], source: str) -> StateDict:
    """The tensors under the given key."""
    key = key.strip().strip(".")
    found = _under(content, key)
    if not found:
        with suppress(ConfigError):  # the key may be a prefix of names in the default set
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
    """The tensors at a dotted ``key`` of nested mappings, whose end may be a prefix of names; empty without any."""
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
    """All prefixes under which ``values`` contain every name of ``own``; may include the empty prefix."""
    needed = [name for name in own if not name.endswith(_NOT_NEEDED)]
    anchor = max(needed, key=len, default="")
    found = [name.removesuffix(anchor) for name in values if name == anchor or name.endswith(f".{anchor}")]
    return [prefix for prefix in found if anchor and all(f"{prefix}{name}" in values for name in needed)]


def _keeps_averages_in_state_dict(content: Mapping[Any, Any]) -> bool:
    """Whether MMEngine wrote the file: it swaps the two, and ``ema_state_dict`` holds the raw weights."""
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
