"""One block of a quantized network learns the output of the same block of the float network.

The target is the float block's output on float inputs, so that a block also makes up for the errors of those before it.
In each iteration a batch of images is drawn, every value of the block's input is the quantized prefix's or, with
probability ``drop``, the float network's, and one step of Adam lowers

    sum (block(x) - target)^2 * weight / sum (target - mean of target)^2          over the batch

in the rounding of weights, the levels of weights and inputs, and, if wanted, the biases. The mixture of inputs, and the
random omission of the quantizers within the block, are those of QDrop (Wei et al., arXiv:2203.05740).

With ``noise_radius`` each step minimizes the error at the worst input near the given one: one step of ascent, of
``noise_radius`` times the norm of the noise x - x_float of that image, in the direction of the gradient. This is
sharpness-aware minimization (Foret et al., arXiv:2010.01412) with the noise of the prefix in the place of that of
weights.

A block that does not become better on all calibration images is put back as it was, bit for bit.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.quant.junctions.sharing import activation_places, places_of
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import QuantizedLayer, in_eval_mode, quantized_layers, weights_given
from saqcli.quant.quantizers.base import Quantizer
from saqcli.reconstruction.activations import Rows
from saqcli.reconstruction.adam import RelativeAdam, Trained
from saqcli.reconstruction.blocks import Block
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.probe import probe
from saqcli.reconstruction.rounding import (
    LEAST_WEIGHTS,
    LearnedRounding,
    learned_rounding,
    weights_per_level,
)
from saqcli.training.execution import overruns
from saqcli.training.loop import NO_MEMORY, Memory

LEAST_IMAGES = 4  # of an iteration, however many values they have
MEASURED = 16  # images of a pass that measures the error
LEAST_POWER = 1e-20  # of a target or a gradient, avoids 0 / 0


class BlockError(NamedTuple):
    """The mean squared error of a block's output on the calibration images, relative to the target's variance.

    Attributes:
        name: of the block.
        before: as it was found.
        after: as it was left; never above ``before``.
    """

    name: str
    before: float
    after: float


def fit_block(
    block: Block,
    model: nn.Module,
    inputs: Rows,
    float_inputs: Rows,
    targets: Rows,
    options: Reconstruction,
    generator: torch.Generator,
    memory: Memory = NO_MEMORY,
    *,
    weights: Rows | None = None,
) -> BlockError:
    """Fit one block, in place; a block that does not become better stays as it was, bit for bit.

    With several ranks each gives the activations of its own images, and all end with the same bits.

    Args:
        block: the part of ``model`` to fit.
        model: quantized and calibrated; its mode is restored.
        inputs: of the block, (N, ...), from the quantized blocks before it.
        float_inputs: the same from the float network; the same object where nothing before the block is quantized.
        targets: outputs of the float block on ``float_inputs``.
        options: see ``Reconstruction``.
        generator: draws images and dropped values; on the CPU.
        memory: holds the state of this block alone, see ``BlockFit.state_dict``.
        weights: of the squared errors, in the shape of ``targets`` or broadcasting against it; None for equal ones.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    with in_eval_mode(model), fused_on_cpu(model):
        before, power = measured(block, model, inputs, targets)
        if not options.iterations:
            return BlockError(block.name, before / power, before / power)
        fit = BlockFit(block, model, inputs, float_inputs, targets, options, generator, power, weights)
        if not fit.optimizer.trained:
            return BlockError(block.name, before / power, before / power)
        if (state := memory.load()) is not None:
            fit.load_state_dict(state)
        fit.run(memory)
        after, _ = measured(block, model, inputs, targets)
        if not after < before:
            fit.undo()
            after = before
        return BlockError(block.name, before / power, after / power)


