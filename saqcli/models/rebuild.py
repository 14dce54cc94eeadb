"""Rebuilding a network from the metadata of an untrusted file.

The metadata name an architecture and its arguments. Names must be registered and arguments plain (``arguments``), so
that building reads no other file, contacts no server and runs no code of the file; a network of the user's own is built
only if the user names it (``own``). The remaining risk is size: a few
bytes could request a terabyte of weights. So the network is first built without memory, on PyTorch's meta device, and
must not have more numbers than the file; then one empty image checks that the network accepts the file's image size
and gives one logit per class. Only then is the network really built.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saqcli.errors import CorruptArtifact, SaqError
from saqcli.models.arguments import check_arguments
from saqcli.models.load import build_architecture
from saqcli.models.own import OwnNetwork
from saqcli.models.preprocessing import Preprocessing
from saqcli.units import counted

MAX_CLASSES = 2**24  # and channels
MAX_SIDE = 4096  # of an image, in pixels
MAX_SCALED = 4 * MAX_SIDE  # of an image before the crop, in pixels
MAX_TRIED = 2**20  # pixels of an image in a real forward pass
CODES_A_BYTE = 4  # at 2 bits
REBUILT = (
    4  # some networks create layers and replace them: timm's pruned ones have twice the numbers while built
)
SPARE_TENSORS = 1000
SPARE_NUMBERS = 2**20
SCRATCH_NUMBERS = 2**27  # of tables that are computed and not saved, such as relative positions

_TOO_LARGE = "it describes a larger network than its tensors belong to"


def rebuild_from_metadata(
    build: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    own: OwnNetwork | None = None,
) -> nn.Module:
    """Build the network of a file, with random weights and in eval mode.

    Args:
        build: arguments of ``build_architecture``.
        preprocessing: result of ``Preprocessing.to_dict``; the network must accept such images.
        tensors: tensors of the same file, which limit the size of the network.
        own: the network that the user named, if any.

    Raises:
        SaqError: the metadata are not allowed, or contradict each other or the tensors.
    """
    channels, height, width = check_build_metadata(build, preprocessing).input_size
    numbers = sum(x.numel() * (CODES_A_BYTE if x.dtype == torch.uint8 else 1) for x in tensors.values())
    with _limited_size(len(tensors), numbers), torch.device("meta"):
        image = torch.empty(1, channels, height, width)
        shape = _build_on_meta(build, image, numbers + SCRATCH_NUMBERS, own)
    with _limited_size(len(tensors), numbers):
        model = build_architecture(build, own)
    if shape is None and height * width <= MAX_TRIED:  # the meta device failed, so a real pass decides
        shape = _output_shape(model, torch.zeros(1, channels, height, width)) or ()
    if shape not in (None, (1, build["num_classes"])):
        raise CorruptArtifact(
            f"{build['name']} does not turn images of {channels} x {height} x {width} into {build['num_classes']} "
            "logits"
        )
    return model


def check_build_metadata(build: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> Preprocessing:
    """Check the types and sizes of a file's metadata, and return its preprocessing.

    Raises:
        SaqError: a type is wrong, a size is too large, or both contradict each other.
    """
    kinds = {"name": str, "num_classes": int, "in_chans": int, "kwargs": dict}
    for key, kind in kinds.items():
        if type(build.get(key)) is not kind or (kind is int and not 1 <= build[key] <= MAX_CLASSES):
            raise CorruptArtifact(f"its build has no valid {key}")
    check_arguments(build["name"], build["kwargs"])
    images = Preprocessing.from_dict(preprocessing)
    channels, *sides = images.input_size
    if channels != build["in_chans"]:
        raise CorruptArtifact(
            f"its images have {counted(channels, 'channel')}, its network {build['in_chans']}: "
            "they do not belong to the same model"
        )
    if max(sides) > MAX_SIDE or max(sides) / images.crop_pct > MAX_SCALED:
        raise CorruptArtifact(
            f"its images of {sides[0]} x {sides[1]} pixels, a crop of {images.crop_pct:g}, are larger than "
            f"{MAX_SIDE} pixels per side or {MAX_SCALED} before the crop"
        )
    return images


def _build_on_meta(
    build: Mapping[str, Any], image: Tensor, most: int, own: OwnNetwork | None
) -> tuple[int, ...] | None:
    """The shape of the network's output on the device of the context; None if it cannot be built or run there.

    Some networks compute with values while they are built or run, which the meta device does not have. No tensor of
    the building may have more than ``most`` numbers.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _TensorLimit(most):
                model = build_architecture(build, own)
            return _output_shape(model, image)
    except CorruptArtifact:
        raise
    except SaqError:
        return None


@torch.no_grad()
def _output_shape(model: nn.Module, image: Tensor) -> tuple[int, ...] | None:
    """The shape of the logits of one image; None if the network does not accept it."""
    try:
        return tuple(model(image).shape)
    except Exception:  # a network may raise anything about its input
        return None


@contextmanager
def _limited_size(tensors: int, numbers: int) -> Iterator[None]:
    """Context that stops the building of a network with clearly more tensors or numbers, before they take memory.

    Raises:
        CorruptArtifact: the network is larger.
    """
    thread, seen = threading.get_ident(), {"tensors": 0, "parameters": 0, "buffers": 0}
    most_parameters, most_buffers = REBUILT * numbers + SPARE_NUMBERS, numbers + SCRATCH_NUMBERS
    most_tensors = REBUILT * tensors + SPARE_TENSORS

    def count(kind: str, value: Tensor | None) -> None:
        if (
            value is None or is_lazy(value) or threading.get_ident() != thread
        ):  # other threads are not limited
            return
        seen["tensors"] += 1
        seen[kind] += value.numel()
        if (
            seen["tensors"] > most_tensors
            or seen["parameters"] > most_parameters
            or seen["buffers"] > most_buffers
        ):
            raise CorruptArtifact(_TOO_LARGE)

    handles = (
        hooks.register_module_parameter_registration_hook(lambda _, __, value: count("parameters", value)),
        hooks.register_module_buffer_registration_hook(lambda _, __, value: count("buffers", value)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _TensorLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises ``CorruptArtifact`` when an operator returns a tensor with more than ``most`` numbers."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and check the sizes of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() > self.most:
                raise CorruptArtifact(_TOO_LARGE)
        return result
