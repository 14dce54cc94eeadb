"""Labels: assigning class folders to the classes of a network.

Wrong labels are a silent error: ten folders in another order than in training give chance accuracy without any error.
Since timm and torchvision number folders differently (see ``class_names``), the first source that exists decides:

``data.class_order``  ``timm``, ``torchvision``, or a file
the run               of a quantized model: folders keep their labels
the checkpoint        if it contains a list of its classes
a file                next to the folders, such as ``class_to_idx.json``
ImageNet              if all folders are its synsets, or words that denote one class each
the library           timm's order, or torchvision's for networks of torchvision

``data.class_map`` assigns folders to classes before that. Choices made for the user are noted.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from saqcli.errors import ConfigError, DataError
from saqcli.serialization import named_path, natural_key, printable, some
from saqcli.tasks.class_lists import mismatch, read_class_list, read_class_map
from saqcli.tasks.class_names import (
    ORDERS,
    SYNSET,
    ClassList,
    Order,
    are_synsets,
    imagenet_list,
    library_order,
    names_by_index,
    sort_classes,
)
from saqcli.units import counted


@dataclass(frozen=True)
class Classes:
    """What is known about a network's classes without its data.

    Attributes:
        count: number of classes.
        library: library whose order is the default.
        names: names of all classes, by index; empty if unknown.
        folders: labels of folders in training.
        order: source of these labels, see ``Numbering``; empty if unknown.
        trained: name in messages of the quantized model with these ``names`` and ``folders``; empty for a float model.
    """

    count: int
    library: Order = "timm"
    names: tuple[str, ...] = ()
    folders: Mapping[str, int] = field(default_factory=dict)
    order: str = ""
    trained: str = ""

    @classmethod
    def of(cls, network: str, count: int, names: Sequence[str] = ()) -> "Classes":
        """The classes of the float network with that canonical name; ``names`` are those of its weights."""
        return cls(count, library_order(network), tuple(names) if len(names) == count else ())


@dataclass(frozen=True)
class Numbering:
    """The labels of class folders.

    Attributes:
        labels: label of each folder.
        names: names of all classes of the network, by index; empty if unknown.
        order: source of the labels: ``timm``, ``torchvision``, ``imagenet``, ``checkpoint``, ``data set``,
            ``class map``, or the name of a file.
        notes: choices made for the user, one line each.
    """

    labels: dict[str, int]
    names: tuple[str, ...]
    order: str
    notes: tuple[str, ...] = ()


def assign_labels(
    folders: Sequence[str],
    classes: Classes,
    where: str,
    *,
    order: str | None = None,
    class_map: str | None = None,
    list_files: Sequence[Path] = (),
    in_order: bool = False,
) -> Numbering:
    """Assign a label to each of ``folders``.

    Args:
        folders: names of class folders, or of the classes of a data set.
        classes: classes of the network.
        where: name of the data in messages.
        order: ``timm``, ``torchvision`` or a file, if the user sets one.
        class_map: a file, if the user sets one.
        list_files: class lists found next to the folders, the nearest first.
        in_order: the order of ``folders`` is the default order.

    Raises:
        ConfigError: a file cannot be read.
        DataError: the folders do not match the classes of the network.
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
    named_order: Order | None = next((known for known in ORDERS if known == order), None)
    lists = _known_lists(classes, list_files, folders, notes, noted=order is None)
    imagenet = imagenet_list(classes.count)
    chosen: ClassList | None = None
    if order is not None and named_order is None:
        chosen = _list_of_user(order, folders, targets, classes.count)
    elif named_order is None and _only_synsets(targets.values(), imagenet, lists, classes):
        chosen = imagenet  # more reliable for synsets than a list of words
    elif named_order is None:
        chosen = _first_that_fits(lists, targets, classes, where, notes)
    if (
        chosen is None
        and imagenet is not None
        and (named_order is None or are_synsets(targets.values(), imagenet))
    ):
        chosen = (
            imagenet if all(imagenet.index_of(target) is not None for target in targets.values()) else None
        )
    if chosen is None and targets and all(isinstance(target, int) for target in targets.values()):
        chosen = ClassList("`data.class_map`", "class map", {})
    if chosen is None:
        chosen = _sorted_list(targets, mapped, classes, where, named_order, in_order, imagenet)
    labels = {
        name: place for name, target in targets.items() if (place := chosen.index_of(target)) is not None
    }
    _check_distinct(labels, {*mapped, *classes.folders}, chosen, where)
    if chosen is imagenet:
        words = [name for name in labels if name not in mapped and not are_synsets([name], imagenet)]
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
        if absent and not all(SYNSET.fullmatch(name) for name in chosen.names):
            notes.append(
                f"{counted(len(absent), 'class')} of the model's {classes.count} have no folder: "
                f"{some([chosen.names[index] for index in absent])}"
            )
    notes += _contradictions(labels, targets, chosen, lists)
    return Numbering(labels, chosen.names, chosen.order, tuple(notes))


