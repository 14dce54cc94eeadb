"""Batch norms absorbed by the layers in front of them, before quantizers are installed.

A norm in eval mode multiplies the output of a layer by a gain and adds an offset, channel by channel:

    y = gain * (W x + b - mean) / sqrt(var + eps) + offset = W' x + b'
    W' = W * gain / sqrt(var + eps)          b' = (b - mean) * gain / sqrt(var + eps) + offset

Sums on the grid of short steps would leave it by the multiplication. So the factor goes into the float weight and the
rest into the bias, and nothing is left of the norm but an activation that it may contain (timm's ``BatchNormAct2d``).
The float network computes the same, to rounding.

A norm is absorbed if it reads the output of a layer that runs itself, and nothing else reads that output. Norms in
front of a layer (DenseNet, pre-activation networks) and norms of layers that share their weight stay as they are.

Source: Jacob et al., arXiv:1712.05877, section 3.2. There batch statistics keep being computed in training; here they
are those of the pretrained network from then on.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saqcli.errors import UnsupportedModel
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, is_convolution, quantized_layers, stores_codes

BatchNorm = nn.modules.batchnorm._BatchNorm
_AFTER = ("drop", "act")  # what norms with an activation run after themselves, in this order


class AbsorbedNorm(nn.Module):
    """What is left of a batch norm that a layer has absorbed.

    Attributes:
        layer: name of that layer.
        after: what the norm's class runs after the norm itself.
    """

    def __init__(self, layer: str, after: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layer = layer
        self.after = nn.ModuleList(after)

    def forward(self, x: Tensor) -> Tensor:
        """``x``, activated where the norm had an activation."""
        for module in self.after:
            x = module(x)
        return x


class _Readers(TorchFunctionMode):
    """Finds norms that alone read the output of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, str] = {}
        self.readers: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.found: dict[str, list[str]] = {}
        self._alive: list[Tensor] = []  # ids of dead tensors would be reused

    def made(self, layer: str, output: Any) -> None:
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if isinstance(output, Tensor):
            self.outputs[id(output)] = layer
            self._alive.append(output)

    def normalizes(self, norm: str, x: Any) -> None:
        layer = self.outputs.get(id(x))
        self.found.setdefault(norm, []).append(layer or "")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if tensors_in(output):  # not the shape, or the number of dimensions
            for each in tensors_in((args, kwargs)):
                if (layer := self.outputs.get(id(each))) is not None:
                    self.readers[layer] = self.readers.get(layer, 0) + 1
        return output


@torch.no_grad()
def absorb_norms(model: nn.Module, example: Tensor | Call) -> dict[str, str]:
    """Fold the batch norms of a wrapped float model into the layers in front of them, in place.

    Args:
        model: from ``convert.wrap``, without quantizers; its mode is restored.
        example: one call of it.

    Returns:
        The layer that absorbed each norm, by name of the norm, in order of execution.

    Raises:
        UnsupportedModel: the model does not run on the example.
    """
    layers = quantized_layers(model)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    readers, handles = _Readers(), []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(lambda _, __, out, name=name: readers.made(name, out)))
    for name, norm in norms.items():
        handles.append(
            norm.register_forward_pre_hook(lambda _, given, name=name: readers.normalizes(name, given[0]))
        )
    try:
        with in_eval_mode(model), readers:
            output = Call.of(example).run(model)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedModel(f"it does not run on an example ({reason})") from error
    finally:
        for handle in handles:
            handle.remove()
    returned = {readers.outputs.get(id(each)) for each in tensors_in(output)}
    chosen = {}
    for name, (made, *more) in readers.found.items():
        alone = made and not more and readers.readers.get(made) == 1 and readers.calls[made] == 1
        if alone and made not in returned and _fits(norms[name], layers[made], layers.values()):
            chosen[name] = made
    for name, made in chosen.items():
        _fold(norms[name], layers[made])
    replace_norms(model, chosen)
    return chosen


def replace_norms(model: nn.Module, absorbed: Mapping[str, str]) -> None:
    """Give the layers biases and take the norms away, without folding: for a model whose tensors will be loaded.

    Args:
        model: wrapped.
        absorbed: by name of the norm, the layer, as from ``absorb_norms``.

    Raises:
        UnsupportedModel: the model has no such norm or layer.
    """
    layers = quantized_layers(model)
    for name, layer in absorbed.items():
        parent, _, attribute = name.rpartition(".")
        try:
            norm = model.get_submodule(name)
        except AttributeError:
            norm = None
        if isinstance(norm, AbsorbedNorm) and norm.layer == layer in layers:
            continue
        if not isinstance(norm, BatchNorm) or layer not in layers:
            raise UnsupportedModel(f"it has no norm {name} that {layer} could absorb")
        _ensure_bias(layers[layer])
        setattr(model.get_submodule(parent), attribute, AbsorbedNorm(layer, _after(norm) or ()))


def absorbed_norms(model: nn.Module) -> dict[str, str]:
    """The layers that absorbed norms, by name of the norm."""
    return {name: module.layer for name, module in model.named_modules() if isinstance(module, AbsorbedNorm)}


def _after(norm: nn.Module) -> list[nn.Module] | None:
    """The modules that a norm runs after itself; None for a class whose forward is not known."""
    if type(norm).forward is BatchNorm.forward:
        return []
    children = dict(norm.named_children())
    known = any(base.__module__.startswith("timm.layers.") for base in type(norm).__mro__)
    if known and set(children) <= set(_AFTER):
        return [children[name] for name in _AFTER if name in children]
    return None


def _fits(norm: Any, layer: QuantizedLayer, layers: Iterable[QuantizedLayer]) -> bool:
    """Whether a norm is a fixed factor and offset for each output channel of the layer."""
    owned = not layer.tied_to and not any(layer in other.tied_to for other in layers)
    plain = stores_codes(layer) and layer.original_dtype is None and "bias" in layer._parameters
    linear = issubclass(layer.float_class, nn.Linear)
    channels = layer.latent_weight().shape[layer.channel_dim]
    return (
        owned
        and plain
        and not layer.routed
        and (is_convolution(layer) or linear)
        and norm.running_mean is not None
        and len(norm.running_mean) == channels
        and _after(norm) is not None
    )


def _fold(norm: Any, layer: QuantizedLayer) -> None:
    weight = layer.latent_weight()
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    offset = -norm.running_mean.double()
    bias = layer._parameters["bias"]
    if bias is not None:
        offset = offset + bias.double()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    offset = offset * factor
    if norm.bias is not None:
        offset = offset + norm.bias.double()
    along = [-1 if d == layer.channel_dim else 1 for d in range(weight.dim())]
    weight.copy_(weight.double() * factor.view(along))
    _ensure_bias(layer).copy_(offset)


def _ensure_bias(layer: QuantizedLayer) -> nn.Parameter:
    bias = layer._parameters["bias"]
    if bias is None:
        weight = layer.latent_weight()
        bias = nn.Parameter(weight.new_zeros(weight.shape[layer.channel_dim]), weight.requires_grad)
        layer._parameters["bias"] = bias
    return bias
