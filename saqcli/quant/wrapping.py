"""Turning a layer into its quantized sister and back, by swapping its class."""

from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.layer import FLOATS, QuantizedLayer
from saqcli.quant.routing import hand_out


def _read_weight(layer: QuantizedLayer) -> Tensor:
    try:
        weight = layer.quantized_weight()
    except (
        AttributeError
    ) as error:  # nn.Module would take it for a missing attribute and return the float weight
        raise RuntimeError(f"quantized weight of {layer.float_class.__name__}: {error}") from error
    return hand_out(weight, layer)


_classes: dict[type[nn.Module], type[QuantizedLayer]] = {}  # made so far; a class is made once


def quantized_class(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    """The quantized sister of a layer class."""
    if float_class not in _classes:
        _classes[float_class] = _make_class(float_class)
    return _classes[float_class]


def _make_class(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    mixin = _mixin(float_class)
    members: dict[str, Any] = {"float_class": float_class, "__module__": __name__, "__reduce_ex__": _reduce}
    if mixin is QuantizedLayer:
        members["weight"] = property(_read_weight)
    return type(f"Quantized{float_class.__name__}", (mixin, float_class), members)


def _mixin(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    from saqcli.quant.attention import special_mixin

    return special_mixin(float_class) or QuantizedLayer


def _weight_name(float_class: type[nn.Module]) -> str:
    return _mixin(float_class).weight_name


def _reduce(layer: QuantizedLayer, protocol: Any) -> Any:
    """Copy and pickle by float class, since the quantized class exists only at run time."""
    return _rebuild, (layer.float_class,), layer.__dict__


def _rebuild(float_class: type[nn.Module]) -> QuantizedLayer:
    cls = quantized_class(float_class)
    return cls.__new__(cls)


# Names that wrapping takes in a module, and keys that files add to its own.
_INSTANCE = (
    *("weight_quantizer", "input_quantizer", "perturbation", "routed", "tied_to", "followers", "answers_in"),
)


_OWN = (
    *_INSTANCE,
    *(
        "float_class",
        "weight_name",
        "latent_weight",
        "effective_weight",
        "quantized_weight",
        "bits",
        "channel_dim",
    ),
)


_KEYS = ("codes", "step")


def reason_for_float(module: nn.Module) -> str | None:
    """Why a convolution, linear layer or attention has to stay in floating point; None where it can be quantized."""
    kind, key = type(module), _weight_name(type(module))
    weight = module._parameters.get(key)
    if weight is None or isinstance(getattr(kind, key, None), property):
        return f"its {key} is not a parameter of its own"
    if weight.dtype not in FLOATS or (weight.dtype != torch.float32 and _mixin(kind) is not QuantizedLayer):
        return f"its {key} is {str(weight.dtype).removeprefix('torch.')}, not float32"
    tensors = {*module._parameters, *module._buffers}
    taken = [name for name in _OWN if hasattr(kind, name) or name in vars(module) or name in module._modules]
    taken += [name for name in _OWN if name in tensors] + [name for name in _KEYS if name in tensors]
    return f"it has a {taken[0]!r} of its own, a name that quantization needs" if taken else None


def wrap_layer(module: nn.Module) -> QuantizedLayer:
    """Turn ``module`` itself into a quantized layer that still computes in floating point."""
    dtype = own_type(module)
    if dtype != torch.float32:
        module.float()
    module.weight_quantizer = nn.Identity()
    module.input_quantizer = nn.Identity()
    module.__class__ = quantized_class(type(module))
    assert isinstance(module, QuantizedLayer)
    module.perturbation = None
    module.routed, module.tied_to, module.followers = False, (), ()
    module.answers_in = None if dtype == torch.float32 else dtype
    return module


def own_type(module: nn.Module) -> torch.dtype:
    """The type of a layer's weight."""
    return module._parameters[_weight_name(type(module))].dtype  # type: ignore[union-attr]


def unwrap_layer(layer: QuantizedLayer) -> nn.Module:
    """The same module object with its float class back; its latent weight as training left it."""
    dtype = layer.answers_in
    for name in _INSTANCE:
        delattr(layer, name)
    layer.__class__ = layer.float_class  # type: ignore[assignment]
    return layer if dtype is None else layer.to(dtype)
