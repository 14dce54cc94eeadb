"""Networks of one's own: a function, class or module that the user names as ``MODULE:NAME``.

``mypackage.nets:build`` is what ``from mypackage.nets import build`` would import from the current folder. Importing
runs code, so it happens only when the user gives the name, on the command line or in Python. A name in a file (a
safetensors or ONNX file, a run directory, a configuration) is compared with the name that the user gives, and never
imported by itself.

The builder receives ``num_classes``, ``in_chans`` and ``pretrained`` if its signature names them, and the user's
arguments. What it does not say is read from an example: the number of classes from the output, the preprocessing from
``pretrained_cfg`` or ``default_cfg``, as timm's networks have them.
"""

import copy
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saqcli.config import names_own_network
from saqcli.errors import BuilderError, ConfigError, SaqError, UnknownModel, UnsupportedModel
from saqcli.models.libraries import Architecture, Published, last_layer
from saqcli.models.preprocessing import SMALL_IMAGES, Preprocessing
from saqcli.quant.tracer import try_model
from saqcli.serialization import printable
from saqcli.units import counted

Builder = Callable[..., nn.Module] | nn.Module
# Where neither the user nor the network says more: ImageNet's preprocessing; small images are not cropped.
SIDE, CROP = 224, 0.875
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WORD = r"[^\W\d]\w*"
_DOTTED = re.compile(rf"{_WORD}(?:\.{_WORD})+")
_FILE = re.compile(r"(?:\./)?(.+)\.py(?::(.+))?")