def _only_synsets(
    targets: Iterable[str | int], imagenet: ClassList | None, lists: Sequence[ClassList], classes: Classes
) -> bool:
    """Whether the folders are synsets of the network's ImageNet subset, and no list contains synsets."""
    if classes.trained or imagenet is None or not are_synsets(targets, imagenet):
        return False
    return not any(SYNSET.fullmatch(name) for one in lists for name in one.index)


def check_files(order: str | None, class_map: str | None) -> None:
    """Check that the class order is an order or a file, and that the class map is a file.

    Raises:
        ConfigError: one of them is not.
    """
    if class_map is not None and not named_path(class_map).is_file():
        raise ConfigError(
            f"`data.class_map={printable(class_map, 200)}` is not a file: give a file with lines `FOLDER CLASS`"
        )
    if order is not None and order not in ORDERS and not named_path(order).is_file():
        raise ConfigError(
            f"`data.class_order={printable(order, 200)}` is neither an order nor a file: give timm, torchvision or "
            "a file of class names"
        )


def _known_lists(
    classes: Classes, list_files: Sequence[Path], folders: Sequence[str], notes: list[str], *, noted: bool
) -> list[ClassList]:
    """The class lists of the run or the checkpoint, and of the files next to the folders."""
    lists = []
    if classes.names or classes.folders:
        index = {name: place for place, name in enumerate(classes.names)} | dict(classes.folders)
        title = classes.trained or "the checkpoint"
        order = (classes.order or "model") if classes.trained else "checkpoint"
        lists.append(ClassList(title, order, index, classes.names))
    for path in list_files:
        try:
            index = read_class_list(path, folders)
            reason = mismatch(index, classes.count)
        except ConfigError as error:
            if path.name.startswith("class_to_idx"):
                raise
            reason = str(error).removeprefix(f"{path}: ").partition(": give")[0]
        if not reason:
            lists.append(ClassList(str(path), path.name, index, names_by_index(index)))
        elif noted:
            notes.append(f"{path} is not used: {reason}")
    return lists


def _list_of_user(
    order: str, folders: Sequence[str], targets: Mapping[str, str | int], count: int
) -> ClassList:
    """The class list in the user's file, which must match the folders and the network."""
    path = named_path(order)
    index = read_class_list(path, folders)
    reason = mismatch(index, count)
    partial = set(index.values()) != set(
        range(len(index))
    )  # an object that says which of more classes these are
    if reason and not (partial and max(index.values()) < count):
        raise DataError(f"`data.class_order={path}` does not fit: {reason}")
    found = ClassList(str(path), path.name, index, () if reason else names_by_index(index))
    if missing := [name for name, target in targets.items() if found.index_of(target) is None]:
        raise DataError(
            f"`data.class_order={path}` does not name {counted(len(missing), 'class folder')} ({some(missing)}): "
            f"it has {some(list(index))}; add or correct the names, or use `data.class_map=FILE`"
        )
    return found


def _first_that_fits(
    lists: Sequence[ClassList],
    targets: Mapping[str, str | int],
    classes: Classes,
    where: str,
    notes: list[str],
) -> ClassList | None:
    """The first list with all folders; a list with only some of them is an error."""
    named = sum(isinstance(target, str) for target in targets.values())
    for one in lists:
        missing = [str(target) for target in targets.values() if one.index_of(target) is None]
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


def _sorted_list(
    targets: Mapping[str, str | int],
    mapped: Mapping[str, str | int],
    classes: Classes,
    where: str,
    named_order: Order | None,
    in_order: bool,
    imagenet: ClassList | None,
) -> ClassList:
    """A list of the sorted folders themselves, whose number must be the network's number of classes."""
    alone = [name for name in targets if name not in mapped] if mapped else []
    strangers = [name for name in mapped if name not in targets]
    if alone and strangers:
        raise DataError(
            f"`data.class_map` has no line for {counted(len(alone), 'class folder')} of {where} ({some(alone)}), but "
            f"names {some(strangers)}, which is not a folder there: correct the names"
        )
    wanted = list(targets.values()) + ([] if alone else list(mapped.values()))
    numbers = [target for target in wanted if isinstance(target, int)]
    names = list(dict.fromkeys(str(target) for target in wanted))
    if numbers and len(numbers) < len(wanted):
        raise DataError(
            f"`data.class_map` gives some classes by index ({some(list(map(str, numbers)), 3)}) and others by name "
            f"({some([str(t) for t in wanted if isinstance(t, str)], 3)}), but the names of the model's classes are "
            "unknown: give all by index, or use `data.class_order=FILE`"
        )
    if len(names) != classes.count:
        raise DataError(_explain_count(names, classes, where, named_order, imagenet))
    order = named_order or classes.library
    if not (in_order and named_order is None):
        names = sort_classes(names, order)
    called = "data set" if in_order and named_order is None else order
    return ClassList(
        "the data set" if called == "data set" else f"{called}'s order",
        called,
        {name: index for index, name in enumerate(names)},
        tuple(names),
    )


