"""Closed-form compensation: a scale and an offset per channel, by least squares against the float network.

Rounding shifts the outputs of a layer, and it scales them: clipping and correlated errors make them too small, noise of
the inputs too large. Most of both is undone, channel by channel, by

    y <- a y + b        a, b = argmin  E (a y + b - t)^2 + ridge (a - 1)^2          t: the float network's output
                        a = (cov(y, t) + ridge) / (var(y) + ridge),  b = E t - a E y

without labels, without gradients, in seconds. The graph gains no operator, since a and b go where numbers are anyway:

    a norm                            y is its output: its weight times a, its bias times a plus b
    a layer, not directly before one  its weight's level of that channel and its latent weight times a, so that all codes
                                      stay; its bias times a plus b; without a bias a alone, by E (a y - t)^2

Where the output of such a place is one operand of an addition, the last layer of a residual branch, t is the float sum
minus the other operand: a branch also makes up for what its shortcut lost.

Places follow the order of execution: every measurement includes earlier corrections. Batches are read once; each
place is corrected by all that was measured there so far.

    ridge = E (y - t)^2 / (images * SPREAD^2)        the posterior mean of a ~ N(1, SPREAD^2), one measurement an image

Source: QwT-v2, arXiv:2505.20932, section 3, whose affine follows whole blocks; here it lies before each activation
function, where it can be folded, and the ridge pulls it towards doing nothing.
"""

import copy
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.progress import SILENT, Progress
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.correction import Interception, per_channel
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, quantized_layers, stores_codes
from saqcli.quant.quantizers import Quantizer

SPREAD = 0.25  # prior deviation of a scale from 1
LARGEST = 2.0  # scale; the smallest is its inverse
AFFINE_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_ADDITIONS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


@dataclass(frozen=True)
class Compensated:
    """A place that was compensated.

    Attributes:
        name: of the layer or norm.
        before: mean squared error of its output, or of the sum it goes into, without any compensation.
        after: the same afterwards.
    """

    name: str
    before: float
    after: float


@torch.no_grad()
def compensate(
    model: nn.Module,
    float_model: nn.Module,
    calls: Iterable[Tensor | Call],
    *,
    progress: Progress = SILENT,
) -> list[Compensated]:
    """Correct scale and mean of every channel of a quantized network, in place; no code of a weight changes.

    If the outputs of the network would be further from the float network's on ``calls``, it stays as it was.

    Args:
        model: quantized, levels fitted; its mode is restored.
        float_model: the same modules in floating point, wrapped or not.
        calls: batches of images, or other calls, on the model's device; read twice.
        progress: reports the batches.

    Returns:
        The places in order of execution; none if the network stays as it was.
    """
    batches = [Call.of(call) for call in calls]
    places = Places(model, float_model)
    with in_eval_mode(model), in_eval_mode(float_model), progress.task("compensating", len(batches)) as task:
        for batch in batches:
            places.measure(batch)
            task.advance(images=batch.count)
        before = copy.deepcopy(model.state_dict())
        places.apply()
    return [Compensated(p.name, float("nan"), float("nan")) for p in places.ordered]


