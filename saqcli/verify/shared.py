"""What the proofs of several files of one model share, computed once: its trace, its exact form, its reference logits.

Style by style, the larger part of a proof would be the same work again: a graph is traced for every style, though most
lower the same one, and the model is run in float64 for every file, though images and model are the same.

The reference is the model in float64, where the order of sums does not matter. PyTorch's convolutions are slow there.
Sums of products of codes are integers, though, and float32 adds them exactly, in any order, as long as none exceeds
2**24. Such layers are computed in float32 and scaled in float64 (``sum_codes_exactly``).
"""

import copy
import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from saqcli.export.integers import EXACT_FLOAT
from saqcli.export.operators import frozen_copy
from saqcli.export.style import OnnxStyle
from saqcli.quant import convert
from saqcli.quant.grid import Grid, codes_of
from saqcli.quant.layer import QuantizedLayer, quantized_layers, stores_codes, weight_owners
from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.routing import within_module

PART = 16  # images of a pass in float64: what it computes stays in the cache
_ROUNDING = 1e-10  # of the largest magnitude; float64 sums in another order stay far below
# Forward passes that are linear in input and weight but for the bias, and pad with zeros or copies.
_LINEAR_FORWARDS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
_LINEAR_CLASSES = ("timm.layers.conv2d_same.Conv2dSame",)

Predict = Callable[[Tensor], Tensor]


class SharedProof:
    """A quantized model, and what proofs of its files have in common.

    Attributes:
        model: on the CPU, in eval mode; it must not change while this object is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pytorch: Predict = Remembered(model)
        self._forms: dict[Any, nn.Module] = {}
        self._traces: dict[Any, onnx.ModelProto] = {}
        self._reference: Predict | None = None

    @cached_property
    def frozen(self) -> nn.Module:
        """The model with placeholders instead of quantizers; not to be changed."""
        return frozen_copy(self.model)

    def form(self, exporter: OnnxStyle, example: Tensor) -> nn.Module:
        """What the exporter's style traces, in eval mode; ``example`` as in ``OnnxStyle.form``."""
        key = type(exporter).form
        if key not in self._forms:
            frozen = frozen_copy(self.model) if exporter.deployed else self.frozen  # whose biases change
            self._forms[key] = exporter.form(frozen, example).eval()
        return self._forms[key]

    def graph(self, exporter: OnnxStyle, example: Tensor) -> ir.Model:
        """The traced graph of the exporter's style, with placeholders, to be lowered.

        From the second style on it is a copy, whose intermediate values may have other names.

        Raises:
            UnsupportedModel: the model cannot be traced.
        """
        key = type(exporter).form, type(exporter).trace
        if key in self._traces:
            return ir.from_proto(self._traces[key])
        traced = exporter.trace(self.form(exporter, example), example)
        self._traces[key] = ir.to_proto(traced)
        return traced

    def reference(self, images: Tensor) -> Predict:
        """The model in float64; the model itself if its forward requires float32. ``images`` are tried."""
        if self._reference is None:
            found = in_float64(self.model, images[:1])
            self._reference = self.pytorch if found is self.model else Remembered(found)
        return self._reference


class Remembered:
    """A function of images whose answers are kept, by the hash of the images."""

    def __init__(self, predict: Predict) -> None:
        self.predict = predict
        self._answers: dict[bytes, Tensor] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """The answer, in the dtype of ``predict``."""
        numbers = images.contiguous().numpy().tobytes()
        key = hashlib.blake2b(numbers, digest_size=16).digest() + repr(tuple(images.shape)).encode()
        if key not in self._answers:
            self._answers[key] = self.predict(images).clone()
        return self._answers[key]


def in_float64(model: nn.Module, images: Tensor) -> Predict:
    """``model`` in float64, where summation order does not matter.

    Args:
        model: quantized, on the CPU, in eval mode; not changed.
        images: (N, C, H, W), to try it on.

    Returns:
        A function from images to logits, float64; ``model`` itself if its forward requires float32.
    """
    double = copy.deepcopy(model)
    convert.fold(double)  # gives the codes of the file; transformations round differently in float64
    double.double()
    try:
        with torch.no_grad():
            for layer in weight_owners(double):  # quantized once, for all passes
                layer.given_weight = layer.quantized_weight().detach()
            sum_codes_exactly(double, images.double())
    except RuntimeError:  # its forward creates or requires float32
        return model
    return lambda images: torch.cat([double(part.double()) for part in torch.split(images, PART)])


