"""Bits under a budget for any module: a searcher on batches of one's own."""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from saqcli.api.accuracy import Accuracy, AccuracyBound, keep, middle, wanted_accuracy
from saqcli.api.arguments import scheme_of, space_for, widths_of
from saqcli.api.batches import Calls, Inputs, class_scores
from saqcli.api.budgets import budget_of, priced
from saqcli.api.networks import CALIBRATION_SAMPLES, copied, corrections_at, float_network, observed, prepare
from saqcli.config import WIDTHS, TrainingSection
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import ClipInit, InputStatistics
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import Budget, Cost
from saqcli.quant.grid import WeightGrid
from saqcli.quant.network import Network
from saqcli.quant.quantizers.base import Granularity
from saqcli.searchers import SEARCHERS, Searcher, SearchImages, SearchProblem, SearchResult, run
from saqcli.searchers.problem import NO_IMAGES, Batch
from saqcli.serialization import parse_object
from saqcli.target import Target, deployment_of
from saqcli.training.optimizer import make_optimizer

# keywords that quantize_model has not
ONLY_SEARCH = ("options", "activation_candidates", "cost", "lr", "weight_error")


@dataclass(frozen=True)
class FoundBits:
    """The result of a search.

    Attributes:
        policy: the bits of every layer.
        cost: bit-operations and bytes of the policy.
        budget: of the search; without bounds if accuracy alone is bounded.
        result: what the searcher returned: further proposals and scores.
        accuracy: the bound of accuracy and what became of it (``accuracy.result.met``); None without one.
    """

    policy: BitConfig
    cost: Cost
    budget: Budget
    result: SearchResult
    accuracy: Accuracy | None = None


def search(
    model: nn.Module,
    budget: int | str | Budget | None = None,
    data: Iterable[Any] | None = None,
    *,
    max_drop: float | None = None,
    min_top1: float | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    searcher: str = "error",
    options: Mapping[str, Any] | None = None,
    candidates: Iterable[int] = WIDTHS,
    activation_candidates: Iterable[int] | Literal["same", "tied"] = "tied",
    pins: Mapping[str, str] | None = None,
    cost: str = "bops",
    quantizer: str = "clip",
    weight_quantizer: str | None = None,
    activation_quantizer: str | None = None,
    weight_grid: WeightGrid = "auto",
    granularity: Granularity = "channel",
    weight_normalization: bool = False,
    restore_deviation: bool = True,
    clip_init: ClipInit = "error",
    error_power: float = 2.0,
    short_steps: int | None = None,
    quantize_attention: bool = False,
    target: str | Path | Target | None = None,
    junctions: Iterable[str] = (),
    lr: float = 0.01,
    weight_error: float = 1.0,
    samples: int = 4096,
    seed: int = 0,
    progress: Progress = SILENT,
) -> FoundBits:
    """Bits for every layer of a float module under a budget; the module is left unchanged.

    Searchers that need images take labelled ones from ``data``, of which they hold ``samples`` in memory: every second
    one is trained on, and the others compare configurations. A bound of accuracy is measured on these others,
    calibrated; if it cannot be met, the most accurate configuration is returned, and ``accuracy`` says what is missing.

    Args:
        model: any float module; with a searcher that needs images, from one tensor to class scores (N, classes).
        budget: as in ``quantize_model``; None for a bound of accuracy alone, with the fewest bit-operations.
        data: any iterable of batches, as the calibration of ``quantize_model``.
        max_drop: most points of top-1 that may be lost.
        min_top1: the same as the least top-1 in percent.
        example: as in ``quantize_model``.
        inputs: as in ``quantize_model``.
        searcher: name in ``saqcli.searchers.SEARCHERS``.
        options: further keyword arguments of the searcher, such as ``{"epochs": 2}``.
        candidates: bit-widths that a layer may have.
        activation_candidates: bit-widths of inputs, chosen apart from those of weights; "same" for ``candidates``,
            "tied" for the bits of the weights.
        pins: as in ``quantize_model``.
        cost: cost model that counts the budget, by its name in ``saqcli.quant.costs.COSTS``, or the path of a table of
            costs; the budget is then in its unit, such as ``"1.8ms"``.
        quantizer: as in ``quantize_model``, like the next eight.
        weight_quantizer: of weights.
        activation_quantizer: of inputs.
        weight_grid: levels of weights.
        granularity: of clipping levels.
        weight_normalization: of the weights of convolutions.
        restore_deviation: multiply normalized weights by their deviation again; False as in the SAQ paper.
        clip_init: where levels start.
        error_power: exponent of the quantization error.
        short_steps: most significant bits of every step.
        quantize_attention: also quantize and count products of activations.
        target: where the module will run, as in ``quantize_model``; only widths that it runs are chosen.
        junctions: kinds of further operators whose operands are quantized, as in ``quantize_model``.
        lr: learning rate of the weights, for searchers that train.
        weight_error: share of the quantization error of weights that configurations are compared with, 0 to 1: give 0.5
            for a policy that is to be trained, which repairs the rest.
        samples: most samples that are read.
        seed: random seed.
        progress: reports calibration and search.

    Raises:
        InfeasibleBudget: the budget is below the smallest reachable cost; the message names the range.
        ConfigError: no budget, an unknown name, options that the searcher does not take, or quantizers or candidates
            that the target does not run.
        DataError: the searcher needs labelled images, and ``data`` has none.
        UnsupportedModel: nothing to quantize, the searcher needs class scores and the module returns others, or the
            target does not run the bits of a pin.

    Example:
        >>> import torch, saqcli as saq
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16),
        ...     torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> found = saq.search(net, "w4a4", [torch.rand(32, 8)])
        >>> str(found.policy.layers["0"]), found.cost.bops <= found.budget.bops
        ('w8a8', True)
    """
    place = deployment_of(target, junctions)
    scheme = scheme_of(
        quantizer,
        weight_quantizer,
        activation_quantizer,
        weight_grid,
        granularity,
        weight_normalization,
        restore_deviation,
        clip_init,
        error_power,
        place,
        short_steps,
    )
    accuracy = wanted_accuracy(budget, max_drop, min_top1)
    ready = prepare(model, data, example, inputs, samples)
    network = float_network(
        ready.model,
        ready.example,
        quantize_attention=quantize_attention,
        target=place,
        fold_norms=short_steps is not None,
    )
    calls = ready.calls.limited(CALIBRATION_SAMPLES)
    statistics = observed(network.model, calls, seed, progress, scheme=scheme)
    return find_bits(
        network,
        budget,
        None if data is None else ready.calls,
        statistics,
        scheme,
        accuracy=accuracy,
        searcher=searcher,
        options=options,
        candidates=candidates,
        activation_candidates=activation_candidates,
        pins=pins,
        cost=cost,
        target=place,
        lr=lr,
        weight_error=weight_error,
        seed=seed,
        progress=progress,
    )


