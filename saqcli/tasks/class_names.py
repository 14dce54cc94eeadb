"""Class names: sort orders of timm and torchvision, ImageNet synsets.

timm and torchvision number class folders differently: timm sorts numbers as numbers and ignores case (``class_2``
before ``class_10``), torchvision sorts as text.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from saqcli.serialization import natural_key

Order = Literal["timm", "torchvision"]
ORDERS: tuple[Order, ...] = ("timm", "torchvision")

SYNSET = re.compile(r"n\d{8}", re.IGNORECASE)


def library_order(network: str) -> Order:
    """The order of class folders in the library of ``network``, a canonical name such as ``timm/resnet18``."""
    return "torchvision" if network.startswith("torchvision/") else "timm"


def sort_classes(names: Iterable[str], order: Order) -> list[str]:
    """Class names in the order of their labels.

    Example:
        >>> sort_classes(["b10", "b9", "A"], "timm"), sort_classes(["b10", "b9", "A"], "torchvision")
        (['A', 'b9', 'b10'], ['A', 'b10', 'b9'])
    """
    return sorted(names, key=natural_key) if order == "timm" else sorted(names)


@dataclass(frozen=True)
class ClassList:
    """A list of class names with their indices.

    Attributes:
        title: name of the list in messages.
        order: see ``labels.Numbering``.
        index: class name to index.
        names: names of all classes by index; empty if the list is partial.
    """

    title: str
    order: str
    index: Mapping[str, int]
    names: tuple[str, ...] = ()

    @cached_property
    def _meanings(self) -> dict[str, set[int]]:
        """Indices by normalized name (case, blanks and underscores are ignored); for a synset also by its words."""
        found: dict[str, set[int]] = {}
        for name, index in [*self.index.items(), *((name, place) for place, name in enumerate(self.names))]:
            for word in {name, *name.split(","), *_words(name)}:
                found.setdefault(_normalized(word), set()).add(index)
        return found

    def meanings(self, name: str) -> set[int]:
        """All indices that ``name`` can denote."""
        if name in self.index:
            return {self.index[name]} | {place for place, known in enumerate(self.names) if known == name}
        words = [name]
        if SYNSET.fullmatch(name) and not any(SYNSET.fullmatch(known) for known in self.index):
            words += [_descriptions().get(name, name), *_words(name)]  # the list consists of ImageNet's words
        return next((meant for word in words if (meant := self._meanings.get(_normalized(word)))), set())

    def index_of(self, target: str | int) -> int | None:
        """The index of a class; None if it has none or several."""
        if isinstance(target, int):
            return target
        found = self.meanings(target)
        return next(iter(found)) if len(found) == 1 else None


def imagenet_names(count: int) -> tuple[str, ...]:
    """The synsets of the ImageNet subset with ``count`` classes, by index; empty if there is none."""
    found = imagenet_list(count)
    return found.names if found else ()


@cache
def imagenet_list(count: int) -> ClassList | None:
    """The ImageNet subset with ``count`` classes; None if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    synsets = tuple(ImageNetInfo(subset).label_names())
    return ClassList("ImageNet", "imagenet", {synset: index for index, synset in enumerate(synsets)}, synsets)


def are_synsets(targets: Iterable[str | int], imagenet: ClassList) -> bool:
    """Whether all ``targets`` are indices, or synsets of ``imagenet``."""
    return all(isinstance(target, int) or target.lower() in imagenet.index for target in targets)


def names_by_index(index: Mapping[str, int]) -> tuple[str, ...]:
    """The names of ``index``, sorted by their indices."""
    return tuple(sorted(index, key=index.__getitem__))


@cache
def _descriptions() -> dict[str, str]:
    """The words of every synset in timm's ImageNet subsets."""
    from timm.data import ImageNetInfo

    found: dict[str, str] = {}
    for subset in ("imagenet-21k-goog", "imagenet-1k"):  # one synset of the second is not in the first
        found |= dict(ImageNetInfo(subset).label_descriptions(as_dict=True))
    return found


def _words(name: str) -> list[str]:
    """The words of a synset; empty for any other name."""
    return _descriptions().get(name, "").split(",") if SYNSET.fullmatch(name) else []


def _normalized(name: str) -> str:
    """``name`` in lower case, with blanks, underscores and hyphens as single blanks."""
    return " ".join(re.split(r"[\s_\-]+", name.casefold())).strip()
