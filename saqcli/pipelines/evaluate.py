"""``saq eval``: accuracy of a model on images, and optionally a benchmark."""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from saqcli import distributed
from saqcli.api.sources import EVALUATED, find_source, named_builder, named_file
from saqcli.config import DataSection, ModelSection
from saqcli.data.batches import Loader
from saqcli.data.splits import open_named, validation_loader
from saqcli.errors import ConfigError, Problems
from saqcli.pipelines.bench import Bench, BenchSettings, bench_source
from saqcli.pipelines.checks import check_builds, check_device, check_images, check_model
from saqcli.pipelines.predictors import Predictor, check_memory_format, open_source, with_memory_format
from saqcli.pipelines.setup import with_trained_rotation
from saqcli.process_group import process_group, started_by_torchrun
from saqcli.progress import SILENT, Progress
from saqcli.tasks.classification import Score
from saqcli.training.loop import score


@dataclass(frozen=True)
class Evaluation:
    """The result of ``saq eval``.

    Attributes:
        source: the evaluated source.
        score: accuracy and loss; None for a benchmark without images.
        images_per_second: throughput, including reading the images.
        memory_format: of the convolutions, which the last bits of the loss depend on; None in ONNX Runtime.
        bench: the benchmark; None if not requested.
        class_order: how folders were mapped to classes, see ``Numbering``; None without images.
    """

    source: str
    score: Score | None
    images_per_second: float | None = None
    memory_format: str | None = None
    bench: Bench | None = None
    class_order: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON; accuracies in percent."""
        score = self.score
        return {
            "target": self.source,
            "top1": score and score.top1,
            "top5": score and score.top5,
            "loss": score and score.loss,
            "images": score and score.images,
            "skipped": score and score.skipped,
            "images_per_second": self.images_per_second,
            "memory_format": self.memory_format,
            "class_order": self.class_order,
            "bench": self.bench and self.bench.to_dict(),
        }


def evaluate_source(
    source: str,
    section: ModelSection,
    data: DataSection,
    *,
    device: str,
    progress: Progress,
    bench: BenchSettings | None = None,
    builder: str | None = None,
    memory_format: str = "auto",
) -> Evaluation:
    """Accuracy, speed, or both, of a model name, a run directory, a safetensors or an ONNX file.

    Args:
        source: the source.
        section: further options of a model name.
        data: images; optional with ``bench``.
        device: device for the accuracy; the benchmark always runs on the CPU.
        progress: reports every batch and every round.
        bench: settings of the benchmark, if any.
        builder: name of the user's own network that a run or file was made from.
        memory_format: for the accuracy, see ``with_memory_format``.

    Raises:
        SaqError: the source or the data cannot be used.
    """
    if bench is None:
        return _accuracy(source, section, data, device, progress, builder, memory_format)
    if started_by_torchrun():
        raise ConfigError("`bench` runs in one process: start it without torchrun")
    problems = Problems()
    problems.attempt(bench.check)
    problems.attempt(
        check_evaluation, source, section, data, device, builder, memory_format, needs_images=False
    )
    problems.check()
    if data.path is None:
        return Evaluation(source, None, bench=bench_source(source, section, bench, progress, builder))
    found = _accuracy(source, section, data, device, progress, builder, memory_format)
    return replace(found, bench=bench_source(source, section, bench, progress, builder))


def _accuracy(
    source: str,
    section: ModelSection,
    data: DataSection,
    device: str,
    progress: Progress,
    builder: str | None,
    memory_format: str,
) -> Evaluation:
    with process_group(
        device, lambda: check_evaluation(source, section, data, device, builder, memory_format)
    ) as place:
        shown = progress if distributed.first() else SILENT
        return _on(place, source, section, data, shown, builder, memory_format)


def check_evaluation(
    source: str,
    section: ModelSection,
    data: DataSection,
    device: str,
    builder: str | None = None,
    memory_format: str = "auto",
    *,
    needs_images: bool = True,
) -> None:
    """Check the arguments before anything is downloaded or loaded.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    found = problems.attempt(find_source, source, EVALUATED)
    if found is not None and found.kind == "model":
        problems.attempt(check_model, section)
    elif found is not None:
        problems.attempt(named_file, found, section)
    problems.attempt(named_builder, found, builder)
    problems.attempt(check_memory_format, memory_format, source)
    if needs_images or data.path is not None:
        problems.attempt(check_images, data, "val")
    elif memory_format != "auto":
        problems.attempt(_refuse_memory_format, memory_format)
    problems.attempt(check_device, device)
    if found is not None and found.kind == "model":
        check_builds(problems, section)
    problems.check()


def _refuse_memory_format(memory_format: str) -> None:
    raise ConfigError(
        f"`memory_format={memory_format}` applies to the accuracy, and `bench` measures networks as they are built: "
        "remove it, or use `data.path=DIR`"
    )


def _on(
    device: torch.device,
    source: str,
    section: ModelSection,
    data: DataSection,
    progress: Progress,
    builder: str | None,
    memory_format: str,
) -> Evaluation:
    """The evaluation on every rank's device, with its share of the images."""
    predictor, loader, order = distributed.together(
        lambda: _opened(device, source, section, data, progress, builder, memory_format)
    )
    start = time.perf_counter()
    found = score(predictor.predict, loader, "evaluating", predictor.device, progress, predictor.name)
    speed = found.images / (time.perf_counter() - start)
    return Evaluation(predictor.name, found, speed, predictor.memory_format, class_order=order)


def _opened(
    device: torch.device,
    source: str,
    section: ModelSection,
    data: DataSection,
    progress: Progress,
    builder: str | None,
    memory_format: str,
) -> tuple[Predictor, Loader, str]:
    """The predictor, its images, and how their folders were mapped to classes."""
    opened = open_source(source, section, device, progress, builder)
    predictor = with_memory_format(opened, memory_format, progress)
    if predictor.metadata is not None:
        data = with_trained_rotation(data, predictor.metadata, progress)
    data = data.model_copy(update={"cache": "off"})  # images are read once
    split = open_named(data, "val", predictor.classes, progress)
    loader = validation_loader(split, predictor.preprocessing, data, predictor.device)
    return predictor, loader, split.class_order
