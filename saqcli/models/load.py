"""Loading a float model with its preprocessing, by name.

A name such as ``resnet18`` is searched in timm, then torchvision, then among the networks of the papers; a prefix
(``timm/``, ``torchvision/``, ``saq/``) selects the library. ``MODULE:NAME`` is a network of the user's own: functions
that take the user's spelling import it, those that take a file's names never do (``saqcli.models.own``). Weights come
from a local file, from the library's published weights, or are random. ``LoadedModel.build`` holds all arguments that
rebuild the network.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saqcli.errors import ConfigError, SaqError, UnsupportedModel, WeightsMismatch
from saqcli.models import catalogue
from saqcli.models.arguments import check_arguments
from saqcli.models.libraries import ZOOS, Architecture, Zoo, no_published_weights
from saqcli.models.names import ModelName, resolve
from saqcli.models.own import OwnNetwork as OwnNetwork
from saqcli.models.own import check_named, own_network
from saqcli.models.preprocessing import Preprocessing as Preprocessing
from saqcli.models.state_dicts import match_names
from saqcli.models.weights import (
    WeightFile,
    adapt_channels,
    channels_note,
    check_finite,
    load_into,
    read_weights,
    sha256_of,
)
from saqcli.serialization import printable
from saqcli.units import counted


@dataclass(frozen=True)
class ModelSpec:
    """The user's request; None leaves the choice to the network or its weights.

    Attributes:
        name: the name as the user typed it.
        weights: a local file; excludes published weights.
        pretrained: load published weights if no file is given.
        num_classes: rows of the classifier.
        in_chans: channels of an image.
        kwargs: arguments of the library's builder.
        input_size: one side, (H, W) or (C, H, W).
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, of pixels scaled to 0..1.
        new_head: start with a random classifier if a weight file has another number of classes.
        weights_key: selects one of several sets of tensors in the file; see ``state_dicts``.
    """

    name: str
    weights: Path | None = None
    pretrained: bool = True
    num_classes: int | None = None
    in_chans: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_size: int | tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    new_head: bool = False
    weights_key: str | None = None


@dataclass
class LoadedModel:
    """A float network, ready to be wrapped.

    Attributes:
        model: in eval mode, on the CPU.
        name: canonical, like ``timm/resnet18.a1_in1k`` or ``saq/resnet20``.
        num_classes: rows of the classifier.
        preprocessing: preprocessing of its images.
        weights_source: name of the weight file, tag of the published weights, ``random``, or that the user's builder
            made them.
        weights_sha256: hash of the weight file; None without one.
        build: arguments of ``build_architecture``; JSON-serializable if the user's kwargs are.
        notes: choices made for the user, one line each.
        trained: whether all weights are trained; False with a new head or random weights.
        classifiers: names of the layers that give class scores; several if heads are averaged (distillation).
        class_names: names by index, if the weight file has one for each class; else empty.
    """

    model: nn.Module
    name: str
    num_classes: int
    preprocessing: Preprocessing
    weights_source: str
    weights_sha256: str | None
    build: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    trained: bool = True
    classifiers: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load the network that ``spec`` describes.

    Raises:
        UnknownModel: there is no network of that name.
        UnsupportedModel: the network has no classifier, or cannot be built here.
        ConfigError: the network does not accept the arguments.
        SaqError: the published weights are missing or not reachable.
        CorruptArtifact, UnsafeWeights, WeightsMismatch: see ``saqcli.models.weights``.
    """
    found = resolve(spec.name)
    prefix, name, note = found
    zoo, notes = _library(found), [note] if note else []
    if spec.weights_key is not None and not spec.weights:
        raise ConfigError(
            "`model.weights_key` chooses among the tensors of a weight file: use `model.weights=FILE` with it"
        )
    # Read before the network is built, so that a bad file fails early.
    file = read_weights(spec.weights, spec.weights_key) if spec.weights else None
    arch, preprocessing = _architecture(zoo, found, spec)
    sha256, trained = None, True
    with _building(found.full, arch.kwargs):
        if spec.weights and file is not None:
            notes += file.notes
            model, arch, trained = _from_file(zoo, found.full, arch, file, spec, notes)
            source, sha256 = spec.weights.name, sha256_of(spec.weights)
        elif spec.pretrained:
            model, name, source = zoo.fetch(arch)
            if arch.num_classes != (published := zoo.default_classes(name)):
                notes.append(
                    f"{source} has {counted(published, 'class')}: the new classifier of {arch.num_classes} starts with "
                    "random weights"
                )
                trained = False
            if isinstance(zoo, OwnNetwork):
                notes.append(f"{source}: give others with `model.weights=FILE`")
            elif arch.in_chans != (channels := zoo.preprocessing(name, None).input_size[0]):
                notes.append(channels_note(source, channels, arch.in_chans))
        else:
            model, source, trained = zoo.build(arch), "random", False
        if not spec.weights:  # weights of a file were checked when they were loaded
            check_finite(model, source)
    build = asdict(arch) | {"name": ModelName(prefix, name).full}
    return LoadedModel(
        model.eval(),
        build["name"],
        arch.num_classes,
        preprocessing,
        source,
        sha256,
        build,
        notes,
        trained,
        zoo.classifiers(model),
        next((names for names in file.class_lists if len(names) == arch.num_classes), ()) if file else (),
    )


