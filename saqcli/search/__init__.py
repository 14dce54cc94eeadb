"""Searchers, one file each: from a budget to a bit configuration.

A searcher receives a wrapped copy of the model with its input statistics, the search space and its costs, the budget,
images, an optimizer and a memory, and returns a configuration within the budget. To add one, write
``saqcli/search/NAME.py`` with a class that has ``search`` and takes its options as keyword arguments, and add its line
here. The contract tests run over the table.
"""

from collections.abc import Callable
from typing import NamedTuple

from saqcli.search.asga import ASGA
from saqcli.search.baselines import ErrorKnapsack, RandomSearch, Uniform
from saqcli.search.hawq import HAWQ
from saqcli.search.problem import Found, Searcher, SearchImages, SearchProblem
from saqcli.search.samq import SAMQ
from saqcli.search.sensitivity import Sensitivity


class Entry(NamedTuple):
    """A searcher and what a list of searchers says about it.

    Attributes:
        make: from its options to the searcher.
        description: one line.
        trains: whether it trains weights, so that its length is counted in epochs.
        looks: whether it looks at images.
    """

    make: Callable[..., Searcher]
    description: str
    trains: bool = False
    looks: bool = True


SEARCHERS: dict[str, Entry] = {
    "samq": Entry(SAMQ, "controller rewarded by the sharpness-aware loss (arXiv:2111.12273)", trains=True),
    "asga": Entry(ASGA, "differentiable, sharpness-aware, made for proxies (arXiv:2505.04877)", trains=True),
    "hawq": Entry(HAWQ, "Hessian traces times quantization errors, exact knapsack (arXiv:1911.03852)"),
    "sensitivity": Entry(Sensitivity, "loss with one layer quantized at a time, exact knapsack"),
    "random": Entry(RandomSearch, "the best of a number of random configurations"),
    "error": Entry(ErrorKnapsack, "relative quantization errors, exact knapsack; seconds", looks=False),
    "uniform": Entry(Uniform, "the same bits everywhere", looks=False),
}

__all__ = ["SEARCHERS", "Entry", "Found", "SearchImages", "SearchProblem", "Searcher"]
