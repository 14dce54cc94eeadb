"""The catalogue of networks, readable without importing timm.

Importing timm takes seconds, so the catalogue is stored in three files in this folder:

    catalogue.csv   family and parameters of every network; written by benchmarks/catalogue.py
    published.json  input sizes and tags of published weights, for one version of each library; written by the same
                    script. If another version is installed, the library itself is imported and queried
    coverage.csv    result of the smallest member of each family in every step of saq (wrapping, calibration, a SAQ
                    step, policy, verified export); written by benchmarks/coverage.py
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
    """The published weights of one network.

    Keys:
        input_size: (C, H, W) that the default weights expect.
        tags: tag of each set of weights to its input size, the default first.
    """

    input_size: list[int]
    tags: dict[str, list[int]]


@dataclass(frozen=True)
class Entry:
    """One network of the catalogue.

    Attributes:
        name: with the library's prefix, and with the tag of the weights if the pattern asks for tags.
        parameters: count with the classifier of the published weights (1000 classes if there is none); None if
            unknown.
        input_size: (C, H, W).
        tags: tags of the published weights, the default first; ``NAME.TAG`` is also a valid name.
        covered: whether the smallest member of its family passed every step; None if untested.
    """

    name: str
    parameters: int | None
    input_size: Size
    tags: tuple[str, ...]
    covered: bool | None


def find(pattern: str | None = None) -> list[Entry]:
    """The networks that match a shell pattern, sorted by library in search order.

    Args:
        pattern: a pattern without a slash is matched against the name without its prefix; a pattern with a dot is
            also matched against names with tags. None matches all networks.
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


def installed_version(library: str) -> str:
    """The installed version of a library, without the build suffix (``+cpu``)."""
    return version(library).partition("+")[0]


def read_library(library: str) -> dict[str, Weights]:
    """The published weights of an installed library, by network name; imports the library (seconds)."""
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
    stored: dict[str, Any] = json.loads(
        (files("saqcli.models") / "published.json").read_text(encoding="utf-8")
    )
    for library, record in stored.items():
        current = record["version"] in (None, installed_version(library))
        for name, weights in (record["networks"] if current else read_library(library)).items():
            yield library, name, weights


def _rows(file: str) -> list[dict[str, str]]:
    text = (files("saqcli.models") / file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
