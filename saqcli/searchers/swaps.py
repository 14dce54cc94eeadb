"""Swaps: bits move between layers, from the best simple configuration on, as long as the network comes nearer to float.

Losses of single operands do not add up at few bits: the sum that a knapsack minimizes can prefer a configuration that
is worse than the same bits everywhere. Here sums only propose, and the network itself decides:

    starts    the same bits everywhere, with weights and inputs at widths of their own; the optima of two knapsacks
              (``fisher``, ``error``)
    fit       one factor for all weights and one for all inputs, with which the sums of ``fisher`` come nearest to
              what was measured of the uniform configurations; the optimum of these sums is one more start, as is the
              one among configurations whose layers have one width for both
    fill      what the best start and the best uniform configuration leave of the budget is spent; of the same bits
              everywhere in steps of both operands
    swaps     one layer's weights, inputs or both get a bit more and another's a bit less, or what the budget allows;
              tried in the order of the predicted gain, kept if the divergence from the float network falls

Every configuration is measured at the starting point of fine-tuning, with its corrections (``Scorer``). The result is
the nearest of all that were measured: never worse, on the scoring images, than the best uniform configuration.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.divergences import add_divergences, divergences
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import Batch, Scored, SearchProblem, SearchResult
from saqcli.searchers.separable import Losses, relative_noise
from saqcli.searchers.supernet import Scorer, closeness, score_all
from saqcli.searchers.uniforms import largest_uniform, untied_uniforms
from saqcli.training.options import check_count

FACTORS = 0.1, 10.0  # least and greatest factor of the divergences of weights, and of inputs
STEPS = (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, -1)  # in widths of weights and of inputs
Choice = tuple[int, ...]
Move = tuple[float, int, int]  # change of the predicted loss, decision, its new option


class Swaps:
    """Takes the configuration nearest to the float network, by measured swaps.

    Args:
        images: number of scoring images that predict the gain of swaps; a backward pass for each.
        scoring: number of scoring images that configurations are compared on, rounded up to whole batches.
        swaps: number of swaps that are measured at most.
        patience: swaps in a row without a gain after which the search ends.
    """

    def __init__(self, *, images: int = 64, scoring: int = 512, swaps: int = 24, patience: int = 4) -> None:
        for option, value in (
            ("images", images),
            ("scoring", scoring),
            ("swaps", swaps),
            ("patience", patience),
        ):
            check_count(option, value)
        self.images, self.scoring, self.swaps, self.patience = images, scoring, swaps, patience

    def search(self, problem: SearchProblem) -> SearchResult:
        """Measure the starts, then swaps of the best."""
        space, budget = problem.space, problem.budget
        space.check_reachable(budget)
        kept = problem.memory.load() or {}
        alone: dict[str, float] = (
            kept["divergences"] if "divergences" in kept else divergences(problem, self.images)
        )
        known, losses = {"divergences": alone}, add_divergences(space, alone)
        starts = _starts(space, budget, losses, relative_noise(problem))
        report = Scorer(problem)  # on all scoring images
        problem = replace(problem, images=replace(problem.images, scoring=self._first(problem)))
        scorer = Scorer(problem, report.at)
        best = score_all(problem, scorer, starts, known)
        if not budget.admits(space.ceiling):
            uniforms = [scorer(choice) for choice in untied_uniforms(space, budget)]
            losses = add_divergences(space, alone, *_factors(space, alone, uniforms))
            tied = _tied(space, losses)
            fitted = [tuple(best_choice(space, budget, each)) for each in (losses, tied)]
            best = score_all(problem, scorer, list(dict.fromkeys([best.choice, *fitted])), known)
            uniform = min(uniforms, key=closeness, default=best)
            filled = [_filled(space, budget, start.choice, losses) for start in (best, uniform)]
            filled.append(_filled(space, budget, tuple(largest_uniform(space, budget)), tied))
            best = score_all(problem, scorer, list(dict.fromkeys([best.choice, *filled])), known)
            best = self._descend(problem, scorer, best, losses, known)
        choice = list(best.choice)

        def propose(budget: Budget) -> list[list[int]]:
            """The best sum, and the uniform pair of the best sum: neither is always the better."""
            pairs = untied_uniforms(space, budget)
            uniform = min(pairs, key=lambda pair: _total(losses, pair), default=None)
            found = [best_choice(space, budget, losses), *([] if uniform is None else [uniform])]
            return found[:1] if found[0] == found[-1] else found

        return SearchResult(choice, propose, report, [report(choice)])

    def _first(self, problem: SearchProblem) -> list[Batch]:
        """Whole batches of the scoring images."""
        found: list[Batch] = []
        for batch in problem.images.scoring:
            if sum(len(labels) for _, labels in found) < self.scoring:
                found.append(batch)
        return found

    def _descend(
        self,
        problem: SearchProblem,
        scorer: Scorer,
        best: Scored,
        losses: Losses,
        known: Mapping[str, Any],
    ) -> Scored:
        """Swap as long as it helps; an interrupted search finds its scores again."""
        tried = {best.choice}
        failed = 0
        with problem.progress.task("swapping bits", self.swaps) as task:
            for _ in range(self.swaps):
                chosen = next(_swapped(problem.space, problem.budget, best.choice, losses, tried), None)
                if chosen is None or failed == self.patience:
                    break
                tried.add(chosen)
                found = scorer(chosen)
                failed = 0 if closeness(found) < closeness(best) else failed + 1
                best = min(best, found, key=closeness)
                task.advance(divergence=best.divergence, best=best.top1)
                problem.memory.offer(lambda: {**known, "calibrated": scorer.state_dict()})
        return best


def _factors(
    space: SearchSpace, alone: Mapping[str, float], measured: Sequence[Scored]
) -> tuple[float, float]:
    """Of weights and of inputs: the sums of divergences come nearest, relatively, to the measured ones."""
    of_weights, of_inputs = add_divergences(space, alone, 1, 0), add_divergences(space, alone, 0, 1)
    rows = [
        [_total(losses, one.choice) / one.divergence for losses in (of_weights, of_inputs)]
        for one in measured
        if one.divergence > 0
    ]
    rows = [row for row in rows if np.isfinite(row).all()]
    if np.linalg.matrix_rank(np.array(rows).reshape(-1, 2)) < 2:  # as where operands are tied
        return 1.0, 1.0
    weight, activation = lsq_linear(rows, [1.0] * len(rows), FACTORS).x
    return float(weight), float(activation)


def _tied(space: SearchSpace, losses: Losses) -> Losses:
    """``losses``, infinite where weights and inputs differ; of a decision without an equal pair as they are."""
    found: Losses = []
    for decision, row in zip(space.decisions, losses, strict=True):
        equal = [bits.weight == bits.activation for bits in decision.options]
        found.append(
            [loss if same or not any(equal) else math.inf for loss, same in zip(row, equal, strict=True)]
        )
    return found


def _total(losses: Losses, choice: Sequence[int]) -> float:
    """The sum of the losses of ``choice``."""
    return sum(row[option] for row, option in zip(losses, choice, strict=True))


def _starts(space: SearchSpace, budget: Budget, losses: Losses, noise: Losses) -> list[Choice]:
    """Distinct configurations within the budget."""
    if budget.admits(space.ceiling):
        return [tuple(len(decision.options) - 1 for decision in space.decisions)]
    uniform = [tuple(choice) for choice in untied_uniforms(space, budget)]
    found = [tuple(best_choice(space, budget, each)) for each in (losses, noise)]
    return list(dict.fromkeys([*found, *uniform]))


def _filled(space: SearchSpace, budget: Budget, choice: Choice, losses: Losses) -> Choice:
    """``choice`` with what is left of the budget spent, most predicted gain first."""
    while True:
        rises = [(gain, i, option) for gain, i, option in _moves(space, choice, losses) if gain < 0]
        for _, i, option in sorted(rises):
            richer = (*choice[:i], option, *choice[i + 1 :])
            if budget.admits(space.cost(richer)):
                choice = richer
                break
        else:
            return choice


def _swapped(
    space: SearchSpace, budget: Budget, choice: Choice, losses: Losses, tried: set[Choice]
) -> Iterator[Choice]:
    """Configurations within the budget one swap away and not yet tried, most predicted gain first."""
    moves = _moves(space, choice, losses)
    pairs = [
        (one[0] + other[0], (one, other))
        for one in moves
        for other in moves
        if one[0] < 0 < other[0] and one[1] != other[1]
    ]
    singles = [(move[0], (move,)) for move in moves if move[0] < 0]
    for _, parts in sorted([*singles, *pairs]):
        changed = list(choice)
        for _, decision, option in parts:
            changed[decision] = option
        if tuple(changed) not in tried and budget.admits(space.cost(changed)):
            yield tuple(changed)


def _moves(space: SearchSpace, choice: Sequence[int], losses: Losses) -> list[Move]:
    """One decision's weights or inputs at the next width."""
    found: list[Move] = []
    for i, (decision, now) in enumerate(zip(space.decisions, choice, strict=True)):
        here = decision.options[now]
        for option in _neighbours(decision.options, here):
            found.append((losses[i][option] - losses[i][now], i, option))
    return found


def _neighbours(options: Sequence[LayerBits], here: LayerBits) -> list[int]:
    """The options next to ``here``: more or fewer bits of one operand, or of both."""
    places = [(bits.weight or 0, bits.activation or 0) for bits in options]
    at = {place: index for index, place in enumerate(places)}
    widths = [sorted(set(of)) for of in zip(*places, strict=True)]
    row, column = widths[0].index(here.weight or 0), widths[1].index(here.activation or 0)
    return [
        at[place]
        for up, right in STEPS
        if 0 <= row + up < len(widths[0]) and 0 <= column + right < len(widths[1])
        if (place := (widths[0][row + up], widths[1][column + right])) in at
    ]
