"""Closed-form compensation: a scale and an offset per channel, by least squares against the float network.

Rounding moves the mean of a layer's output and changes its scale: clipping makes it smaller, noisy inputs larger.
Both are undone, channel by channel, with neither labels nor gradients, in seconds:

    y <- a y + b        minimizes  E (a y + b - t)^2 + ridge (a - 1)^2            t: what the float network has there

    a     = (cov(y, t) + ridge) / (var(y) + ridge)                                 within 1 / LARGEST ... LARGEST
    b     = E t - a E y
    ridge = E (y - t)^2 / (images * SPREAD^2)       the posterior mean of a, if a ~ N(1, SPREAD^2) and an image is one
                                                    measurement: few images change little

The graph gains no operator, since a and b are folded into numbers that it has (decision 0028):

    a norm with weight and bias      y is its output: weight <- a weight, bias <- a bias + b
    a layer that no such norm reads  the latent weight and its level of that channel times a, so that every code stays,
                                     and bias <- a bias + b; without a bias a alone, from moments about zero

Where the output of a place is read by one addition only, as that of the last layer or norm of a residual branch, t is
the float network's sum minus the other operand: the branch also makes up for what the shortcut has lost.

Places follow the order of execution. Within a batch every measurement includes the corrections of earlier places by all
that was measured there so far. On these measurements no place's error rises; if the error of the network's output does,
the network stays as it was.

Source: QwT-v2, arXiv:2505.20932, section 3, whose affine follows a whole block and costs an operator. Here it lies
before the activation function, where it can be folded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.progress import SILENT, Progress
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.correction import Interception, bias_of, per_channel
from saqcli.quant.layer import QuantizedLayer, in_eval_mode
from saqcli.quant.short_steps.rescaling import can_rescale, rescale

SPREAD = 0.25  # prior deviation of a scale from 1
LARGEST = 2.0  # scale; the smallest is its inverse
LEAST_VARIANCE = 1e-9  # of a channel, relative to the float network's, below which its scale stays
LEAST_POWER = 1e-20  # of an output, avoids 0 / 0
ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
NORM_FUNCTIONS = (F.batch_norm, F.layer_norm, F.group_norm)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Compensation:
    """What a compensation has changed.

    Attributes:
        places: layers and norms that were corrected, in order of execution; none if the network stays as it was.
        before: mean squared error of the network's output on the calibration data, relative to the variance of the
            float network's.
        after: the same with the corrections; never above ``before``.
    """

    places: tuple[str, ...]
    before: float
    after: float


@torch.no_grad()
def compensate(
    model: nn.Module,
    float_model: nn.Module,
    calls: Iterable[Tensor | Call],
    *,
    progress: Progress = SILENT,
) -> Compensation:
    """Correct scale and mean of every channel of a quantized network, in place; all codes of weights stay.

    Args:
        model: quantized, levels fitted; its mode is restored.
        float_model: a copy of it in floating point, wrapped, with the original weights and statistics.
        calls: images, (N, C, H, W), or other calls, on the model's device; kept in memory.
        progress: reports the batches.
    """
    batches = [Call.of(call) for call in calls]
    places = _Places(model, float_model)
    before, after = _OutputError(), _OutputError()
    with (
        in_eval_mode(model),
        in_eval_mode(float_model),
        progress.task("compensating", 2 * len(batches)) as task,
    ):
        for batch in batches:
            before.add(batch.run(model), places.measure(batch))
            task.advance(images=batch.count)
        kept = places.apply()
        for batch in batches:
            after.add(batch.run(model), batch.run(float_model))
            task.advance(images=batch.count)
    if not after.relative() < before.relative():
        for tensor, value in kept:
            tensor.copy_(value)
        return Compensation((), before.relative(), before.relative())
    return Compensation(tuple(places.found), before.relative(), after.relative())


class _OutputError:
    """The mean squared error of a network's output over batches."""

    def __init__(self) -> None:
        self.error = self.total = self.squares = 0.0
        self.count = 0

    def add(self, output: Any, target: Any) -> None:
        """Add one batch; tensors that are no floating-point numbers do not count."""
        for one, other in zip(tensors_in(output), tensors_in(target), strict=True):
            if one.is_floating_point():
                self.error += float((one - other).double().square().sum())
                self.total += float(other.double().sum())
                self.squares += float(other.double().square().sum())
                self.count += other.numel()

    def relative(self) -> float:
        """The error relative to the variance of the target."""
        count = max(1, self.count)
        variance = self.squares / count - (self.total / count) ** 2
        return self.error / count / max(variance, LEAST_POWER)