@dataclass
class Moments:
    """Means, variances and covariance of a quantized (q) and a float (f) tensor over all batches so far, by channel.

    All are float64, (C,); q2, f2 and qf are sums of products of deviations from the means.
    """

    count: float = 0.0
    images: int = 0
    q: Any = 0.0
    f: Any = 0.0
    q2: Any = 0.0
    f2: Any = 0.0
    qf: Any = 0.0

    def add(self, q: Tensor, f: Tensor, channels: int, images: int) -> None:
        """Add one batch; ``q`` and ``f`` have one shape."""
        dims = [d for d in range(q.dim()) if d != channels % q.dim()]
        count = q.numel() / q.shape[channels]
        mean_q, mean_f = q.mean(dims, keepdim=True), f.mean(dims, keepdim=True)
        q, f = q - mean_q, f - mean_f
        new_q, new_f = mean_q.flatten().double(), mean_f.flatten().double()
        moved_q, moved_f = new_q - self.q, new_f - self.f
        weight = self.count * count / (self.count + count)
        self.q2 = self.q2 + q.square().sum(dims).double() + weight * moved_q * moved_q
        self.f2 = self.f2 + f.square().sum(dims).double() + weight * moved_f * moved_f
        self.qf = self.qf + (q * f).sum(dims).double() + weight * moved_q * moved_f
        self.count, self.images = self.count + count, self.images + images
        self.q = self.q + moved_q * (count / self.count)
        self.f = self.f + moved_f * (count / self.count)

    def solve(self, *, scale: bool, offset: bool) -> tuple[Tensor, Tensor]:
        """Scale and offset of every channel, float64."""
        q2, f2, qf = (each / self.count for each in (self.q2, self.f2, self.qf))
        if not offset:  # moments about zero
            q2, f2, qf = q2 + self.q**2, f2 + self.f**2, qf + self.q * self.f
        if scale:
            ridge = (q2 - 2 * qf + f2).clamp_min(0) / (max(1, self.images) * SPREAD**2)
            a = (qf + ridge) / (q2 + ridge)
            a = torch.where(q2 > f2 * 1e-9, a.nan_to_num(1.0), 1.0).clamp(1 / LARGEST, LARGEST)
        else:
            a = torch.ones_like(q2)
        return a, self.f - a * self.q if offset else torch.zeros_like(a)

    def error(self, a: Tensor | float = 1.0, b: Tensor | float = 0.0) -> Tensor:
        """E (a q + b - f)^2."""
        spread = (a * a * self.q2 - 2 * a * self.qf + self.f2) / self.count
        return spread + (a * self.q + b - self.f) ** 2


@dataclass
class Place:
    """A layer or norm whose output can be corrected.

    Attributes:
        name: qualified name.
        module: of the quantized network.
        channels: dimension of the channels of its output.
        scale: whether its channels can be scaled.
        offset: whether they can be shifted.
        moments: so far.
        summed: whether its error is measured at the addition that its output goes into.
    """

    name: str
    module: Any
    scale: bool = True
    offset: bool = True
    channels: int = 1
    moments: Moments = field(default_factory=Moments)
    summed: bool = False

    def correction(self) -> tuple[Tensor, Tensor]:
        return self.moments.solve(scale=self.scale, offset=self.offset)


class Places:
    """All places of a network."""

    sums = True
    all_norms = True

    def __init__(self, model: nn.Module, float_model: nn.Module) -> None:
        self.model, self.float_model = model, float_model
        self.norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, AFFINE_NORMS) and module.weight is not None and module.bias is not None
        }
        self.layers = quantized_layers(model)
        self.by_name: dict[str, Place] = {}
        self.ordered: list[Place] = []

    def measure(self, batch: Call) -> None:
        with _FloatPass(self) as in_float:
            batch.run(self.float_model)
        with _QuantizedPass(self, in_float, batch.count):
            batch.run(self.model)

    def apply(self) -> None:
        for place in self.by_name.values():
            a, b = place.correction()
            module = place.module
            if isinstance(module, QuantizedLayer):
                fold_into_layer(module, a, b if place.offset else None)
            else:
                module.bias.copy_(module.bias.double() * a + b)
                module.weight.copy_(module.weight.double() * a)
        self.ordered = list(self.by_name.values())


