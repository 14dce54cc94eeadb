"""Batches of any loader: how a module is called on one, and where its labels are.

A loader is any iterable. A batch may be

    a tensor            the only argument of the module
    a tuple or list     as many arguments as the forward requires, or as many as the example had, then labels; or the
                        arguments as one nested tuple first
    a dictionary        the arguments by name; labels under ``labels``, ``label``, ``targets``, ``target`` or ``y``

A function ``inputs`` from a batch to the arguments replaces these rules. Labels are numbers of classes, integers (N,).
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.api.info import info
from saqcli.errors import ConfigError, DataError
from saqcli.quant.calls import Call, tensors_in

LABELS = ("labels", "label", "targets", "target", "y")
IMAGES = ("images", "image", "pixel_values", "inputs", "input", "x")
Inputs = Callable[[Any], Any]  # from a batch to a tensor, a tuple of arguments or a dictionary of them
IGNORED = -100  # label that cross-entropy leaves out
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BatchReader:
    """Turns the batches of a loader into calls of a module.

    Args:
        model: the module; its forward tells how many arguments it takes.
        inputs: from a batch to a tensor, a tuple of arguments or a dictionary of arguments; None for the rules of
            this file.
        arguments: number of arguments; None for that of a quantized module's example, or those that the forward
            requires.
        dtype: of floating-point inputs; None for that of the module's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs | None = None,
        arguments: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._inputs, self._dtype = model, inputs, dtype
        self._takes = _signature(model)
        quantized = info(model).quantization
        if arguments is None and quantized is not None:
            arguments = quantized.arguments
        self._count = self._takes.required if arguments is None else arguments

    def call(self, batch: Any) -> Call:
        """The arguments of the module for ``batch``, on its device; floating-point ones in the dtype of its parameters.

        Raises:
            DataError: the batch does not hold the arguments that the forward requires, or images are bytes.
        """
        if isinstance(batch, Call):
            found = batch
        elif self._inputs is not None:
            found = self._as_call(self._inputs(batch))
        else:
            found = self._by_rules(batch)
            _refuse_bytes(found)
        device, dtype = device_of(self._model), self._dtype or _dtype_of(self._model)
        return found.to(device).map(lambda x: x.to(dtype) if x.dtype in _FLOATS else x)

    def _by_rules(self, batch: Any) -> Call:
        if isinstance(batch, Tensor):
            return self._as_call(batch)
        if isinstance(batch, Mapping):
            return self._of_mapping(batch)
        if isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
            return self._of_sequence(batch)
        raise DataError(
            f"a batch of the loader is a {type(batch).__name__}: give tensors, tuples or dictionaries of tensors, "
            "or `inputs`, a function from a batch to the arguments of the module"
        )

    def labels(self, batch: Any) -> Tensor | None:
        """The labels in ``batch`` on the module's device; None if there are none."""
        found = None
        if isinstance(batch, Mapping):
            found = next((batch[name] for name in LABELS if name in batch), None)
        elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
            place = 1 if _nested(batch) else self._count
            found = batch[place] if len(batch) > place else None
        return found.to(device_of(self._model)) if isinstance(found, Tensor) else None

    def known_labels(self, batch: Any) -> Tensor:
        """As ``labels``.

        Raises:
            DataError: there are none.
        """
        labels = None if isinstance(batch, Call) else self.labels(batch)
        if labels is None:
            raise DataError(
                "a batch of the loader has no labels: give batches (images, labels), or a dictionary with both"
            )
        return labels

    def _of_sequence(self, batch: Sequence[Any]) -> Call:
        if _nested(batch):
            first, names = batch[0], self._takes.names
            if isinstance(first, Mapping):
                spread = not names or any(name in first for name in names)
            else:
                spread = self._count == len(first)
            return self._as_call(first if spread else (first,))
        if len(batch) < self._count:
            raise DataError(
                f"a batch of the loader holds {len(batch)} of the {self._count} inputs that "
                f"{type(self._model).__name__} takes ({', '.join(self._wanted)}): give all of them, or `inputs`, a "
                "function from a batch to the arguments of the module"
            )
        return self._as_call(tuple(batch[: self._count]))

    def _of_mapping(self, batch: Mapping[str, Any]) -> Call:
        named = {name: batch[name] for name in self._takes.names if name in batch}
        if len(named) >= self._count and all(name in named for name in self._wanted):
            return Call((), named)
        if self._count == 1:
            key = next((name for name in IMAGES if name in batch), None)
            if key is not None:
                return self._as_call(batch[key])
        raise DataError(
            f"a batch of the loader has the keys {', '.join(map(str, batch))}, and {type(self._model).__name__} takes "
            f"{', '.join(self._wanted)}: give `inputs`, a function from a batch to the arguments"
        )

    @property
    def _wanted(self) -> list[str]:
        """Names of the arguments that a batch must hold."""
        return self._takes.names_of(self._count)

    def _as_call(self, value: Any) -> Call:
        """A tensor, a tuple of arguments in order, or a dictionary of them as a call."""
        if isinstance(value, Mapping):
            return Call((), dict(value))
        if not isinstance(value, tuple | list):
            value = (value,)
        keywords = self._takes.keywords if len(value) >= self._takes.required else ()
        places = len(value) - len(keywords)
        return Call(tuple(value[:places]), dict(zip(keywords, value[places:], strict=True)))


