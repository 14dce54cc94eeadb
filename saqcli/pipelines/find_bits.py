"""From a budget to a policy: requesting, binding and running a search."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from saqcli import distributed
from saqcli.api.costs import layer_rows
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.pipelines.bits import (
    accuracy_bound,
    check_compares,
    explain_shares,
    make_searcher,
    scheme_of,
    search_budget,
    space_of,
    weight_error_of,
)
from saqcli.pipelines.calibration import CalibrationCorrection, calibrate
from saqcli.pipelines.proxy import open_proxy, search_images
from saqcli.pipelines.setup import Network
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget, Cost
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers import SEARCHERS, SearchImages, SearchProblem, SearchResult, run
from saqcli.searchers.accuracy import Accuracy
from saqcli.searchers.problem import NO_IMAGES
from saqcli.training.loop import Memory
from saqcli.training.optimizer import make_optimizer, search_training
from saqcli.training.preflight import check_trains


class SearchRequest(NamedTuple):
    """A checked request for a search.

    Attributes:
        space: the bit options.
        budget: the budget of the search.
        asked: the budget that was asked for, the same unless it bounds accuracy alone.
        network: the target network of the policy.
        search_network: the network that is searched: the target network, or the proxy's.
        images: images of ``search_network``.
        parts: the parts of these images that the search uses.
    """

    space: SearchSpace
    budget: Budget
    asked: Budget
    network: Network
    search_network: Network
    images: Images
    parts: SearchImages


class BoundSearch(NamedTuple):
    """A search problem with its networks.

    Attributes:
        problem: the problem, not yet given a memory.
        asked: the budget that was asked for.
        network: the target network of the policy.
        search_network: the network that is searched: the target network, or the proxy's.
    """

    problem: SearchProblem
    asked: Budget
    network: Network
    search_network: Network


@dataclass(frozen=True)
class FoundBits:
    """The result of a search.

    Attributes:
        searcher: its name.
        seconds: duration of the search since it was last resumed.
        result: what the searcher returned.
        bound: the search that was run.
        accuracy: what became of the budget of accuracy; None without one.
    """

    searcher: str
    seconds: float
    result: SearchResult
    bound: BoundSearch
    accuracy: Accuracy | None = None

    @property
    def policy(self) -> BitConfig:
        """The bits of every layer."""
        return self.bound.problem.config(self.result.choice)

    @property
    def cost(self) -> Cost:
        """The policy's cost."""
        return self.bound.problem.space.cost(self.result.choice)

    @property
    def budget(self) -> Budget:
        """The budget that was asked for."""
        return self.bound.asked

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in ``search.json``; accuracies in percent."""
        score = self.result.score(self.result.choice) if self.result.score else None
        labelled = self.bound.problem.images.labelled
        costs, other = self.bound.problem.space.costs, {}
        if costs.unit != self.bound.network.costs.unit:
            other = {"cost": self.cost.bops, "cost_unit": costs.unit, "budget_cost": self.budget.bops}
        return {
            "model": self.policy.model,
            "searcher": self.searcher,
            "policy": self.policy.model_dump()["layers"],
            "layers": layer_rows(self.bound.network, self.policy),
            "bops": costs.bops(self.policy),
            "size_bytes": self.cost.size,
            "budget_bops": self.budget.bit_operations,
            "budget_bytes": self.budget.size,
            **other,
            "weight_error": self.bound.problem.weight_error,
            "seconds": round(self.seconds, 1),
            "scoring_top1": score.top1 if score and labelled else None,
            "scoring_loss": score.loss if score and labelled else None,
            "scoring_divergence": score.divergence if score else None,
            "scored": len(self.result.scored),
            **({} if self.accuracy is None else {"accuracy": self.accuracy.to_dict()}),
        }


def request_search(
    config: RunConfig, network: Network, images: Images | None, progress: Progress
) -> SearchRequest:
    """The search that the configuration describes, with every check that takes no time.

    Args:
        config: resolved.
        network: the target network of the policy.
        images: its images; unused if the configuration has a proxy.
        progress: reports opening the images, and notes.

    Raises:
        SaqError: the budget is below the smallest reachable cost, the images do not suffice, or the optimizer is
            invalid.
    """
    space = space_of(config.quantization, network)
    asked, budget = search_budget(config.quantization, network, space)
    for line in (*explain_shares(config.quantization, asked), *space.outlook(asked)):
        progress.note(line)
    space.check_reachable(asked)
    accuracy = accuracy_bound(config.quantization)
    if accuracy is not None:
        check_compares(network)
    training = search_training(config)
    make_optimizer(nn.Linear(1, 1), training)  # raises now, not after the calibration
    search_network = network
    if config.search.proxy is not None:
        search_network, images = open_proxy(config, network, pick_device(config.run.device), progress)
    assert images is not None
    uses_images = SEARCHERS[config.quantization.searcher].uses_images or config.search.pareto > 0
    uses_images = uses_images or accuracy is not None
    parts = search_images(images, config.search, progress) if uses_images else NO_IMAGES
    if SEARCHERS[config.quantization.searcher].trains:
        _check_trains(search_network, config, getattr(parts.training, "images", 0) * distributed.count())
    return SearchRequest(space, budget, asked, network, search_network, images, parts)


def _check_trains(search_network: Network, config: RunConfig, images: int) -> None:
    """Check that the searcher can train the network on ``images``."""
    limits = {}
    if (step := config.search.options.get("asga", {}).get("step_images")) and isinstance(step, int):
        limits["search.options.asga.step_images"] = max(1, step // distributed.count())
    name = config.quantization.searcher
    check_trains(
        search_network.model,
        search_network.name,
        search_network.loaded.preprocessing,
        config,
        images=images or None,
        limits=limits if name == "asga" else {},
    )


def bind_search(
    config: RunConfig,
    request: SearchRequest,
    statistics: Mapping[str, InputStatistics] | None,
    progress: Progress,
) -> BoundSearch:
    """The search problem of ``request``, calibrated.

    Args:
        config: resolved.
        request: its networks are not changed.
        statistics: input statistics of the searched network, if known already.
        progress: reports the calibration.
    """
    training, search_network = search_training(config), request.search_network
    if statistics is None:
        statistics = calibrate(search_network, request.images, config, progress)
    problem = SearchProblem(
        model=copy.deepcopy(search_network.model),
        space=request.space,
        budget=request.budget,
        scheme=scheme_of(config.quantization),
        statistics=statistics,
        images=request.parts,
        optimizer=lambda model: make_optimizer(model, training),
        seed=config.run.seed,
        progress=progress,
        corrections=lambda model: CalibrationCorrection(config, model, request.images, SILENT, keep=True),
        weight_error=weight_error_of(config),
    )
    return BoundSearch(problem, request.asked, request.network, search_network)


def explain_weight_error(share: float) -> list[str]:
    """The share of the error of weights that configurations are compared with, as a line; none for all of it."""
    if share == 1:
        return []
    return [
        f"configurations are compared with {share:g} of the quantization error of weights: training and reconstruction "
        "repair the rest"
    ]


def find_bits(config: RunConfig, bound: BoundSearch, memory: Memory) -> FoundBits:
    """The policy that the configured searcher finds.

    Raises:
        Interrupted: a signal asked to stop.
        PluginError: a searcher of another package failed.
    """
    searcher, problem = make_searcher(config), replace(bound.problem, memory=memory)
    for line in explain_weight_error(problem.weight_error):
        problem.progress.note(line)
    start = time.perf_counter()
    result = run(config.quantization.searcher, searcher, problem)
    choice = distributed.from_first(lambda: result.choice)  # the ranks may have different processors
    seconds = time.perf_counter() - start
    found = FoundBits(config.quantization.searcher, seconds, replace(result, choice=choice), bound)
    if bound.asked.bounds():
        problem.progress.note(f"searcher {found.searcher}: {bound.asked.shares(found.cost)}, {seconds:.0f} s")
    return found
