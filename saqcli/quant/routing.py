"""Weights that a parent takes: ``F.linear(x, self.qkv.weight)`` quantizes the weight but not the input.

A few networks (timm's beit, eva and swin_v2 attention, torchvision's Swin) never call their projection as a
module. Reading ``weight`` hands out a tensor; while a ``Route`` is active it remembers who handed it out, and
quantizes the other operand when that very tensor reaches a linear or convolution operator. Which parents need
a route is found in the traced pass (``trace.py``), not listed.

The same modules, and others, multiply activations with each other; where those products are to be quantized, the
route takes them through ``products``.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saqcli.quant import products

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

_active: ContextVar["HandedOut | None"] = ContextVar("saq_handed_out", default=None)


def hand_out(weight: Tensor, layer: "QuantizedLayer") -> Tensor:
    """``weight``, remembered as ``layer``'s by the innermost active listener."""
    listener = _active.get()
    if listener is not None:
        listener.remember(weight, layer)
    return weight


class HandedOut(TorchFunctionMode):
    """Hears which layer handed out which weight tensor while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self._handed: list[tuple[Tensor, QuantizedLayer]] = []

    def remember(self, weight: Tensor, layer: "QuantizedLayer") -> None:
        """Called by ``hand_out``."""
        self._handed.append((weight, layer))

    def owner(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "QuantizedLayer | None":
        """The layer whose weight this operator call multiplies with."""
        if func not in WEIGHT_OPERATORS:
            return None
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return next((layer for tensor, layer in reversed(self._handed) if tensor is weight), None)

    def __enter__(self) -> Self:
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _active.reset(self._token)
        self._handed.clear()


class Route(HandedOut):
    """Quantizes what a parent multiplies itself: inputs of routed layers, and both operands of its own products."""

    def __init__(self, own: nn.ModuleDict | None = None) -> None:
        """``own`` are the products of the parent, by position in its forward."""
        super().__init__()
        self._multiply = None if own is None else products.Multiplications(own)

    @property
    def attention_weights(self) -> Tensor | None:
        """Of the last attention over quantized operands, (..., L, S); None where there was none."""
        return None if self._multiply is None else self._multiply.attention_weights

    def remember(self, weight: Tensor, layer: "QuantizedLayer") -> None:
        """Only routed layers concern us: the others quantize their input in their own forward."""
        if layer.routed:
            super().remember(weight, layer)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The operator, over a quantized input where the weight is a routed one, or over quantized operands."""
        kwargs = kwargs or {}
        if self._multiply is not None and func in products.OPERATORS:
            return self._multiply(func, args, kwargs, mine=_active.get() is self)
        layer = self.owner(func, args, kwargs)
        if layer is not None:
            args, kwargs = products.in_order(args, kwargs, ("weight",))
            args = (layer.input_quantizer(args[0]), *args[1:])
        return func(*args, **kwargs)


class RoutedParent(nn.Module):
    """Mixin of a module that multiplies with its children's weights itself, or activations with each other."""

    float_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward under a ``Route``."""
        with Route(products.own_products(self)):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by float class, as quantized layers do."""
        return _rebuild_parent, (self.float_class,), self.__dict__


_classes: dict[type[nn.Module], type[RoutedParent]] = {}  # made so far; a class is made once


def routed_class(float_class: type[nn.Module]) -> type[RoutedParent]:
    """The routed sister of a module class."""
    if float_class not in _classes:
        members = {"float_class": float_class, "__module__": __name__}
        _classes[float_class] = type(f"Routed{float_class.__name__}", (RoutedParent, float_class), members)
    return _classes[float_class]


def _rebuild_parent(float_class: type[nn.Module]) -> RoutedParent:
    cls = routed_class(float_class)
    return cls.__new__(cls)