def sum_codes_exactly(double: nn.Module, images: Tensor) -> list[str]:
    """Let convolutions and linear layers add products of codes in float32 where that is exact; in place.

    A layer is changed if no sum of its codes can exceed 2**24. One that answers differently on ``images`` afterwards,
    by more than float64 rounds, is left as it was.

    Args:
        double: a quantized model in float64, in eval mode.
        images: (N, C, H, W), float64.

    Returns:
        The names of the changed layers.
    """
    layers = quantized_layers(double)
    shared = {id(owner) for layer in layers.values() for owner in layer.tied_to}
    sums = {
        name: found
        for name, layer in layers.items()
        if not layer.tied_to and id(layer) not in shared and (found := _IntegerSum.of(layer)) is not None
    }
    agrees: dict[str, list[bool]] = {name: [] for name in sums}  # of every call

    def compare(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            assert isinstance(layer, QuantizedLayer)
            agrees[name].append(False)
            # no operator here is one of the parent's; errors are those of a forward pass with other arguments
            with within_module(), suppress(RuntimeError, TypeError):
                answer = sums[name](*inputs)
                limit = _ROUNDING * float(output.abs().max())
                same = answer.shape == output.shape and float((answer - output).abs().max()) <= limit
                agrees[name][-1] = same

        return hook

    handles = [layers[name].register_forward_hook(compare(name)) for name in sums]
    try:
        double(images)
    finally:
        for handle in handles:
            handle.remove()
    changed = [name for name, calls in agrees.items() if calls and all(calls)]
    for name in changed:
        layers[name].forward = sums[name].__call__  # type: ignore[method-assign, assignment]
    return changed


class _IntegerSum:
    """The forward pass of a quantized layer as a sum of products of codes, in float32, times their steps."""

    def __init__(self, layer: QuantizedLayer, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.layer, self.codes, self.scale, self.bias = layer, codes, scale, bias

    @classmethod
    def of(cls, layer: QuantizedLayer) -> "_IntegerSum | None":
        """The form of ``layer``, in float64; None if it has none."""
        inputs, weights = layer.input_quantizer, layer.weight_quantizer
        if not (isinstance(inputs, Quantizer) and isinstance(weights, Quantizer) and _is_linear(layer)):
            return None
        grid = inputs.grid()
        if (
            not isinstance(grid, Grid)
            or layer.routed
            or layer.original_dtype is not None
            or layer.requantizes
        ):
            return None
        values, step = layer.quantized_weight().detach(), weights.step().detach()
        codes = torch.round(values / step)
        largest = codes.abs().flatten(1).sum(1).max() * max(-grid.lowest, grid.highest)
        if not stores_codes(layer) or not torch.equal(codes * step, values) or largest > EXACT_FLOAT:
            return None
        channels, dims = codes.shape[0], codes.dim()
        shape = (-1,) if dims == 2 else (1, -1, *(1,) * (dims - 2))
        scale = (step.expand(channels, *codes.shape[1:]).flatten(1)[:, 0] * inputs.step().detach()).reshape(
            shape
        )
        bias = layer._parameters.get("bias")
        return cls(layer, codes.float(), scale, None if bias is None else bias.detach().reshape(shape))

    def __call__(self, x: Tensor) -> Tensor:
        """The output, float64, of the input in float64."""
        with within_module():  # see ``sum_codes_exactly``
            return self._sum(x)

    def _sum(self, x: Tensor) -> Tensor:
        layer, inputs = self.layer, self.layer.input_quantizer
        assert isinstance(inputs, Quantizer)
        numbers = codes_of(x, inputs.step(), inputs.grid()).float()
        bias, given = layer._parameters.get("bias"), layer.given_weight
        layer._parameters["bias"], layer.given_weight = None, self.codes
        try:
            output: Tensor = layer.float_class.forward(layer, numbers).double() * self.scale
        finally:
            layer._parameters["bias"], layer.given_weight = bias, given
        return output if self.bias is None else output + self.bias


def _is_linear(layer: QuantizedLayer) -> bool:
    """Whether the float layer's forward pass is known to be linear in input and weight."""
    kind = layer.float_class
    known = f"{kind.__module__}.{kind.__qualname__}" in _LINEAR_CLASSES
    return known or kind.forward in _LINEAR_FORWARDS
