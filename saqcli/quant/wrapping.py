"""Conversion of a layer to its quantized class and back, by a class swap."""

from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.layer import FLOATS, QuantizedLayer
from saqcli.quant.routing import record_weight, within_module


def _read_weight(layer: QuantizedLayer) -> Tensor:
    try:
        with within_module():
            weight = layer.quantized_weight()
    except AttributeError as error:  # nn.Module would return the float weight for a missing attribute
        raise RuntimeError(f"quantized weight of {layer.float_class.__name__}: {error}") from error
    return record_weight(weight, layer)


def _read_bias(layer: QuantizedLayer) -> Any:
    if "bias" in layer._parameters:
        return layer.quantized_bias()
    found = next((each for each in (vars(layer), layer._buffers, layer._modules) if "bias" in each), None)
    if found is None:
        raise AttributeError(f"{layer.float_class.__name__} has no attribute bias")
    return found["bias"]


_classes: dict[type[nn.Module], type[QuantizedLayer]] = {}  # cache: one class per float class


def quantized_class(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    """The quantized subclass of a layer class."""
    if float_class not in _classes:
        _classes[float_class] = _make_class(float_class)
    return _classes[float_class]


def _make_class(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    mixin = _mixin(float_class)
    members: dict[str, Any] = {"float_class": float_class, "__module__": __name__, "__reduce_ex__": _reduce}
    if mixin is QuantizedLayer:
        members["weight"] = property(_read_weight)
        if not hasattr(float_class, "bias"):
            members["bias"] = property(_read_bias)
    return type(f"Quantized{float_class.__name__}", (mixin, float_class), members)


def _mixin(float_class: type[nn.Module]) -> type[QuantizedLayer]:
    from saqcli.quant.attention import custom_mixin

    return custom_mixin(float_class) or QuantizedLayer


def _weight_name(float_class: type[nn.Module]) -> str:
    return _mixin(float_class).weight_name


def _reduce(layer: QuantizedLayer, protocol: Any) -> Any:
    """Copy and pickle by float class, since the quantized class exists at run time only."""
    return _rebuild, (layer.float_class,), layer.__dict__


def _rebuild(float_class: type[nn.Module]) -> QuantizedLayer:
    cls = quantized_class(float_class)
    return cls.__new__(cls)


_ATTRIBUTES = (  # set by wrapping
    *(
        "weight_quantizer",
        "input_quantizer",
        "perturbation",
        "given_weight",
        "given_from",
        "routed",
        "tied_to",
        "followers",
        "tensor_read",
        "requantizes",
        "original_dtype",
        "short_steps",
    ),
)
_RESERVED = (
    *_ATTRIBUTES,
    *(
        "float_class",
        "weight_name",
        "latent_weight",
        "effective_weight",
        "quantized_weight",
        "quantized_input",
        "quantized_bias",
        "unit_of_sums",
        "least_step",
        "allot_step_bits",
        "bits",
        "channel_dim",
    ),
)
_FILE_KEYS = ("codes", "step")  # added by files to the tensors of a layer


def reason_for_float(module: nn.Module) -> str | None:
    """Why a convolution, linear layer or attention must stay in floating point; None if it can be quantized."""
    kind, key = type(module), _weight_name(type(module))
    weight = module._parameters.get(key)
    if weight is None or isinstance(getattr(kind, key, None), property):
        return f"its {key} is not a plain parameter"
    if weight.dtype not in FLOATS or (weight.dtype != torch.float32 and _mixin(kind) is not QuantizedLayer):
        return f"its {key} is {str(weight.dtype).removeprefix('torch.')}, not float32"
    tensors = {*module._parameters, *module._buffers}
    taken = [
        name for name in _RESERVED if hasattr(kind, name) or name in vars(module) or name in module._modules
    ]
    taken += [name for name in (*_RESERVED, *_FILE_KEYS) if name in tensors]
    return f"it has an attribute {taken[0]!r}, a name reserved for quantization" if taken else None


def wrap_layer(module: nn.Module) -> QuantizedLayer:
    """Turn ``module`` itself into a quantized layer that still computes in floating point."""
    dtype = weight_dtype(module)
    if dtype != torch.float32:
        module.float()
    module.weight_quantizer = nn.Identity()
    module.input_quantizer = nn.Identity()
    module.__class__ = quantized_class(type(module))
    assert isinstance(module, QuantizedLayer)
    module.perturbation = module.given_weight = module.given_from = None
    module.routed, module.tied_to, module.followers = False, (), ()
    module.tensor_read, module.requantizes = "", ()
    module.short_steps = None
    module.original_dtype = None if dtype == torch.float32 else dtype
    return module


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight."""
    return module._parameters[_weight_name(type(module))].dtype  # type: ignore[union-attr]


def unwrap_layer(layer: QuantizedLayer) -> nn.Module:
    """Restore the float class of the module; the latent weight keeps its trained value."""
    dtype = layer.original_dtype
    for name in _ATTRIBUTES:
        delattr(layer, name)
    layer.__class__ = layer.float_class  # type: ignore[assignment]
    return layer if dtype is None else layer.to(dtype)