class BlockFit:
    """The iterations of one block; can be saved and continued between any two of them.

    Args:
        power: mean square of the targets about their mean, over all ranks.
        others: as for ``fit_block``.
    """

    def __init__(
        self,
        block: Block,
        model: nn.Module,
        inputs: Rows,
        float_inputs: Rows,
        targets: Rows,
        options: Reconstruction,
        generator: torch.Generator,
        power: float,
        weights: Rows | None = None,
    ) -> None:
        self.block, self.model, self.options, self.generator = block, model, options, generator
        self._inputs, self._float_inputs, self._targets, self._weights = (
            inputs,
            float_inputs,
            targets,
            weights,
        )
        self._power = power
        self._noisy = inputs is not float_inputs and (options.drop > 0 or options.noise_radius > 0)
        self._probe = probe(block, model, inputs)
        self._layers = self._probe.layers
        self.batch_size = self._batch_size()
        self._roundings: list[LearnedRounding] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._order: list[int] = []
        self._done = 0
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.optimizer = RelativeAdam(list(self._trained()))

    def _trained(self) -> Iterator[Trained]:
        options = self.options
        own = _own_quantizers(self.block, self.model)
        for layer in self._layers:
            if _owns_weight(layer, self._layers, self.model):
                rounding = learned_rounding(layer, options)
                self._roundings.append(rounding)
                self._keep(layer.latent_weight())
                yield from rounding.trained
                if weights_per_level(layer) >= LEAST_WEIGHTS:
                    yield from self._levels(layer.weight_quantizer, options.weight_level_lr)
            if layer.input_quantizer in own:
                own.remove(layer.input_quantizer)
                yield from self._levels(layer.input_quantizer, options.input_level_lr)
        for quantizer in own:
            yield from self._levels(quantizer, options.input_level_lr)
        if options.bias_lr:
            yield from self._biases()

    def _levels(self, quantizer: nn.Module, rate: float) -> Iterator[Trained]:
        if isinstance(quantizer, Quantizer) and rate:
            for level in quantizer.parameters():
                self._keep(level)
                yield Trained(level, level.detach().abs().clone(), rate)

    def _biases(self) -> Iterator[Trained]:
        for bias, scale in self._probe.biases:
            self._keep(bias)
            yield Trained(bias, scale, self.options.bias_lr)

    def _keep(self, tensor: Tensor) -> None:
        self._kept.append((tensor, tensor.detach().clone()))

    def run(self, memory: Memory = NO_MEMORY) -> None:
        """All iterations that are left; the layers are ordinary ones again afterwards, also after errors."""
        options = self.options
        try:
            for parameter, _ in self._flags:
                parameter.requires_grad_(False)
            for one in self.optimizer.trained:
                one.value.requires_grad_(True)
            with _dropping(self.block, self.model, options.drop_inputs, self.generator):
                while self._done < options.iterations:
                    self._step()
                    self._done += 1
                    memory.offer(self.state_dict)
            for rounding in self._roundings:
                rounding.fix()
        finally:
            for layer in self._layers:
                layer.given_weight = None
            for parameter, flag in self._flags:
                parameter.requires_grad_(flag)
                parameter.grad = None

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back as it was before the first iteration."""
        for tensor, before in self._kept:
            tensor.copy_(before)

    def _step(self) -> None:
        options = self.options
        index = self._draw()
        x, target = _laid_out(self._inputs[index], self._layers), self._targets[index]
        weight = None if self._weights is None else self._weights[index]
        if self._noisy and isinstance(x, Tensor):
            x = self._mixed(x, _laid_out(self._float_inputs[index], self._layers), target, weight)
        loss = self._error(x, target, weight)
        done = self._done / options.iterations
        if done >= options.warm_up:
            progress = (done - options.warm_up) / max(1 - options.warm_up, LEAST_POWER)
            terms = [term for one in self._roundings if (term := one.regularizer(progress)) is not None]
            if terms:
                loss = loss + options.regularization * torch.stack(terms).mean()
        torch.autograd.backward(loss)
        distributed.average(one.value.grad for one in self.optimizer.trained if one.value.grad is not None)
        self.optimizer.step(0.5 * (1 + math.cos(math.pi * done)))

    def _mixed(self, x: Tensor, in_float: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The input of an iteration: partly the float network's, then moved to the worst one within the radius."""
        options = self.options
        radius = _norm(x - in_float) * options.noise_radius
        if options.drop:
            x = torch.where(_chosen(x, options.drop, self.generator), in_float, x)
        if not options.noise_radius:
            return x
        x = x.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self._error(x, target, weight), x)
        return (x + gradient * (radius / _norm(gradient).clamp_min(LEAST_POWER))).detach()

    def _error(self, x: Any, target: Tensor, weight: Tensor | None) -> Tensor:
        for rounding in self._roundings:
            rounding.prepare()
        error = (self.block(self.model, x) - target).square()
        return (error if weight is None else error * weight).mean() / self._power

    def _batch_size(self) -> int:
        """Images of an iteration on this rank."""
        options = self.options
        most = max(LEAST_IMAGES, options.most_values // max(1, self._probe.values))
        return min(len(self._inputs), max(1, min(options.batch_size, most) // distributed.count()))

    def _draw(self) -> Tensor:
        """The next images, in a new order after each pass over all of them."""
        count = self.batch_size
        if len(self._order) < count:
            self._order = torch.randperm(len(self._inputs), generator=self.generator).tolist()
        index, self._order = self._order[:count], self._order[count:]
        return torch.tensor(index)

    def state_dict(self) -> dict[str, Any]:
        """The state between two iterations."""
        return {
            "block": self.block.name,
            "done": self._done,
            "values": [one.value.detach() for one in self.optimizer.trained],
            "optimizer": self.optimizer.state_dict(),
            "order": list(self._order),
            "generator": self.generator.get_state(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; the model has to be as it was before the first iteration."""
        self._done = int(state["done"])
        for one, value in zip(self.optimizer.trained, state["values"], strict=True):
            one.value.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self._order = list(state["order"])
        self.generator.set_state(state["generator"])


def _owns_weight(layer: QuantizedLayer, layers: Sequence[QuantizedLayer], model: nn.Module) -> bool:
    """Whether the block may change the weight: it is quantized, and no layer of another block computes with it."""
    if layer.tied_to or not isinstance(layer.weight_quantizer, Quantizer):
        return False
    sharing = [other for other in quantized_layers(model).values() if layer in other.tied_to]
    return all(other in layers for other in sharing)


def _own_quantizers(block: Block, model: nn.Module) -> list[Quantizer]:
    """The quantizers of activations in a block, each once; not those that another block shares, which stay."""
    inside = {name for part in block.layers for name in places_of(part, model.get_submodule(part))}
    found: list[Quantizer] = []
    shared: set[int] = set()
    for name, place in activation_places(model).items():
        if isinstance(place.quantizer, Quantizer) and name not in inside:
            shared.add(id(place.quantizer))
    for part in block.layers:
        for place in places_of(part, model.get_submodule(part)).values():
            quantizer = place.quantizer
            if isinstance(quantizer, Quantizer) and id(quantizer) not in shared:
                shared.add(id(quantizer))
                found.append(quantizer)
    return found


@torch.no_grad()
def measured(block: Block, model: nn.Module, inputs: Rows, targets: Rows) -> tuple[float, float]:
    """The mean squared error of a block, and the mean square of its targets about their mean, over all ranks."""
    named = quantized_layers(model)
    layers = [named[name] for name in block.layers if name in named]
    error = count = total = squares = 0.0
    with weights_given([layer for layer in layers if not layer.tied_to and layer.given_weight is None]):
        for start in range(0, len(inputs), MEASURED):
            index = torch.arange(start, min(start + MEASURED, len(inputs)))
            target = targets[index]
            error += float((block(model, _laid_out(inputs[index], layers)) - target).double().square().sum())
            total += float(target.double().sum())
            squares += float(target.double().square().sum())
            count += target.numel()
    error, total, squares, count = distributed.totals(error, total, squares, count)
    return error / count, max(squares / count - (total / count) ** 2, LEAST_POWER)


@contextmanager
def _dropping(block: Block, model: nn.Module, share: float, generator: torch.Generator) -> Iterator[None]:
    """Within the context input quantizers of the block leave a random share of the values as they are."""
    if not share:
        yield
        return
    places = [place for name in block.layers for place in places_of(name, model.get_submodule(name)).values()]
    before = [place.quantizer for place in places]
    try:
        for place, quantizer in zip(places, before, strict=True):
            place.put(_Dropping(quantizer, share, generator))
        yield
    finally:
        for place, quantizer in zip(places, before, strict=True):
            place.put(quantizer)


class _Dropping(nn.Module):
    """A quantizer of inputs that leaves a random share of the values as they are."""

    def __init__(self, quantizer: nn.Module, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer, self.share, self.generator = quantizer, share, generator

    def forward(self, x: Tensor) -> Tensor:
        """``x``, most of it quantized."""
        return torch.where(_chosen(x, self.share, self.generator), x, self.quantizer(x))


def _chosen(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A random mask in the shape of ``x``, true with probability ``share``."""
    return (torch.rand(x.shape, generator=generator) < share).to(x.device)


def _norm(x: Tensor) -> Tensor:
    """The norm of each image's values, broadcasting against ``x``."""
    norms: Tensor = x.detach().flatten(1).norm(dim=1)
    return norms.view(-1, *(1,) * (x.dim() - 1))


def _laid_out(x: Any, layers: Sequence[QuantizedLayer]) -> Any:
    """Images with channels last, which convolutions compute faster; other inputs as they are.

    Not where ``layers`` have a strided convolution of one pixel with few channels: on a CPU, torch 2.15 writes beyond
    the memory of the gradient of its weight.
    """
    plain = not isinstance(x, Tensor) or x.dim() != 4 or any(map(overruns, layers))
    return x if plain else x.contiguous(memory_format=torch.channels_last)
