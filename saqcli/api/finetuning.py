"""Fine-tuning of a quantized module in one call, for those who need no loop of their own."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.api.batches import BatchReader, Inputs, class_labels, class_scores
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
        method: minimizer: ``saq``, ``asaq``, ``sam``, ``case1``, ``msam``, ``qat``, or another of the table.
        lr: learning rate at the start.
        rho: radius of the perturbation; None for the paper's at these bits.
        loss: from class scores (N, classes) and labels to a mean, one number with a gradient; cross-entropy by default,
            for labels (N,) or shares (N, classes). A loss of one's own takes any labels with N rows, and is reported.
        validation: labelled batches to score after every epoch.
        teacher: float module to learn from as well, by its class scores.
        on_epoch: called after every epoch with ``epoch``, ``lr``, ``loss``, ``top1`` and others, and where there is
            ``validation`` also with ``val_loss``, ``val_top1`` and others; ``top1`` and ``top5`` are None where
            labels are no integers (N,).
        inputs: from a batch to the module's argument.
        settings: further fields of ``saqcli.config.TrainingSection``, such as ``{"micro_batch": 32}``.
        progress: reports every step.

    Returns:
        The score on ``validation`` after the last epoch, by ``loss`` if given, or None.

    Raises:
        ConfigError: the module is not quantized, settings, optimizer or method are unknown, or ``loss`` returns
            something else than one number with a gradient.
        DataError: the loader is empty, or the labels of a batch are missing or do not fit.
        UnsupportedModel: the module takes several inputs or returns something else than class scores, or the teacher
            returns others.
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
    mixed = bool(training.mixup or training.cutmix)
    classes = scores.shape[1]

    def labelled(batches: Iterable[Any], *, shares: bool = True, skipped: bool = False) -> _Labelled:
        def check(labels: Tensor, count: int) -> Tensor:
            if loss is not None and shares:
                return _any_labels(labels, count)
            return class_labels(labels, classes, count, shares=shares, skipped=skipped)

        return _Labelled(batches, reader, check)

    trainer = Trainer(
        module,
        labelled(data, shares=not mixed),
        training.model_copy(update={"distill": teacher is not None}),
        num_classes=classes,
        image_size=max(shapes[0][1:] or shapes[0]),
        network=about.name,
        validation=None if validation is None else labelled(validation, skipped=True),
        teacher=teacher,
        criterion=None if loss is None else _checked(loss),
        run=_Callback(on_epoch, validated=validation is not None),
        progress=progress,
    )
    with nullcontext() if teacher is None else in_eval_mode(teacher):
        trainer.fit()
    return trainer.last


class _Labelled:
    """Images and labels of a loader, any number of times."""

    def __init__(
        self, data: Iterable[Any], reader: BatchReader, check: Callable[[Tensor, int], Tensor]
    ) -> None:
        kept: Any = data if _repeats(data) else list(data)
        self._data = kept
        self._reader, self._check = reader, check
        if not len(self._data):
            raise DataError("the loader has no batches: give at least one")
        if hasattr(data, "set_epoch"):
            self.set_epoch = data.set_epoch

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._data:
            labels = self._reader.known_labels(batch)
            images = self._reader.call(batch).tensors[0]
            yield images, self._check(labels, len(images))


def _repeats(data: Any) -> bool:
    """Whether ``data`` has a length, which loaders of a stream have not, and can be read again."""
    try:
        return len(data) >= 0 and iter(data) is not data
    except TypeError:
        return False


def _any_labels(labels: Tensor, count: int) -> Tensor:
    """Labels for a loss of one's own: integers become int64.

    Raises:
        DataError: they do not have ``count`` rows.
    """
    if not labels.dim() or len(labels) != count:
        raise DataError(
            f"a batch of the loader has {count} images and labels of {tuple(labels.shape)}: give a label for each"
        )
    kept = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    return labels if kept else labels.long()


def _checked(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """``loss``, whose results must be one number with a gradient.

    Raises:
        ConfigError: a result is something else.
    """

    def checked(scores: Tensor, labels: Tensor) -> Tensor:
        found: Any = loss(scores, labels)
        problem = None
        if not isinstance(found, Tensor):
            problem = f"a {type(found).__name__}"
        elif found.numel() != 1:
            problem = f"a tensor of {tuple(found.shape)}"
        elif scores.requires_grad and not found.requires_grad:
            problem = "a tensor without a gradient"
        if problem is not None:
            raise ConfigError(
                f"`loss` returns {problem}: return one number that depends on the scores, the mean over the batch"
            )
        result: Tensor = found
        return result

    return checked


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
        if math.isnan(values["top1"]):
            values |= {"top1": None, "top5": None}
        self._figures |= {key if key == "epoch" else f"{prefix}{key}": value for key, value in values.items()}
        if self._on_epoch is not None and phase == ("val" if self._validated else "train"):
            self._on_epoch(dict(self._figures))

    def check_signal(self) -> None:
        """Signals are raised as usual."""
