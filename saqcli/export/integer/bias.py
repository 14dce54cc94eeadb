"""Biases on the grid of the accumulator: INT32 in units of input step times weight step.

Integer kernels add the bias to a sum of products of codes, so it must be a multiple of the sum's unit. This is a change
of the function, by up to half a unit for each output channel. A file with such biases is compared with the PyTorch
model that has the same biases (``round_biases``), so that the proof is about the model as it is deployed; how far that
is from the fake-quantized model of training is a figure of the verdict.

A norm after a convolution is folded into it, and the sum of bias and norm is what is rounded. In PyTorch the norm stays
a module: the bias of the convolution before it moves by the rounding error divided by the gain.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from saqcli.export.operators import FrozenInput, FrozenWeight
from saqcli.quant.grid import Grid
from saqcli.quant.layer import QuantizedLayer, quantized_layers

INT32_MAX = 2**31 - 1
HIGHEST_INPUT = 255  # of a code of an input, counted from its zero point
LOWEST = -128  # code of a weight without a negative counterpart
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = (*CONVOLUTIONS, nn.Linear)
SMALLEST = 1e-30  # step that a channel without weights may get, far above where float32 loses bits
FREE = 2.0**20  # units of a bias in a channel whose weights are all zero: its unit can be chosen


@dataclass(frozen=True)
class GridBias:
    """A bias in units of the accumulator.

    Attributes:
        codes: int32, (C,).
        unit: float32 value of one code, shaped like the weight's step.
        weight_step: the weight's step; changed in channels without weights only.
    """

    codes: Any
    unit: Any
    weight_step: Any

    @property
    def values(self) -> Any:
        """The rounded bias in float64, (C,)."""
        return self.codes * self.unit.astype(np.float64)


def grid_bias(bias: Any, weights: Any, input_step: Any, weight_step: Any) -> GridBias | None:
    """``bias`` in units of ``input_step * weight_step``, or None if the sum could exceed 32 bits.

    Args:
        bias: (C,).
        weights: integer codes, output channels first.
        input_step: a scalar.
        weight_step: a scalar or (C,).
    """
    step = np.asarray(weight_step, np.float32)
    x_step = np.float32(input_step)
    sums = np.abs(np.asarray(weights, np.int64)).reshape(len(weights), -1).sum(1)
    if step.ndim:
        chosen = np.abs(np.asarray(bias, np.float64)) / FREE / float(x_step)
        step = np.where((sums == 0) & (chosen > SMALLEST), chosen, step).astype(np.float32)
    unit = (x_step * step).astype(np.float32)
    if not np.all(unit > 0):
        return None
    codes = np.round(np.asarray(bias, np.float64) / unit)
    if not np.isfinite(codes).all() or (np.abs(codes) + HIGHEST_INPUT * sums > INT32_MAX).any():
        return None
    return GridBias(codes.astype(np.int32), unit, step)


@dataclass
class _Norm:
    """The arguments of a batch norm."""

    mean: Tensor
    variance: Tensor
    gain: Tensor | None
    shift: Tensor | None
    epsilon: float

    def scale(self) -> Any:
        """The factor of every channel, in float64."""
        scale = 1 / torch.sqrt(self.variance.double() + self.epsilon)
        return (scale if self.gain is None else scale * self.gain.double()).numpy()

    def fold(self, bias: Any) -> Any:
        """The bias after the norm, in float64."""
        shift = 0.0 if self.shift is None else self.shift.double().numpy()
        return (bias - self.mean.double().numpy()) * self.scale() + shift


class _Norms(TorchFunctionMode):
    """Finds the batch norms that are the only readers of a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[int, str] = {}
        self.norms: dict[str, _Norm] = {}
        self.readers: Counter[str] = Counter()
        self._kept: list[Tensor] = []  # so that no other tensor gets their identity

    def record(self, name: str, output: Tensor) -> None:
        """Called with the output of every layer."""
        self._kept.append(output)
        self.outputs[id(output)] = name

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and note who reads layers' outputs."""
        kwargs = kwargs or {}
        if func is F.batch_norm and args and id(args[0]) in self.outputs:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            all_of = dict(zip(names, args, strict=False)) | kwargs
            if all_of.get("running_mean") is not None:
                self.norms[self.outputs[id(args[0])]] = _Norm(
                    all_of["running_mean"],
                    all_of["running_var"],
                    all_of.get("weight"),
                    all_of.get("bias"),
                    float(all_of.get("eps", 1e-5)),
                )
        output = func(*args, **kwargs)
        if isinstance(output, Tensor | tuple | list):  # not its shape or type
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            self.readers.update({self.outputs[id(each)] for each in given if id(each) in self.outputs})
        return output


@torch.no_grad()
def round_biases(frozen: nn.Module, example: Tensor) -> nn.Module:
    """Round the bias of every convolution and linear layer with quantized operands to its grid, in place.

    The code -128 of a channel whose norm has a negative gain becomes -127: its sign changes when the norm is folded.

    Args:
        frozen: from ``frozen_copy``.
        example: images (N, C, H, W).

    Returns:
        ``frozen``.
    """
    seen = _norms_of(frozen, example)
    for name, layer in quantized_layers(frozen).items():
        weights, inputs = layer.weight_quantizer, layer.input_quantizer
        if not isinstance(weights, FrozenWeight) or not isinstance(inputs, FrozenInput):
            continue
        if isinstance(inputs.grid, Grid) and isinstance(layer, KINDS) and weights.dim < 1:
            _round(layer, weights, float(inputs.step), seen.get(name))
    return frozen


def _norms_of(frozen: nn.Module, example: Tensor) -> dict[str, _Norm]:
    """The norm of every layer whose output nothing else reads, by the name of the layer."""
    seen = _Norms()
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, name=name: seen.record(name, output))
        for name, layer in quantized_layers(frozen).items()
    ]
    try:
        with seen:
            frozen(example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: norm for name, norm in seen.norms.items() if seen.readers[name] == 1}


def _round(layer: QuantizedLayer, weights: FrozenWeight, input_step: float, norm: _Norm | None) -> None:
    any_layer: Any = layer
    bias = None if any_layer.bias is None else any_layer.bias.double().numpy()
    if norm is None and bias is None:
        return
    step, codes = weights.step.numpy().astype(np.float64), weights.codes.numpy()
    before = np.zeros(len(codes)) if bias is None else bias
    scale, folded = np.ones(len(codes)), before
    if norm is not None and isinstance(layer, CONVOLUTIONS):
        scale, folded = norm.scale(), norm.fold(before)
        shape = (-1, *(1,) * (codes.ndim - 1))
        codes[(codes == LOWEST) & (scale < 0).reshape(shape)] = LOWEST + 1  # in place, in the model
        codes, step = (
            codes * np.sign(scale).astype(int).reshape(shape),
            np.where(scale == 0, 1, np.abs(scale)) * step,
        )
    found = grid_bias(folded.astype(np.float32), codes, input_step, step)
    if found is not None:
        moved = np.divide(found.values - folded, scale, out=np.zeros(len(codes)), where=scale != 0)
        any_layer.bias = nn.Parameter(torch.from_numpy(before + moved).float(), requires_grad=False)