def device_of(model: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


class Calls:
    """The calls of a module on the first samples of a loader, any number of times.

    Batches of an iterator, which can be read once only, are kept.

    Args:
        loader: any iterable of batches.
        reader: turns batches into calls.
        samples: read until this many, whole batches; None for all.

    Attributes:
        loader: the batches; a list if ``loader`` was an iterator.
        reader: turns batches into calls.
    """

    def __init__(self, loader: Iterable[Any], reader: BatchReader, samples: int | None = None) -> None:
        self.loader, self.reader, self._samples = loader, reader, samples
        if iter(loader) is loader:
            self.loader = [batch for batch, _ in self._pairs()]

    def __iter__(self) -> Iterator[Call]:
        for _, call in self._pairs():
            yield call

    def limited(self, samples: int) -> "Calls":
        """The same, read until ``samples`` samples."""
        return Calls(self.loader, self.reader, samples)

    def labelled(self, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of all batches that have labels, where the module takes one tensor; as ``labelled_images``.

        Raises:
            DataError: labels are no classes.
        """
        for batch, call in self._pairs():
            labels = self.reader.labels(batch)
            if labels is not None and len(call.tensors) == 1:
                images, labels = labelled_images(call.tensors[0], labels, classes)
                if len(labels):
                    yield images, labels

    def _pairs(self) -> Iterator[tuple[Any, Call]]:
        seen = 0
        for batch in self.loader:
            call = self.reader.call(batch)
            yield batch, call
            seen += call.count
            if self._samples is not None and seen >= self._samples:
                return
        if not seen:
            raise DataError("the loader has no samples: give at least one batch")


def class_labels(
    labels: Tensor, classes: int, count: int, *, shares: bool = False, skipped: bool = False
) -> Tensor:
    """Labels as int64 (N,), or as shares (N, classes) in float32.

    Args:
        labels: of a batch.
        classes: how many there are.
        count: samples of the batch.
        shares: whether shares are allowed.
        skipped: whether labels below 0 are, which are left out; otherwise -100 alone, as in PyTorch.

    Raises:
        DataError: these are no classes of the batch.
    """
    if labels.is_floating_point():
        if shares and labels.shape == (count, classes):
            return labels.float()
    elif labels.shape == (count,) and not labels.is_complex():
        labels = labels.long()
        wrong = labels >= classes
        if not skipped:
            wrong = wrong | (labels < 0) & (labels != IGNORED)
        if wrong.any():
            raise DataError(
                f"a batch of the loader has the label {int(labels[wrong][0])}, and the module returns {classes} "
                f"scores: labels are 0 to {classes - 1}"
            )
        return labels
    dtype, shape = str(labels.dtype).removeprefix("torch."), tuple(labels.shape)
    other = f", or their shares, floats ({count}, {classes}), or a `loss` for these labels" if shares else ""
    raise DataError(
        f"the labels of a batch are {dtype} of {shape}, which are no classes: give integers ({count},), from 0 to "
        f"{classes - 1}{other}"
    )


def labelled_images(images: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Images and their classes; unreadable images, with a label below 0, are left out.

    Raises:
        DataError: labels are no classes.
    """
    labels = class_labels(labels, classes, len(images), skipped=True)
    readable = labels >= 0
    return (images, labels) if readable.all() else (images[readable], labels[readable])


def class_scores(output: Any) -> Tensor | None:
    """``output`` if it is one tensor (N, classes), else None."""
    return output if isinstance(output, Tensor) and output.dim() == 2 else None


def _nested(batch: Sequence[Any]) -> bool:
    """Whether the first element holds the arguments."""
    return isinstance(batch[0], Mapping | tuple | list) and bool(tensors_in(batch[0]))


def _refuse_bytes(call: Call) -> None:
    images = next(iter(call.tensors), None)
    if images is not None and images.dtype == torch.uint8 and images.dim() > 2:
        raise DataError(
            "the images of a batch are uint8: convert them to floats as the network was trained with, such as "
            "images.float() / 255, or give `inputs`, a function from a batch to the arguments of the module"
        )


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a module's floating-point parameters; float32 without any."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return first if first in _FLOATS else torch.float32


@dataclass(frozen=True)
class _Signature:
    """The arguments of a forward.

    Attributes:
        positional: names of those that may be given by position.
        keywords: names of required ones that are given by name only.
        optional: names of further ones that are given by name only.
        required: how many a call needs, at least one.
        open: whether it takes any number of them.
    """

    positional: list[str]
    keywords: list[str]
    optional: list[str]
    required: int
    open: bool = False

    @property
    def names(self) -> list[str]:
        """All names, in order."""
        return [*self.positional, *self.keywords, *self.optional]

    def names_of(self, count: int) -> list[str]:
        """Names of ``count`` arguments that are given in order."""
        return [*self.positional[: max(count - len(self.keywords), 0)], *self.keywords]

    def holds(self, count: int) -> bool:
        """Whether it takes ``count`` arguments in order."""
        return self.open or count <= len(self.positional) + len(self.keywords)


def example_arguments(model: nn.Module, example: Any) -> int | None:
    """How many arguments an example gives: all that it holds, or None for a batch with labels or by name.

    A tuple and a list mean the same: the arguments, unless they are more than the forward takes.
    """
    given = isinstance(example, tuple | list) and _signature(model).holds(len(example))
    return len(example) if given else None


def _signature(model: nn.Module) -> _Signature:
    """The arguments of a module's forward; one for a forward without names.

    Raises:
        ConfigError: the forward has no signature.
    """
    if isinstance(model, torch.jit.ScriptModule):
        forward: Any = model.forward
        arguments = forward.schema.arguments[1:]
        names = [argument.name for argument in arguments]
        return _Signature(names, [], [], max(sum(not a.has_default_value() for a in arguments), 1))
    parameters = _parameters(model)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    keywords = [p.name for p in by_name if p.default is p.empty]
    return _Signature(
        [p.name for p in named],
        keywords,
        [p.name for p in by_name if p.default is not p.empty and p.name not in LABELS],
        max(sum(p.default is p.empty for p in named) + len(keywords), 1),
        any(p.kind is p.VAR_POSITIONAL for p in parameters),
    )


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a forward, that of the object itself if it was patched; a patch that passes all on has none."""
    own = vars(model).get("forward")
    try:
        if own is not None:
            patched = list(inspect.signature(own).parameters.values())
            if any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in patched):
                return patched
        forward = getattr(model, "float_class", type(model)).forward
        return list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the forward of {type(model).__name__} has no signature: give `inputs`") from error
