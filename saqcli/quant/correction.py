"""Correction of means and variances after quantization, without training.

Rounding and clipping shift the mean of a layer's output and change its variance; the shifts of many layers add up. Both
are measured on the same images, in floating point (f) and quantized (q), channel by channel, and corrected in biases
and running statistics:

    bias           b    <- b + E_f[y] - E_q[y]                         y: output of the layer
    batch norm     var  <- var * (V_q[x] + eps) / (V_f[x] + eps)       x: input of the norm
                   mean <- E_q[x] - (E_f[x] - mean) * deviation after / deviation before

Corrections follow the order of execution: within a batch, every measurement includes the corrections of earlier layers.
They are averaged over batches; with a single batch the means of outputs agree afterwards, except for rounding.

A norm that a layer has absorbed (``short_steps.absorb``) is corrected in that layer: its weight and levels times the
ratio of the deviations, sqrt(V_f[y] / V_q[y]), its bias such that the means agree.

Differences of paired measurements need few images, which may differ from those of the running statistics (augmented
images, other crops). Re-estimating the statistics, as ``reestimate_batch_norms`` does, is sensitive to both.

Source: bias correction is that of Nagel et al., arXiv:1906.04721, section 4.2, in its empirical form. The paired form
for batch norms is ours.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.quant.calibration import in_floating_point
from saqcli.quant.calls import Call
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, quantized_layers
from saqcli.quant.routing import WeightRecorder
from saqcli.quant.short_steps.absorb import absorbed_norms
from saqcli.quant.short_steps.rescaling import can_rescale, rescale, tensors_of

LEAST_VARIANCE = 1e-5  # of a channel, relative to their mean, that is told from 0
TINY = 1e-30
BatchNorm = nn.modules.batchnorm._BatchNorm


def correct(model: nn.Module, batches: Iterable[Tensor | Call], *, biases: bool, norms: bool) -> None:
    """Correct the mean shifts of quantization, in place; weights and levels stay unchanged.

    Args:
        model: quantized, levels fitted; its mode is restored.
        batches: images, (N, C, H, W), or other calls, on the model's device.
        biases: correct the bias of every layer; without a bias, the mean of a batch norm that follows directly.
        norms: correct mean and variance of every batch norm; those of one that a layer has absorbed, by its
            weight and bias.
    """
    Corrections(model, biases=biases, norms=norms)(batches)


class Corrections:
    """Repeated ``correct`` while the bits change: each call starts from the uncorrected model.

    The float measurements do not depend on the bits and are made in the first call only.

    Args:
        model: as for ``correct``, not corrected yet.
        biases: as for ``correct``.
        norms: as for ``correct``.
    """

    def __init__(self, model: nn.Module, *, biases: bool, norms: bool) -> None:
        self.model, self.biases, self.norms = model, biases, norms
        self._uncorrected = [(tensor, tensor.detach().clone()) for tensor in correctable(model)]
        self._in_float: list[_Pass] = []  # one per batch

    @torch.no_grad()
    def __call__(self, batches: Iterable[Tensor | Call]) -> None:
        """Correct the model at its active bits; ``batches`` must be the same in every call."""
        model = self.model
        for tensor, before in self._uncorrected:
            tensor.copy_(before)
        places = _Places(model, biases=self.biases, norms=self.norms)
        calls: Iterable[Call] = map(Call.of, batches)
        if places.scaled:  # measured twice
            calls = list(calls)
        with in_eval_mode(model):
            self._measure(places, calls)
            places.apply()
            if places.scaled:
                means = places.of_scaled()
                self._measure(means, calls)
                means.apply()

    def _measure(self, places: "_Places", calls: Iterable[Call]) -> None:
        for index, batch in enumerate(calls):
            if index == len(self._in_float):
                with in_floating_point(self.model), _Pass(places) as in_float:
                    batch.run(self.model)
                self._in_float.append(in_float)
            with places.restored_statistics(), _Pass(places, self._in_float[index]):
                batch.run(self.model)
            places.add_batch(batch.count)


def correctable(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that a correction may change: biases of layers, running statistics of batch norms; of layers that
    absorbed a norm, weights and levels too.
    """
    for layer in quantized_layers(model).values():
        if (bias := bias_of(layer)) is not None:
            yield bias
    for name in absorbed_norms(model).values():
        yield from tensors_of(quantized_layers(model)[name])
    norms: list[Any] = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        if norm.running_mean is not None:
            yield from (norm.running_mean, norm.running_var)


