"""Searchers, one file each: from a budget to a bit configuration.

A searcher receives a wrapped copy of the model with its input statistics, the search space and its costs, the budget,
images, an optimizer and a memory, and returns a configuration within the budget. To add one, write
``saqcli/search/NAME.py`` with a class that has ``search`` and takes its options as keyword arguments, and add it to
the table below. The contract tests cover every entry of the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from saqcli.plugins import Plugins
from saqcli.search.asga import ASGA
from saqcli.search.baselines import ErrorKnapsack, RandomSearch, Uniform
from saqcli.search.hawq import HAWQ
from saqcli.search.problem import Searcher, SearchImages, SearchProblem, SearchResult
from saqcli.search.samq import SAMQ
from saqcli.search.sensitivity import Sensitivity


class Entry(NamedTuple):
    """A searcher in the table.

    Attributes:
        make: builds the searcher from its options.
        description: one line for lists of searchers.
        trains: whether it trains weights; if so, its length is counted in epochs.
        uses_images: whether it needs images.
    """

    make: Callable[..., Searcher]
    description: str
    trains: bool = False
    uses_images: bool = True


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    return None if isinstance(plugin, Entry) else f"it is a {type(plugin).__name__}, not an Entry"


_OURS = {
    "samq": Entry(SAMQ, "controller rewarded by the sharpness-aware loss (arXiv:2111.12273)", trains=True),
    "asga": Entry(
        ASGA, "differentiable, sharpness-aware, for proxy data sets (arXiv:2505.04877)", trains=True
    ),
    "hawq": Entry(HAWQ, "Hessian traces times quantization errors, exact knapsack (arXiv:1911.03852)"),
    "sensitivity": Entry(Sensitivity, "loss with one layer quantized at a time, exact knapsack"),
    "random": Entry(RandomSearch, "best of several random configurations"),
    "error": Entry(
        ErrorKnapsack, "relative quantization errors, exact knapsack; takes seconds", uses_images=False
    ),
    "uniform": Entry(Uniform, "the same bits everywhere", uses_images=False),
}
SEARCHERS: Plugins[Entry] = Plugins("searchers", "searcher", _OURS, _problem)

__all__ = ["SEARCHERS", "Entry", "SearchImages", "SearchProblem", "SearchResult", "Searcher"]
