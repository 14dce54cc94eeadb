"""Factors with which the losses of single operands add up to what was measured of whole configurations.

The noise of all operands together is not the sum of what each does alone, and inputs in particular matter more than
their own losses say. So a sum is weighed, with a factor for every operand of every decision:

    minimize   sum over measured c of  (sum_k factor_k * loss_k(c) / divergence(c) - 1)**2
             + PULL**2 * sum_k (factor_k / common_k - 1)**2

where ``common`` is one factor for all weights and one for all inputs, by the same least squares without the second
term. Factors stay within ``RANGE``. With few measurements the operands stay near their common factors; with more, each
finds its own. This is Bayesian linear regression with a prior whose deviation is 1 / PULL times that of the relative
errors.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import lsq_linear

from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.divergences import add_divergences
from saqcli.searchers.problem import Scored
from saqcli.searchers.separable import Losses

# of the factor of all weights, or all inputs, over the scale of both; of that of one operand, over its kind's
RANGE = 0.1, 10.0
PULL = 0.15  # relative errors of the sums are about 15 %, deviations of factors about 100 %


def fitted(space: SearchSpace, alone: Mapping[str, float], measured: Sequence[Scored]) -> Losses:
    """The losses of every option in nats, by decision, weighed so that their sums come near ``measured``.

    Without a usable measurement they are as they are.

    Args:
        space: the search space.
        alone: what every operand causes alone, as of ``divergences``.
        measured: configurations of the space; those without a finite, positive divergence are left out.
    """
    parts = add_divergences(space, alone, 1, 0), add_divergences(space, alone, 0, 1)
    rows = np.array([_shares(parts, one) for one in measured if 0 < one.divergence < math.inf])
    rows = rows[np.isfinite(rows).all(1)] if len(rows) else np.zeros((0, 2 * len(space.decisions)))
    if not rows.any():
        return add_divergences(space, alone)
    common = np.repeat(_common(rows), len(space.decisions))
    count = rows.shape[1]
    system = np.vstack([rows * common, PULL * np.eye(count)])
    wanted = np.concatenate([np.ones(len(rows)), np.full(count, PULL)])
    factors = common * lsq_linear(system, wanted, RANGE).x
    of_weights, of_inputs = np.split(factors, 2)
    return [
        [float(w * weight + a * activation) for weight, activation in zip(weights, inputs, strict=True)]
        for w, a, weights, inputs in zip(of_weights, of_inputs, *parts, strict=True)
    ]


def tied(space: SearchSpace, losses: Losses) -> Losses:
    """``losses``, infinite where weights and inputs differ, which a knapsack avoids; of a decision without an equal
    pair as they are.
    """
    found: Losses = []
    for decision, row in zip(space.decisions, losses, strict=True):
        equal = [bits.weight == bits.activation for bits in decision.options]
        found.append(
            [loss if same or not any(equal) else math.inf for loss, same in zip(row, equal, strict=True)]
        )
    return found


def _shares(parts: tuple[Losses, Losses], one: Scored) -> list[float]:
    """The losses of the weights, then of the inputs, of every decision, over the divergence of all together."""
    return [
        row[option] / one.divergence for part in parts for row, option in zip(part, one.choice, strict=True)
    ]


def _common(rows: np.ndarray) -> list[float]:
    """One factor for all weights and one for all inputs."""
    sums = np.stack([half.sum(1) for half in np.split(rows, 2, axis=1)], axis=1)
    both = sums.sum(1)
    scale = float(both.sum() / (both * both).sum())
    if np.linalg.matrix_rank(sums) < 2:  # nothing tells the two apart, as where operands are tied
        return [scale, scale]
    found: list[float] = lsq_linear(sums, np.ones(len(sums)), tuple(scale * end for end in RANGE)).x.tolist()
    return found
