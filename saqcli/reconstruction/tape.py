"""A forward pass as a list of operators that can be run in parts.

Reconstruction fits a piece of a network on its own, from one tensor to another, and for that the piece must be
runnable. Modules do not give the pieces: a forward adds, concatenates and reshapes between its modules. So one pass is
recorded: every operator with its operands, as the calls are intercepted by torch (``TorchFunctionMode``). A quantized
layer, a product of activations and a quantizer are each one operator, which calls the live module; parameters and
buffers are recorded by name. So a part of the tape, run on a model, computes what that model computes now, in eval mode
and with the same bits, under autograd, and also on a copy of the model.

Sizes are recorded as numbers. A tape is therefore of one batch size, and each size that is asked for is recorded once
(``Tapes``).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from saqcli.errors import UnsupportedModel
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.junctions.quantized import QuantizedJunction
from saqcli.quant.junctions.sharing import places_of, quantized_joins
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, quantized_layers, weights_taken
from saqcli.quant.products import OPERANDS

SIZES_KEPT = 8  # tapes of as many batch sizes are kept

_memory_of: Callable[[torch.UntypedStorage], StorageWeakRef] = StorageWeakRef  # its constructor has no types


@dataclass(frozen=True)
class Value:
    """A tensor of the pass, by number."""

    index: int


@dataclass(frozen=True)
class Named:
    """A parameter or buffer of the model, by qualified name."""

    name: str

    def of(self, model: nn.Module) -> Tensor:
        """The tensor itself."""
        owner, _, attribute = self.name.rpartition(".")
        found: Tensor = getattr(model.get_submodule(owner), attribute)
        return found


@dataclass(frozen=True)
class CalledModule:
    """A module that is called as a whole, by qualified name."""

    name: str

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of that module of ``model``."""
        return model.get_submodule(self.name)(*args, **kwargs)


@dataclass(frozen=True)
class ReadWeight:
    """Q(w) of a layer, whose weight a parent multiplies with."""

    name: str

    def __call__(self, model: nn.Module) -> Tensor:
        """The quantized weight of that layer of ``model``."""
        layer = model.get_submodule(self.name)
        assert isinstance(layer, QuantizedLayer)
        return layer.quantized_weight()


@dataclass(frozen=True)
class Function:
    """A function or tensor method of torch."""

    function: Callable[..., Any]

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Its result; the model is not needed."""
        return self.function(*args, **kwargs)


@dataclass
class Operator:
    """One step of the pass.

    Attributes:
        run: what is called, with the model first.
        args: positional operands, with ``Value`` and ``Named`` in the place of tensors.
        kwargs: the same by keyword.
        reads: values among the operands.
        makes: the value of every tensor in the result.
        writes: values that it changes in place, all views of the same memory included.
        layers: quantized layers, products and junctions that it computes with, in order of execution.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    writes: tuple[int, ...]
    layers: tuple[str, ...]

    def same_as(self, other: "Operator") -> bool:
        """Whether both do the same on values of the same numbers, whatever the sizes."""
        return (self.run, self.reads, self.makes, self.writes) == (
            other.run,
            other.reads,
            other.makes,
            other.writes,
        )


@dataclass
class Tape:
    """The operators of one pass for one batch size.

    Attributes:
        operators: in order of execution.
        shapes: of every value.
        floating: whether a value is of floating point.
        inputs: values of the tensors of the call.
        outputs: values of the tensors that the model returned.
    """

    operators: list[Operator] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    floating: list[bool] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    def run(
        self, model: nn.Module, indices: Sequence[int], given: Mapping[int, Tensor], wanted: Sequence[int]
    ) -> list[Tensor]:
        """Run some operators on ``model``.

        Args:
            model: the recorded model or a copy of it.
            indices: of the operators, in order.
            given: tensors of the values that these operators read and do not make.
            wanted: values to return.
        """
        last = {value: i for i in indices for value in self.operators[i].reads}
        known = dict(given)

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, Value):
                return known[leaf.index]
            return leaf.of(model) if isinstance(leaf, Named) else leaf

        for i in indices:
            operator = self.operators[i]
            args, kwargs = tree_map(operand, (operator.args, operator.kwargs))
            result = operator.run(model, *args, **kwargs)
            for value, tensor in zip(operator.makes, tensors_in(result), strict=True):
                known[value] = tensor
            del args, kwargs, result
            for value in (*operator.reads, *operator.makes):
                if last.get(value, -1) <= i and value not in wanted:
                    known.pop(value, None)
        return [known[value] for value in wanted]