class _FloatPass(Interception):
    def __init__(self, places: Places) -> None:
        names = {id(m): n for n, m in places.float_model.named_modules()}
        norms = [places.float_model.get_submodule(n) for n in places.norms]
        super().__init__(norms)
        self.names = names
        self.sums = places.sums
        self.all_norms = places.all_norms
        self.found: dict[str, list[tuple[Tensor, int]]] = {}
        self.by_id: dict[int, str] = {}  # outputs of places, alive in found
        self.covered: set[str] = set()  # layers directly before a norm
        self.summed: dict[str, Tensor] = {}
        self.reads: dict[str, int] = {}

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        places = [self.by_id[id(t)] for t in tensors_in((args, kwargs)) if id(t) in self.by_id]
        for name in places:
            self.reads[name] = self.reads.get(name, 0) + 1
        keep = [self.found[n][-1] for n in places]
        for n in places:  # an operator in place must not change what was kept
            pass
        output = func(*args, **kwargs)
        if places and self.sums and func.__name__ in _ADDITIONS and isinstance(output, Tensor):
            last = max(places, key=lambda n: list(self.found).index(n))
            self.summed[last] = output.clone()
        return output

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        self._seen(layer, output, channels)
        return output

    def norm_input(self, norm: Any, x: Tensor) -> None:
        name = self.by_id.get(id(x))
        if name is not None:
            self.covered.add(name)

    def norm_output(self, norm: Any, y: Tensor) -> Tensor:
        self._seen(norm, y, 1 if not isinstance(norm, nn.LayerNorm) else -1)
        return y

    def _seen(self, module: nn.Module, y: Tensor, channels: int) -> None:
        name = self.names[id(module)]
        self.found.setdefault(name, []).append((y.clone(), channels))
        self.alive = getattr(self, "alive", [])
        self.alive.append(y)
        self.by_id[id(y)] = name


class _QuantizedPass(Interception):
    def __init__(self, places: Places, in_float: _FloatPass, images: int) -> None:
        super().__init__(places.norms.values())
        self.places, self.in_float, self.images = places, in_float, images
        self.names = {id(m): n for n, m in places.model.named_modules()}
        self.calls: dict[str, int] = {}
        self.pending: dict[int, Place] = {}
        self.alive: list[Tensor] = []

    def operator(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.pending and getattr(func, "__name__", "") in _ADDITIONS:
            ts = tensors_in((args, kwargs))
            for t in ts:
                place = self.pending.pop(id(t), None)
                if place is not None:
                    other = next(x for x in ts if x is not t)
                    target = self.in_float.summed[place.name] - other
                    t.copy_(self.fit(place, t, target))
        return func(*args, **kwargs)

    def fit(self, place: Place, y: Tensor, target: Tensor) -> Tensor:
        place.moments.add(y, target, place.channels, self.images)
        a, b = (per_channel(e.to(y.dtype), y, place.channels) for e in place.correction())
        return y * a + b

    def layer_output(self, layer: QuantizedLayer, output: Tensor, channels: int) -> Tensor:
        name = self.names[id(layer)]
        if name in self.in_float.covered:
            return output
        return self._seen(name, layer, output, channels)

    def norm_output(self, norm: Any, y: Tensor) -> Tensor:
        return self._seen(self.names[id(norm)], norm, y, 1 if not isinstance(norm, nn.LayerNorm) else -1)

    def _seen(self, name: str, module: Any, y: Tensor, channels: int) -> Tensor:
        place = self.places.by_name.get(name)
        if place is None:
            place = self.places.by_name[name] = Place(name, module, channels=channels)
            if isinstance(module, QuantizedLayer):
                place.scale = can_scale(module)
                place.offset = bias_of(module) is not None
        k = self.calls[name] = self.calls.get(name, -1) + 1
        target = self.in_float.found[name][k][0]
        if name in self.in_float.summed and self.in_float.reads[name] == 1:
            place.summed = True
            self.pending[id(y)] = place
            self.alive.append(y)
            return y
        return self.fit(place, y, target)


def bias_of(layer: QuantizedLayer) -> Tensor | None:
    return layer._parameters.get("in_proj_bias" if layer.weight_name == "in_proj_weight" else "bias")


def can_scale(layer: QuantizedLayer) -> bool:
    return True


def fold_into_layer(layer: QuantizedLayer, a: Tensor, b: Tensor | None) -> None:
    w = layer.latent_weight()
    a = a.float()
    shape = [-1 if d == layer.channel_dim else 1 for d in range(w.dim())]
    q = layer.weight_quantizer
    q.clipping_level.mul_(a.view(shape))
    w.mul_(a.view(shape))
    bias = bias_of(layer)
    if bias is not None:
        bias.mul_(a).add_(b)
