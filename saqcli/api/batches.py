"""Batches of any loader: how a module is called on one, and where its labels are.

A loader is any iterable. A batch may be

    a tensor            the only argument of the module
    a tuple or list     as many arguments as the forward takes, then labels; or the arguments as one nested tuple first
    a dictionary        the arguments by name; labels under ``labels``, ``label``, ``targets``, ``target`` or ``y``

A function ``inputs`` from a batch to the arguments replaces these rules.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError, DataError
from saqcli.quant.calls import Call, tensors_in

LABELS = ("labels", "label", "targets", "target", "y")
IMAGES = ("images", "image", "pixel_values", "inputs", "input", "x")
Inputs = Callable[[Any], Any]  # from a batch to a tensor, a tuple of arguments or a dictionary of them
_HALF = (torch.float16, torch.bfloat16)


class BatchReader:
    """Turns the batches of a loader into calls of a module.

    Args:
        model: the module; its forward tells how many arguments it takes.
        inputs: from a batch to a tensor, a tuple of arguments or a dictionary of arguments; None for the rules of
            this file.
        arguments: number of positional arguments; None for those that the forward requires.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None = None, arguments: int | None = None) -> None:
        self._model, self._inputs = model, inputs
        self._names, required = _parameters(model)
        self._count = required if arguments is None else arguments

    def call(self, batch: Any) -> Call:
        """The arguments of the module for ``batch``, on the module's device; half precision becomes float32.

        Raises:
            DataError: the batch does not hold the arguments that the forward requires.
        """
        if isinstance(batch, Call):
            found = batch
        elif self._inputs is not None:
            found = _as_call(self._inputs(batch))
        elif isinstance(batch, Tensor):
            found = Call((batch,))
        elif isinstance(batch, Mapping):
            found = self._of_mapping(batch)
        elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes) and len(batch):
            found = self._of_sequence(batch)
        else:
            raise DataError(
                f"a batch of the loader is a {type(batch).__name__}: give tensors, tuples or dictionaries of tensors, "
                "or `inputs`, a function from a batch to the arguments of the module"
            )
        device = device_of(self._model)
        return found.to(device).map(lambda x: x.float() if x.dtype in _HALF else x)

    def labels(self, batch: Any) -> Tensor | None:
        """The labels in ``batch`` on the module's device; None if there are none."""
        found = None
        if isinstance(batch, Mapping):
            found = next((batch[name] for name in LABELS if name in batch), None)
        elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
            place = 1 if _nested(batch) else self._count
            found = batch[place] if len(batch) > place else None
        return found.to(device_of(self._model)) if isinstance(found, Tensor) else None

    def _of_sequence(self, batch: Sequence[Any]) -> Call:
        if _nested(batch):
            first = batch[0]
            spread = isinstance(first, Mapping) or self._count == len(first)
            return _as_call(first) if spread else Call((first,))
        if len(batch) < self._count:
            raise DataError(
                f"a batch of the loader holds {len(batch)} of the {self._count} inputs that "
                f"{type(self._model).__name__} takes ({', '.join(self._names[: self._count])}): give all of them, or "
                "`inputs`, a function from a batch to the arguments of the module"
            )
        return Call(tuple(batch[: self._count]))

    def _of_mapping(self, batch: Mapping[str, Any]) -> Call:
        named = {name: batch[name] for name in self._names if name in batch}
        if len(named) >= self._count and all(name in named for name in self._names[: self._count]):
            return Call((), named)
        if self._count == 1:
            key = next((name for name in IMAGES if name in batch), None)
            if key is not None:
                return Call((batch[key],))
        raise DataError(
            f"a batch of the loader has the keys {', '.join(map(str, batch))}, and {type(self._model).__name__} takes "
            f"{', '.join(self._names[: self._count])}: give `inputs`, a function from a batch to the arguments"
        )


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

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of all batches that have labels, where the module takes one tensor."""
        for batch, call in self._pairs():
            labels = self.reader.labels(batch)
            if labels is not None and len(call.tensors) == 1:
                yield call.tensors[0], labels

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


def class_scores(output: Any) -> Tensor | None:
    """``output`` if it is one tensor (N, classes), else None."""
    return output if isinstance(output, Tensor) and output.dim() == 2 else None


def _nested(batch: Sequence[Any]) -> bool:
    """Whether the first element holds the arguments."""
    return isinstance(batch[0], Mapping | tuple | list) and bool(tensors_in(batch[0]))


def _as_call(value: Any) -> Call:
    if isinstance(value, Mapping):
        return Call((), dict(value))
    if isinstance(value, tuple | list):
        return Call(tuple(value))
    return Call((value,))


def _parameters(model: nn.Module) -> tuple[list[str], int]:
    """Names of the arguments of a forward, and how many are required; one for a forward without a signature."""
    function = getattr(model, "float_class", type(model)).forward
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the forward of {type(model).__name__} has no signature: give `inputs`") from error
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in named if p.default is p.empty]
    return [p.name for p in named], max(len(required), 1)
