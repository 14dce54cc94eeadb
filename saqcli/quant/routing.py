"""Weights and activations that a parent multiplies in its forward.

A few networks (timm's beit, eva and swin_v2 attention, torchvision's Swin) never call their projection as a module:
``F.linear(x, self.qkv.weight)`` quantizes the weight but not the input. While a ``Route`` is active it records which
layer each weight was read from, and quantizes the other operand when that tensor reaches a linear or convolution
operator. The traced pass (``tracer``) finds the parents that need a route.

The same modules, and others, multiply activations with each other, add and concatenate them; where such products and
junctions are to be quantized, the route redirects them through ``products`` and ``junctions``.

Junctions are numbered within the forward of their owner itself. So the modules that it calls tell the route when they
start and end, by hooks (``tell_route``).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saqcli.quant import products
from saqcli.quant.junctions.kinds import kind_of
from saqcli.quant.junctions.quantized import Joins, junctions_of

if TYPE_CHECKING:
    from saqcli.quant.layer import QuantizedLayer

# Operators that multiply an input (argument 0) by a weight (argument 1).
WEIGHT_OPERATORS = {
    F.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}

_active: ContextVar["WeightRecorder | None"] = ContextVar("saq_weight_recorder", default=None)


def record_weight(weight: Tensor, layer: "QuantizedLayer") -> Tensor:
    """``weight``, recorded as that of ``layer`` by all active recorders."""
    recorder = _active.get()
    while recorder is not None:
        recorder.record(weight, layer)
        recorder = recorder.outer
    return weight


@contextmanager
def within_module() -> Iterator[None]:
    """Within the context operators are not those of the forward of a routed parent."""
    route = _active.get()
    if not isinstance(route, Route):
        yield
        return
    route.inside += 1
    try:
        yield
    finally:
        route.inside -= 1


def _entered(module: nn.Module, args: Any) -> None:
    route = _active.get()
    if isinstance(route, Route):
        route.inside += 1


def _left(module: nn.Module, args: Any, output: Any) -> None:
    route = _active.get()
    if isinstance(route, Route):
        route.inside -= 1


def tell_route(module: nn.Module) -> None:
    """Have ``module`` tell the route of the parent that calls it when it starts and ends; once is enough."""
    if _entered not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_entered)
        module.register_forward_hook(_left, always_call=True)


def tell_no_route(module: nn.Module) -> None:
    """Undo ``tell_route``."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_entered, _left)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


class WeightRecorder(TorchFunctionMode):
    """Records the layer of every weight tensor that is read while it is active.

    Attributes:
        outer: the recorder that was active before.
    """

    outer: "WeightRecorder | None" = None

    def __init__(self) -> None:
        super().__init__()
        self._recorded: list[tuple[Tensor, QuantizedLayer]] = []

    def record(self, weight: Tensor, layer: "QuantizedLayer") -> None:
        """Called by ``record_weight``."""
        self._recorded.append((weight, layer))

    def owner(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "QuantizedLayer | None":
        """The layer whose weight this operator call multiplies with, or None."""
        if func not in WEIGHT_OPERATORS:
            return None
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return next((layer for tensor, layer in reversed(self._recorded) if tensor is weight), None)

    def __enter__(self) -> Self:
        self.outer = _active.get()
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _active.reset(self._token)
        self.outer = None
        self._recorded.clear()


class Route(WeightRecorder):
    """Quantizes the operands that a parent joins: inputs of routed layers, operands of its products and junctions.

    Attributes:
        inside: modules that the parent has called and that are still running.
    """

    def __init__(self, owned: nn.ModuleDict | None = None, joined: nn.ModuleDict | None = None) -> None:
        """``owned`` are the products, ``joined`` the junctions of the parent, by position in its forward."""
        super().__init__()
        self._multiply = None if owned is None else products.Multiplications(owned)
        self._join = None if joined is None else Joins(joined)
        self.inside = 0

    @property
    def attention_weights(self) -> Tensor | None:
        """Attention weights of the last attention on quantized operands, (..., L, S), or None."""
        return None if self._multiply is None else self._multiply.attention_weights

    def record(self, weight: Tensor, layer: "QuantizedLayer") -> None:
        """Record the routed layers of the parent only: the others quantize their input in their own forward."""
        if layer.routed and _active.get() is self:
            super().record(weight, layer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, on a quantized input if the weight is a routed one, or on quantized operands."""
        kwargs = kwargs or {}
        if self._multiply is not None and func in products.OPERATORS:
            return self._multiply(func, args, kwargs, owned=_active.get() is self)
        if self._join is not None and not self.inside and _active.get() is self and kind_of(func):
            return self._join(func, args, kwargs)
        layer = self.owner(func, args, kwargs)
        if layer is not None:
            args, kwargs = products.operands_first(args, kwargs, ("weight",))
            args = (layer.quantized_input(args[0]), *args[1:])
        return func(*args, **kwargs)


class RoutedParent(nn.Module):
    """Mixin of a module that multiplies with its children's weights, or activations with each other."""

    float_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the float class under a ``Route``."""
        with Route(products.products_of(self), junctions_of(self)):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by float class, as quantized layers do."""
        return _rebuild_parent, (self.float_class,), self.__dict__


_classes: dict[type[nn.Module], type[RoutedParent]] = {}  # cache: one class per float class


def routed_class(float_class: type[nn.Module]) -> type[RoutedParent]:
    """The routed subclass of a module class."""
    if float_class not in _classes:
        members = {"float_class": float_class, "__module__": __name__}
        _classes[float_class] = type(f"Routed{float_class.__name__}", (RoutedParent, float_class), members)
    return _classes[float_class]


def _rebuild_parent(float_class: type[nn.Module]) -> RoutedParent:
    cls = routed_class(float_class)
    return cls.__new__(cls)
