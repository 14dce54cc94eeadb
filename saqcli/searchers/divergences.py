"""The divergence from the float network that the noise of one operand causes, from one backward pass.

Let z be the logits of an image over a temperature of 4, and p their class probabilities. Noise that moves z by d
changes the Kullback-Leibler divergence from the float network by 1/2 d^T F d to second order, with F = diag(p) - p p^T.
For a vector r of random signs, v = sqrt(p) * r - p (sqrt(p) . r) has E v v^T = F, so that with g = dz/dx^T v, from one
backward pass,

    loss of a width = 1/2 * mean over images of (g . (Q(x) - x))**2

for the weights of a layer, of whose error the share ``SearchProblem.weight_error`` counts, or for its input. The
products keep the errors of a tensor together: errors that cancel in the sums of a layer cost nothing, unlike in HAWQ,
which knows their mean square alone. Labels do not enter.

Probabilities are softened, as in distillation. A network is certain of most images, above all of those that it was
trained on. At temperature 1 their F nearly vanishes and a few others decide the sum, though larger noise, beyond
second order, moves the certain ones too.

Source: the Fisher information as a measure of sensitivity, as in BRECQ (Li et al., arXiv:2102.05426) and LIMPQ (Tang et
al., arXiv:2203.08368); v is the sketch of the generalized Gauss-Newton matrix of Martens (arXiv:1412.1193), section 6.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from saqcli.progress import Task
from saqcli.quant.clip_init import best_level
from saqcli.quant.grid import AnyGrid, fake_quantize
from saqcli.quant.layer import QuantizedLayer, perturbed, quantized_layers, zero_ports
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.problem import SearchProblem
from saqcli.searchers.separable import Key, Losses, add_losses, sums_over_batches, widths

TEMPERATURE = 4.0  # of class probabilities
Quantizer = tuple[Tensor, AnyGrid]  # clipping level, and the grid


def divergences(problem: SearchProblem, count: int) -> dict[str, float]:
    """The divergence of softened class probabilities, in nats, that every operand causes alone at every width, by name;
    weights with the share of their error that the problem counts.

    Args:
        problem: its model in floating point, which is not changed.
        count: number of scoring images; a backward pass for each.
    """
    layers, images = quantized_layers(problem.model.eval()), _images(problem, count)
    free = {layer.name for decision in problem.space.decisions for layer in decision.members}
    layers = {name: layer for name, layer in layers.items() if name in free}
    inputs, errors = _inputs(problem, layers), _weight_errors(problem, layers)

    def measure(number: int, task: Task) -> Iterator[tuple[str, float]]:
        generator = torch.Generator().manual_seed(problem.seed * 1_000_003 + number)
        for key, moved in _movements(problem, layers, images[number], inputs, errors, generator):
            yield _name(key), 0.5 * moved**2 / len(images)
        task.advance(images=1)

    steps = len(images) if layers else 0
    return sums_over_batches(problem, "sensitivity of every operand", steps, measure)


def add_divergences(
    space: SearchSpace, found: Mapping[str, float], weight: float = 1.0, activation: float = 1.0
) -> Losses:
    """The losses of every option: divergences of weights and inputs, each times its factor, summed over layers."""
    factors = {"weight": weight, "activation": activation}
    return add_losses(space, lambda key: factors[key.operand] * found.get(_name(key), 0.0))


def _images(problem: SearchProblem, count: int) -> list[Tensor]:
    """Single images (1, C, H, W), readable ones."""
    found: list[Tensor] = []
    for batch, labels in problem.images.scoring:
        found += torch.split(batch[labels >= 0][: count - len(found)], 1)
        if len(found) == count:
            break
    return found


def _name(key: Key) -> str:
    return f"{key.operand} {key.layer} {key.bits}"


def _inputs(problem: SearchProblem, layers: Mapping[str, QuantizedLayer]) -> dict[Key, Quantizer]:
    """The quantizer of every layer's input at every width."""
    found: dict[Key, Quantizer] = {}
    for decision in problem.space.decisions:
        for name in (member.name for member in decision.members):
            statistics = problem.statistics[name]
            for bits in widths(decision, "activation"):
                grid = problem.scheme.grid_of_inputs(bits, signed=statistics.signed)
                level = best_level(statistics.samples, grid).to(problem.device)
                found[Key(name, "activation", bits)] = level, grid
    return found


@torch.no_grad()
def _weight_errors(problem: SearchProblem, layers: Mapping[str, QuantizedLayer]) -> dict[Key, Tensor]:
    """Q(w) - w of every layer at every width, the share that the problem counts."""
    found: dict[Key, Tensor] = {}
    for decision in problem.space.decisions:
        for name in (member.name for member in decision.members):
            weight, shape = layers[name].effective_weight().detach(), problem.scheme.level_shape(layers[name])
            for bits in widths(decision, "weight"):
                grid = problem.scheme.grid_of_weights(bits)
                level = best_level(weight, grid, shape)
                error = fake_quantize(weight, level, grid) - weight
                found[Key(name, "weight", bits)] = problem.weight_error * error
    return found


def _movements(
    problem: SearchProblem,
    layers: Mapping[str, QuantizedLayer],
    image: Tensor,
    inputs: Mapping[Key, Quantizer],
    errors: Mapping[Key, Tensor],
    generator: torch.Generator,
) -> Iterator[tuple[Key, float]]:
    """v . d of an image for every operand at every width: how far its noise moves the logits along v."""
    ports = dict(zip(layers, zero_ports(layers.values()), strict=True))
    with perturbed(list(layers.values()), list(ports.values())), _input_taps(layers) as taps:
        logits = problem.model(image.to(problem.device).requires_grad_(True)).float() / TEMPERATURE
        share = logits.detach().softmax(1)
        signs = (torch.randint(0, 2, share.shape, generator=generator) * 2 - 1).to(share)
        root = share.sqrt()
        direction = root * signs - share * (root * signs).sum(1, keepdim=True)
        tapped = [x for name in layers for x in taps[name]]
        gradients = torch.autograd.grad(
            (logits * direction).sum(), [*ports.values(), *tapped], allow_unused=True
        )
    to_weights = dict(zip(layers, gradients, strict=False))
    to_inputs = dict(zip(map(id, tapped), gradients[len(ports) :], strict=True))
    with torch.no_grad():
        for key, error in errors.items():
            gradient = to_weights[key.layer]
            if gradient is not None:
                yield key, float((gradient * error).double().sum())
        for key, (level, grid) in inputs.items():
            moved = 0.0
            for x in taps[key.layer]:
                gradient = to_inputs[id(x)]
                if gradient is not None:
                    moved += float((gradient * (fake_quantize(x, level, grid) - x)).double().sum())
            yield key, moved


@contextmanager
def _input_taps(layers: Mapping[str, QuantizedLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context every layer keeps its inputs, in order of its calls; yields them by layer."""
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    before = {name: layer.input_quantizer for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.input_quantizer = _Tap(kept[name])
        yield kept
    finally:
        for name, layer in layers.items():
            layer.input_quantizer = before[name]


class _Tap(nn.Module):
    """Passes its input on, and keeps it."""

    def __init__(self, kept: list[Tensor]) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        """``x``, with a place in the graph of its own."""
        own = x.view_as(x)
        self.kept.append(own)
        return own