@dataclass
class Moments:
    """Moments of a tensor (y) and its target (t) over all values so far, per channel, float64 (C,).

    Attributes:
        count: values of a channel.
        images: so far.
        y: mean.
        t: mean.
        yy: sum of squared deviations from the mean.
        tt: the same of the target.
        yt: sum of products of deviations.
    """

    count: int = 0
    images: int = 0
    y: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    t: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    yy: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    tt: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    yt: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, y: Tensor, t: Tensor, channels: int, images: int) -> None:
        """Add one batch of a tensor and its target, of one shape.

        Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        """
        dims = [d for d in range(y.dim()) if d != channels % y.dim()]
        count = y.numel() // y.shape[channels]
        if not count:
            return
        y_mean, t_mean = _mean(y, dims), _mean(t, dims)
        y, t = y - y_mean, t - t_mean
        y_moved = y_mean.flatten().double() - self.y
        t_moved = t_mean.flatten().double() - self.t
        total = self.count + count
        weight = self.count * count / total
        self.yy = self.yy + _sum(y * y, dims) + weight * y_moved * y_moved
        self.tt = self.tt + _sum(t * t, dims) + weight * t_moved * t_moved
        self.yt = self.yt + _sum(y * t, dims) + weight * y_moved * t_moved
        self.y = self.y + y_moved * (count / total)
        self.t = self.t + t_moved * (count / total)
        self.count, self.images = total, self.images + images

    def affine(self, *, scale: bool = True, offset: bool = True) -> tuple[Tensor, Tensor]:
        """Scale and offset of every channel; see the module's docstring.

        Args:
            scale: whether a scale is possible; else it is 1.
            offset: whether an offset is possible; else it is 0.
        """
        one = torch.ones_like(self.yy)
        if not scale:
            return one, self.t - self.y if offset else torch.zeros_like(one)
        about = 0 if offset else 1  # moments about the mean or about zero
        yy, tt, yt = (
            sums / self.count + about * mean
            for sums, mean in ((self.yy, self.y**2), (self.tt, self.t**2), (self.yt, self.y * self.t))
        )
        ridge = (yy - 2 * yt + tt).clamp_min(0) / (max(1, self.images) * SPREAD**2)
        a = ((yt + ridge) / (yy + ridge)).clamp(1 / LARGEST, LARGEST)
        a = torch.where(yy > tt * LEAST_VARIANCE, a, one)
        return a, self.t - a * self.y if offset else torch.zeros_like(a)


def _mean(x: Tensor, dims: list[int]) -> Tensor:
    return x.mean(dims, keepdim=True) if dims else x


def _sum(x: Tensor, dims: list[int]) -> Tensor:
    return (x.sum(dims) if dims else x).double()