def require_weights(spec: ModelSpec) -> None:
    """Check within seconds that the weights that ``load_model`` would fetch are cached or reachable.

    Raises:
        SaqError: they are not, or the network has no published weights.
    """
    prefix, name, _ = resolve(spec.name)
    if spec.weights is None and spec.pretrained and prefix in ZOOS:
        ZOOS[prefix].require(name)


def published_weights(name: str) -> str:
    """The network's name with the tag of the weights that ``load_model`` would fetch.

    Raises:
        SaqError: there is no such network, or it has no published weights.
    """
    prefix, short, _ = resolve(name)
    architecture, _, tag = short.partition(".")
    tags = next((entry.tags for entry in catalogue.find(f"{prefix}/{architecture}")), ())
    if not tags:
        raise no_published_weights(f"{prefix}/{short}")
    return f"{prefix}/{architecture}.{tag or tags[0]}".rstrip(".")


def default_classes(name: str) -> int:
    """The network's default number of classes.

    Raises:
        UnknownModel: there is no network of that name.
    """
    prefix, short, _ = resolve(name)
    return ZOOS[prefix].default_classes(short)


def check_model_name(name: str) -> None:
    """Check that a network of that name exists, without building it; a network of the user's own is imported.

    Raises:
        UnknownModel: there is none; the message suggests similar names.
        BuilderError: the module of the user's own network fails when it is imported.
    """
    _library(resolve(name))


def build_architecture(build: Mapping[str, Any], own: OwnNetwork | None = None) -> nn.Module:
    """Build the network of ``LoadedModel.build`` with random weights, in eval mode.

    Args:
        build: may come from a file.
        own: the network that the user named, if any; ``build`` imports none by itself.

    Raises:
        BuilderError: ``build`` names a network of the user's own that is not ``own``, or ``own`` fails.
        ConfigError: a key is missing or unknown, or the network does not accept the arguments.
        UnknownModel: the installed libraries have no such network.
    """
    keys = {"name", "num_classes", "in_chans", "kwargs"}
    if wrong := keys ^ set(build):
        raise ConfigError(
            f"the architecture's {', '.join(sorted(wrong))} is missing or unknown: it needs {sorted(keys)}"
        )
    zoo, name = _library_of_file(build["name"], own)
    with _building(build["name"], build["kwargs"]):
        return zoo.build(Architecture(**{**build, "name": name})).eval()


def as_loaded(
    model: nn.Module,
    build: Mapping[str, Any],
    preprocessing: Preprocessing,
    source: str,
    own: OwnNetwork | None = None,
) -> LoadedModel:
    """A network that was already built from ``build`` and ``own``, as ``load_model`` would return it."""
    zoo, _ = _library_of_file(build["name"], own)
    return LoadedModel(
        model,
        build["name"],
        build["num_classes"],
        preprocessing,
        source,
        None,
        dict(build),
        classifiers=zoo.classifiers(model),
    )


def _library(found: ModelName) -> Zoo:
    """The library of a name that the user gave; a network of the user's own is imported."""
    return ZOOS[found.prefix] if found.prefix else own_network(found.name)


def _library_of_file(name: str, own: OwnNetwork | None) -> tuple[Zoo, str]:
    """The library of a name in a file and its name there; ``own`` is what the user named, nothing else is imported."""
    check_named(name, own)
    if own is not None:
        return own, name
    found = resolve(name, exact=True)
    return ZOOS[found.prefix], found.name


