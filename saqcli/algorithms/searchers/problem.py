"""What a searcher is asked, and what it must be able to do."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from saqcli.progress import Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibrate import InputStatistics
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import Budget, CostModel


@dataclass(frozen=True)
class SearchProblem:
    """Find bits for every layer of a model under a budget.

    Attributes:
        model: wrapped, in floating point, no quantizers installed.
        name: canonical name of the network, for the configuration.
        costs: of the layers.
        budget: never to be exceeded.
        candidates: bit-widths that a free layer may have, ascending.
        scheme: which quantizers will be used.
        statistics: of every layer's input on calibration images.
        progress: where to tell how far the search is.
    """

    model: nn.Module
    name: str
    costs: CostModel
    budget: Budget
    candidates: tuple[int, ...]
    scheme: Scheme
    statistics: Mapping[str, InputStatistics]
    progress: Progress


class Searcher(Protocol):
    """Finds the best configuration it can; the budget admits what it returns."""

    def search(self, problem: SearchProblem) -> BitConfig:
        """The best configuration found.

        Raises:
            InfeasibleBudget: no configuration meets the budget.
        """
