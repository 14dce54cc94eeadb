"""From a search to the configuration that keeps the accuracy: measurements that can be interrupted and resumed.

Every configuration is measured on the held-out images of the search, which no validation image is among. The bound is
one of the drop on these images: the float network has learned its training images by heart, so that its top-1 on them
says nothing about other images, but the difference between two networks does. ``min_top1`` therefore becomes the drop
that it is on the validation images, of which only the float network's accuracy is used.

An interrupted measurement is repeated from its beginning, with the configurations that were measured before it stopped:
the same ones are proposed again, and lead to the same result bit for bit.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from saqcli.api.batches import device_of
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.pipelines.accuracy.trials import Trials, trial_stages
from saqcli.pipelines.bits import accuracy_bound
from saqcli.pipelines.calibration import quantized
from saqcli.pipelines.find_bits import FoundBits
from saqcli.pipelines.setup import Network
from saqcli.progress import SILENT, Progress
from saqcli.quant.cost import Budget
from saqcli.runs.directory import RunDirectory
from saqcli.runs.saving import SearchMemory
from saqcli.searchers import Scored, Scorer
from saqcli.searchers.accuracy import Accuracy, AccuracyBound, Met, keep_accuracy, keep_by_trials
from saqcli.training.loop import Memory, evaluate, score
from saqcli.units import counted, format_quantity

CALIBRATED = "calibrated"  # before the stages that only trials take


def keep(
    config: RunConfig,
    found: FoundBits,
    run: RunDirectory,
    progress: Progress,
    images: Images,
    float_top1: float | None = None,
    *,
    fine_tunes: bool = False,
) -> FoundBits:
    """What ``found`` becomes under the budget of accuracy; itself without one.

    Args:
        config: resolved.
        found: by a searcher, on the network itself.
        run: keeps what was measured.
        progress: reports every measurement.
        images: of the run.
        float_top1: percent, of the float network on the validation images; only used by ``min_top1``.
        fine_tunes: whether the run goes on from here, so that trials of its stages may decide; else calibrated
            accuracy decides alone.

    Raises:
        Interrupted: a signal asked to stop.
    """
    bound = accuracy_bound(config.quantization)
    if bound is None:
        return found
    start = time.perf_counter()
    problem, network = found.bound.problem, found.bound.search_network
    with SILENT.task("", 0) as task:
        in_float = evaluate(
            network.model.eval(), problem.images.scoring, task, device=problem.device, shared=True
        )
    drop = bound.drop(in_float.top1 if float_top1 is None else float_top1)
    progress.note(_asked(bound, drop, in_float.top1, in_float.images))
    with SearchMemory(run, config.run.checkpoint_minutes, progress.note, "accuracy") as memory:
        measurements = Measurements(config, found, memory, images, fine_tunes=fine_tunes)
        met, method = measurements.keep(in_float.top1 - drop)
    accuracy = Accuracy(bound, drop, in_float.top1, in_float.images, method, found.budget, met)
    kept = met.kept
    progress.note(
        f"accuracy: {counted(met.measured, 'configuration')} measured; {found.budget.shares(kept.cost)} has "
        f"{kept.top1:.2f} % ({method}), a drop of {in_float.top1 - kept.top1:.2f} points"
    )
    within = found.budget if found.budget.bounds() else Budget(bops=kept.cost.bops, unit=found.budget.unit)
    return replace(
        found,
        seconds=found.seconds + time.perf_counter() - start,
        result=replace(
            found.result,
            choice=list(kept.choice),
            score=measurements.scorer,
            scored=list(measurements.scorer.scored.values()),
        ),
        bound=found.bound._replace(problem=replace(problem, budget=within)),
        accuracy=accuracy,
    )


def top1_in_float(config: RunConfig, network: Network, images: Images, progress: Progress) -> float | None:
    """Top-1 of the float network on the validation images in percent, where the bound needs it; else None."""
    if config.quantization.min_top1 is None:
        return None
    device = device_of(network.model)
    return score(network.model, images.validation(), "evaluating float", device, progress, network.name).top1


def _asked(bound: AccuracyBound, drop: float, float_top1: float, images: int) -> str:
    """The bound as one line."""
    as_drop = "" if bound.max_drop is not None else f", which is a drop of at most {drop:.2f} points"
    return f"accuracy: {bound} was asked for{as_drop}; float {float_top1:.2f} % on {counted(images, 'held-out image')}"


def scorer_of(config: RunConfig, found: FoundBits, images: Images) -> Scorer:
    """Measures a configuration as the first stage of a run leaves it; knows what the search has measured so."""
    network, problem = found.bound.search_network, found.bound.problem
    if config.quantization.balance_norms:  # which depends on the configuration, and searchers leave out

        def at(choice: Sequence[int]) -> nn.Module:
            copied = replace(network, model=copy.deepcopy(network.model))
            return quantized(config, copied, problem.config(choice), problem.statistics, images, SILENT)

        return Scorer(replace(problem, model=network.model), at)
    scorer = Scorer(replace(problem, model=network.model))
    scorer.scored.update({one.choice: one for one in found.result.scored})
    return scorer


class Measurements:
    """The measurements for a bound, with their memory.

    Args:
        config: resolved.
        found: by the searcher.
        memory: keeps what was measured.
        images: of the run.
        fine_tunes: whether the run has its further stages after this.
    """

    def __init__(
        self, config: RunConfig, found: FoundBits, memory: Memory, images: Images, *, fine_tunes: bool
    ) -> None:
        self.found, self.memory, self.scorer = found, memory, scorer_of(config, found, images)
        self._known = list(self.scorer.scored.values())
        state: Mapping[str, Any] = memory.load() or {}
        self.scorer.load_state_dict(state.get("calibrated", {"configurations": []}))
        self._tried: dict[tuple[int, ...], Scored] = {}
        for choice, top1, loss in state.get("tried", []):
            cost = found.bound.problem.space.cost(choice)
            self._tried[tuple(choice)] = Scored(tuple(choice), cost, top1, loss)
        stages = trial_stages(config) if fine_tunes else []
        self._method = stages[-1] if stages else CALIBRATED
        self._count = config.search.trials if stages else 0
        self._trials: Trials | None = None
        self._interrupted: dict[str, Any] | None = state.get("trial")
        if self._count:
            self._trials = Trials(config, found.bound, images, self._interrupted)

    def keep(self, least: float) -> tuple[Met, str]:
        """The configuration for a top-1 of ``least`` percent, and how it was measured."""
        problem, result, asked = self.found.bound.problem, self.found.result, self.found.budget
        met = keep_accuracy(
            problem.space,
            asked,
            result.choice,
            result.propose,
            self._calibrated,
            least,
            self._known,
            problem.progress,
        )
        met, tried = keep_by_trials(
            problem.space, asked, met, result.propose, self._calibrated, self._trial, least, self._count
        )
        return met, self._method if tried else CALIBRATED

    def _calibrated(self, choice: Sequence[int]) -> Scored:
        scored = self.scorer(choice)
        self.memory.offer(self._state)
        return scored

    def _trial(self, choice: Sequence[int]) -> Scored:
        assert self._trials is not None
        key = tuple(choice)
        if key not in self._tried:
            number, progress = len(self._tried) + 1, self.found.bound.problem.progress
            self._interrupted = None  # the trial has it now
            self._tried[key] = scored = self._trials(key, number, self.memory, self._state)
            progress.note(
                f"trial {number} of at most {self._count}: "
                f"{format_quantity(scored.cost.bops, self.found.budget.unit)}, {self._method} {scored.top1:.2f} % on "
                "held-out images"
            )
            self.memory.offer(self._state, milestone=True)
        return self._tried[key]

    def _state(self) -> dict[str, Any]:
        tried = [[list(one.choice), one.top1, one.loss] for one in self._tried.values()]
        state = {"calibrated": self.scorer.state_dict(), "tried": tried}
        return state if self._interrupted is None else {**state, "trial": self._interrupted}