@dataclass
class _Place:
    """A layer or norm whose output is corrected."""

    module: Any
    channels: int
    scale: bool
    offset: bool
    moments: Moments = field(default_factory=Moments)

    def fit(self, y: Tensor, target: Tensor, images: int) -> Tensor:
        """Measure ``y``, and correct it by all that was measured so far."""
        self.moments.add(y, target, self.channels, images)
        a, b = self.affine()
        return y * per_channel(a.to(y), y, self.channels) + per_channel(b.to(y), y, self.channels)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and offset by all that was measured so far."""
        return self.moments.affine(scale=self.scale, offset=self.offset)

    def tensors(self) -> list[Tensor]:
        """All that folding may change."""
        module = self.module
        if not isinstance(module, QuantizedLayer):
            return [module.weight, module.bias]
        bias = bias_of(module)
        quantizer = module.weight_quantizer
        levels = [*quantizer.parameters(), *quantizer.buffers()]
        return [module.latent_weight(), *levels, *([] if bias is None else [bias])]

    def apply(self) -> None:
        """Fold the correction."""
        a, b = self.affine()
        module = self.module
        if not isinstance(module, QuantizedLayer):
            module.weight.copy_(module.weight.double() * a)
            module.bias.copy_(module.bias.double() * a + b)
            return
        if self.scale:
            rescale(module, a)
        if (bias := bias_of(module)) is not None:
            bias.copy_(bias.double() * a + b)


class _Places:
    """All places of a network, found in its passes.

    Attributes:
        found: by name, in order of execution.
    """

    def __init__(self, model: nn.Module, float_model: nn.Module) -> None:
        self.model, self.float_model = model, float_model
        uses: dict[int, int] = {}
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
        self._shared = {key for key, count in uses.items() if count > 1}
        self.norms = [
            name
            for name, module in model.named_modules()
            if isinstance(module, NORMS)
            and module.weight is not None
            and module.bias is not None
            and not self._shared & {id(module.weight), id(module.bias)}
        ]
        self.found: dict[str, _Place] = {}

    def measure(self, batch: Call) -> Any:
        """Measure all places on one batch; returns the output of the float network."""
        with _FloatPass(self.float_model, self.norms) as in_float:
            output = batch.run(self.float_model)
        with _CorrectedPass(self, in_float, batch.count):
            batch.run(self.model)
        return output

    def place(self, name: str, module: Any, channels: int) -> _Place:
        """The place of a layer or norm."""
        if name not in self.found:
            scale = offset = True
            if isinstance(module, QuantizedLayer):
                bias = bias_of(module)
                free = id(module.latent_weight()) not in self._shared and _groups(module) == 1
                scale = free and can_rescale(module)
                offset = bias is not None and id(bias) not in self._shared
            self.found[name] = _Place(module, channels, scale, offset)
        return self.found[name]

    def apply(self) -> list[tuple[Tensor, Tensor]]:
        """Fold all corrections; returns all tensors that may have changed, with their values before."""
        places = [place for place in self.found.values() if place.moments.count]
        kept = [(tensor, tensor.clone()) for place in places for tensor in place.tensors()]
        for place in places:
            place.apply()
        return kept


class _Named(Interception):
    """A pass that names its layers and norms.

    Norms are recognised by the weight that their function gets, since modules may do more (timm's ``BatchNormAct2d``
    computes an activation function too, and ``LayerNorm2d`` permutes).
    """

    def __init__(self, model: nn.Module, norms: Iterable[str]) -> None:
        super().__init__(())
        self._names = {module: name for name, module in model.named_modules()}
        found: list[Any] = [model.get_submodule(name) for name in norms]
        self._by_weight = {id(norm.weight): norm for norm in found}

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator; hand on the output of a norm."""
        operands = tensors_in((args, kwargs)) if func in NORM_FUNCTIONS else []
        norm = next((self._by_weight[id(x)] for x in operands if id(x) in self._by_weight), None)
        if norm is not None:
            self.norm_input(norm, operands[0])
        y = self.other_operator(func, args, kwargs)
        if norm is None or norm.weight.dim() > 1:
            return y
        return self.output(self._names[norm], norm, y, -1 if func is F.layer_norm else 1)

    def other_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs every operator."""
        return func(*args, **kwargs)

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        """Hand on the output of a layer, but parts of an attention's projection."""
        if output.shape[channels] != layer.latent_weight().shape[layer.channel_dim] * _groups(layer):
            return output
        return self.output(self._names[layer], layer, output, channels)

    def output(self, name: str, module: nn.Module, y: Tensor, channels: int) -> Tensor:
        """Called with the output of every place; what it returns is used in the place of ``y``."""
        raise NotImplementedError