@dataclass
class _Average:
    """Mean of the measurements at one place over batches, weighted by images.

    Attributes:
        current: measurements of the current batch, one per call.
    """

    total: Tensor | None = None
    images: int = 0
    current: list[Tensor] = field(default_factory=list)

    def add_batch(self, images: int) -> None:
        if self.current:
            measured = torch.stack(self.current).mean(0) * images
            self.total = measured if self.total is None else self.total + measured
            self.images += images
            self.current = []

    def mean(self) -> Tensor | None:
        return None if self.total is None else self.total / self.images


class _Places:
    """The places that can be corrected, and the shifts measured so far."""

    def __init__(self, model: nn.Module, *, biases: bool, norms: bool) -> None:
        absorbed = set(absorbed_norms(model).values())
        self.biases = {
            layer: (bias, _Average())
            for name, layer in quantized_layers(model).items()
            if (biases or (norms and name in absorbed)) and (bias := bias_of(layer)) is not None
        }
        self.scaled = {
            layer
            for name, layer in quantized_layers(model).items()
            if norms and name in absorbed and layer in self.biases and can_rescale(layer)
        }
        self.without_bias = biases and not norms
        self.all_norms = norms
        self.norms: dict[Any, _Average] = {
            module: _Average()
            for module in model.modules()
            if isinstance(module, BatchNorm) and module.running_mean is not None and (norms or biases)
        }

    def of_scaled(self) -> "_Places":
        """The biases of the layers that were scaled: short steps are not exactly what the scales ask for."""
        found = copy.copy(self)
        found.biases = {layer: (self.biases[layer][0], _Average()) for layer in self.scaled}
        found.norms, found.scaled = {}, set()
        found.without_bias = found.all_norms = False
        return found

    @contextmanager
    def restored_statistics(self) -> Iterator[None]:
        """Restore the running statistics on exit; a pass corrects them for its own batch."""
        kept = [(norm, norm.running_mean.clone(), norm.running_var.clone()) for norm in self.norms]
        try:
            yield
        finally:
            for norm, mean, variance in kept:
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)

    def add_batch(self, images: int) -> None:
        for place in (*(shift for _, shift in self.biases.values()), *self.norms.values()):
            place.add_batch(images)

    def apply(self) -> None:
        for layer, (bias, shift) in self.biases.items():
            if (moved := shift.mean()) is None:
                continue
            if layer in self.scaled:
                factors, moved = moved
                rescale(layer, factors)
                bias.mul_(factors)
            bias.add_(moved)
        for norm, moments in self.norms.items():
            if (measured := moments.mean()) is not None:
                self.correct_norm(norm, measured)

    def correct_norm(self, norm: Any, measured: Tensor) -> None:
        """Correct the statistics of ``norm``; ``measured`` are (E_q, E_f, V_q, V_f), each of all channels."""
        mean_q, mean_f, variance_q, variance_f = measured
        before = (norm.running_var + norm.eps).sqrt()
        if self.all_norms:
            norm.running_var.mul_((variance_q + norm.eps) / (variance_f + norm.eps))
        after = (norm.running_var + norm.eps).sqrt()
        norm.running_mean.copy_(mean_q - (mean_f - norm.running_mean) * after / before)


def bias_of(layer: QuantizedLayer) -> Tensor | None:
    """The layer's bias, if it is a parameter."""
    return layer._parameters.get("in_proj_bias" if layer.weight_name == "in_proj_weight" else "bias")


