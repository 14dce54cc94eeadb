"""Losses that are additive over layers, measured batch by batch.

A knapsack is solved with losses that are sums over layers and operands (weights, inputs). They are measured on batches
that are distributed over the ranks; the measurement can be interrupted and resumed.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saqcli import distributed
from saqcli.progress import Task
from saqcli.quant.clip_init import best_level, squared_error
from saqcli.quant.grid import AnyGrid
from saqcli.quant.layer import quantized_layers
from saqcli.quant.search_space import Decision, SearchSpace
from saqcli.searchers.problem import SearchProblem


def sums_over_batches(
    problem: SearchProblem,
    title: str,
    count: int,
    measure: Callable[[int, Task], Iterable[tuple[str, float]]],
    steps: int = 1,
) -> dict[str, float]:
    """Sums by name, resumed from the memory; every rank gets the sums of a single process, bit for bit.

    Args:
        problem: whose memory holds the sums, and whose progress receives the task.
        title: of the task.
        count: number of batches.
        measure: maps a batch number to names and values, each batch on one rank; advances the task.
        steps: by which ``measure`` advances the task per batch.
    """
    kept: dict[str, Any] = problem.memory.load() or {"done": 0, "sums": {}}
    sums: dict[str, float] = kept["sums"]
    with problem.progress.task(title, -(-count // distributed.count()) * steps) as task:
        task.advance(kept["done"] // distributed.count() * steps)
        for first in range(kept["done"], count, distributed.count()):
            own = first + distributed.index()
            mine = list(measure(own, task)) if own < count else []
            for found in distributed.gathered(mine):  # in the order of the batches
                for name, value in found:
                    sums[name] = sums.get(name, 0.0) + value
            done = min(first + distributed.count(), count)
            problem.memory.offer(lambda done=done: {"done": done, "sums": sums})  # type: ignore[misc]
    return sums


Operand = Literal["weight", "activation"]
OPERANDS: tuple[Operand, Operand] = ("weight", "activation")
Losses = list[list[float]]  # of every option, by decision


class Key(NamedTuple):
    """An operand of a layer at a width."""

    layer: str
    operand: Operand
    bits: int


class Noise(NamedTuple):
    """Mean noise power of rounding and clipping, and the signal's power, per value.

    Attributes:
        error: mean squared error at the level where it is least; of weights, of the share that the problem counts.
        power: mean square of the tensor.
    """

    error: float
    power: float


def widths(decision: Decision, operand: Operand) -> list[int]:
    """The possible bit-widths of the weights, or inputs, of a decision's layers, ascending."""
    return sorted({getattr(bits, operand) for bits in decision.options})


def add_losses(space: SearchSpace, loss: Callable[[Key], float]) -> Losses:
    """The sum over a decision's layers of the losses of weights and inputs, for every option."""
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
    """The noise of every operand at every possible width."""
    layers, share = quantized_layers(problem.model), problem.weight_error
    found: dict[Key, Noise] = {}
    with problem.progress.task("measuring quantization error", len(problem.space.decisions)) as task:
        for decision in problem.space.decisions:
            for name in (member.name for member in decision.members):
                layer, statistics = layers[name], problem.statistics[name]
                weight, shape = layer.effective_weight().detach(), problem.scheme.level_shape(layer)
                for bits in widths(decision, "weight"):
                    grid = problem.scheme.grid_of_weights(bits)
                    noise = _noise(weight, grid, shape)
                    found[Key(name, "weight", bits)] = noise._replace(error=share**2 * noise.error)
                for bits in widths(decision, "activation"):
                    grid = problem.scheme.grid_of_inputs(bits, signed=statistics.signed)
                    found[Key(name, "activation", bits)] = _noise(statistics.samples, grid)
            task.advance()
    return found


def relative_noise(problem: SearchProblem) -> Losses:
    """Noise-to-signal ratios of weights plus inputs, of every option; 0 for an all-zero tensor."""
    noise = measure_noise(problem)
    ratios = {key: found.error / found.power if found.power > 0 else 0.0 for key, found in noise.items()}
    return add_losses(problem.space, ratios.__getitem__)


def _noise(x: Tensor, grid: AnyGrid, shape: tuple[int, ...] = ()) -> Noise:
    error = squared_error(x.float(), best_level(x, grid, shape), grid).double().sum()
    return Noise(float(error) / x.numel(), float(x.double().square().mean()))
