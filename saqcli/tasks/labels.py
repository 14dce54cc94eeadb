"""Which class of a network a folder of images stands for.

Labels are where an evaluation goes wrong in silence: ten folders numbered in another order than in training give an
accuracy of chance and no error. timm and torchvision number folders differently: timm numbers as numbers and without
regard to capitals (``class_2`` before ``class_10``), torchvision as text. What decides here, the first that is there:

``data.class_order``  ``timm``, ``torchvision``, or a file
the run               that a quantized model comes from: its folders keep their labels
the checkpoint        where it brings a list of its classes
a file                beside the folders, such as ``class_to_idx.json``
ImageNet              where all folders are its synsets, or words that stand for one class each
the library           timm's order, or torchvision's for networks of torchvision

``data.class_map`` says beforehand which class a folder is. Whatever was decided for the user is noted.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Literal

from saqcli.errors import ConfigError, DataError
from saqcli.serialization import named_path, natural_key, printable, some
from saqcli.tasks.class_lists import misfit, read_class_list, read_class_map
from saqcli.units import counted

Order = Literal["timm", "torchvision"]
ORDERS: tuple[Order, ...] = ("timm", "torchvision")

_SYNSET = re.compile(r"n\d{8}", re.IGNORECASE)


@dataclass(frozen=True)
class Classes:
    """What is known of a network's classes before any folder is looked at.

    Attributes:
        count: how many there are.
        library: whose order folders have where nothing else decides.
        names: of all classes, by index; empty where unknown.
        folders: labels that folders had in training.
        order: how these were numbered; empty where unknown.
        trained: what messages call the quantized model that ``names`` and ``folders`` are of; empty for a float one.
    """

    count: int
    library: Order = "timm"
    names: tuple[str, ...] = ()
    folders: Mapping[str, int] = field(default_factory=dict)
    order: str = ""
    trained: str = ""

    @classmethod
    def of(cls, network: str, count: int, names: Sequence[str] = ()) -> "Classes":
        """Of the float network with that canonical name; ``names`` came with its weights."""
        return cls(count, library_order(network), tuple(names) if len(names) == count else ())


@dataclass(frozen=True)
class Numbering:
    """The label of each folder.

    Attributes:
        labels: of the folders.
        names: of all classes of the network, by index; empty where unknown.
        order: what decided: ``timm``, ``torchvision``, ``imagenet``, ``checkpoint``, ``data set``, ``class map``, or a
            file's name.
        notes: what was decided for the user, one line each.
    """

    labels: dict[str, int]
    names: tuple[str, ...]
    order: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _List:
    """Names of classes and their indices, from somewhere.

    Attributes:
        title: what messages call it.
        order: see ``Numbering``.
        index: name to index.
        names: of all classes by index, if these are all.
    """

    title: str
    order: str
    index: Mapping[str, int]
    names: tuple[str, ...] = ()

    @cached_property
    def _meanings(self) -> dict[str, set[int]]:
        """Indices by name, without regard to capitals, blanks and underscores; of a synset also by its words."""
        found: dict[str, set[int]] = {}
        for name, index in [*self.index.items(), *((name, place) for place, name in enumerate(self.names))]:
            for word in {name, *name.split(","), *_words(name)}:
                found.setdefault(_plain(word), set()).add(index)
        return found

    def meanings(self, name: str) -> set[int]:
        """The indices that ``name`` can stand for."""
        if name in self.index:
            return {self.index[name]} | {place for place, known in enumerate(self.names) if known == name}
        words = [name]
        if _SYNSET.fullmatch(name) and not any(_SYNSET.fullmatch(known) for known in self.index):
            words += [_descriptions().get(name, name), *_words(name)]  # a list of ImageNet's words
        return next((meant for word in words if (meant := self._meanings.get(_plain(word)))), set())

    def place(self, target: str | int) -> int | None:
        """The index of a class; None where it has none, or more than one."""
        if isinstance(target, int):
            return target
        found = self.meanings(target)
        return next(iter(found)) if len(found) == 1 else None


def library_order(network: str) -> Order:
    """The order in which the library of a network numbers class folders, by the network's canonical name."""
    return "torchvision" if network.startswith("torchvision/") else "timm"


