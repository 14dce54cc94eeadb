"""Balanced norms: channels of a layer's input are given similar ranges by folding ratios into the norm before it.

The input of a layer after a layer norm has one step for all channels, and the ranges of its channels often differ by a
factor of ten and more: most channels get few of the codes. With a ratio r and an offset o for every channel c,

    y' = (y - o) / r        norm:    weight' = weight / r,    bias' = (bias - o) / r
    W' y' + b' = W y + b    layers:  W'[:, c] = W[:, c] r[c],  b' = b + W o

the network computes the same, to float rounding, and no operator is added. All layers that read the norm's output take
part, q, k and v among them. A norm is left as it is, with a reason, if anything else reads its output: after an
addition (post-norm) the next addition does.

Layers that read a norm are found by a traced pass. The norm is run once more with weight 0 and the numbers of its
channels as bias: this tensor follows the output through all operators that only rearrange numbers, and shows at the
layer which input channel is which, and where zeros were inserted (which allow no offset). No names, and no list of
layouts.

Ratios are powers of the channels' spreads, r = (spread / mean spread)**alpha. Larger ratios leave the input less error
and the weight more, so alpha, the measure of the spread (range or deviation) and whether there is an offset are chosen
for every norm by the squared error of its layers' outputs, quantized against float, on calibration rows. Leaving the
norm as it is is one of the candidates.

Source: RepQ-ViT, Li et al., arXiv:2212.08254, section 3.2. Differs from the paper, which has alpha = 1, ranges and
offsets everywhere, and norms of plain vision transformers only. Measuring candidates follows SmoothQuant's alpha
(arXiv:2211.10438), which is a constant there.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import (
    TRANSPOSED,
    QuantizedLayer,
    in_eval_mode,
    is_convolution,
    quantized_layers,
    stores_codes,
)
from saqcli.quant.products import operands_first
from saqcli.quant.quantizers import Quantizer
from saqcli.quant.routing import WEIGHT_OPERATORS

NORMS = (nn.LayerNorm, nn.GroupNorm)
# Operators that only rearrange the numbers of a tensor, leave some out, or insert zeros.
_LAYOUT = set(
    "view reshape permute transpose t flatten unflatten squeeze unsqueeze contiguous clone roll __getitem__ select "
    "narrow chunk split unbind expand movedim moveaxis swapaxes swapdims pad dropout identity to float detach "
    "pixel_unshuffle".split()
)
_SHAPES = {
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
}
ROWS, BATCHES = 64, 8  # rows of an input that are kept of a batch, and batches: enough for ranges to 5 %
OUTPUTS = 256  # most output channels that errors are measured on
VALUES = 16384  # most values that a level is fitted to while candidates are compared
ALPHAS = (0.5, 1.0)
LEAST_SPREAD = 1e-3  # of the mean spread, so that an almost constant channel does not blow up
LEAST_GAIN = 0.99  # a candidate must have less than this part of the error


@dataclass(frozen=True)
class NormReaders:
    """A norm and the layers that read its output.

    Attributes:
        norm: its name.
        layers: names of the layers, in order of execution.
        shifts: whether an offset can be folded: no zeros were inserted, and every layer has a bias of its own.
        reason: why the norm must stay as it is; empty if it can be balanced.
    """

    norm: str
    layers: tuple[str, ...] = ()
    shifts: bool = True
    reason: str = ""


@dataclass(frozen=True)
class BalancedNorm:
    """What became of a norm.

    Attributes:
        norm: its name.
        layers: names of the layers that read it.
        before: squared error of their outputs with the norm as it was, relative to their variance.
        after: the same with the folded ratios; equal to ``before`` if nothing was folded.
        folded: whether ratios were folded.
        reason: why not.
    """

    norm: str
    layers: tuple[str, ...]
    before: float = 0.0
    after: float = 0.0
    folded: bool = False
    reason: str = ""


@dataclass
class _Found:
    layers: list[str] = field(default_factory=list)
    calls: int = 0
    shifts: bool = True
    reason: str = ""


class _Probe(TorchFunctionMode):
    """Follows the channel numbers of norms through a pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = quantized_layers(model)
        # A layer without a quantizer multiplies with its latent weight itself, also in a routed parent.
        self.names = {id(layer.latent_weight()): name for name, layer in reversed(self.layers.items())}
        self.found: dict[str, _Found] = {}
        self.calls: dict[str, int] = {}  # multiplications of a layer
        self._shadows: dict[int, tuple[str, Tensor]] = {}  # by id: a norm, and its channel numbers from 1
        self._alive: list[Tensor] = []  # ids of dead tensors would be reused

    def normalized(self, name: str, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Start the shadow of a norm's output; called after its forward."""
        found = self.found.setdefault(name, _Found())
        found.calls += 1
        if found.calls > 1:
            found.reason = "it runs more than once"
        elif isinstance(output, Tensor) and isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor):
            self._set(output, name, _channel_numbers(norm, inputs))
        else:
            found.reason = "it has no weight and bias"

    def finish(self, output: Any) -> None:
        """Norms whose output the network returns stay as they are."""
        for tensor in tensors_in(output):
            if id(tensor) in self._shadows:
                self._refuse(self._shadows[id(tensor)][0], "the network returns its output")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and the same one on channel numbers if it only rearranges."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        reader = self._reader(func, args, kwargs)
        if reader is not None:
            self.calls[reader] = self.calls.get(reader, 0) + 1
        inputs = {id(each): each for each in tensors_in((args, kwargs)) if id(each) in self._shadows}
        operator = getattr(func, "__name__", "")
        outputs = tensors_in(output)
        if not inputs or operator in _SHAPES or (not outputs and operator != "__setitem__"):
            return output
        if reader is not None and len(inputs) == 1:
            self._multiplied(reader, args, kwargs)
        elif operator in _LAYOUT and len(inputs) == 1:
            (name, _), *_ = (self._shadows[each] for each in inputs)
            shadowed = tree_map(self._shadow_of, (args, kwargs))
            for made, numbers in zip(outputs, tensors_in(func(*shadowed[0], **shadowed[1])), strict=True):
                self._set(made, name, numbers)
        else:
            for each in inputs:
                self._refuse(self._shadows[each][0], f"{_readable(func, operator)} reads its output too")
        return output

    def _reader(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The layer whose weight an operator multiplies with."""
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        return self.names.get(id(weight)) if func in WEIGHT_OPERATORS else None

    def _shadow_of(self, leaf: Any) -> Any:
        return self._shadows[id(leaf)][1] if isinstance(leaf, Tensor) and id(leaf) in self._shadows else leaf

    def _set(self, tensor: Tensor, name: str, numbers: Tensor) -> None:
        self._shadows[id(tensor)] = name, numbers
        self._alive.append(tensor)

    def _refuse(self, name: str, reason: str) -> None:
        self.found[name].reason = self.found[name].reason or reason

    def _multiplied(self, reader: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self.layers[reader]
        (x, _, *rest), kwargs = operands_first(args, kwargs, ("weight",))
        if id(x) not in self._shadows:
            return
        name, numbers = self._shadows[id(x)]
        found = self.found[name]
        found.layers.append(reader)
        reason = _unfit(layer)
        channels = _channels_last(layer, numbers).flatten(0, -2)
        expected = torch.arange(1, channels.shape[1] + 1, device=channels.device).float()
        same, zero = channels == expected, channels == 0
        if not reason and not bool((same | zero).all() & same.any(0).all()):
            reason = f"{reader} reads its channels in another order"
        if reason:
            self._refuse(name, reason)
        bias = rest[0] if rest else kwargs.get("bias")
        padded = bool(zero.any()) or (is_convolution(layer) and _pads(layer))
        if padded or bias is None or bias is not _bias(layer):
            found.shifts = False


def _readable(func: Any, operator: str) -> str:
    """The name of an operator in a message."""
    return operator.strip("_") or str(func)


def _unfit(layer: QuantizedLayer) -> str:
    """Why ratios cannot be folded into the weight of a layer, or nothing."""
    name = layer.float_class.__name__
    if not stores_codes(layer):
        return f"a {name} derives its weight from another one"
    if issubclass(layer.float_class, TRANSPOSED) or getattr(layer, "groups", 1) != 1:
        return f"a {name} of groups, or a transposed one, reads it"
    return ""


def _pads(layer: QuantizedLayer) -> bool:
    """Whether a convolution inserts zeros."""
    padding: Any = getattr(layer, "padding", 0)
    return padding == "same" or (not isinstance(padding, str) and any(padding))


def _bias(layer: QuantizedLayer) -> nn.Parameter | None:
    return layer._parameters.get("in_proj_bias" if layer.weight_name == "in_proj_weight" else "bias")


def _channels_last(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """The input of a layer with its channels in the last of at least two dimensions."""
    x = x.movedim(1, -1) if is_convolution(layer) else x
    return x if x.dim() > 1 else x.unsqueeze(0)


def _channel_numbers(norm: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The output of the norm with weight 0 and the numbers of its channels, from 1, as bias."""
    kept = dict(norm._parameters)
    weight, bias = kept["weight"], kept["bias"]
    assert weight is not None
    assert bias is not None
    numbers = torch.arange(1, bias.numel() + 1, device=bias.device, dtype=bias.dtype).view_as(bias)
    try:
        norm._parameters["weight"] = nn.Parameter(torch.zeros_like(weight), False)
        norm._parameters["bias"] = nn.Parameter(numbers, False)
        with torch._C.DisableTorchFunction():
            return norm.forward(*inputs).float()  # type: ignore[no-any-return]
    finally:
        norm._parameters.update(kept)


@torch.no_grad()
def find_norms(model: nn.Module, example: Tensor | Call) -> list[NormReaders]:
    """The norms of a wrapped network that still computes in floating point, with their readers, in order of execution.

    Args:
        model: wrapped and traced; its mode is restored.
        example: one image, (1, C, H, W), or another call.
    """
    probe = _Probe(model)
    handles = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: probe.normalized(name, m, inputs, output)
        )
        for name, module in model.named_modules()
        if isinstance(module, NORMS)
    ]
    try:
        with in_eval_mode(model), probe:
            probe.finish(Call.of(example).run(model))
    finally:
        for handle in handles:
            handle.remove()
    layers = quantized_layers(model)
    tied = {id(first) for layer in layers.values() for first in layer.tied_to}
    result = []
    for name, found in probe.found.items():
        reason = found.reason or ("" if found.layers else "no quantized layer reads its output")
        for reader in found.layers:
            if layers[reader].tied_to or id(layers[reader]) in tied:
                reason = reason or f"{reader} shares its weight with another layer"
            if probe.calls[reader] > found.layers.count(reader):
                reason = reason or f"{reader} also reads something else"
        result.append(NormReaders(name, tuple(dict.fromkeys(found.layers)), found.shifts, reason))
    return result