def _explain_count(
    names: Sequence[str], classes: Classes, where: str, named_order: Order | None, imagenet: ClassList | None
) -> str:
    """The message for a number of folders that is not the number of classes."""
    known = f" ({some(classes.names, 3)})" if classes.names and not imagenet else ""
    seen = f"{where} has {counted(len(names), 'class')} ({some(names)}), the model {classes.count}{known}"
    new_head = f"`model.num_classes={len(names)}` `model.new_head=True`"
    head = f"{new_head} on quantize or search (a new head, to be fine-tuned)"
    if imagenet is None:
        mapped = "`data.class_map=FILE` with lines `FOLDER CLASS`"
        return f"{seen}: give {head}, {mapped}, or data whose folders are the model's classes"
    mapped = "`data.class_map=FILE` with lines `FOLDER SYNSET`"
    if named_order is not None:
        return f"{seen}: remove `data.class_order={named_order}`, which needs a folder for every class, or give {head}"
    unknown = [name for name in names if imagenet.index_of(name) is None]
    several = next((name for name in unknown if len(imagenet.meanings(name)) > 1), None)
    if several is not None:
        meant = [imagenet.names[index] for index in sorted(imagenet.meanings(several))]
        return (
            f"{seen}: {several} can be {' or '.join(meant)} of ImageNet; rename the folder to one of these synsets, "
            f"or give {mapped}"
        )
    if len(unknown) < len(names):
        return (
            f"{seen}: rename or remove folders that are neither an ImageNet synset nor its name ({some(unknown)}), "
            f"or give {mapped}"
        )
    return (
        f"{seen}: none of these is an ImageNet synset (such as n01440764) or its name; give {mapped}, {head}, or "
        "data whose folders are ImageNet synsets"
    )


def _check_distinct(
    labels: Mapping[str, int], joined: Collection[str], chosen: ClassList, where: str
) -> None:
    """Refuse two folders of the same class, unless a class map or the run assigns both."""
    seen: dict[int, str] = {}
    for name, label in labels.items():
        other = seen.setdefault(label, name)
        if other != name and not (name in joined and other in joined):
            raise DataError(
                f"{where} has two folders of one class: {printable(other)} and {printable(name)} are both class "
                f"{label} of {chosen.title}: merge them, or assign both with `data.class_map=FILE`"
            )


def _order_notes(
    targets: Mapping[str, str | int], chosen: ClassList, given: bool, listed: bool, library: Order
) -> Iterator[str]:
    """Notes on the order of the folders, if timm's and torchvision's differ or a list has another order."""
    names = list(dict.fromkeys(target for target in targets.values() if isinstance(target, str)))
    orders = {known: sort_classes(names, known) for known in ORDERS}
    timm, text = orders["timm"], orders["torchvision"]
    if chosen.order in ORDERS and not listed:
        other: Order = "torchvision" if chosen.order == "timm" else "timm"
        if timm != text:
            mine, theirs = orders[chosen.order], orders[other]
            yield (
                f"class folders are numbered in {chosen.order}'s order ({_excerpt(mine, theirs)}), {other}'s order is "
                f"{_excerpt(theirs, mine)}: use `data.class_order={other}` for weights that were trained with it"
            )
        same = next(
            (pair for pair in pairwise(timm) if natural_key(pair[0])[0] == natural_key(pair[1])[0]), None
        )
        if chosen.order == "timm" and same:
            yield (
                f"timm does not distinguish {same[0]} and {same[1]} and numbers them arbitrarily: here {same[0]} comes "
                "first"
            )
    elif not given:
        used = sorted(names, key=lambda name: chosen.index_of(name) or 0)
        if chosen.order == "data set" and used != text:
            return  # the data set has a standard order
        way = f", in {chosen.order}'s order" if chosen.order in ORDERS else ""
        if timm != text:
            others = f"timm's order would be {_excerpt(timm, used)}, torchvision's {_excerpt(text, used)}"
        elif used != orders[library]:
            others = f"timm's and torchvision's order would be {_excerpt(timm, used)}"
        else:
            return
        yield (
            f"classes are numbered as in {chosen.title}{way} ({_excerpt(used, orders[library])}); {others}: "
            "use `data.class_order` to change the order"
        )


def _contradictions(
    labels: Mapping[str, int], targets: Mapping[str, str | int], chosen: ClassList, lists: Sequence[ClassList]
) -> Iterator[str]:
    """Notes on other lists that contain all folders but number them differently."""
    for one in lists:
        places = {name: one.index_of(target) for name, target in targets.items()}
        wrong = [name for name, place in places.items() if place != labels[name]]
        if one is not chosen and wrong and None not in places.values():
            yield (
                f"{one.title} numbers these classes differently: {printable(wrong[0])} is {places[wrong[0]]} "
                f"there, and {labels[wrong[0]]} by {chosen.title}, which decides"
            )


def _excerpt(names: Sequence[str], other: Sequence[str]) -> str:
    """Three names of one order around its first difference from the other."""
    place = next((at for at, (one, two) in enumerate(zip(names, other, strict=False)) if one != two), 0)
    start = max(0, place - 1)
    shown = [printable(name) for name in names[start : start + 3]]
    return f"{'... ' if start else ''}{', '.join(shown)}{', ...' if start + 3 < len(names) else ''}"