class _Recorder(TorchFunctionMode):
    """Records the operators of one pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.tape = Tape()
        self._named = {id(tensor): name for name, tensor in _tensors_of(model)}
        self._values: Any = WeakTensorKeyDictionary()  # by tensor; a dead tensor's id may be used again
        self._memory: list[StorageWeakRef] = []  # of every value
        self._depth = 0

    def start(self, tensors: Iterable[Tensor]) -> None:
        """Record the tensors of the call."""
        self.tape.inputs = tuple(map(self._value, tensors))

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Record the tensors that the model returned."""
        self.tape.outputs = tuple(map(self._value, tensors))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and record it."""
        kwargs = kwargs or {}
        if self._depth:
            return func(*args, **kwargs)
        with self.recorded(Function(func), args, kwargs) as results:
            results.append(func(*args, **kwargs))
        return results[0]

    @contextmanager
    def recorded(
        self,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        layers: tuple[str, ...] = (),
    ) -> Iterator[list[Any]]:
        """Record what happens within the context as one operator; its result is appended to the list.

        Within the context of another operator nothing is recorded.
        """
        if self._depth:
            yield []
            return
        results: list[Any] = []
        with torch._C.DisableTorchFunction():
            tensors = tensors_in((args, kwargs))
            versions = [tensor._version for tensor in tensors]
            args, kwargs = tree_map(self._operand, (args, kwargs))
            reads = tuple(dict.fromkeys(self._values[each] for each in tensors if each in self._values))
        self._depth += 1
        try:
            yield results
        finally:
            self._depth -= 1
        with torch._C.DisableTorchFunction():
            changed = [t for t, version in zip(tensors, versions, strict=True) if t._version != version]
            outputs = tensors_in(results)
            if not outputs and not changed:
                return
            makes = tuple(map(self._value, outputs))
            writes = tuple(dict.fromkeys(value for tensor in changed for value in self._views(tensor)))
            self.tape.operators.append(Operator(run, args, kwargs, reads, makes, writes, layers))

    def _operand(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf in self._values:
            return Value(self._values[leaf])
        name = self._named.get(id(leaf))
        return leaf.detach() if name is None else Named(name)

    def _value(self, tensor: Tensor) -> int:
        if tensor not in self._values:
            self._values[tensor] = len(self.tape.shapes)
            self._memory.append(_memory_of(tensor.untyped_storage()))
            self.tape.shapes.append(tensor.shape)
            self.tape.floating.append(tensor.is_floating_point())
        found: int = self._values[tensor]
        return found

    def _views(self, tensor: Tensor) -> list[int]:
        """All values in the memory of ``tensor``."""
        memory = _memory_of(tensor.untyped_storage())
        return [value for value, each in enumerate(self._memory) if each.cdata == memory.cdata]


def _tensors_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _opaque(model: nn.Module) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The modules that are one operator each, with the quantized layers, products and junctions in them, by name."""
    layers: dict[str, nn.Module] = {**quantized_layers(model), **quantized_joins(model)}
    found: dict[str, tuple[nn.Module, tuple[str, ...]]] = {}
    for name, module in layers.items():
        inside = tuple(
            f"{name}.{each}".strip(".") for each, m in module.named_modules() if m in layers.values()
        )
        found[name] = module, inside
        for attribute in () if isinstance(module, QuantizedJunction) else OPERANDS.values():
            found[f"{name}.{attribute}".lstrip(".")] = getattr(module, attribute), (name,)
    return found


