"""Fine-tuning of a quantized module in one call, for those who need no loop of their own."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from saqcli.api.batches import BatchReader, Inputs, class_scores
from saqcli.api.info import quantization_of
from saqcli.config import TrainingSection
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.progress import SILENT, Progress
from saqcli.quant.layer import in_eval_mode
from saqcli.serialization import parse_object
from saqcli.tasks.classification import Score
from saqcli.training.trainer import Trainer


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 3,
    method: str = "saq",
    lr: float = 0.005,
    rho: float | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    validation: Iterable[Any] | None = None,
    teacher: nn.Module | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    inputs: Inputs | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> Score | None:
    """Train a quantized module on labelled batches, in place, with SGD, a cosine schedule and a minimizer.

    For several inputs, other outputs or another loop, take a minimizer: ``saqcli.SAQ(model, optimizer).step(closure)``.

    Args:
        model: from ``quantize_model`` or ``load``; maps one tensor to class scores (N, classes). In eval mode
            afterwards if there is ``validation``.
        data: labelled batches, which can be read once an epoch; ``set_epoch`` of it is called if there is one.
        epochs: passes over ``data``.
        method: minimizer: ``saq``, ``asaq``, ``sam``, ``case1``, ``qat``, or another of the table.
        lr: learning rate at the start.
        rho: radius of the perturbation; None for the paper's at these bits.
        loss: from class scores (N, classes) and labels to a mean; cross-entropy by default.
        validation: labelled batches to score after every epoch.
        teacher: float module to learn from as well, by its class scores.
        on_epoch: called after every epoch with ``epoch``, ``lr``, ``loss``, ``top1`` and others, and where there is
            ``validation`` also with ``val_loss``, ``val_top1`` and others.
        inputs: from a batch to the module's argument.
        settings: further fields of ``saqcli.config.TrainingSection``, such as ``{"micro_batch": 32}``.
        progress: reports every step.

    Returns:
        The score on ``validation`` after the last epoch, or None.

    Raises:
        ConfigError: the module is not quantized, or settings, optimizer or method are unknown.
        DataError: the loader is empty, or a batch has no labels.
        UnsupportedModel: the module takes several inputs or returns something else than class scores.
        TrainingDiverged: the loss is NaN or infinite, in many steps in a row.
        DeviceMemoryError: out of memory, however small the micro-batches.
    """
    module, about, found = quantization_of(model)
    scores, shapes = class_scores(found.traced.outputs), found.traced.inputs
    if scores is None or len(shapes) != 1:
        raise UnsupportedModel(
            f"{about.name} does not map one tensor to class scores (N, classes): write a loop of your own with "
            "saqcli.SAQ(model, optimizer).step(closure)"
        )
    given = {"epochs": epochs, "method": method, "lr": lr, "rho": rho, **(settings or {})}
    training = parse_object(TrainingSection, given, "`settings`", ConfigError)
    if not training.epochs:
        raise ConfigError("`epochs=0` trains nothing: give 1 or more, or omit the call")
    reader = BatchReader(module, inputs)
    trainer = Trainer(
        module,
        _Labelled(data, reader),
        training.model_copy(update={"distill": teacher is not None}),
        num_classes=scores.shape[1],
        image_size=max(shapes[0][1:] or shapes[0]),
        validation=None if validation is None else _Labelled(validation, reader),
        teacher=teacher,
        criterion=loss,
        run=_Callback(on_epoch, validated=validation is not None),
        progress=progress,
    )
    with nullcontext() if teacher is None else in_eval_mode(teacher):
        trainer.fit()
    return trainer.last


class _Labelled:
    """Images and labels of a loader, any number of times."""

    def __init__(self, data: Iterable[Any], reader: BatchReader) -> None:
        again: Any = data
        self._data: Any = again if hasattr(again, "__len__") and iter(again) is not again else list(data)
        self._reader = reader
        if not len(self._data):
            raise DataError("the loader has no batches: give at least one")
        if hasattr(data, "set_epoch"):
            self.set_epoch = data.set_epoch

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._data:
            labels = self._reader.labels(batch)
            if labels is None:
                raise DataError(
                    "a batch of the loader has no labels: give batches (images, labels), or a dictionary with both"
                )
            yield self._reader.call(batch).tensors[0], labels


class _Callback:
    """Passes the metrics of every epoch on; saves nothing."""

    def __init__(self, on_epoch: Callable[[dict[str, Any]], None] | None, *, validated: bool) -> None:
        self._on_epoch, self._validated = on_epoch, validated
        self._figures: dict[str, Any] = {}

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Nothing is saved."""

    def log(self, **values: Any) -> None:
        """Collect the metrics of an epoch; the last ones call the function."""
        phase = values.pop("phase")
        prefix = "val_" if phase == "val" else ""
        self._figures |= {key if key == "epoch" else f"{prefix}{key}": value for key, value in values.items()}
        if self._on_epoch is not None and phase == ("val" if self._validated else "train"):
            self._on_epoch(dict(self._figures))

    def check_signal(self) -> None:
        """Signals are raised as usual."""
