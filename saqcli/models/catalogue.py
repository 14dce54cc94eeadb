"""What can be quantized, told at once: names, parameters, input sizes, published weights, and what was tried.

Asking timm takes the seconds of its import. So what is known lies in files beside this one:

    catalogue.csv   family and parameters of every network; benchmarks/catalogue.py
    published.json  input sizes and tags of published weights, as one version of each library has them; the same
                    script. Where another version is installed, that library is asked itself
    coverage.csv    what came out when the smallest member of a family went through all that saq does: wrapping,
                    calibration, a SAQ step, policy, verified export; benchmarks/coverage.py
"""

import csv
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypedDict

Size = tuple[int, int, int]


class Weights(TypedDict):
    """What a library publishes of one network.

    Keys:
        input_size: (C, H, W) that the default weights expect.
        tags: of all weights, the default first, and the input size of each.
    """

    input_size: list[int]
    tags: dict[str, list[int]]


@dataclass(frozen=True)
class Entry:
    """A line of the catalogue.

    Attributes:
        name: with prefix, and with the tag of published weights where these were asked for.
        parameters: with the classifier of the published weights, of 1000 classes where there is none; None where
            nobody counted.
        input_size: (C, H, W).
        tags: of published weights, the default first; ``NAME.TAG`` is a name too.
        covered: whether the smallest member of its family went through everything; None where nobody tried.
    """

    name: str
    parameters: int | None
    input_size: Size
    tags: tuple[str, ...]
    covered: bool | None


def find(pattern: str | None = None) -> list[Entry]:
    """The networks that a shell pattern matches, by library in order of search.

    Args:
        pattern: without a slash it is matched against what follows the prefix; with a dot in it names with the
            tags of published weights are matched too. None is all networks.
    """
    pattern = (pattern or "*").lower()
    known = {row["name"]: row for row in _rows("catalogue.csv")}
    tried = {(row["library"], row["family"]): row["verdict"] == "ok" for row in _rows("coverage.csv")}
    found = []
    for library, name, weights in _published():
        full = f"{library}/{name}"
        counted = known.get(full)
        parameters = int(counted["parameters"]) if counted else None
        covered = tried.get((library, counted["family"])) if counted else None
        candidates = [(full, weights["input_size"], tuple(weights["tags"]))]
        if "." in pattern:
            candidates += [(f"{full}.{tag}", size, (tag,)) for tag, size in weights["tags"].items()]
        for candidate, (channels, height, width), tags in candidates:
            compared = candidate if "/" in pattern else candidate.partition("/")[2]
            if fnmatch.fnmatchcase(compared.lower(), pattern):
                found.append(Entry(candidate, parameters, (channels, height, width), tags, covered))
    return found


def installed(library: str) -> str:
    """Version of a library, without what tells builds of it apart."""
    return version(library).partition("+")[0]


def look_up(library: str) -> dict[str, Weights]:
    """What an installed library publishes, by name; takes the seconds of its import."""
    from saqcli.models.libraries import ZOOS

    zoo = ZOOS[library]

    def size(name: str) -> list[int]:
        return list(zoo.preprocessing(name, None).input_size)

    return {
        name: {"input_size": size(name), "tags": {tag: size(f"{name}.{tag}") for tag in tags}}
        for name, tags in zoo.tags().items()
    }


def _published() -> Iterator[tuple[str, str, Weights]]:
    """Library, name and published weights of every network."""
    kept: dict[str, Any] = json.loads((files("saqcli.models") / "published.json").read_text(encoding="utf-8"))
    for library, record in kept.items():
        current = record["version"] in (None, installed(library))
        for name, weights in (record["networks"] if current else look_up(library)).items():
            yield library, name, weights


def _rows(file: str) -> list[dict[str, str]]:
    text = (files("saqcli.models") / file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
