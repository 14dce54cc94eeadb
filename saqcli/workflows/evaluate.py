"""``saq eval``: accuracy of anything on a folder of images."""

import time
from dataclasses import dataclass
from typing import Any

from saqcli.algorithms.training import Score, evaluate
from saqcli.config import DataSection, ModelSection
from saqcli.io.data import check_trained_on
from saqcli.io.loaders import Loader
from saqcli.progress import Progress
from saqcli.workflows.predictors import Predictor, open_target
from saqcli.workflows.setup import open_named, pick_device, validation_loader


@dataclass(frozen=True)
class Evaluation:
    """What ``saq eval`` found.

    Attributes:
        target: what was evaluated.
        score: accuracy and loss.
        images_per_second: including reading the images.
    """

    target: str
    score: Score
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it; accuracies in percent."""
        return {
            "target": self.target,
            "top1": self.score.top1,
            "top5": self.score.top5,
            "loss": self.score.loss,
            "images": self.score.images,
            "skipped": self.score.skipped,
            "images_per_second": self.images_per_second,
        }


def evaluate_target(
    target: str, section: ModelSection, data: DataSection, *, device: str, progress: Progress
) -> Evaluation:
    """Accuracy of a model name, a run directory, a safetensors or an ONNX file.

    Raises:
        SaqError: the target or the data cannot be used.
    """
    predictor = open_target(target, section, pick_device(device), progress)
    split = open_named(data, "val", predictor.num_classes)
    if predictor.facts is not None:
        check_trained_on(split, predictor.facts.class_names, predictor.num_classes, predictor.name)
    loader = validation_loader(split, predictor.preprocessing, data, predictor.device)
    start = time.perf_counter()
    score = score_predictor(predictor, loader, progress)
    return Evaluation(predictor.name, score, score.images / (time.perf_counter() - start))


def score_predictor(predictor: Predictor, loader: Loader, progress: Progress) -> Score:
    """Accuracy of a predictor over a loader."""
    with progress.task("evaluating", len(loader)) as task:
        return evaluate(predictor.predict, loader, task, device=predictor.device)