@torch.no_grad()
def fold_ratios(model: nn.Module, found: NormReaders, ratio: Tensor, offset: Tensor) -> None:
    """Fold a ratio and an offset of every channel into a norm and the layers that read it, in place.

    Args:
        model: the network of ``found``.
        found: a norm without a reason.
        ratio: (channels,), positive.
        offset: (channels,), zeros where ``found`` has no ``shifts``.
    """
    norm, layers = model.get_submodule(found.norm), quantized_layers(model)
    ratio, offset = ratio.double(), offset.double()
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    weight.copy_((weight.double().flatten() / ratio).view_as(weight))
    bias.copy_(((bias.double().flatten() - offset) / ratio).view_as(bias))
    for name in found.layers:
        latent, own = layers[name].latent_weight(), _bias(layers[name])
        if found.shifts and own is not None:
            own.add_((latent.double().flatten(2).sum(2) if latent.dim() > 2 else latent.double()) @ offset)
        latent.copy_(latent.double() * ratio.view(1, -1, *(1,) * (latent.dim() - 2)))


class _Rows(nn.Module):
    """Takes the place of an input quantizer and keeps rows of its input."""

    def __init__(self, layer: QuantizedLayer, generator: torch.Generator) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self._is_last = not is_convolution(layer)
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Keep some rows of ``x`` and return it."""
        rows = (x if self._is_last else x.movedim(1, -1)).detach().flatten(0, -2)
        index = torch.randint(len(rows), (ROWS,), generator=self._generator)
        self.kept.append(rows[index.to(rows.device)].float())
        return x


@contextmanager
def _collecting(layers: dict[str, QuantizedLayer], seed: int) -> Iterator[dict[str, _Rows]]:
    generator = torch.Generator().manual_seed(seed)
    before = {name: layer.input_quantizer for name, layer in layers.items()}
    collected = {name: _Rows(layer, generator) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.input_quantizer = collected[name]
        yield collected
    finally:
        for name, layer in layers.items():
            layer.input_quantizer = before[name]


@torch.no_grad()
def balance_norms(
    model: nn.Module,
    calls: Iterable[Call],
    policy: BitConfig,
    scheme: Scheme,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[BalancedNorm]:
    """Balance every norm of a network whose layers gain by it, in place; the network computes the same.

    Args:
        model: wrapped and traced, without quantizers; its mode is restored.
        calls: calibration data, of which the first batches are read.
        policy: the bits that its layers will have.
        scheme: the quantizers that they will have.
        seed: for drawing rows.
        progress: reports what was folded.

    Returns:
        One entry for every norm, in order of execution.
    """
    batches = list(islice(calls, BATCHES))
    if not batches:
        return []
    layers = quantized_layers(model)
    results: list[BalancedNorm] = []
    found = find_norms(model, batches[0].first())
    read = {name: layers[name] for each in found if not each.reason for name in each.layers[:1]}
    with in_eval_mode(model), _collecting(read, seed) as collected:
        for batch in batches:
            batch.run(model)
    for each in found:
        if each.reason:
            results.append(BalancedNorm(each.norm, each.layers, reason=each.reason))
        else:
            results.append(_balance(model, each, torch.cat(collected[each.layers[0]].kept), policy, scheme))
    count = sum(each.folded for each in results)
    progress.note(f"{count} of {len(results)} norms balanced{_reasons(results)}")
    return results


def _reasons(results: Sequence[BalancedNorm]) -> str:
    first = next((each for each in results if each.reason), None)
    return f"; {first.norm} is not, since {first.reason}" if first else ""


def _balance(
    model: nn.Module, found: NormReaders, rows: Tensor, policy: BitConfig, scheme: Scheme
) -> BalancedNorm:
    """Fold the best candidate into one norm."""
    layers = {name: quantized_layers(model)[name] for name in found.layers}
    if any(policy.layers[name].activation is None for name in layers):
        return BalancedNorm(found.norm, found.layers, reason="its layers compute in floating point")
    unchanged = torch.ones_like(rows[0]), torch.zeros_like(rows[0])
    before = _error(layers, rows, *unchanged, policy, scheme)
    best, least = unchanged, before * LEAST_GAIN
    for ratio, offset in _candidates(rows, shifts=found.shifts):
        error = _error(layers, rows, ratio, offset, policy, scheme)
        if error < least:
            best, least = (ratio, offset), error
    if best is unchanged:
        return BalancedNorm(
            found.norm, found.layers, before, before, reason="no ratios lower the error of its layers"
        )
    fold_ratios(model, found, *best)
    return BalancedNorm(found.norm, found.layers, before, least, folded=True)


def _candidates(rows: Tensor, *, shifts: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Ratios and offsets to try for inputs ``rows``, (rows, channels)."""
    low, high = rows.amin(0), rows.amax(0)
    zero = torch.zeros_like(low)
    if shifts:
        yield torch.ones_like(low), (low + high) / 2
    for offset, alpha in product([zero, *([(low + high) / 2, rows.mean(0)] if shifts else [])], ALPHAS):
        centred = rows - offset
        for spread in (centred.abs().amax(0), centred.square().mean(0).sqrt()):
            mean = spread.mean()
            if mean > 0:
                relative = (spread / mean).clamp_min(LEAST_SPREAD) ** alpha
                yield relative / relative.log().mean().exp(), offset


