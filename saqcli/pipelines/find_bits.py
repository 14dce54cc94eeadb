"""From a budget to a policy: what the configured searcher is asked, and what it found."""

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.pipelines.bits import budget_of, make_searcher, space_of
from saqcli.pipelines.calibration import AfterFit, calibrate, scheme_of
from saqcli.pipelines.profile import layer_rows
from saqcli.pipelines.proxy import open_proxy, search_images
from saqcli.pipelines.setup import Network
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget, Cost
from saqcli.quant.search_space import SearchSpace
from saqcli.search import SEARCHERS, SearchImages, SearchProblem, SearchResult
from saqcli.search.problem import NO_IMAGES
from saqcli.training.loop import Memory
from saqcli.training.optimizer import make_optimizer, search_training
from saqcli.training.preflight import check_trains


class Asked(NamedTuple):
    """What is to be found, and in which network.

    Attributes:
        space: what may be chosen.
        budget: that is to be met.
        network: that the policy is for.
        searched: the network that is searched: the same, or the proxy's.
        images: of that network.
        parts: of these, for the search.
    """

    space: SearchSpace
    budget: Budget
    network: Network
    searched: Network
    images: Images
    parts: SearchImages


class Posed(NamedTuple):
    """A problem and where it came from.

    Attributes:
        problem: without a memory yet.
        network: that the policy is for.
        searched: the network that is searched: the same, or the proxy's.
    """

    problem: SearchProblem
    network: Network
    searched: Network


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        searcher: its name.
        seconds: that the search took, since it was last resumed.
        found: what the searcher gave back.
        posed: what it was asked.
    """

    searcher: str
    seconds: float
    found: SearchResult
    posed: Posed

    @property
    def policy(self) -> BitConfig:
        """The bits of every layer."""
        return self.posed.problem.config(self.found.choice)

    @property
    def cost(self) -> Cost:
        """Of the policy."""
        return self.posed.problem.space.cost(self.found.choice)

    @property
    def budget(self) -> Budget:
        """That admits it."""
        return self.posed.problem.budget

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``search.json`` keeps them; accuracies in percent."""
        score = self.found.score(self.found.choice) if self.found.score else None
        return {
            "model": self.policy.model,
            "searcher": self.searcher,
            "policy": self.policy.model_dump()["layers"],
            "layers": layer_rows(self.posed.network, self.policy),
            "bops": self.cost.bops,
            "size_bytes": self.cost.size,
            "budget_bops": self.budget.bops,
            "budget_bytes": self.budget.size,
            "seconds": round(self.seconds, 1),
            "scoring_top1": score.top1 if score else None,
            "scoring_loss": score.loss if score else None,
            "scored": len(self.found.scored),
        }


def ask(config: RunConfig, network: Network, images: Images | None, progress: Progress) -> Asked:
    """What the configuration asks for; everything that can be refused before time is spent is refused.

    Args:
        config: resolved.
        network: that the policy is for.
        images: of the network; not used where the configuration has a proxy.
        progress: told about everything.

    Raises:
        SaqError: a budget that nothing meets, images that cannot be searched on, an optimizer that is none.
    """
    space, budget = space_of(config.quantization, network), budget_of(config.quantization, network)
    for line in space.outlook(budget):
        progress.note(line)
    space.check_reachable(budget)
    training = search_training(config)
    make_optimizer(nn.Linear(1, 1), training)  # to be refused now, if at all
    searched = network
    if config.search.proxy is not None:
        searched, images = open_proxy(config, network, pick_device(config.run.device), progress)
    assert images is not None
    uses_images = SEARCHERS[config.quantization.searcher].uses_images or config.search.pareto > 0
    parts = search_images(images, config.search, progress) if uses_images else NO_IMAGES
    if SEARCHERS[config.quantization.searcher].trains:
        _check_trains(searched, config, getattr(parts.training, "images", 0) * distributed.count())
    return Asked(space, budget, network, searched, images, parts)


def _check_trains(searched: Network, config: RunConfig, images: int) -> None:
    """Refuse a network that cannot be trained on ``images`` as the searcher does."""
    limits = {}
    if (step := config.search.options.get("asga", {}).get("step_images")) and isinstance(step, int):
        limits["search.options.asga.step_images"] = max(1, step // distributed.count())
    name = config.quantization.searcher
    check_trains(
        searched.model,
        searched.name,
        searched.loaded.preprocessing,
        config,
        images=images or None,
        limits=limits if name == "asga" else {},
    )


def pose(
    config: RunConfig, asked: Asked, statistics: Mapping[str, InputStatistics] | None, progress: Progress
) -> Posed:
    """The problem of what was asked.

    Args:
        config: resolved.
        asked: its networks are left as they are.
        statistics: of the inputs of the network that is searched, where they are known already.
        progress: told about everything.
    """
    training, searched = search_training(config), asked.searched
    if statistics is None:
        statistics = calibrate(searched, asked.images, config, progress)
    problem = SearchProblem(
        model=copy.deepcopy(searched.model),
        space=asked.space,
        budget=asked.budget,
        scheme=scheme_of(config),
        statistics=statistics,
        images=asked.parts,
        optimizer=lambda model: make_optimizer(model, training),
        seed=config.run.seed,
        progress=progress,
        corrections=lambda model: AfterFit(config, model, asked.images, SILENT, keep=True),
    )
    return Posed(problem, asked.network, searched)


def find_bits(config: RunConfig, posed: Posed, memory: Memory) -> Searched:
    """The policy that the configured searcher finds.

    Raises:
        Interrupted: asked to stop.
    """
    searcher, problem = make_searcher(config), replace(posed.problem, memory=memory)
    start = time.perf_counter()
    found = searcher.search(problem)
    found = replace(
        found, choice=distributed.from_first(lambda: found.choice)
    )  # in case that their processors differ
    searched = Searched(config.quantization.searcher, time.perf_counter() - start, found, posed)
    found_at = problem.budget.shares(searched.cost)
    problem.progress.note(f"searcher {searched.searcher}: {found_at}, {searched.seconds:.0f} s")
    return searched