class OwnNetwork:
    """A network of the user's as a library with one name; see ``saqcli.models.libraries.Zoo``.

    Args:
        source: builds the module; a module is copied, with its weights.
        name: ``MODULE:NAME``; empty for an object given in Python, which fits files of any network.
        folder: added to ``sys.path`` while the builder runs, so that it can import its neighbours.
    """

    def __init__(self, source: Builder, name: str = "", folder: Path | None = None) -> None:
        self.source, self.name, self.folder = source, name, folder
        self._called = name or getattr(source, "__qualname__", type(source).__name__)
        self._example: nn.Module | None = None
        self._channels, self._classes = len(MEAN), 0

    def names(self) -> list[str]:
        """See ``Zoo``."""
        return [self.name]

    def tags(self) -> dict[str, list[str]]:
        """See ``Zoo``; there are no published weights."""
        return {self.name: []}

    def has_model(self, name: str) -> bool:
        """See ``Zoo``."""
        return name == self.name

    def default_classes(self, name: str) -> int:
        """See ``Zoo``; those of the network that was built last, 0 if they are not known."""
        return self._classes

    def examine(self, arch: Architecture) -> None:
        """Build an example, from which ``preprocessing`` and ``sized`` read what the user does not say."""
        self._channels = arch.in_chans
        self._example = self.build(arch)

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """See ``Zoo``; that of ImageNet where the network has no ``pretrained_cfg`` or ``default_cfg``."""
        cfg = self._cfg()
        sides = size or tuple(cfg.get("input_size") or (SIDE, SIDE))[-2:]
        mean, std = tuple(cfg.get("mean") or MEAN), tuple(cfg.get("std") or STD)
        if len(mean) != self._channels or len(std) != self._channels:
            mean, std = ((sum(each) / len(each),) * self._channels for each in (mean, std))
        try:
            return Preprocessing.from_dict(
                {
                    "input_size": (self._channels, *sides),
                    "mean": mean,
                    "std": std,
                    "interpolation": cfg.get("interpolation") or "bilinear",
                    "crop_pct": cfg.get("crop_pct") or (1.0 if max(sides) <= SMALL_IMAGES else CROP),
                    "crop_mode": cfg.get("crop_mode") or "center",
                }
            )
        except ConfigError as error:
            raise ConfigError(f"{self._called}: {error}, in its pretrained_cfg or default_cfg") from None

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """See ``Zoo``; runs the example on an empty image of ``size`` and counts the classes.

        Raises:
            UnsupportedModel: it does not run, or does not give class scores.
            ConfigError: it gives another number of classes than the user wants.
        """
        example = self._example or self.build(arch)
        try:
            with torch.no_grad():
                classes = try_model(example, torch.zeros(1, arch.in_chans, *size)).shape[1]
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"{self._called}: {error}; use another `model.input_size`, or correct the network"
            ) from error
        except Exception as error:
            raise BuilderError(f"{self._called} does not run on an image: {_describe(error)}") from error
        if arch.num_classes not in (0, classes):
            takes = "" if self._takes("num_classes") else ", since it takes no argument num_classes"
            raise ConfigError(
                f"{self._called} gives {counted(classes, 'class')}, not {arch.num_classes}{takes}: remove "
                f"`model.num_classes`, or build a network of {arch.num_classes}"
            )
        return Architecture(arch.name, classes, arch.in_chans, arch.kwargs)

    def build(self, arch: Architecture, *, pretrained: bool = False) -> nn.Module:
        """See ``Zoo``; with the weights that the builder makes, in float32 and on the CPU.

        Raises:
            ConfigError: the builder does not take the arguments.
            BuilderError: it fails, or returns no module.
        """
        arguments = self._arguments(arch, pretrained=pretrained)
        try:
            with _on_path(self.folder):
                source = self.source
                model: Any = copy.deepcopy(source) if isinstance(source, nn.Module) else source(**arguments)
        except SaqError:
            raise
        except (Exception, SystemExit) as error:
            raise BuilderError(f"{self._called} failed: {_describe(error)}") from error
        if not isinstance(model, nn.Module):
            raise BuilderError(
                f"{self._called} returned {printable(repr(type(model).__name__), 100)}, not a torch.nn.Module: "
                "name a function or class that builds the network"
            )
        tensors = (*model.parameters(), *model.buffers())
        if any(is_lazy(tensor) for tensor in tensors):
            raise BuilderError(f"{self._called} has lazy layers: run the network on an image in its builder")
        if any(tensor.is_cuda for tensor in tensors):
            model.cpu()
        if all(parameter.dtype != torch.float32 for parameter in model.parameters()):
            model.float()
        self._classes = arch.num_classes
        return model

    def require(self, name: str) -> None:
        """See ``Zoo``; the builder makes the weights."""

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``; the weights are those that the builder makes."""
        return Published(self.build(arch, pretrained=True), self.name, f"weights as built by {self._called}")

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; there is only one version of the network."""
        return None

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``; the last layer with one row per class, if the number of classes is known."""
        rows = {
            name: len(layer.weight)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        return tuple(name for name, count in rows.items() if count == self._classes)[-1:] or last_layer(model)

    def _takes(self, argument: str) -> bool:
        return argument in self._parameters()

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """The arguments that the builder takes by name."""
        if isinstance(self.source, nn.Module):
            return {}
        try:
            found = inspect.signature(self.source).parameters
        except (TypeError, ValueError):  # builtins may have no signature
            return {}
        unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        return {name: each for name, each in found.items() if each.kind not in unnamed}

    def _arguments(self, arch: Architecture, *, pretrained: bool) -> dict[str, Any]:
        """The arguments of the builder.

        Raises:
            ConfigError: it does not take one of the user's, or needs another one.
        """
        known = self._parameters()
        anything = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        if not anything and (unknown := [name for name in arch.kwargs if name not in known]):
            raise ConfigError(f"{self._called} has no argument {unknown[0]!r}: correct `model.kwargs`")
        own = {"in_chans": arch.in_chans, "pretrained": pretrained}
        own |= {"num_classes": arch.num_classes} if arch.num_classes else {}
        arguments = {**{name: value for name, value in own.items() if name in known}, **arch.kwargs}
        for name, each in known.items():
            required = (
                each.default is inspect.Parameter.empty and each.kind is not inspect.Parameter.VAR_KEYWORD
            )
            if required and name not in arguments:
                setting = "model.num_classes" if name == "num_classes" else f"model.kwargs={name}=VALUE"
                raise ConfigError(f"{self._called} needs the argument {name}: use `{setting}`")
        return arguments

    def _cfg(self) -> Mapping[str, Any]:
        """The network's own ``pretrained_cfg`` or ``default_cfg``, of the built module or of its builder."""
        for owner in (self._example, self.source):
            for attribute in ("pretrained_cfg", "default_cfg"):
                found: Any = getattr(owner, attribute, None)
                found = found.to_dict() if hasattr(found, "to_dict") else found
                if isinstance(found, Mapping) and found:
                    return found
        return {}