def sort_classes(names: Iterable[str], order: Order) -> list[str]:
    """Class names in the order of their labels.

    Example:
        >>> sort_classes(["b10", "b9", "A"], "timm"), sort_classes(["b10", "b9", "A"], "torchvision")
        (['A', 'b9', 'b10'], ['A', 'b10', 'b9'])
    """
    return sorted(names, key=natural_key) if order == "timm" else sorted(names)


def number_classes(
    folders: Sequence[str],
    classes: Classes,
    where: str,
    *,
    order: str | None = None,
    class_map: str | None = None,
    beside: Sequence[Path] = (),
    in_order: bool = False,
) -> Numbering:
    """The label of each of ``folders``.

    Args:
        folders: names of class folders, or of the classes of a data set.
        classes: of the network.
        where: what messages call the folders.
        order: ``timm``, ``torchvision`` or a file, where the user says so.
        class_map: a file, where the user gives one.
        beside: class lists that lie beside the folders, the nearest first.
        in_order: ``folders`` are in the order of their labels where nothing else decides.

    Raises:
        ConfigError: a file that cannot be read.
        DataError: folders that are no classes of the network.
    """
    mapped = read_class_map(named_path(class_map), folders) if class_map else {}
    targets: dict[str, str | int] = {name: mapped.get(name, name) for name in folders}
    if wrong := [
        name for name, label in targets.items() if isinstance(label, int) and label >= classes.count
    ]:
        raise DataError(
            f"{class_map}: {printable(wrong[0])} is class {targets[wrong[0]]}, the model has classes 0 to "
            f"{classes.count - 1}"
        )
    notes: list[str] = []
    asked: Order | None = next((known for known in ORDERS if known == order), None)
    lists = _known_lists(classes, beside, folders, notes, noted=order is None)
    imagenet = _imagenet(classes.count)
    chosen: _List | None = None
    if order is not None and asked is None:
        chosen = _asked_list(order, folders, targets, classes.count)
    elif asked is None and _only_synsets(targets.values(), imagenet, lists, classes):
        chosen = imagenet  # a list of words cannot number synsets as surely as ImageNet itself
    elif asked is None:
        chosen = _first_that_fits(lists, targets, classes, where, notes)
    if (
        chosen is None
        and imagenet is not None
        and (asked is None or _are_synsets(targets.values(), imagenet))
    ):
        chosen = imagenet if all(imagenet.place(target) is not None for target in targets.values()) else None
    if chosen is None and targets and all(isinstance(target, int) for target in targets.values()):
        chosen = _List("`data.class_map`", "class map", {})
    if chosen is None:
        chosen = _sorted(targets, mapped, classes, where, asked, in_order, imagenet)
    labels = {name: place for name, target in targets.items() if (place := chosen.place(target)) is not None}
    _refuse_same(labels, {*mapped, *classes.folders}, chosen, where)
    if chosen is imagenet:
        words = [name for name in labels if name not in mapped and not _are_synsets([name], imagenet)]
        if words:
            read = [f"{name} is {chosen.names[labels[name]]}" for name in words]
            notes.append(
                f"class folders are read as names of ImageNet's classes ({some(read, 3)}): use `data.class_map=FILE` "
                "where that is wrong"
            )
    else:
        listed = any(chosen is one for one in lists)
        notes += _order_notes(targets, chosen, order is not None, listed, classes.library)
        absent = sorted(set(range(len(chosen.names))) - set(labels.values()))
        if absent and not all(_SYNSET.fullmatch(name) for name in chosen.names):
            notes.append(
                f"{counted(len(absent), 'class')} of the model's {classes.count} have no folder: "
                f"{some([chosen.names[index] for index in absent])}"
            )
    notes += _contradictions(labels, targets, chosen, lists)
    return Numbering(labels, chosen.names, chosen.order, tuple(notes))