class _Copying(nn.Module):
    """In the place of a missing quantizer: its result is another value than its operand, as with a quantizer."""

    def forward(self, x: Tensor) -> Tensor:
        """A copy of ``x``."""
        return x.clone()


@contextmanager
def _recorded_alike(model: nn.Module) -> Iterator[None]:
    """Within the context a network in floating point has as many values in its pass as a quantized one."""
    places = [
        place for name, join in quantized_joins(model).items() for place in places_of(name, join).values()
    ]
    missing = [(place, place.quantizer) for place in places if isinstance(place.quantizer, nn.Identity)]
    try:
        for place, _ in missing:
            place.put(_Copying())
        yield
    finally:
        for place, identity in missing:
            place.put(identity)


@torch.no_grad()
def record(model: nn.Module, call: Call) -> Tape:
    """Run ``model`` once, in eval mode, and record its operators.

    Raises:
        Exception: whatever the forward raises.
    """
    with _recorded_alike(model):
        return _record(model, call)


def _record(model: nn.Module, call: Call) -> Tape:
    recorder = _Recorder(model)
    layers = quantized_layers(model)
    handles: list[Any] = []
    running: list[Any] = []  # contexts of the modules in execution
    order: dict[str, int] = {}  # of the first call of each of them

    def enter(name: str, inside: tuple[str, ...]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.setdefault(inside[0], len(order))
            context = recorder.recorded(CalledModule(name), args, kwargs, inside)
            running.append((context, context.__enter__()))

        return hook

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        context, results = running.pop()
        results.append(output)
        context.__exit__(None, None, None)

    def reading(name: str, layer: QuantizedLayer) -> Callable[[], Tensor]:
        def read() -> Tensor:
            order.setdefault(name, len(order))
            with recorder.recorded(ReadWeight(name), (), {}, (name,)) as results:
                results.append(type(layer).quantized_weight(layer))
            weight: Tensor = results[0]
            return weight

        return read

    try:
        for name, (module, inside) in _opaque(model).items():
            handles.append(module.register_forward_pre_hook(enter(name, inside), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        for name, layer in layers.items():
            vars(layer)["quantized_weight"] = reading(name, layer)
        with in_eval_mode(model), weights_taken(list(layers.values())), recorder:
            recorder.start(call.tensors)
            recorder.finish(tensors_in(call.run(model)))
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            vars(layer).pop("quantized_weight", None)
    for operator in recorder.tape.operators:
        operator.layers = tuple(sorted(operator.layers, key=lambda name: order.get(name, len(order))))
    return recorder.tape


class Tapes:
    """The tapes of a model for every batch size, recorded when they are needed."""

    def __init__(self, example: Call) -> None:
        """The samples of ``example`` are repeated for larger batches."""
        self._count = example.count
        self._example = example.map(torch.detach)
        self._tapes: dict[int, Tape] = {}

    def call(self, size: int) -> Call:
        """The example with ``size`` samples."""
        index = torch.arange(size) % max(self._count, 1)

        def repeated(tensor: Tensor) -> Tensor:
            if not tensor.dim() or len(tensor) != self._count:
                return tensor
            return tensor[index.to(tensor.device)]

        return self._example.map(repeated)

    def of(self, model: nn.Module, size: int) -> Tape:
        """The tape for batches of ``size``; ``model`` is run once if there is none yet.

        Raises:
            UnsupportedModel: the pass differs between batch sizes.
        """
        tape = self._tapes.pop(size, None)
        if tape is None:
            tape = record(model, self.call(size))
            self._check(tape)
        self._tapes[size] = tape
        while len(self._tapes) > SIZES_KEPT:
            del self._tapes[next(iter(self._tapes))]
        return tape

    def _check(self, tape: Tape) -> None:
        first = next(iter(self._tapes.values()), tape)
        same = len(first.operators) == len(tape.operators) and first.outputs == tape.outputs
        if not same or not all(
            one.same_as(other) for one, other in zip(first.operators, tape.operators, strict=True)
        ):
            raise UnsupportedModel("its forward differs between batch sizes")
