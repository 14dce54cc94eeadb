"""Layer inputs on calibration images: range, sign and sample values.

They determine the clipping levels of the activations, whether a quantizer must be signed, and the error of each
bit-width. Weights need no data: they are fitted tensor by tensor.
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
from saqcli.quant.layer import in_eval_mode, is_convolution, quantized_layers
from saqcli.quant.products import OPERANDS, QuantizedProduct, operand_name, quantized_products
from saqcli.quant.quantizers import Quantizer

SAMPLES_PER_BATCH = 8192  # values kept of each layer's input; 8 batches determine a level to 1 %
ClipInit = Literal["error", "paper"]


@dataclass
class InputStatistics:
    """Statistics of the input of one layer.

    Attributes:
        lowest: smallest value.
        highest: largest value.
        samples: values drawn uniformly from every batch, one dimension.
    """

    lowest: float = float("inf")
    highest: float = float("-inf")
    _drawn: list[Tensor] = field(default_factory=list)

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
        self._drawn.append(flat.cpu())


class _Observer(nn.Module):
    """Takes the place of the input quantizer, records its input and returns it unchanged."""

    def __init__(self, name: str, statistics: InputStatistics, generator: torch.Generator) -> None:
        super().__init__()
        self.name, self.statistics, self.generator = name, statistics, generator

    def forward(self, x: Tensor) -> Tensor:
        """Record ``x`` and return it."""
        _check_finite(x, f"the input of layer {self.name} is")
        self.statistics.update(x, self.generator)
        return x


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(x.isfinite().all()):
        raise UnsupportedModel(
            f"{what} NaN or infinite on calibration images: check the weights, `model.mean`, `model.std` and "
            "`model.input_size`"
        )


@contextmanager
def _observed(model: nn.Module, seed: int) -> Iterator[dict[str, InputStatistics]]:
    generator = torch.Generator().manual_seed(seed)
    places = _places(model)
    statistics = {name: InputStatistics() for name in places}
    before = {name: getattr(*place) for name, place in places.items()}
    try:
        for name, place in places.items():
            setattr(*place, _Observer(name, statistics[name], generator))
        yield statistics
    finally:
        for name, place in places.items():
            setattr(*place, before[name])


@contextmanager
def in_floating_point(model: nn.Module) -> Iterator[None]:
    """Within the context every layer, and every product of activations, computes without its quantizers."""
    modules: list[Any] = [*quantized_layers(model).values(), *quantized_products(model).values()]
    kept = [(module, module.weight_quantizer, module.input_quantizer) for module in modules]
    try:
        for module, _, _ in kept:
            module.weight_quantizer, module.input_quantizer = nn.Identity(), nn.Identity()
        yield
    finally:
        for module, weights, inputs in kept:
            module.weight_quantizer, module.input_quantizer = weights, inputs


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Module and attribute of every activation quantizer: inputs of layers, operands of products."""
    places: dict[str, tuple[nn.Module, str]] = {
        name: (layer, "input_quantizer") for name, layer in quantized_layers(model).items()
    }
    for name, product in quantized_products(model).items():
        for operand, attribute in OPERANDS.items():
            places[operand_name(name, operand)] = product, attribute
    return places


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Tensor | Call], seed: int = 0) -> dict[str, InputStatistics]:
    """Run ``batches`` through the float model in eval mode and record the input statistics of every quantized layer,
    and those of the operands of every product to be quantized.

    Args:
        model: wrapped; its mode is restored.
        batches: images, (N, C, H, W), or other calls, on the model's device.
        seed: for drawing sample values.

    Raises:
        UnsupportedModel: the input of a layer, or an output, is NaN or infinite.
    """
    with in_eval_mode(model), _observed(model, seed) as statistics:
        for batch in batches:
            for output in tensors_in(Call.of(batch).run(model)):
                _check_finite(output, "the class scores are" if output.dim() == 2 else "the outputs are")
    return statistics


def fit(model: nn.Module, statistics: Mapping[str, InputStatistics], clip_init: ClipInit = "error") -> None:
    """Fit the levels, steps and offsets of every installed quantizer, for all candidates.

    Args:
        model: with quantizers installed.
        statistics: by layer and by operand of a product, from ``observe``.
        clip_init: least squared ``error``, or as in the SAQ ``paper``.
    """
    for name, layer in quantized_layers(model).items():
        linear = not is_convolution(layer)
        if isinstance(layer.weight_quantizer, Quantizer):
            _start(layer.weight_quantizer, layer.effective_weight().detach(), clip_init, linear)
        if isinstance(layer.input_quantizer, Quantizer):
            samples = statistics[name].samples.to(layer.latent_weight().device)
            _start(layer.input_quantizer, samples, clip_init, linear)
    for name, (module, attribute) in _places(model).items():
        quantizer = getattr(module, attribute)
        if isinstance(module, QuantizedProduct) and isinstance(quantizer, Quantizer):
            device = next(chain(quantizer.parameters(), quantizer.buffers(), model.parameters())).device
            _start(quantizer, statistics[name].samples.to(device), clip_init, linear=False)


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


def _start(quantizer: Quantizer, x: Tensor, clip_init: ClipInit, linear: bool) -> None:
    if clip_init == "paper":
        quantizer.fit_as_published(x, linear=linear)
    else:
        quantizer.fit(x)
