"""Trials: the accuracy of a configuration after all stages of the run, on images that it was not trained on.

A trial takes the stages that the run takes, by the same functions: calibration, compensation, reconstruction,
fine-tuning. It trains on those training images that the search does not hold out: half of them by default, so that it
takes half of the time of a fine-tuning, and is rather less accurate than what the run ends with.

An interrupted trial resumes bit-identically: in the block or the step where it stopped.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.errors import TrainingDiverged
from saqcli.pipelines.calibration import balanced, install_quantizers
from saqcli.pipelines.find_bits import BoundSearch
from saqcli.pipelines.setup import distills
from saqcli.pipelines.stages import planned_stages, wanted_stages
from saqcli.progress import SILENT
from saqcli.report.run_report import NOUNS
from saqcli.searchers import Scored
from saqcli.training.loop import Memory, evaluate
from saqcli.training.trainer import Trainer

State = Callable[[], dict[str, Any]]


def trial_stages(config: RunConfig) -> list[str]:
    """The stages after calibration, which make trials necessary."""
    return planned_stages(config)[1:]


class Trials:
    """Takes configurations through the stages of a run, each from the float weights.

    Args:
        config: resolved.
        bound: the search whose configurations these are.
        images: of the run.
        state: of an interrupted trial, as ``_TrialMemory`` saves it, or None.
    """

    def __init__(
        self, config: RunConfig, bound: BoundSearch, images: Images, state: dict[str, Any] | None
    ) -> None:
        self.config, self.bound, self.images, self._interrupted = config, bound, images, state

    def __call__(self, choice: Sequence[int], number: int, memory: Memory, kept: State) -> Scored:
        """Score ``choice`` after all stages.

        Args:
            choice: one option index per decision.
            number: of the trial, for its title.
            memory: keeps the state of the trial.
            kept: what the memory keeps besides.

        One whose training diverges has an accuracy of 0.

        Raises:
            Interrupted: a signal asked to stop.
        """
        problem, network = self.bound.problem, self.bound.search_network
        config, policy = self.config, problem.config(choice)
        copied = replace(network, model=copy.deepcopy(network.model))
        statistics = balanced(config, copied, policy, problem.statistics, self.images, SILENT)
        in_float = copy.deepcopy(copied.model).eval().requires_grad_(False)
        model = install_quantizers(config, copied, policy, statistics, self.images, SILENT)
        stages = trial_stages(self.config)
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and interrupted["choice"] != list(choice):
            interrupted = None
        if interrupted is not None:
            stages = stages[stages.index(interrupted["stage"]) :]
        for stage in stages:
            problem.progress.note(f"trial {number}: {NOUNS[stage]}")
            state = interrupted["state"] if interrupted is not None else None
            own = _TrialMemory(memory, kept, {"choice": list(choice), "stage": stage}, state)
            interrupted = None
            try:
                self._take(stage, model, in_float, own, number)
            except TrainingDiverged as error:
                problem.progress.note(f"trial {number} failed: {error}")
                return Scored(tuple(choice), problem.space.cost(choice), 0.0, math.inf)
        with SILENT.task("", 0) as task:
            score = evaluate(model.eval(), problem.images.scoring, task, device=problem.device, shared=True)
        return Scored(tuple(choice), problem.space.cost(choice), score.top1, score.loss)

    def _take(
        self, stage: str, model: nn.Module, in_float: nn.Module, memory: "_TrialMemory", number: int
    ) -> None:
        """Take one stage; validation images stay unseen, so that of a fine-tuning the last state counts."""
        problem = self.bound.problem
        without_labels = wanted_stages(self.config).get(stage)
        if without_labels is not None:
            without_labels(self.config, model, in_float, self.images, memory, problem.progress)
            return
        trainer = Trainer(
            model,
            problem.images.training,
            self.config.training.model_copy(update={"keep": "last"}),
            num_classes=self.bound.search_network.loaded.num_classes,
            image_size=max(self.images.preprocessing.input_size[1:]),
            network=self.bound.problem.space.model,
            teacher=in_float if distills(self.config, self.bound.search_network.loaded) else None,
            run=memory,
            title=f"trial {number}, epoch",
            progress=problem.progress,
        )
        state = memory.load()
        if state is not None:
            trainer.load_state_dict(state)
        trainer.fit()


class _TrialMemory:
    """The state of one stage of a trial, within that of the measurements; nothing else of its training is recorded.

    Args:
        memory: of the measurements.
        kept: what it keeps besides.
        position: choice and stage of the trial.
        state: of the stage when it was interrupted, or None.
    """

    def __init__(
        self, memory: Memory, kept: State, position: dict[str, Any], state: dict[str, Any] | None
    ) -> None:
        self._memory, self._kept, self._position, self._state = memory, kept, position, state

    def load(self) -> dict[str, Any] | None:
        """The state of the stage when it was interrupted, or None."""
        return self._state

    def offer(self, state: State, *, milestone: bool = False, failing: bool = False) -> None:
        """Offer the state to the memory, see ``Memory.offer``."""

        def everything() -> dict[str, Any]:
            return {**self._kept(), "trial": {**self._position, "state": state()}}

        self._memory.offer(everything, milestone=milestone, failing=failing)

    def restore_random(self) -> None:
        """Restore the random numbers of the saved state."""
        self._memory.restore_random()

    def log(self, **values: Any) -> None:
        """Nothing: the trial's result is noted."""

    def check_signal(self) -> None:
        """Does nothing, since there is no evaluation."""
