"""Swaps: bits move between layers, from the best simple configuration on, as long as the network comes nearer to float.

Losses of single operands do not add up at few bits: the sum that a knapsack minimizes can prefer a configuration that
is worse than the same bits everywhere. Here sums only propose, and the network itself decides:

    starts    the same bits everywhere, with weights and inputs at widths of their own or at one; the optima of two
              knapsacks (``fisher``, ``error``)
    fit       factors with which the sums of ``fisher`` come near all that was measured so far (``fit``)
    propose   in turn: an optimum of the fitted sums, over all configurations or over those whose layers have one
              width for both operands, or a configuration with what it leaves of the budget spent; and a swap of the
              best: one layer's weights, inputs or both get a bit more, another's a bit less
    decide    what is nearer to the float network than the best, on some scoring images, is measured on all of them,
              and is the new best if it is nearer there too

Every measurement is of the starting point of fine-tuning, with its corrections and the share of the error of weights
that the problem counts (``Comparison``), and is fitted before the next proposal: a proposal that fails corrects the
sums that made it. The result is never farther from float in these measurements, on all scoring images, than the best
uniform configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from saqcli import distributed
from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.divergences import add_divergences, divergences
from saqcli.searchers.fit import fitted, tied
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import Batch, Scored, SearchProblem, SearchResult
from saqcli.searchers.separable import Losses, relative_noise
from saqcli.searchers.supernet import Comparison, Scorer, closeness, score_all
from saqcli.searchers.uniforms import largest_uniform, untied_uniforms
from saqcli.training.options import check_count

STEPS = (1, 0), (0, 1), (1, 1), (-1, 0), (0, -1), (-1, -1)  # in widths of weights and of inputs
Choice = tuple[int, ...]
Move = tuple[float, int, int]  # change of the predicted loss, decision, its new option


class Swaps:
    """Takes the configuration nearest to the float network, by measured proposals.

    Args:
        images: number of scoring images that the sums are made of; a backward pass for each.
        scoring: number of scoring images that every proposal is measured on, rounded up to whole batches; those
            that are nearer than the best are measured on all.
        swaps: number of proposals that are measured at most.
        patience: proposals in a row without a gain after which the search ends.
    """

    def __init__(self, *, images: int = 64, scoring: int = 512, swaps: int = 32, patience: int = 10) -> None:
        for option, value in (
            ("images", images),
            ("scoring", scoring),
            ("swaps", swaps),
            ("patience", patience),
        ):
            check_count(option, value)
        self.images, self.scoring, self.swaps, self.patience = images, scoring, swaps, patience

    def search(self, problem: SearchProblem) -> SearchResult:
        """Measure the starts, then proposals."""
        space, budget = problem.space, problem.budget
        space.check_reachable(budget)
        kept = problem.memory.load() or {}
        alone: dict[str, float] = (
            kept["divergences"] if "divergences" in kept else divergences(problem, self.images)
        )
        race = _Race(problem, self._first(problem), {"divergences": alone})
        starts = simple_choices(space, budget, add_divergences(space, alone), relative_noise(problem))
        uniforms = [tuple(choice) for choice in untied_uniforms(space, budget)]
        best = race.start(starts, uniforms)
        uniforms.sort(key=lambda choice: closeness(race.on_all(choice)))
        if not budget.admits(space.ceiling):
            best = self._improve(problem, race, best, uniforms, alone)
        losses = fitted(space, alone, race.measured)

        def propose(budget: Budget) -> list[list[int]]:
            """The best sum, and the uniform pair of the best sum: neither is always the better."""
            pairs = untied_uniforms(space, budget)
            uniform = min(pairs, key=lambda pair: _total(losses, pair), default=None)
            found = [best_choice(space, budget, losses), *([] if uniform is None else [uniform])]
            return found[:1] if found[0] == found[-1] else found

        return race.on_all.result(best.choice, propose)

    def _first(self, problem: SearchProblem) -> list[Batch]:
        """Whole batches of the scoring images."""
        found: list[Batch] = []
        for batch in problem.images.scoring:
            if sum(len(labels) for _, labels in found) < self.scoring:
                found.append(batch)
        return found

    def _improve(
        self,
        problem: SearchProblem,
        race: "_Race",
        best: Scored,
        uniforms: Sequence[Choice],
        alone: Mapping[str, float],
    ) -> Scored:
        """Measure proposals as long as they help; an interrupted search finds its scores again."""
        space, failed = problem.space, 0
        with problem.progress.task("moving bits", self.swaps) as task:
            for step in range(self.swaps):
                if failed == self.patience:
                    break
                losses = fitted(space, alone, race.measured)
                optima = _optima(problem, losses, [best.choice, *uniforms[:1]])
                swapped = _swapped(space, problem.budget, best.choice, losses)
                proposals = chain(swapped, optima) if step % 2 else chain(optima, swapped)
                chosen = _first_unknown(proposals, race)
                if chosen is None:
                    break
                found = race.better(chosen, best)
                failed = failed + 1 if found is best else 0
                best = found
                task.advance(divergence=best.divergence, MBOPs=best.cost.bops / 1e6)
        return best


def _first_unknown(proposals: Iterator[Choice], race: "_Race") -> Choice | None:
    """The first proposal that was not measured; of the first rank, since solvers may round differently on each."""
    return distributed.from_first(
        lambda: next((choice for choice in proposals if not race.knows(choice)), None)
    )


class _Race:
    """Configurations are measured on the first images; only one that is nearer there than the best, on all.

    Args:
        problem: of the search.
        first: some of the scoring images.
        known: what else the memory keeps.

    Attributes:
        measured: what this run asked for, in order, on the first images; not what an interrupted one knew before.
        on_all: scores on all scoring images.
    """

    def __init__(self, problem: SearchProblem, first: Sequence[Batch], known: Mapping[str, object]) -> None:
        self._problem = replace(problem, images=replace(problem.images, scoring=first))
        self._known = known
        self.measured: list[Scored] = []
        self.on_all = Comparison(problem)
        whole = len(first) == len(problem.images.scoring)
        self._on_first = self.on_all if whole else Scorer(self._problem, self.on_all.at)
        kept = problem.memory.load() or {}
        self.on_all.load_state_dict(kept.get("on_all", {"configurations": []}))

    def start(self, starts: Sequence[Choice], uniforms: Sequence[Choice]) -> Scored:
        """The nearest on all images: of the nearest of ``starts`` on the first, and of all ``uniforms``."""
        nearest = score_all(self._problem, self._on_first, starts, self._state())
        self.measured = [self._on_first(choice) for choice in starts]
        return min(map(self.on_all, dict.fromkeys([nearest.choice, *uniforms])), key=closeness)

    def knows(self, choice: Choice) -> bool:
        """Whether ``choice`` was measured."""
        return any(one.choice == choice for one in self.measured)

    def better(self, choice: Choice, best: Scored) -> Scored:
        """The better of the two; measures ``choice``."""
        found = self._on_first(choice)
        self.measured.append(found)
        if closeness(found) < closeness(self._on_first(best.choice)):
            best = min(best, self.on_all(choice), key=closeness)
        self._problem.memory.offer(lambda: {**self._state(), "calibrated": self._on_first.state_dict()})
        return best

    def _state(self) -> dict[str, object]:
        return {**self._known, "on_all": self.on_all.state_dict()}


def _total(losses: Losses, choice: Sequence[int]) -> float:
    """The sum of the losses of ``choice``."""
    return sum(row[option] for row, option in zip(losses, choice, strict=True))


def simple_choices(space: SearchSpace, budget: Budget, losses: Losses, noise: Losses) -> list[Choice]:
    """Where a search starts: the optima of two sums, and uniform configurations; the most bits if these fit."""
    if budget.admits(space.ceiling):
        return [tuple(len(decision.options) - 1 for decision in space.decisions)]
    found = [best_choice(space, budget, each) for each in (losses, noise)]
    found += [*untied_uniforms(space, budget), largest_uniform(space, budget)]
    return list(dict.fromkeys(map(tuple, found)))


def _optima(problem: SearchProblem, losses: Losses, starts: Sequence[Choice]) -> Iterator[Choice]:
    """The choices of least sum, and ``starts`` with the rest of the budget spent."""
    space, budget, same = problem.space, problem.budget, tied(problem.space, losses)
    for each in (losses, same):
        yield tuple(best_choice(space, budget, each))
    for start in starts:
        yield _filled(space, budget, start, losses)
    yield _filled(space, budget, tuple(largest_uniform(space, budget)), same)


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


def _swapped(space: SearchSpace, budget: Budget, choice: Choice, losses: Losses) -> Iterator[Choice]:
    """Configurations within the budget one swap away, most predicted gain first."""
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
        if budget.admits(space.cost(changed)):
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
