"""The ladder of ``saq quantize``: calibrated, compensated, reconstructed, fine-tuned.

Each stage starts from the model that the one before left, and ends with a score, a checkpoint and a line for the
reader, who may stop there. The stages before fine-tuning need no labels: they compare the quantized network with the
float one on calibration images. An interrupted stage resumes bit-identically: compensation, which takes seconds, from
its start, reconstruction in the block where it stopped.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.data.images import ImageSet
from saqcli.data.splits import Images
from saqcli.pipelines.calibration import calls_of
from saqcli.progress import Progress
from saqcli.quant.calls import Call
from saqcli.reconstruction.compensation import Compensation, compensate
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.reconstruct import reconstruct, without_quantizers
from saqcli.report.answers import write_answers
from saqcli.report.run_report import FROM_TEACHER, NOUNS, QuantizeResult
from saqcli.runs.directory import RunDirectory
from saqcli.runs.saving import SearchMemory
from saqcli.tasks.classification import Score
from saqcli.training.loop import Memory, score
from saqcli.units import counted

# From settings, model, float network, images, memory and progress to figures for the metrics; changes the model.
Stage = Callable[[RunConfig, nn.Module, nn.Module, Images, Memory, Progress], dict[str, Any]]


class Measured(NamedTuple):
    """A model's score on the images of a run.

    Attributes:
        score: accuracy and loss, NaN without labels.
        agreement: percent of the images with the best class of the float network; None where that is unknown: in runs
            of earlier versions, and of streamed images on several ranks.
    """

    score: Score
    agreement: float | None


@dataclass
class Scorer:
    """Scores models on the images of a run, and compares them with the float network.

    Attributes:
        images: of the run.
        device: of the models.
        name: of the network, for messages.
        progress: reports every batch.
        float_classes: best class of the float network for every readable image, in order, (N,); None if unknown.
        classes: the same of the model that was scored last; None before that.
        labels: of all images, in the same order; those of unreadable ones are below 0; None before that.
    """

    images: Images
    device: torch.device
    name: str
    progress: Progress
    float_classes: Tensor | None = None
    classes: Tensor | None = None
    labels: Tensor | None = None

    def of_float(self, model: nn.Module) -> Score:
        """The score of the float network, whose best classes are kept if images come in the same order again."""
        found, classes = self._score(model, "evaluating float", self.name)
        ordered = isinstance(self.images.val.dataset, ImageSet) or distributed.count() == 1
        self.float_classes = classes if ordered else None
        return found

    def of(self, model: nn.Module, stage: str, title: str | None = None) -> Measured:
        """The score of the model after a stage.

        Args:
            model: quantized.
            stage: its name, for messages.
            title: of the task; None names the stage.
        """
        found, classes = self._score(model, title or f"evaluating {stage}", f"{self.name}, {stage},")
        self.classes = classes
        if self.float_classes is None or len(classes) != len(self.float_classes):
            return Measured(found, None)
        same = int((classes == self.float_classes).sum())
        return Measured(found, 100 * same / len(classes))

    def keep_answers(self, run: RunDirectory) -> None:
        """Write the answers of the model that was scored last beside those of the float network; none if unknown."""
        if self.float_classes is not None and self.classes is not None and self.labels is not None:
            answers = self.labels, self.float_classes, self.classes
            write_answers(run, self.images.val, *answers, labelled=self.images.labelled)

    def _score(self, model: nn.Module, title: str, name: str) -> tuple[Score, Tensor]:
        classes: list[Tensor] = []
        labels: list[Tensor] = []
        found = score(
            *(model, self.images.validation(), title, self.device, self.progress, name),
            keep=classes,
            keep_labels=labels,
        )
        self.labels = torch.cat(labels)
        if not self.images.labelled:
            found = replace(found, loss=math.nan, top1=math.nan, top5=math.nan)
        return found, torch.cat(classes).to(torch.int32)


class CalibrationCalls:
    """The calibration images of a run as calls, the same at every pass."""

    def __init__(self, images: Images) -> None:
        self._loader = images.calibration()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Call]:
        return calls_of(self._loader)


def float_network(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The float network of a quantized one: the same modules without quantizers, with the weights of before."""
    network = without_quantizers(model)
    network.load_state_dict(tensors)
    return network


@contextmanager
def timed(run: RunDirectory, stage: str) -> Iterator[None]:
    """Add the time in the context to that of a stage, which the manifest keeps over interruptions."""
    start = time.perf_counter()
    try:
        yield
    finally:
        run.add_seconds(stage, time.perf_counter() - start)


def described(row: Mapping[str, Any], seconds: float | None = None) -> str:
    """``reconstructed 90.97 % top-1, agrees with float on 95.20 %``: the end of a stage in words."""
    figures = [] if row["top1"] is None else [f"{row['top1']:.2f} % top-1"]
    if row["agreement"] is not None:
        figures.append(f"agrees with float on {row['agreement']:.2f} %")
    took = "" if seconds is None else f", {seconds:.0f} s"
    return f"{row['stage']}: {', '.join(figures)}{took}"