def _only_synsets(
    targets: Iterable[str | int], imagenet: _List | None, lists: Sequence[_List], classes: Classes
) -> bool:
    """Whether the folders are synsets of the network's ImageNet set, and no list says which class a synset is."""
    if classes.trained or imagenet is None or not _are_synsets(targets, imagenet):
        return False
    return not any(_SYNSET.fullmatch(name) for one in lists for name in one.index)


def check_files(order: str | None, class_map: str | None) -> None:
    """Refuse a class order that is neither an order nor a file, and a class map that is not a file.

    Raises:
        ConfigError: one is not.
    """
    if class_map is not None and not named_path(class_map).is_file():
        raise ConfigError(
            f"`data.class_map={printable(class_map, 200)}` is not a file: give one with lines `FOLDER CLASS`"
        )
    if order is not None and order not in ORDERS and not named_path(order).is_file():
        raise ConfigError(
            f"`data.class_order={printable(order, 200)}` is neither an order nor a file: give timm, torchvision or "
            "a file of class names"
        )


def _known_lists(
    classes: Classes, beside: Sequence[Path], folders: Sequence[str], notes: list[str], *, noted: bool
) -> list[_List]:
    """The class lists of the run or the checkpoint, and of the files beside the folders."""
    lists = []
    if classes.names or classes.folders:
        index = {name: place for place, name in enumerate(classes.names)} | dict(classes.folders)
        title = classes.trained or "the checkpoint"
        order = (classes.order or "model") if classes.trained else "checkpoint"
        lists.append(_List(title, order, index, classes.names))
    for path in beside:
        try:
            index = read_class_list(path, folders)
            reason = misfit(index, classes.count)
        except ConfigError as error:
            if path.name.startswith("class_to_idx"):
                raise
            reason = str(error).removeprefix(f"{path}: ").partition(": give")[0]
        if not reason:
            lists.append(_List(str(path), path.name, index, _by_index(index)))
        elif noted:
            notes.append(f"{path} is not used: {reason}")
    return lists


def _asked_list(order: str, folders: Sequence[str], targets: Mapping[str, str | int], count: int) -> _List:
    """The list in the file that the user named, which must fit."""
    path = named_path(order)
    index = read_class_list(path, folders)
    reason = misfit(index, count)
    partial = set(index.values()) != set(
        range(len(index))
    )  # an object that says which of more classes these are
    if reason and not (partial and max(index.values()) < count):
        raise DataError(f"`data.class_order={path}` does not fit: {reason}")
    found = _List(str(path), path.name, index, () if reason else _by_index(index))
    if missing := [name for name, target in targets.items() if found.place(target) is None]:
        raise DataError(
            f"`data.class_order={path}` does not name {counted(len(missing), 'class folder')} ({some(missing)}): "
            f"it has {some(list(index))}; add or correct the names, or use `data.class_map=FILE`"
        )
    return found


def _first_that_fits(
    lists: Sequence[_List],
    targets: Mapping[str, str | int],
    classes: Classes,
    where: str,
    notes: list[str],
) -> _List | None:
    """The first list that names all folders; one that names some of them is an error."""
    named = sum(isinstance(target, str) for target in targets.values())
    for one in lists:
        missing = [str(target) for target in targets.values() if one.place(target) is None]
        if not missing:
            return one
        if one.title == classes.trained and (one.names or len(missing) < named):
            raise DataError(
                f"{where} has the classes {some(missing, 3)}, {one.title} was trained on "
                f"{some(one.names or list(one.index), 3)}: give images of the same classes, or use "
                "`data.class_map=FILE`"
            )
        if len(missing) < named:
            fits = len(targets) == classes.count
            without = f", or `data.class_order={classes.library}` to number them without it" if fits else ""
            raise DataError(
                f"{one.title} does not name {counted(len(missing), 'class folder')} of {where} ({some(missing)}): it "
                f"has {some(list(one.index))}; rename the folders, or use `data.class_map=FILE`{without}"
            )
        notes.append(
            f"{one.title} lists other classes ({some(list(one.index), 3)}) than these folders: not used"
        )
    return None


