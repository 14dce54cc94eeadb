"""Resolving a user's spelling of a network's name.

The exact name is searched first, in timm, then torchvision, then among the networks of the papers; a prefix selects the
library. Then common spellings are accepted: ``ResNet-18``, ``resnet_18``, ``torchvision.models.resnet18``,
``hf_hub:timm/resnet18.a1_in1k``. Ambiguous names are refused, not guessed. ``mypackage.nets:build`` is a network of the
user's own; nothing is imported here.
"""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from saqcli.config import names_own_network
from saqcli.errors import UnknownModel
from saqcli.models import catalogue
from saqcli.models.libraries import ZOOS, Zoo
from saqcli.models.own import suggest_own
from saqcli.models.weights import PICKLES
from saqcli.serialization import printable

_HUB = re.compile(r"(?:https?://(?:www\.)?huggingface\.co/|hf[-_]hub:|hf://)(.+)", re.IGNORECASE)
_DOTTED = re.compile(r"(timm|torchvision|models|saq)(?:\.models)?[.:](.+)", re.IGNORECASE)
_FILES = (".safetensors", ".onnx", *PICKLES)


class ModelName(NamedTuple):
    """The resolved name of a network.

    Attributes:
        prefix: the library's prefix; empty for a network of the user's own.
        name: the library's name of the network, with the tag if there is one.
        note: how the user's spelling was read; empty if it was exact.
    """

    prefix: str
    name: str
    note: str = ""

    @property
    def full(self) -> str:
        """The canonical name, such as ``timm/resnet18`` or ``mypackage.nets:build``."""
        return f"{self.prefix}/{self.name}" if self.prefix else self.name


def resolve(spelling: str, *, exact: bool = False) -> ModelName:
    """The network with the name ``spelling``; other spellings are accepted unless ``exact``, as for names in files.

    Raises:
        UnknownModel: there is none, or several; the message suggests similar names or a remedy.
    """
    plain = spelling.strip().removesuffix("()")
    own = not exact and names_own_network(spelling)  # as it stands, since files are checked for that
    if own and not spelling.startswith(
        "models:"
    ):  # ``models:resnet18`` is a spelling of torchvision/resnet18
        return ModelName("", spelling)
    suggestion = "" if exact else suggest_own(plain)
    if suggestion and ".py" in plain:
        raise _not_own(spelling, suggestion)
    if (found := find_exact(spelling)) is not None:
        return found
    name = spelling
    if not exact:
        _refuse_files(spelling)
        name = _with_prefix(plain)
        for prefix, short in _candidates(name):
            if (same := _fuzzy_match(ZOOS[prefix], short)) is not None:
                return ModelName(prefix, same, f"{printable(spelling, 100)} is read as {prefix}/{same}")
    if own:
        return ModelName("", spelling)
    prefix, slash, short = name.partition("/")
    if suggestion:
        raise _not_own(spelling, suggestion)
    near = _similar(short if slash else name, prefix if slash and prefix in ZOOS else None)
    hint = f"did you mean {', '.join(near)}?" if near else "no similar name"
    raise UnknownModel(f"unknown model {spelling!r} ({hint}): `saq models PATTERN` lists names")


def _not_own(spelling: str, suggestion: str) -> UnknownModel:
    return UnknownModel(
        f"unknown model {printable(spelling, 200)!r}: a network of your own is named MODULE:NAME, as Python imports it "
        f"from the current folder, such as {suggestion}"
    )


def find_exact(name: str) -> ModelName | None:
    """The network with exactly that name; None if there is none."""
    for prefix, short in _candidates(name):
        if ZOOS[prefix].has_model(short):
            return ModelName(prefix, short)
    return None


def _candidates(name: str) -> list[tuple[str, str]]:
    """Pairs of library and name to try; all libraries in search order if ``name`` has no prefix."""
    prefix, slash, rest = name.partition("/")
    if slash and prefix in ZOOS:
        return [(prefix, rest)]
    return [(known, name) for known in ZOOS]


def _with_prefix(name: str) -> str:
    """``name`` with the library's prefix, if a known spelling of another program contains the library."""
    if hub := _HUB.fullmatch(name):
        name = hub[1].partition("@")[0]
        if not name.lower().startswith("timm/"):
            raise UnknownModel(
                f"{printable(hub[0], 200)} is a repository of the Hugging Face hub outside timm/, which saq cannot "
                "load: name the network, and give its weights with `model.weights=FILE`"
            )
    if dotted := _DOTTED.fullmatch(name):
        library = dotted[1].lower()
        name = f"{'torchvision' if library == 'models' else library}/{dotted[2]}"
    prefix, slash, rest = name.partition("/")
    return f"{prefix.lower()}/{rest}" if slash and prefix.lower() in ZOOS else name


def _fuzzy_match(zoo: Zoo, name: str) -> str | None:
    """The only network of ``zoo`` that equals ``name`` up to case and separators; None if there is none or several."""
    if zoo.has_model(name):
        return name
    networks = zoo.names()
    for architecture, tag in _interpretations(name):
        same = [network for network in networks if _key(network) == _key(architecture)]
        if len(same) != 1:
            continue
        if not tag:
            return same[0]
        tags = [known for known in zoo.tags().get(same[0], ()) if _key(known) == _key(tag)]
        if len(tags) == 1:
            return f"{same[0]}.{tags[0]}"
    return None


def _interpretations(name: str) -> Iterator[tuple[str, str]]:
    """Pairs of architecture and tag: ``squeezenet1.1`` may be one name, ``resnet.resnet18`` a function in a module."""
    architecture, _, tag = name.partition(".")
    yield architecture, tag
    if tag:
        yield name, ""
        yield name.rpartition(".")[2], ""


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _refuse_files(name: str) -> None:
    """Refuse a file in place of a network's name.

    Raises:
        UnknownModel: ``name`` is a file.
    """
    suffix = Path(name).suffix.lower()
    if suffix == ".onnx":
        raise UnknownModel(
            f"{printable(name, 200)} is an ONNX file: name the PyTorch network that it was exported from"
        )
    if suffix in _FILES or (name.strip() and len(name) < 200 and Path(name).is_file()):
        name = printable(name, 200)
        raise UnknownModel(f"{name} is a weight file: name its network, and use `model.weights={name}`")


def _similar(name: str, prefix: str | None) -> list[str]:
    """Up to five known names similar to ``name``, of the library ``prefix`` if given."""
    name = name.lower()
    architecture, dot, _ = name.partition(".")
    full: dict[str, str] = {}
    for entry in catalogue.find("*.*" if dot else None) + catalogue.find():
        library, _, short = entry.name.partition("/")
        if prefix in (None, library):
            full.setdefault(short, entry.name)
    tagged = [short for short in full if dot and short.startswith(f"{architecture}.")]
    alike = difflib.get_close_matches(name, tagged or full, n=4, cutoff=0.7)
    within = sorted((short for short in full if len(name) > 2 and name in short), key=len)
    return [full[short] for short in dict.fromkeys(alike + tagged + within)][:5]
