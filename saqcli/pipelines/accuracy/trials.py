"""Trial fine-tunings: the accuracy of a configuration after training, on images that it was not trained on.

A trial trains as the run does, on those training images that the search does not hold out: half of them by default, so
that a trial takes half of the time of a fine-tuning, and is rather less accurate than what the run ends with.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from saqcli.config import RunConfig
from saqcli.data.splits import Images
from saqcli.pipelines.calibration import install_quantizers
from saqcli.pipelines.find_bits import BoundSearch
from saqcli.progress import SILENT, Progress
from saqcli.searchers import Scored
from saqcli.training.loop import Memory, evaluate
from saqcli.training.trainer import Trainer

State = Callable[[], dict[str, Any]]


class FineTuning:
    """Fine-tunes configurations, each from the float weights.

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
        """Fine-tune and score ``choice``.

        Args:
            choice: one option index per decision.
            number: of the trial, for its title.
            memory: keeps the state of training.
            kept: what the memory keeps besides.

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
            Interrupted: a signal asked to stop.
        """
        problem, network = self.bound.problem, self.bound.search_network
        teacher: nn.Module | None = None
        if self.config.training.distill:
            teacher = copy.deepcopy(network.model).eval().requires_grad_(False)
        copied = replace(network, model=copy.deepcopy(network.model))
        model = install_quantizers(
            self.config, copied, problem.config(choice), problem.statistics, self.images, SILENT
        )
        trainer = Trainer(
            model,
            problem.images.training,
            self.config.training.model_copy(update={"keep": "last"}),
            num_classes=network.loaded.num_classes,
            image_size=max(self.images.preprocessing.input_size[1:]),
            teacher=teacher,
            run=_TrialRun(choice, memory, kept, problem.progress),
            title=f"trial {number}, epoch",
            progress=problem.progress,
        )
        if self._interrupted is not None and self._interrupted["choice"] == list(choice):
            trainer.load_state_dict(self._interrupted["trainer"])
        self._interrupted = None
        trainer.fit()
        with SILENT.task("", 0) as task:
            score = evaluate(model.eval(), problem.images.scoring, task, device=problem.device, shared=True)
        return Scored(tuple(choice), problem.space.cost(choice), score.top1, score.loss)


class _TrialRun:
    """Saves the state of a trial in the memory of the measurements."""

    def __init__(self, choice: Sequence[int], memory: Memory, kept: State, progress: Progress) -> None:
        self._choice, self._memory, self._kept, self._progress = list(choice), memory, kept, progress

    def offer(self, state: State, *, milestone: bool = False, failing: bool = False) -> None:
        """Offer the state to the memory, see ``Memory.offer``."""

        def everything() -> dict[str, Any]:
            return {**self._kept(), "training": {"choice": self._choice, "trainer": state()}}

        self._memory.offer(everything, milestone=milestone, failing=failing)

    def log(self, **values: Any) -> None:
        """Nothing: the trial's result is noted."""

    def check_signal(self) -> None:
        """Does nothing, since there is no evaluation."""
