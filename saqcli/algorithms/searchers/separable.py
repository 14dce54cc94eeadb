"""Losses that add up over layers and operands: what a knapsack is solved with, and the errors they are made of."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saqcli.algorithms.searchers.problem import SearchProblem
from saqcli.quant import grids
from saqcli.quant.grids import Grid
from saqcli.quant.layers import quantized_layers
from saqcli.quant.levels import best_level, squared_error
from saqcli.quant.space import Decision, SearchSpace

Operand = Literal["weight", "activation"]
OPERANDS: tuple[Operand, Operand] = ("weight", "activation")
Losses = list[list[float]]  # of every option, by decision


class Key(NamedTuple):
    """An operand of a layer at a width."""

    layer: str
    operand: Operand
    bits: int


class Noise(NamedTuple):
    """What rounding and clipping do to a tensor, per number.

    Attributes:
        error: mean squared error at the level where it is least.
        power: mean square of the tensor.
    """

    error: float
    power: float


def widths(decision: Decision, operand: Operand) -> list[int]:
    """The bit-widths that weights, or inputs, of a decision's layers may have, ascending."""
    return sorted({getattr(bits, operand) for bits in decision.options})


def add_losses(space: SearchSpace, loss: Callable[[Key], float]) -> Losses:
    """The sum over a decision's layers of what weights and inputs lose, for every option."""
    return [
        [
            sum(
                loss(Key(layer.name, operand, getattr(bits, operand)))
                for layer in decision.members
                for operand in OPERANDS
            )
            for bits in decision.options
        ]
        for decision in space.decisions
    ]


@torch.no_grad()
def measure_noise(problem: SearchProblem) -> dict[Key, Noise]:
    """The noise of every operand at every width it may have."""
    layers = quantized_layers(problem.model)
    found: dict[Key, Noise] = {}
    with problem.progress.task("measuring quantization error", len(problem.space.decisions)) as task:
        for decision in problem.space.decisions:
            for name in (member.name for member in decision.members):
                layer, statistics = layers[name], problem.statistics[name]
                weight, shape = layer.effective_weight().detach(), problem.scheme.level_shape(layer)
                for bits in widths(decision, "weight"):
                    grid = grids.weights(bits, problem.scheme.weight_grid)
                    found[Key(name, "weight", bits)] = _noise(weight, grid, shape)
                for bits in widths(decision, "activation"):
                    grid = grids.activations(bits, signed=statistics.signed)
                    found[Key(name, "activation", bits)] = _noise(statistics.samples, grid)
            task.advance()
    return found


def relative_noise(problem: SearchProblem) -> Losses:
    """Noise-to-signal ratios of weights plus inputs, of every option; 0 for an all-zero tensor."""
    noise = measure_noise(problem)
    ratios = {key: found.error / found.power if found.power > 0 else 0.0 for key, found in noise.items()}
    return add_losses(problem.space, ratios.__getitem__)


def _noise(x: Tensor, grid: Grid, shape: tuple[int, ...] = ()) -> Noise:
    error = squared_error(x.float(), best_level(x, grid, shape), grid).double().sum()
    return Noise(float(error) / x.numel(), float(x.double().square().mean()))