def _sorted(
    targets: Mapping[str, str | int],
    mapped: Mapping[str, str | int],
    classes: Classes,
    where: str,
    asked: Order | None,
    in_order: bool,
    imagenet: _List | None,
) -> _List:
    """The folders themselves in an order, which must be as many as the network has classes."""
    alone = [name for name in targets if name not in mapped] if mapped else []
    strangers = [name for name in mapped if name not in targets]
    if alone and strangers:
        raise DataError(
            f"`data.class_map` has no line for {counted(len(alone), 'class folder')} of {where} ({some(alone)}), and "
            f"{some(strangers)} is not a folder there: correct the names"
        )
    wanted = list(targets.values()) + ([] if alone else list(mapped.values()))
    numbers = [target for target in wanted if isinstance(target, int)]
    names = list(dict.fromkeys(str(target) for target in wanted))
    if numbers and len(numbers) < len(wanted):
        raise DataError(
            f"`data.class_map` gives {some(list(map(str, numbers)), 3)} by index and others by name "
            f"({some([str(t) for t in wanted if isinstance(t, str)], 3)}), and the names of the model's classes are "
            "not known: give the index of all, or `data.class_order=FILE`"
        )
    if len(names) != classes.count:
        raise DataError(_other_count(names, classes, where, asked, imagenet))
    order = asked or classes.library
    if not (in_order and asked is None):
        names = sort_classes(names, order)
    called = "data set" if in_order and asked is None else order
    return _List(
        "the data set" if called == "data set" else f"{called}'s order",
        called,
        {name: index for index, name in enumerate(names)},
        tuple(names),
    )


def _other_count(
    names: Sequence[str], classes: Classes, where: str, asked: Order | None, imagenet: _List | None
) -> str:
    """What was seen where there are not as many folders as classes, and what to do."""
    known = f" ({some(classes.names, 3)})" if classes.names and not imagenet else ""
    seen = f"{where} has {counted(len(names), 'class')} ({some(names)}), the model {classes.count}{known}"
    new_head = f"`model.num_classes={len(names)}` `model.new_head=True`"
    head = f"{new_head} on quantize or search (a new head, to be fine-tuned)"
    if imagenet is None:
        mapped = "`data.class_map=FILE` with a line `FOLDER CLASS` each"
        return f"{seen}: give {head}, {mapped}, or data whose folders are the model's classes"
    mapped = "`data.class_map=FILE` with a line `FOLDER SYNSET` each"
    if asked is not None:
        return (
            f"{seen}: remove `data.class_order={asked}`, which needs a folder for every class, or give {head}"
        )
    unknown = [name for name in names if imagenet.place(name) is None]
    several = next((name for name in unknown if len(imagenet.meanings(name)) > 1), None)
    if several is not None:
        meant = [imagenet.names[index] for index in sorted(imagenet.meanings(several))]
        return (
            f"{seen}: {several} can be {' or '.join(meant)} of ImageNet; rename the folder to the synset that is "
            f"meant, or give {mapped}"
        )
    if len(unknown) < len(names):
        return (
            f"{seen}: rename or remove what is neither an ImageNet synset ({some(unknown)}) nor the name of one, "
            f"or give {mapped}"
        )
    return (
        f"{seen}: none of these is an ImageNet synset (n01440764) or the name of one; give {mapped}, {head}, or data "
        "whose folders are ImageNet synsets"
    )


def _refuse_same(labels: Mapping[str, int], joined: Collection[str], chosen: _List, where: str) -> None:
    """Two folders of one class are refused, unless a class map, or the run, says so of both."""
    seen: dict[int, str] = {}
    for name, label in labels.items():
        other = seen.setdefault(label, name)
        if other != name and not (name in joined and other in joined):
            raise DataError(
                f"{where} has two folders of one class: {printable(other)} and {printable(name)} are both class "
                f"{label} of {chosen.title}: join them, or say so with `data.class_map=FILE`"
            )