def end_stage(
    stage: str, measured: Measured, result: QuantizeResult, run: RunDirectory, progress: Progress, **more: Any
) -> None:
    """Record the end of a stage without labels in the results and the metrics, and note it."""
    row = result.add_stage(stage, *measured)
    log_stage(run, stage, measured, **more)
    progress.note(described(row, distributed.from_first(run.manifest).seconds.get(stage)))


def log_stage(run: RunDirectory, phase: str, measured: Measured, **more: Any) -> None:
    """Append the figures of a stage to the metrics."""
    known = {} if measured.agreement is None else {"agreement": measured.agreement}
    run.log(phase=phase, **asdict(measured.score), **known, **more)


def wanted_stages(config: RunConfig) -> dict[str, Stage]:
    """The stages without labels that a run takes after calibration, in their order."""
    found: dict[str, Stage] = {}
    if config.quantization.compensate:
        found["compensated"] = _compensate
    if config.reconstruction.enabled:
        found["reconstructed"] = _reconstruct
    return found


def _compensate(
    config: RunConfig,
    model: nn.Module,
    in_float: nn.Module,
    images: Images,
    memory: Memory,
    progress: Progress,
) -> dict[str, Any]:
    """Compensate in closed form, on the first rank; the error of the network's output before and after."""

    def compensated() -> tuple[Compensation, dict[str, Tensor]]:
        found = compensate(model, in_float, CalibrationCalls(images), progress=progress)
        return found, {name: value.cpu() for name, value in model.state_dict().items()}

    found, tensors = distributed.from_first(compensated)
    model.load_state_dict(tensors)
    return {"places": len(found.places), "before": found.before, "after": found.after}


def _reconstruct(
    config: RunConfig,
    model: nn.Module,
    in_float: nn.Module,
    images: Images,
    memory: Memory,
    progress: Progress,
) -> dict[str, Any]:
    """Reconstruct block by block, resumed in the block where it stopped; the error of every block before and after."""
    options = config.reconstruction.model_dump(exclude={"enabled"})
    blocks = reconstruct(
        model,
        in_float,
        CalibrationCalls(images),
        Reconstruction(**options),
        seed=config.run.seed,
        memory=memory,
        progress=progress,
    )
    return {"blocks": [block._asdict() for block in blocks]}


def tensors_before(config: RunConfig, model: nn.Module) -> dict[str, Any]:
    """What the stages without labels need of the float network, for the checkpoint; nothing if there are none.

    Weights are kept and not read again: those of a network without trained weights exist only once, and balanced norms
    differ from those of the file.
    """
    if not wanted_stages(config):
        return {}
    return {"float": {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}}


def planned_stages(config: RunConfig) -> list[str]:
    """The names of all stages of a run, in their order."""
    return ["calibrated", *wanted_stages(config), *(["fine-tuned"] if config.training.epochs else [])]


def announcement(config: RunConfig, images: Images, *, learns_from_float: bool) -> str:
    """What the run will do once its bits are known, on one line."""
    training, count = config.training, min(config.data.calibration_images, images.train.images)
    parts = [f"calibration on {counted(count, 'image')}", *(NOUNS[stage] for stage in wanted_stages(config))]
    if training.epochs:
        steps = counted(len(images.training()), "step")
        teacher = f", {FROM_TEACHER}" if learns_from_float else ""
        parts.append(f"{counted(training.epochs, 'epoch')} of {steps} with {training.method}{teacher}")
    scored = counted(images.val.images, "image")
    return f"{config.model.name}: {'; '.join(parts)}; scored on {scored}"


def climb(
    config: RunConfig,
    run: RunDirectory,
    state: dict[str, Any],
    model: nn.Module,
    result: QuantizeResult,
    scorer: Scorer,
) -> dict[str, Any]:
    """Take the stages without labels that are asked for and not done; the checkpoint of the run after them.

    Args:
        config: of the run.
        run: keeps a checkpoint after every stage.
        state: the checkpoint that ``model`` and ``result`` are of.
        model: calibrated, changed in place.
        result: receives a row for every stage.
        scorer: of the run.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    done = [row["stage"] for row in result.stages]
    wanted = wanted_stages(config)
    last = next(reversed(wanted), None)
    for stage, work in wanted.items():
        if stage in done:
            continue
        minutes, progress = config.run.checkpoint_minutes, scorer.progress
        with timed(run, stage), SearchMemory(run, minutes, progress.note, "reconstruction") as memory:
            more = work(config, model, float_network(model, state["float"]), scorer.images, memory, progress)
        end_stage(stage, scorer.of(model, stage), result, run, scorer.progress, **more)
        state = {**state, "outcome": result.pack(), "model": model.state_dict()}
        if stage == last:
            del state["float"]  # nothing after this compares with it
        run.save_checkpoint(state)
    run.end_reconstruction()
    return state
