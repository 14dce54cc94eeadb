"""Uniform configurations: the same widths in every free layer, the baseline that a search has to beat."""

from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace


def largest_uniform(space: SearchSpace, budget: Budget) -> list[int]:
    """The uniform choice with the most bits within ``budget``; the cheapest choice if there is none."""
    options = [bits for decision in space.decisions for bits in decision.options]
    widths = {width for bits in options for width in (bits.weight, bits.activation)}
    for width in sorted(filter(None, widths), reverse=True):
        choice = space.nearest(LayerBits(weight=width, activation=width))
        if budget.admits(space.cost(choice)):
            return choice
    return [0] * len(space.decisions)


def untied_uniforms(space: SearchSpace, budget: Budget) -> list[list[int]]:
    """The same widths everywhere, one for weights and one for inputs, within the budget; none that another exceeds."""
    options = [bits for decision in space.decisions for bits in decision.options]
    weights, inputs = ({getattr(bits, of) for bits in options} - {None} for of in ("weight", "activation"))
    pairs = {
        (w, a): choice
        for w in weights
        for a in inputs
        if budget.admits(space.cost(choice := space.nearest(LayerBits(weight=w, activation=a))))
    }
    widest = [
        pair
        for pair in pairs
        if not any(other != pair and other[0] >= pair[0] and other[1] >= pair[1] for other in pairs)
    ]
    return [pairs[pair] for pair in sorted(widest)]