class Interception(WeightRecorder):
    """A pass that hands the output of every layer, and the input of norms, to its methods in turn.

    Args:
        norms: the norms to watch.
    """

    def __init__(self, norms: Iterable[nn.Module]) -> None:
        super().__init__()
        self._norms = list(norms)
        self._handles: list[Any] = []

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        """Called with every product of a layer's weight; what it returns is used in the place of ``output``.

        Args:
            layer: the layer.
            output: the result of the operator.
            channels: its dimension of channels, which may count from the end.
        """
        return output

    def norm_input(self, norm: Any, x: Tensor) -> None:
        """Called before every norm."""

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs every operator."""
        return func(*args, **kwargs)

    def __enter__(self) -> Self:
        for norm in self._norms:
            hook = norm.register_forward_pre_hook(lambda norm, given: self.norm_input(norm, given[0]))
            self._handles.append(hook)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; hand the output of a layer on."""
        kwargs = kwargs or {}
        output = self.operator(func, args, kwargs)
        layer = self.owner(func, args, kwargs)
        return output if layer is None else self.layer_output(layer, output, -1 if func is F.linear else 1)


class _Pass(Interception):
    """One pass over one batch: it measures, and with ``in_float`` to compare with it also corrects."""

    def __init__(self, places: _Places, in_float: "_Pass | None" = None) -> None:
        super().__init__(places.norms)
        self.places, self.in_float = places, in_float
        self.outputs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.inputs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        # norms directly after a layer without bias, found in floating point
        self.mean_only: set[nn.Module] = set() if in_float is None else in_float.mean_only
        self._unbiased: list[weakref.ref[Tensor]] = []

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        """Measure, and correct, the output of a layer."""
        if layer not in self.places.biases:
            if self.in_float is None and self.places.without_bias and bias_of(layer) is None:
                self._unbiased.append(weakref.ref(output))
            return output
        bias, shift = self.places.biases[layer]
        if output.shape[channels] != len(bias):  # one part of an attention's projection
            return output
        mean, variance = _moments(output, channels)
        seen = self.outputs.setdefault(layer, [])
        seen.append((mean, variance))
        if self.in_float is None:
            return output
        wanted, spread = self.in_float.outputs[layer][len(seen) - 1]
        if layer not in self.places.scaled:
            shift.current.append(wanted - mean)
            return output + per_channel(wanted - mean, output, channels)
        least = LEAST_VARIANCE * spread.mean()
        factors = ((spread + least) / (variance + least).clamp_min(TINY)).sqrt()
        moved = wanted - factors * mean
        shift.current.append(torch.stack([factors, moved]))
        return output * per_channel(factors, output, channels) + per_channel(moved, output, channels)

    def norm_input(self, norm: Any, x: Tensor) -> None:
        """Measure the input of a norm, and correct its statistics."""
        if self.in_float is None and any(output() is x for output in self._unbiased):
            self.mean_only.add(norm)
        if not self.places.all_norms and norm not in self.mean_only:
            return
        moments = _moments(x, 1)
        seen = self.inputs.setdefault(norm, [])
        seen.append(moments)
        if self.in_float is not None:
            pairs = zip(moments, self.in_float.inputs[norm][len(seen) - 1], strict=True)
            measured = torch.stack([moment for pair in pairs for moment in pair])
            self.places.norms[norm].current.append(measured)
            self.places.correct_norm(norm, measured)


def per_channel(values: Tensor, like: Tensor, channels: int) -> Tensor:
    """``values``, one per channel, in a shape that broadcasts against ``like``."""
    return values.view([-1 if d == channels % like.dim() else 1 for d in range(like.dim())])


def _moments(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel.

    Within an image in two passes, which unlike that of ``var_mean`` are vectorized; over images in double precision.
    Few bits amplify errors: the last digits of a mean can decide a rounding in every later layer.
    """
    dtype, x = x.dtype, x.detach()
    x = x.float() if x.itemsize < 4 else x  # sums of squares exceed half precision
    inner = [d for d in range(1, x.dim()) if d != channels % x.dim()]
    means, variances = x, torch.zeros_like(x[:1])
    if inner:
        means = x.mean(inner, keepdim=True)
        norms = torch.linalg.vector_norm(x - means, dim=inner)
        means, variances = means.reshape(norms.shape), norms**2 * (norms.numel() / max(x.numel(), 1))
    means, variances = means.double(), variances.double()
    mean = means.mean(0)
    return mean.to(dtype), (variances.mean(0) + (means - mean).square().mean(0)).to(dtype)
