"""Bits by quantization error alone: seconds, no training, an exact knapsack.

The output noise of a layer, relative to its signal, is to first order the sum of the noise-to-signal ratios
of its weight and of its input, each on the scheme's grid at the level of least squared error, whatever the
quantizer. The searcher minimises the sum of these over all layers under the budget. It knows nothing of how
much a layer's noise matters to the loss; it is what a learned search must beat.
"""

import torch

from saqcli.algorithms.searchers.knapsack import choose
from saqcli.algorithms.searchers.problem import SearchProblem
from saqcli.quant import grids
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.cost import BUDGET_USE, LayerCost, decisions
from saqcli.quant.layers import quantized_layers
from saqcli.quant.levels import best_level, noise_to_signal


class ErrorKnapsack:
    """Least sum of relative quantization errors, weights and activations of a layer at the same bits."""

    def search(self, problem: SearchProblem) -> BitConfig:
        """Measure every layer at every candidate, then solve the knapsack exactly."""
        problem.budget.check_reachable(problem.costs, problem.candidates, problem.name)
        ceiling = problem.costs.uniform(
            problem.name, LayerBits(weight=max(problem.candidates), activation=max(problem.candidates))
        )
        if problem.budget.admits(problem.costs.bops(ceiling)):
            return ceiling  # nothing to choose, even where fewer bits err as little
        groups = decisions(problem.costs.layers)
        noise = measure_noise(problem)
        options = [LayerBits(weight=bits, activation=bits) for bits in problem.candidates]
        fixed = problem.costs.bops(problem.costs.uniform(problem.name, options[0])) - sum(
            layer.bops(options[0]) for members in groups.values() for layer in members
        )
        costs = [
            [sum(layer.bops(bits) for layer in members) for bits in options] for members in groups.values()
        ]
        losses = [[_sum(noise, members, bits) for bits in problem.candidates] for members in groups.values()]
        limit = problem.budget.bops - fixed
        wanted = -(-round(1000 * BUDGET_USE) * problem.budget.bops // 1000)  # rounded up
        chosen = choose(costs, losses, limit, least=wanted - fixed)
        by_layer = {
            layer.name: options[index]
            for members, index in zip(groups.values(), chosen, strict=True)
            for layer in members
        }
        return BitConfig(
            model=problem.name,
            layers={layer.name: layer.pinned or by_layer[layer.name] for layer in problem.costs.layers},
        )


@torch.no_grad()
def measure_noise(problem: SearchProblem) -> dict[tuple[str, int], float]:
    """Noise-to-signal ratio of weight plus input, by layer and bit-width, of every layer that is free."""
    layers = quantized_layers(problem.model)
    free = [layer for layer in problem.costs.layers if layer.pinned is None]
    noise: dict[tuple[str, int], float] = {}
    with problem.progress.task("measuring quantization error", len(free)) as task:
        for cost in free:
            layer, statistics = layers[cost.name], problem.statistics[cost.name]
            weight, shape = layer.effective_weight().detach(), problem.scheme.level_shape(layer)
            for bits in problem.candidates:
                grid = grids.weights(bits, problem.scheme.weight_grid)
                ratio = noise_to_signal(weight, best_level(weight, grid, shape), grid)
                grid = grids.activations(bits, signed=statistics.signed)
                samples = statistics.samples
                noise[cost.name, bits] = ratio + noise_to_signal(samples, best_level(samples, grid), grid)
            task.advance()
    return noise


def _sum(noise: dict[tuple[str, int], float], members: list[LayerCost], bits: int) -> float:
    return sum(noise[layer.name, bits] for layer in members)