def _order_notes(
    targets: Mapping[str, str | int], chosen: _List, given: bool, listed: bool, library: Order
) -> Iterator[str]:
    """Whose order the folders have, where timm's and torchvision's differ or a list has another."""
    names = list(dict.fromkeys(target for target in targets.values() if isinstance(target, str)))
    orders = {known: sort_classes(names, known) for known in ORDERS}
    timm, text = orders["timm"], orders["torchvision"]
    if chosen.order in ORDERS and not listed:
        other: Order = "torchvision" if chosen.order == "timm" else "timm"
        if timm != text:
            mine, theirs = orders[chosen.order], orders[other]
            yield (
                f"class folders are numbered in {chosen.order}'s order ({_around(mine, theirs)}), {other}'s order is "
                f"{_around(theirs, mine)}: use `data.class_order={other}` for weights that were trained in it"
            )
        same = next(
            (pair for pair in pairwise(timm) if natural_key(pair[0])[0] == natural_key(pair[1])[0]), None
        )
        if chosen.order == "timm" and same:
            yield f"timm does not tell {same[0]} from {same[1]} and numbers them by chance: here {same[0]} comes first"
    elif not given:
        used = sorted(names, key=lambda name: chosen.place(name) or 0)
        if chosen.order == "data set" and used != text:
            return  # an order of its own, that everybody uses with these images
        way = f", in {chosen.order}'s order" if chosen.order in ORDERS else ""
        if timm != text:
            others = f"timm's order would be {_around(timm, used)}, torchvision's {_around(text, used)}"
        elif used != orders[library]:
            others = f"timm's and torchvision's order would be {_around(timm, used)}"
        else:
            return
        yield (
            f"classes are numbered as in {chosen.title}{way} ({_around(used, orders[library])}); {others}: "
            "`data.class_order` chooses another"
        )


def _contradictions(
    labels: Mapping[str, int], targets: Mapping[str, str | int], chosen: _List, lists: Sequence[_List]
) -> Iterator[str]:
    """The lists that name all folders and number them otherwise."""
    for one in lists:
        places = {name: one.place(target) for name, target in targets.items()}
        wrong = [name for name, place in places.items() if place != labels[name]]
        if one is not chosen and wrong and None not in places.values():
            yield (
                f"{one.title} numbers these classes differently: {printable(wrong[0])} is {places[wrong[0]]} "
                f"there, and {labels[wrong[0]]} by {chosen.title}, which decides"
            )


def _around(names: Sequence[str], other: Sequence[str]) -> str:
    """Where two orders begin to differ: the first names of one, from the one before that."""
    place = next((at for at, (one, two) in enumerate(zip(names, other, strict=False)) if one != two), 0)
    start = max(0, place - 1)
    shown = [printable(name) for name in names[start : start + 3]]
    return f"{'... ' if start else ''}{', '.join(shown)}{', ...' if start + 3 < len(names) else ''}"


@cache
def _imagenet(count: int) -> _List | None:
    """The ImageNet set of that many classes, if there is one."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    synsets = tuple(ImageNetInfo(subset).label_names())
    return _List("ImageNet", "imagenet", {synset: index for index, synset in enumerate(synsets)}, synsets)


@cache
def _descriptions() -> dict[str, str]:
    """The words of every synset that any of timm's ImageNet sets has."""
    from timm.data import ImageNetInfo

    found: dict[str, str] = {}
    for subset in ("imagenet-21k-goog", "imagenet-1k"):  # one synset of the second is not in the first
        found |= dict(ImageNetInfo(subset).label_descriptions(as_dict=True))
    return found


def _words(name: str) -> list[str]:
    """The words that stand for a synset; none for any other name."""
    return _descriptions().get(name, "").split(",") if _SYNSET.fullmatch(name) else []


def imagenet_names(count: int) -> tuple[str, ...]:
    """The synsets of the ImageNet set of that many classes, by index; empty if there is none."""
    found = _imagenet(count)
    return found.names if found else ()


def _are_synsets(targets: Iterable[str | int], imagenet: _List) -> bool:
    return all(isinstance(target, int) or target.lower() in imagenet.index for target in targets)


def _by_index(index: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(index, key=index.__getitem__))


def _plain(name: str) -> str:
    """Without regard to capitals, and to what stands between words."""
    return " ".join(re.split(r"[\s_\-]+", name.casefold())).strip()
