"""Layer inputs on calibration images: range, sign and sample values.

They determine the clipping levels of the activations, whether a quantizer must be signed, and the error of each
bit-width. Weights need no data, unless the start of every layer is chosen by the error of its output (``starts``): then
parts of a few images' inputs are kept whole, as the layer reads them.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.junctions.places import Place
from saqcli.quant.junctions.sharing import activation_places, owners, without_requantization
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, is_convolution, quantized_layers
from saqcli.quant.products import QuantizedProduct
from saqcli.quant.quantizers import Quantizer
from saqcli.quant.starts import choose_starts

SAMPLES_PER_BATCH = 8192  # values kept of each layer's input; 8 batches determine a level to 1 %
ClipInit = Literal["error", "output", "paper"]
KEPT_IMAGES = 16  # of every layer, whose inputs are kept whole for the error of its output
KEPT_PER_BATCH = 4
KEPT_VALUES = 2**15  # at most, of an image: a window from its middle


@dataclass
class InputStatistics:
    """Statistics of the input of one layer.

    Attributes:
        lowest: smallest value.
        highest: largest value.
        samples: values drawn uniformly from every batch, one dimension.
        inputs: if they are kept, windows of the inputs of a few images, each (n, ...) as the layer reads them.
    """

    lowest: float = float("inf")
    highest: float = float("-inf")
    _drawn: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def signed(self) -> bool:
        """Whether negative values occur, so that the quantizer needs negative levels."""
        return self.lowest < 0

    @property
    def samples(self) -> Tensor:
        """The values drawn so far."""
        return torch.cat(self._drawn) if self._drawn else torch.zeros(1)

    def update(self, x: Tensor, generator: torch.Generator) -> None:
        """Add one batch."""
        flat = x.detach().float().flatten()
        low, high = torch.aminmax(flat)
        self.lowest, self.highest = min(self.lowest, low.item()), max(self.highest, high.item())
        if flat.numel() > SAMPLES_PER_BATCH:
            index = torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=generator)
            flat = flat[index.to(flat.device)]
        else:
            flat = flat.clone()  # the next operator may write to it
        self._drawn.append(flat.cpu())

    def keep(self, x: Tensor, kernel: tuple[int, ...] | None) -> None:
        """Keep windows of the first images of a batch, (N, ...), while fewer than ``KEPT_IMAGES`` are there.

        Args:
            x: input of the layer.
            kernel: sizes that a convolution reads along the last dimensions of ``x``; None for a linear layer, whose
                channels are the last dimension.
        """
        count = min(KEPT_PER_BATCH, KEPT_IMAGES - sum(map(len, self.inputs)))
        if count > 0 and x.dim() > 1 + len(kernel or ()):
            self.inputs.append(_window(x.detach().float()[:count], kernel).cpu().clone())


def _window(x: Tensor, kernel: tuple[int, ...] | None) -> Tensor:
    """All channels of ``x``, and of its other dimensions a window from the middle with about ``KEPT_VALUES`` values."""
    end = x.dim() if kernel else x.dim() - 1
    start = end - len(kernel) if kernel else 1
    for d, least in zip(range(start, end), kernel or (1,) * (end - start), strict=True):
        excess = x[0].numel() / KEPT_VALUES
        if excess > 1:
            size = min(x.shape[d], max(least, int(x.shape[d] / excess ** (1 / (end - d)))))
            x = x.narrow(d, (x.shape[d] - size) // 2, size)
    return x


class _Observer(nn.Module):
    """Takes the place of the input quantizer, records its input and returns it unchanged."""

    def __init__(
        self, name: str, statistics: InputStatistics, generator: torch.Generator, layer: nn.Module | None
    ) -> None:
        """Inputs of ``layer`` are kept whole as well, if it is one that is called itself."""
        super().__init__()
        self.name, self.statistics, self.generator = name, statistics, generator
        self.keeps = isinstance(layer, QuantizedLayer) and _called_itself(layer)
        self.kernel = _kernel(layer) if self.keeps else None

    def forward(self, x: Tensor) -> Tensor:
        """Record ``x`` and return it."""
        _check_finite(x, f"the input of layer {self.name} is")
        self.statistics.update(x, self.generator)
        if self.keeps:
            self.statistics.keep(x, self.kernel)
        return x


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise UnsupportedModel(
            f"{what} NaN or infinite on calibration images: check the weights, `model.mean`, `model.std` and "
            "`model.input_size`"
        )


@contextmanager
def _observed(model: nn.Module, seed: int, keep: bool) -> Iterator[dict[str, InputStatistics]]:
    generator = torch.Generator().manual_seed(seed)
    places = activation_places(model)
    statistics = {name: InputStatistics() for name in places}
    before = {name: place.quantizer for name, place in places.items()}
    try:
        for name, place in places.items():
            layer = place.holder if keep else None
            place.put(_Observer(name, statistics[name], generator, layer))
        yield statistics
    finally:
        for name, place in places.items():
            place.put(before[name])


def _called_itself(layer: QuantizedLayer) -> bool:
    """Whether a convolution or linear layer computes its output; a parent may use a routed one in any way."""
    return not layer.routed and (is_convolution(layer) or issubclass(layer.float_class, nn.Linear))


def _kernel(layer: Any) -> tuple[int, ...] | None:
    """The sizes that a convolution reads along each dimension of its input; None for other layers."""
    if not is_convolution(layer):
        return None
    return tuple((size - 1) * gap + 1 for size, gap in zip(layer.kernel_size, layer.dilation, strict=True))


@contextmanager
def in_floating_point(model: nn.Module) -> Iterator[None]:
    """Within the context every layer, product of activations and junction computes without its quantizers."""
    layers = quantized_layers(model).values()
    places = [*(Place(layer, "weight_quantizer") for layer in layers), *activation_places(model).values()]
    kept = [(place, place.quantizer) for place in places]
    try:
        for place, _ in kept:
            place.put(nn.Identity())
        yield
    finally:
        for place, quantizer in kept:
            place.put(quantizer)


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Tensor | Call], seed: int = 0, *, keep: bool = False
) -> dict[str, InputStatistics]:
    """Run ``batches`` through the float model in eval mode and record the input statistics of every quantized layer,
    and those of the operands of every product and junction to be quantized.

    Args:
        model: wrapped; its mode is restored.
        batches: images, (N, C, H, W), or other calls, on the model's device.
        seed: for drawing sample values.
        keep: whether to keep inputs of a few images whole, as ``clip_init`` as ``output`` needs them.

    Raises:
        UnsupportedModel: the input of a layer, or an output, is NaN or infinite.
    """
    with in_eval_mode(model), without_requantization(model), _observed(model, seed, keep) as statistics:
        for batch in batches:
            for output in tensors_in(Call.of(batch).run(model)):
                _check_finite(output, "the class scores are" if output.dim() == 2 else "the outputs are")
    return statistics


def fit(model: nn.Module, statistics: Mapping[str, InputStatistics], clip_init: ClipInit = "error") -> None:
    """Fit the levels, steps and offsets of every installed quantizer, for all candidates.

    Args:
        model: with quantizers installed.
        statistics: by layer and by operand of a product or junction, from ``observe``.
        clip_init: least quantization ``error``, least error of each layer's ``output``, or as in the SAQ ``paper``.
            For ``output`` the statistics need the inputs that ``observe`` keeps; layers without them start at the least
            quantization error.
    """
    shared = owners(model)
    samples = {name: [statistics[name].samples] for name in activation_places(model)}
    for name, owner in shared.items():
        samples[owner] += samples.pop(name)
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.input_quantizer, Quantizer) and name not in shared:
            drawn = torch.cat(samples[name]).to(layer.latent_weight().device)
            _start(layer.input_quantizer, drawn, clip_init, not is_convolution(layer))
    for name, place in activation_places(model).items():
        quantizer = place.quantizer
        if isinstance(place.holder, QuantizedLayer) or name in shared or not isinstance(quantizer, Quantizer):
            continue
        device = next(chain(quantizer.parameters(), quantizer.buffers(), model.parameters())).device
        start = clip_init if isinstance(place.holder, QuantizedProduct) else "error"
        _start(quantizer, torch.cat(samples[name]).to(device), start, linear=False)
    for layer in quantized_layers(model).values():  # after all inputs, which bound the steps of weights
        if isinstance(layer.weight_quantizer, Quantizer):
            weight = layer.effective_weight().detach()
            _start(layer.weight_quantizer, weight, clip_init, not is_convolution(layer), layer.least_step())
    if clip_init == "output":
        with without_requantization(model):
            for name, layer in quantized_layers(model).items():
                if name in shared:
                    choose_starts(layer, None, statistics[name].inputs)
                else:
                    choose_starts(layer, torch.cat(samples[name]), statistics[name].inputs)


@torch.no_grad()
def reestimate_batch_norms(model: nn.Module, batches: Iterable[Tensor | Call]) -> None:
    """Re-estimate the running statistics of every batch norm as means over ``batches``; all else stays in eval mode.

    Weight normalization removes the mean of every weight. This shifts the output of a convolution considerably where
    its inputs are positive; a batch norm in training mode would remove the shift again.

    Args:
        model: quantized; its mode is restored.
        batches: images, (N, C, H, W), or other calls, on the model's device.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    with in_eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over all batches
                norm.train()
            for batch in batches:
                Call.of(batch).run(model)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _start(
    quantizer: Quantizer, x: Tensor, clip_init: ClipInit, linear: bool, least: Tensor | None = None
) -> None:
    if clip_init == "paper":
        quantizer.fit_as_published(x, linear=linear)
    else:
        quantizer.fit(x)
    quantizer.settle(x, least)