def _groups(layer: QuantizedLayer) -> int:
    """By how much a layer has more output channels than its weight: grouped transposed convolutions."""
    groups: int = getattr(layer, "groups", 1)
    return groups if layer.channel_dim else 1


class _FloatPass(_Named):
    """Keeps the outputs of one pass in floating point.

    Attributes:
        outputs: of every layer and norm, one per call.
        sums: the sum that the only output of a place is read by, where it is read by nothing else.
        before_norm: layers whose output a norm reads.
    """

    def __init__(self, model: nn.Module, norms: Iterable[str]) -> None:
        super().__init__(model, norms)
        self.outputs: dict[str, list[Tensor]] = {}
        self.sums: dict[str, Tensor] = {}
        self.before_norm: set[str] = set()
        self._made: dict[int, str] = {}  # outputs by id
        self._alive: list[Tensor] = []  # ids of dead tensors would be reused
        self._reads: dict[str, int] = {}

    def other_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator; count what it reads, and keep what it adds."""
        name = getattr(func, "__name__", "")
        read = [] if name == "__get__" else [self._made.get(id(x)) for x in tensors_in((args, kwargs))]
        places = [place for place in read if place is not None]
        for place in places:
            self._reads[place] = self._reads.get(place, 0) + 1
        output = func(*args, **kwargs)
        if places and name in ADDITIONS and len(read) == 2 and kwargs.get("alpha", 1) == 1:
            last = max(places, key=list(self.outputs).index)
            self.sums[last] = output.clone()
        return output

    def summed(self, name: str) -> Tensor | None:
        """The sum that the output of a place goes into and nowhere else."""
        once = self._reads.get(name) == 1 and len(self.outputs[name]) == 1
        return self.sums.get(name) if once else None

    def norm_input(self, norm: Any, x: Tensor) -> None:
        """Note the layer before a norm."""
        if (name := self._made.get(id(x))) is not None:
            self.before_norm.add(name)

    def output(self, name: str, module: nn.Module, y: Tensor, channels: int) -> Tensor:
        """Keep a copy, since operators in place may follow."""
        self.outputs.setdefault(name, []).append(y.clone())
        self._made[id(y)] = name
        self._alive.append(y)
        return y


class _CorrectedPass(_Named):
    """Measures and corrects the outputs of one pass of the quantized network."""

    def __init__(self, places: _Places, in_float: _FloatPass, images: int) -> None:
        super().__init__(places.model, places.norms)
        self._places, self._in_float, self._images = places, in_float, images
        self._calls: dict[str, int] = {}
        self._waiting: dict[
            int, tuple[_Place, Tensor, Tensor]
        ] = {}  # for their addition, by id of the output

    def other_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator; correct what waited for this addition first."""
        if self._waiting and getattr(func, "__name__", "") in ADDITIONS:
            operands = tensors_in((args, kwargs))
            for x in operands:
                place, y, total = self._waiting.pop(id(x), (None, x, x))
                if place is not None:
                    other = next(each for each in operands if each is not y)
                    y.copy_(place.fit(y, total - other, self._images))
        return func(*args, **kwargs)

    def output(self, name: str, module: nn.Module, y: Tensor, channels: int) -> Tensor:
        """Correct the output of a place, or let it wait for its addition."""
        if name in self._in_float.before_norm:
            return y
        index = self._calls[name] = self._calls.get(name, -1) + 1
        target = self._in_float.outputs[name][index]
        place = self._places.place(name, module, channels)
        total = self._in_float.summed(name)
        if total is not None and total.shape == y.shape:
            self._waiting[id(y)] = place, y, total
            return y
        return place.fit(y, target, self._images)