def own_network(given: str | Builder) -> OwnNetwork:
    """The network that the user gives: ``MODULE:NAME``, a builder, or a module.

    A name is imported, with the current folder first on ``sys.path``. Never call this with a name from a file.

    Raises:
        ConfigError: not such a name, no such module, or nothing callable of that name in it.
        BuilderError: the module fails when it is imported.
    """
    if not isinstance(given, str):
        return OwnNetwork(given)
    if not names_own_network(given):
        raise ConfigError(
            f"`builder={printable(given, 200)}`: give MODULE:NAME, such as mypackage.nets:build"
        )
    path, _, attribute = given.partition(":")
    module = _import(given, path)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            named = [name for name in dir(found) if not name.startswith("_")][:8]
            there = f"; it has {', '.join(named)}" if named else ""
            raise UnknownModel(f"{given}: {path} has no {attribute}{there}")
        found = getattr(found, part)
    if not callable(found):
        raise UnknownModel(
            f"{given} is a {type(found).__name__}: name a function or class that builds the network, or a module"
        )
    return OwnNetwork(found, given, _folder_of(module))


def own_of(name: str) -> OwnNetwork | None:
    """The user's own network if ``name``, which the user gave, names one; else None."""
    return own_network(name) if names_own_network(name) else None


def check_named(name: str, own: OwnNetwork | None, source: str = "it") -> None:
    """Check that the network that a file names is one that may be built; nothing is imported.

    Args:
        name: the network's name in the file.
        own: the network that the user named, if any.
        source: name of the file in the message.

    Raises:
        BuilderError: the file needs a network that the user did not name, or the user named another.
    """
    given = own.name if own is not None else None
    if given is None and is_class_name(name) and not names_own_network(name):
        raise BuilderError(
            f"{source} was saved from a module of {printable(name, 200)}, which no name builds: load it in Python with "
            "`saqcli.load(path, model=...)`, given a float module like it"
        )
    if given in ("", name) or (given is None and not names_own_network(name)):
        return
    name = printable(name, 200)
    if given is None:
        raise BuilderError(
            f"{source} needs the network {name} of a module outside saq, and names in files are never imported: "
            f"if you know and trust this module, use `builder={name}`"
        )
    remedy = f"use `builder={name}`" if names_own_network(name) else "remove `builder`"
    raise BuilderError(f"{source} was made from the network {name}, not from {given}: {remedy}")


def is_class_name(name: str) -> bool:
    """Whether ``name``, in a file, is that of a class or of a network of one's own: ``MODULE:NAME``."""
    return re.fullmatch(r"[\w.]+:[\w.<>]+", name) is not None


def suggest_own(spelling: str) -> str:
    """How to write a network of one's own that ``spelling`` seems to mean; empty if it means something else."""
    if names_own_network(spelling):  # before ``()`` or spaces were removed
        return spelling
    if (file := _FILE.fullmatch(spelling)) and not Path(spelling).is_absolute():
        return f"{file[1].replace('/', '.')}:{file[2] or 'NAME'}"
    if _DOTTED.fullmatch(spelling):
        top, (module, _, attribute) = spelling.partition(".")[0], spelling.rpartition(".")
        if Path(f"{top}.py").is_file() or Path(top).is_dir():
            return f"{module}:{attribute}"
    return ""


def _import(name: str, path: str) -> ModuleType:
    """The module ``path`` of the network ``name``."""
    try:
        with _on_path(Path.cwd()):
            return import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise BuilderError(f"importing {path} failed: {_describe(error)}") from error
        raise UnknownModel(
            f"{name}: there is no module {error.name} in {Path.cwd()}, nor one that is installed: start saq in the "
            "folder that holds it"
        ) from error
    except (Exception, SystemExit) as error:
        raise BuilderError(f"importing {path} failed: {_describe(error)}") from error


@contextmanager
def _on_path(folder: Path | None) -> Iterator[None]:
    """Within the context ``folder`` is first on ``sys.path``."""
    before = list(sys.path)
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _folder_of(module: ModuleType) -> Path | None:
    """The folder from which the module's top package is imported; None if it has no file."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    path = Path(file).absolute()
    path = path.parent if path.name == "__init__.py" else path
    return path.parents[module.__name__.count(".")]


def _describe(error: BaseException) -> str:
    """``ValueError: no such width (nets.py:12)``, in one line; the place is the last one outside of libraries."""
    text = f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return printable(f"SyntaxError: {error.msg} ({_shown(error.filename)}:{error.lineno})", 400)
    frames = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith("<")]
    outside = [each for each in frames if not Path(each.filename).is_relative_to(Path(__file__).parents[1])]
    library = Path(inspect.__file__).parent, Path(torch.__file__).parents[1]
    theirs = [each for each in outside if not any(Path(each.filename).is_relative_to(one) for one in library)]
    last = (theirs or outside)[-1:]
    place = f" ({_shown(last[0].filename)}:{last[0].lineno})" if last else ""
    return printable(f"{text}{place}", 400)


def _shown(file: str) -> str:
    """``file`` relative to the current folder, if it lies there."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