def _architecture(zoo: Zoo, found: ModelName, spec: ModelSpec) -> tuple[Architecture, Preprocessing]:
    """The architecture and the preprocessing of ``spec``."""
    name, short = found.full, found.name
    check_arguments(name, spec.kwargs)
    kwargs = dict(spec.kwargs)
    in_chans = kwargs.pop("in_chans", None) or spec.in_chans or 3
    num_classes = zoo.default_classes(short) if spec.num_classes is None else spec.num_classes
    if spec.num_classes is not None and num_classes < 1:
        raise ConfigError(
            f"{name} cannot have {counted(num_classes, 'class')}: `model.num_classes` must be at least 1"
        )
    if isinstance(zoo, OwnNetwork):
        zoo.examine(Architecture(short, num_classes, in_chans, kwargs))
    elif num_classes < 1:
        raise UnsupportedModel(
            f"{name} has no classifier, it gives features: use `model.num_classes`, or choose another"
        )
    asked = spec.input_size or kwargs.get("img_size") or kwargs.get("image_size")
    size = None if asked is None else _height_width(asked, in_chans)
    default = zoo.preprocessing(short, size)
    height, width = size or default.input_size[1:]
    preprocessing = replace(
        default,
        input_size=(in_chans, height, width),
        mean=spec.mean or _per_channel(default.mean, in_chans),
        std=spec.std or _per_channel(default.std, in_chans),
    )
    return zoo.sized(Architecture(short, num_classes, in_chans, kwargs), (height, width)), preprocessing


def _height_width(size: int | tuple[int, ...], in_chans: int) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) == 3 and sides[0] == in_chans:
        sides = sides[1:]
    if len(sides) != 2 or min(sides) < 1:
        raise ConfigError(
            f"input size {size} is not the size of a {in_chans}-channel image: give one side, or height and width"
        )
    return sides[0], sides[1]


def _per_channel(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    """``values``, or their mean for every channel if the image has another number of channels."""
    return values if len(values) == in_chans else (sum(values) / len(values),) * in_chans


def _from_file(
    zoo: Zoo, name: str, arch: Architecture, file: WeightFile, spec: ModelSpec, notes: list[str]
) -> tuple[nn.Module, Architecture, bool]:
    """The network with the file's weights, its architecture, and whether all its weights are trained.

    The file determines the number of classes unless the user sets it.
    """
    source, model = spec.weights.name if spec.weights else "", zoo.build(arch)
    own, misfits = model.state_dict().keys(), dict[int, WeightsMismatch]()
    for candidate in match_names(file.tensors, own, source):
        more: list[str] = []
        try:
            found = _from_state(zoo, name, arch, model, candidate.values, spec, more)
        except WeightsMismatch as error:
            misfits[len(own & candidate.values.keys())] = error
        else:
            notes += [*candidate.notes, *more]
            return found
    closest = misfits[max(misfits)]
    hint = (
        f"; `model.weights_key` chooses other tensors of the file: {', '.join(file.others)}"
        if file.others
        else ""
    )
    raise WeightsMismatch(f"{closest}{printable(hint)}") from closest


def _from_state(
    zoo: Zoo,
    name: str,
    arch: Architecture,
    model: nn.Module,
    state: Mapping[str, Tensor],
    spec: ModelSpec,
    notes: list[str],
) -> tuple[nn.Module, Architecture, bool]:
    """Load ``state`` into ``model``, rebuilt if ``state`` has another number of classes; returns as ``_from_file``."""
    source = spec.weights.name if spec.weights else ""
    heads = zoo.classifiers(model)
    head = state.get(f"{heads[0]}.weight") if heads else None
    if spec.num_classes is None and head is not None and len(head) != arch.num_classes:
        notes.append(
            f"{name} has {counted(len(head), 'class')}, like {source}, instead of {arch.num_classes}"
        )
        arch = replace(arch, num_classes=len(head))
        model = zoo.build(arch)
    trained = head is None or len(head) == arch.num_classes or not spec.new_head
    if not trained:
        own = model.state_dict()
        state = {k: own[k] if k.rpartition(".")[0] in heads and k in own else v for k, v in state.items()}
        notes.append(
            f"{source} has another classifier: the new one of {counted(arch.num_classes, 'class')} starts with "
            "random weights"
        )
    state, note = adapt_channels(state, model.state_dict(), arch.in_chans, source)
    notes += [note] if note else []
    try:
        load_into(model, state, source, name=name, classifiers=heads)
    except WeightsMismatch:
        if (converted := zoo.convert(arch, state)) is None:
            raise
        load_into(model, converted, source, name=name, classifiers=heads)
        notes.append(f"{source} was written for another version of {name}: its parameters were converted")
    return model, arch, trained


@contextmanager
def _building(name: str, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Convert the exceptions of a library's builder to errors of one line."""
    try:
        yield
    except SaqError:
        raise
    except Exception as error:
        if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise ConfigError(f"{name} has no argument {found[1]!r}: correct `model.kwargs`") from error
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if kwargs:
            raise ConfigError(
                f"{name} cannot be built with {dict(kwargs)} ({reason}): correct `model.kwargs` "
                "or `model.input_size`"
            ) from error
        raise UnsupportedModel(
            f"{name} cannot be built ({reason}): choose another, see `saq models`"
        ) from error