def find_bits(
    network: Network,
    budget: int | str | Budget | None,
    calls: Calls | None,
    statistics: Mapping[str, InputStatistics],
    scheme: Scheme,
    *,
    accuracy: AccuracyBound | None = None,
    searcher: str = "error",
    options: Mapping[str, Any] | None = None,
    candidates: Iterable[int] = WIDTHS,
    activation_candidates: Iterable[int] | Literal["same", "tied"] = "tied",
    pins: Mapping[str, str] | None = None,
    cost: str = "bops",
    target: Target | None = None,
    lr: float = 0.01,
    weight_error: float = 1.0,
    seed: int = 0,
    progress: Progress = SILENT,
) -> FoundBits:
    """As ``search``, for a network that is traced and calibrated; its model is not changed."""
    target = target or deployment_of(None)
    widths = widths_of(candidates, activation_candidates, target)
    costs = priced(network.costs, cost)
    space = space_for(network.name, costs, widths, pins or {}, target)
    asked = Budget(unit=costs.unit) if budget is None else budget_of(budget, network.name, costs)
    space.check_reachable(asked)
    bound = asked if asked.bounds() else middle(space)
    entry = SEARCHERS.find(searcher, "searcher")
    if not 0 <= weight_error <= 1:
        raise ConfigError(f"`weight_error={weight_error:g}`: give a share from 0 to 1")
    check_takes_weight_error(searcher, weight_error, "weight_error")
    found = searcher_with(searcher, options or {})
    images = NO_IMAGES
    if entry.uses_images or accuracy is not None:
        needs_labels = entry.uses_labels or accuracy is not None
        images = search_images(network, searcher, calls, seed, needs_labels=needs_labels)
    given = {"optimizer": "sgd", "lr": lr, "weight_decay": 1e-4}
    training = parse_object(TrainingSection, given, "the search", ConfigError)
    model = copied(network.model)
    problem = SearchProblem(
        model=model,
        space=space,
        budget=bound,
        scheme=scheme,
        statistics=statistics,
        images=images,
        optimizer=lambda trained: make_optimizer(trained, training),
        seed=seed,
        progress=progress,
        corrections=lambda fitted: corrections_at(fitted, calls),
        weight_error=weight_error,
    )
    result = run(searcher, found, problem)
    kept = None
    if accuracy is not None:
        result, kept = keep(accuracy, asked, replace(problem, model=network.model), result)
    policy = space.config(result.choice)
    return FoundBits(policy, space.cost(result.choice), asked, result, kept)


