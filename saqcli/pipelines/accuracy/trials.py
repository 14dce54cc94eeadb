"""Trials: the accuracy of a configuration after all stages of the run, on images that it was not trained on.

A trial takes the stages that the run takes after calibration: compensation, reconstruction, fine-tuning. It trains on
those training images that the search does not hold out: half of them by default, so that it takes half of the time of a
fine-tuning, and is rather less accurate than what the run ends with.

An interrupted trial resumes at its last step of fine-tuning, bit-identically; one that was interrupted before, from its
beginning.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.errors import TrainingDiverged
from saqcli.pipelines.calibration import install_quantizers
from saqcli.pipelines.find_bits import BoundSearch
from saqcli.pipelines.stages import CalibrationCalls, planned_stages
from saqcli.progress import SILENT
from saqcli.reconstruction.compensation import compensate
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.reconstruct import reconstruct
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
        state: of an interrupted trial, or None.
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
            memory: keeps the state of training.
            kept: what the memory keeps besides.

        One whose training diverges has an accuracy of 0.

        Raises:
            Interrupted: a signal asked to stop.
        """
        problem, network = self.bound.problem, self.bound.search_network
        in_float = copy.deepcopy(network.model).eval().requires_grad_(False)
        copied = replace(network, model=copy.deepcopy(network.model))
        model = install_quantizers(
            self.config, copied, problem.config(choice), problem.statistics, self.images, SILENT
        )
        interrupted, self._interrupted = self._interrupted, None
        if interrupted is not None and interrupted["choice"] != list(choice):
            interrupted = None
        if interrupted is None:
            self._without_labels(model, in_float, _Paused(memory, kept), number)
        if self.config.training.epochs:
            run = _TrialRun(choice, memory, kept)
            trainer = self._trainer(model, in_float, run, number)
            if interrupted is not None:
                trainer.load_state_dict(interrupted["trainer"])
            try:
                trainer.fit()
            except TrainingDiverged as error:
                problem.progress.note(f"trial {number} failed: {error}")
                return Scored(tuple(choice), problem.space.cost(choice), 0.0, math.inf)
        with SILENT.task("", 0) as task:
            score = evaluate(model.eval(), problem.images.scoring, task, device=problem.device, shared=True)
        return Scored(tuple(choice), problem.space.cost(choice), score.top1, score.loss)

    def _without_labels(self, model: nn.Module, in_float: nn.Module, memory: Memory, number: int) -> None:
        """Compensate and reconstruct, as far as the run does."""
        calls, progress = CalibrationCalls(self.images), self.bound.problem.progress
        if self.config.quantization.compensate:

            def compensated() -> dict[str, Tensor]:
                compensate(model, in_float, calls, progress=SILENT)
                return {name: value.cpu() for name, value in model.state_dict().items()}

            model.load_state_dict(distributed.from_first(compensated))
        if self.config.reconstruction.enabled:
            options = self.config.reconstruction.model_dump(exclude={"enabled"})
            progress.note(f"trial {number}: reconstructing")
            reconstruct(
                model,
                in_float,
                calls,
                Reconstruction(**options),
                seed=self.config.run.seed,
                memory=memory,
                progress=progress,
            )

    def _trainer(self, model: nn.Module, in_float: nn.Module, run: "_TrialRun", number: int) -> Trainer:
        """Trains a trial; validation images stay unseen, so that the last state counts."""
        problem, network = self.bound.problem, self.bound.search_network
        return Trainer(
            model,
            problem.images.training,
            self.config.training.model_copy(update={"keep": "last"}),
            num_classes=network.loaded.num_classes,
            image_size=max(self.images.preprocessing.input_size[1:]),
            teacher=in_float if self.config.training.distill else None,
            run=run,
            title=f"trial {number}, epoch",
            progress=problem.progress,
        )


class _Paused:
    """The memory of a reconstruction within a trial: saves what was measured before, and stops on signals."""

    def __init__(self, memory: Memory, kept: State) -> None:
        self._memory, self._kept = memory, kept

    def load(self) -> None:
        """Nothing: the reconstruction starts from its beginning."""

    def offer(self, state: State, *, milestone: bool = False, failing: bool = False) -> None:
        """Offer what was measured before; see ``Memory.offer``."""
        self._memory.offer(self._kept, failing=failing)

    def restore_random(self) -> None:
        """Nothing to restore."""


class _TrialRun:
    """Saves the state of a trial in the memory of the measurements."""

    def __init__(self, choice: Sequence[int], memory: Memory, kept: State) -> None:
        self._choice, self._memory, self._kept = list(choice), memory, kept

    def offer(self, state: State, *, milestone: bool = False, failing: bool = False) -> None:
        """Offer the state to the memory, see ``Memory.offer``."""

        def everything() -> dict[str, Any]:
            return {**self._kept(), "training": {"choice": self._choice, "trainer": state()}}

        self._memory.offer(everything, milestone=milestone, failing=failing)

    def log(self, **values: Any) -> None:
        """Nothing: the trial's result is noted."""

    def check_signal(self) -> None:
        """Does nothing, since there is no evaluation."""
