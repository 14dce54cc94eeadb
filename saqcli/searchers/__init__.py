"""Searchers, one file each: from a budget to a bit configuration.

To add one, write ``saqcli/searchers/NAME.py`` with a class that has ``search``, its options keyword arguments,
and add it to the table below. Another package writes the same class and an entry point:

    [project.entry-points."saqcli.searchers"]
    greedy = "my_package.greedy:ENTRY"          # ENTRY = SearcherEntry(Greedy, "one line about it")

A searcher receives a ``SearchProblem``: a wrapped copy of the model with its input statistics, the search space and its
costs, the budget, images, an optimizer and a memory. It returns a ``SearchResult``. The contract, which the tests in
``tests/searchers/test_searchers.py`` check over the table:

- The configuration is within the budget. If the budget admits the most bits in every layer, these are the result.
- ``SearchSpace.check_reachable`` comes first: it refuses a budget below the smallest reachable cost.
- ``propose`` returns at least one configuration for any reachable budget, each within it.
- Equal problems with equal seeds give equal results, whatever the state of torch's global random numbers.
- What it scores with the whole error of weights, it reports: ``scored`` holds the scores, and ``score`` gives the same
  ones again.
- One that takes longer than minutes offers its state to the memory after every step, and resumes from there.
- Invalid options raise ``ConfigError`` (``saqcli.training.options`` has the checks). ``search.epochs`` and
  ``search.rho`` arrive as the options ``epochs`` and ``rho``, all others from ``search.options.NAME.OPTION``.
- Optional: a searcher whose entry says ``fills_budget`` uses at least ``BUDGET_USE`` of a bound (``quant.cost``)
  wherever the space has such a configuration.

Everything in ``__all__`` is public. Beside the contract these are:

- configurations: ``best_choice`` (exact knapsack), ``Sampler`` (random ones that use the budget);
  ``SearchSpace.cheaper`` (one layer at fewer bits), ``cost``, ``config`` and ``nearest``;
- losses that add up over layers: ``measure_noise`` and ``relative_noise`` (quantization errors), ``add_losses``,
  ``sums_over_batches`` (over the images, on all ranks, resumable);
- scores: ``Scorer`` (accuracy and loss of a configuration as fine-tuning would start from it), ``Comparison`` (the same
  with the problem's share of the error of weights, for policies that will be trained), ``score_all``, ``rank``;
- networks: ``Supernet`` (computes at any configuration), ``remaining_batches`` (an epoch, resumed).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from saqcli.plugins import Plugins
from saqcli.searchers.asga import ASGA
from saqcli.searchers.baselines import ErrorKnapsack, RandomSearch, Uniform
from saqcli.searchers.fisher import Fisher
from saqcli.searchers.hawq import HAWQ
from saqcli.searchers.knapsack import Sampler, best_choice
from saqcli.searchers.problem import (
    Scored,
    Searcher,
    SearchImages,
    SearchProblem,
    SearchResult,
    remaining_batches,
)
from saqcli.searchers.samq import SAMQ
from saqcli.searchers.sensitivity import Sensitivity
from saqcli.searchers.separable import Key, add_losses, measure_noise, relative_noise, sums_over_batches
from saqcli.searchers.supernet import Comparison, Scorer, Supernet, closeness, rank, score_all
from saqcli.searchers.swaps import Swaps


class SearcherEntry(NamedTuple):
    """A searcher in the table.

    Attributes:
        make: builds the searcher from its options.
        description: one line for lists of searchers.
        trains: whether it trains weights; if so, its length is counted in epochs.
        uses_images: whether it needs images.
        fills_budget: promises to use at least ``BUDGET_USE`` of a bound wherever the space has such a configuration.
        keeps_scores: whether its results have ``losses``, from which another budget can be solved.
        uses_labels: whether the images need labels.
        takes_weight_error: whether it compares configurations with the problem's ``weight_error``, as ``measure_noise``
            and ``Comparison`` do; for others that is 1.
    """

    make: Callable[..., Searcher]
    description: str
    trains: bool = False
    uses_images: bool = True
    fills_budget: bool = False
    keeps_scores: bool = False
    uses_labels: bool = True
    takes_weight_error: bool = False


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    if not isinstance(plugin, SearcherEntry):
        return f"it is a {type(plugin).__name__}, not a SearcherEntry"
    return None if callable(plugin.make) else "its `make` cannot be called"


_OURS = {
    "samq": SearcherEntry(
        SAMQ,
        "controller rewarded by the sharpness-aware loss (arXiv:2111.12273)",
        trains=True,
        fills_budget=True,
    ),
    "asga": SearcherEntry(
        ASGA,
        "differentiable, sharpness-aware, for proxy data sets (arXiv:2505.04877)",
        trains=True,
        fills_budget=True,
    ),
    "hawq": SearcherEntry(
        HAWQ,
        "Hessian traces times quantization errors, exact knapsack (arXiv:1911.03852)",
        fills_budget=True,
        keeps_scores=True,
        takes_weight_error=True,
    ),
    "sensitivity": SearcherEntry(
        Sensitivity,
        "loss with one layer quantized at a time, exact knapsack",
        fills_budget=True,
        keeps_scores=True,
        takes_weight_error=True,
    ),
    "fisher": SearcherEntry(
        Fisher,
        "divergence from the float network by one backward pass an image, exact knapsack",
        uses_labels=False,
        fills_budget=True,
        keeps_scores=True,
        takes_weight_error=True,
    ),
    "swaps": SearcherEntry(
        Swaps,
        "optima of sums fitted to measurements, and measured swaps of bits between layers",
        uses_labels=False,
        takes_weight_error=True,
    ),
    "random": SearcherEntry(
        RandomSearch, "best of several random configurations", fills_budget=True, takes_weight_error=True
    ),
    "error": SearcherEntry(
        ErrorKnapsack,
        "relative quantization errors, exact knapsack; takes seconds",
        uses_images=False,
        uses_labels=False,
        fills_budget=True,
        keeps_scores=True,
        takes_weight_error=True,
    ),
    "uniform": SearcherEntry(Uniform, "the same bits everywhere", uses_images=False, uses_labels=False),
}
SEARCHERS: Plugins[SearcherEntry] = Plugins("searchers", "searcher", _OURS, _problem)


def run(name: str, searcher: Searcher, problem: SearchProblem) -> SearchResult:
    """What the searcher ``name`` finds, checked; one of another package is also named if its result fails later.

    Raises:
        PluginError: a searcher of another package failed, or one returned something else than a ``SearchResult`` with a
            configuration of the space within the budget.
    """
    blamed = SEARCHERS.blamed
    with blamed(name):
        result = searcher.search(problem)
        reason = _wrong_result(result, problem)
    if reason:
        raise SEARCHERS.failure(name, f"it returned {reason}")
    if SEARCHERS.is_ours(name):
        return result
    score = None if result.score is None else blamed(name)(result.score)
    return replace(result, propose=blamed(name)(result.propose), score=score)


def _wrong_result(result: Any, problem: SearchProblem) -> str | None:
    """What a searcher returned instead of a result; None if it is one."""
    space = problem.space
    if not isinstance(result, SearchResult):
        return f"a {type(result).__name__}, not a SearchResult"
    options = [len(decision.options) for decision in space.decisions]
    if len(result.choice) != len(options) or not all(
        0 <= c < n for c, n in zip(result.choice, options, strict=True)
    ):
        return f"no configuration of {space.model}"
    cost = space.cost(result.choice)
    return (
        None if problem.budget.admits(cost) else f"a configuration that costs {problem.budget.shares(cost)}"
    )


__all__ = [
    "SEARCHERS",
    "Comparison",
    "Key",
    "Sampler",
    "Scored",
    "Scorer",
    "SearchImages",
    "SearchProblem",
    "SearchResult",
    "Searcher",
    "SearcherEntry",
    "Supernet",
    "add_losses",
    "best_choice",
    "closeness",
    "measure_noise",
    "rank",
    "relative_noise",
    "remaining_batches",
    "run",
    "score_all",
    "sums_over_batches",
]