def search_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of ``find_bits`` that ``quantize_model`` passes on.

    Raises:
        ConfigError: a keyword that it takes itself, or none of ``search``.
    """
    for name in given:
        if name not in ONLY_SEARCH:
            raise ConfigError(
                f"`search` takes no {name!r}: it takes {', '.join(ONLY_SEARCH)}; give anything else to quantize_model "
                "itself"
            )
    return dict(given)


def check_takes_weight_error(name: str, share: float | None, setting: str) -> None:
    """Check that the searcher ``name`` compares configurations with a share of the error of weights, if one is given.

    Raises:
        ConfigError: it counts the whole error.
    """
    if share not in (None, 1) and not SEARCHERS.find(name).takes_weight_error:
        able = ", ".join(known for known, entry in SEARCHERS.items() if entry.takes_weight_error)
        raise ConfigError(
            f"searcher {name} counts the whole error of weights: remove `{setting}={share:g}`, or choose from {able}"
        )


def searcher_with(name: str, options: Mapping[str, Any]) -> Searcher:
    """The searcher ``name`` with its options.

    Raises:
        ConfigError: unknown searcher, or options that it does not take.
    """
    make = SEARCHERS.find(name).make
    known = list(inspect.signature(make).parameters)
    for option in options:
        if option not in known:
            options_are = f"its options are {', '.join(known)}" if known else "it has no options"
            raise ConfigError(f"searcher {name} has no {option}: {options_are}")
    with SEARCHERS.blamed(name):
        return make(**options)


def search_images(
    network: Network, searcher: str, calls: Calls | None, seed: int, *, needs_labels: bool
) -> SearchImages:
    """Batches for a searcher, labelled if they can be; every second image is trained on, the others compare.

    Raises:
        DataError: there are no labelled images, or labels are no classes.
        UnsupportedModel: the module does not map one tensor to class scores.
    """
    scores = class_scores(network.traced.outputs)
    if scores is None:
        kind = type(network.traced.outputs).__name__
        raise UnsupportedModel(
            f"searcher {searcher} compares class scores (N, classes), and {network.name} returns a {kind}: choose "
            "error or uniform, which need none"
        )
    batches = [] if calls is None else list(calls.labelled(scores.shape[1]))
    labelled = bool(batches) or calls is None or needs_labels
    if not labelled and calls is not None:
        batches = [(call.tensors[0], torch.zeros(call.count).long()) for call in calls]
    if not batches:
        raise DataError(f"searcher {searcher} needs labelled images: give batches (images, labels)")
    trained, held_out = _every_second(batches, 0), _every_second(batches, 1)
    if not held_out:
        raise DataError(f"searcher {searcher} needs two labelled images at least: give more")
    return SearchImages(
        training=ShuffledBatches(trained, seed),
        held_out=ShuffledBatches(held_out, seed),
        scoring=held_out,
        whole=ShuffledBatches(batches, seed),
        labelled=labelled,
    )


class ShuffledBatches:
    """Batches in memory, in another order every epoch."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        self._batches, self._seed, self._epoch = batches, seed, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        order = list(range(len(self._batches)))
        random.Random(f"{self._seed} {self._epoch}").shuffle(order)
        return (self._batches[index] for index in order)

    @property
    def images(self) -> int:
        """Images of one epoch."""
        return sum(len(labels) for _, labels in self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next pass."""
        self._epoch = epoch


def _every_second(batches: Sequence[Batch], start: int) -> list[Batch]:
    """Every second image of all batches, from image ``start`` on."""
    parts = []
    for images, labels in batches:
        if len(labels) > start:
            parts.append((images[start::2], labels[start::2]))
        start = (start + len(labels)) % 2
    return parts