def _error(
    layers: dict[str, QuantizedLayer],
    rows: Tensor,
    ratio: Tensor,
    offset: Tensor,
    policy: BitConfig,
    scheme: Scheme,
) -> float:
    """Squared error of the layers' outputs with quantized weights and inputs, relative to their variance."""
    moved, total = (rows - offset) / ratio, 0.0
    few = moved[:: -(-moved.numel() // VALUES)]
    for name, layer in layers.items():
        bits = policy.layers[name]
        assert bits.activation is not None
        weight = layer.latent_weight().detach()[:: -(-len(layer.latent_weight()) // OUTPUTS)]
        outputs = F.linear(rows, _taps(weight)).double()
        variance = float((outputs - outputs.mean(0)).square().sum())  # no offset changes it
        weight = weight * ratio.view(1, -1, *(1,) * (weight.dim() - 2))
        quantized = weight
        if bits.weight is not None:
            quantized = _fitted(scheme.new_weight_quantizer(layer, (bits.weight,)), weight)(weight)
        signed = bool((moved < 0).any())
        inputs = scheme.new_input_quantizer(layer, (bits.activation,), signed=signed)
        inputs.fit(few)
        difference = F.linear(inputs(moved), _taps(quantized)) - F.linear(moved, _taps(weight))
        total += float(difference.double().square().sum()) / variance if variance > 0 else 0.0
    return total / max(1, len(layers))


def _taps(weight: Tensor) -> Tensor:
    """A weight as a matrix; of a convolution, every tap of the kernel, since rows are single positions."""
    return weight.flatten(2).movedim(2, 0).flatten(0, 1) if weight.dim() > 2 else weight


def _fitted(quantizer: Quantizer, weight: Tensor) -> Quantizer:
    """A quantizer of the same kind for some rows of the weight, fitted to them."""
    shape = (
        tuple(size if level > 1 else 1 for size, level in zip(weight.shape, quantizer.shape, strict=True))
        if quantizer.shape
        else ()
    )
    same = type(quantizer)(quantizer.grids, shape).to(weight.device)
    same.fit(weight)
    return same
