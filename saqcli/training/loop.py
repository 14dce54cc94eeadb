"""The only loops over batches: one epoch of training, one pass of evaluation."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.data.batches import Loader
from saqcli.errors import DataError, DeviceMemoryError, TrainingDiverged
from saqcli.progress import Progress, Task
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import quantized_once
from saqcli.tasks.classification import Meter, Score, best_class
from saqcli.training.memory import Attempt
from saqcli.training.minimizers.base import check_score
from saqcli.training.step import Stepper

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) and labels (N,)


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Batches,
    task: Task,
    *,
    device: torch.device,
    keep: list[Tensor] | None = None,
    keep_labels: list[Tensor] | None = None,
    shared: bool = False,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    model: nn.Module | None = None,
) -> Score:
    """Accuracy and loss of ``predict``.

    Args:
        predict: images (N, C, H, W) to logits (N, classes); a model in eval mode, an ``Engine`` or an ONNX session.
        batches: deterministic.
        task: reports every batch.
        device: of the images that ``predict`` gets.
        keep: filled with the best class of every counted image, in order; with ``shared``, those of all ranks.
        keep_labels: filled with the label of every image, counted or not, in the same order.
        shared: all ranks call this, and each looks at its part of the batches. Every rank gets the score of all, bit
            for bit what one process would find (of shards but for the order in which losses are added).
        criterion: mean loss of logits and labels on ``device``; None for cross-entropy.
        model: what ``predict`` computes with, if it is no module itself; weights are quantized once for all batches.

    Raises:
        DataError: not one readable image.
        DeviceMemoryError: not even one image fits in memory.
    """
    meters: list[Meter] = []
    so_far = Meter()
    if model is None:
        model = predict if isinstance(predict, nn.Module) else nn.Module()
    # Not in inference mode: a module may keep tensors of this pass, and train with them. It would not be faster.
    with torch.no_grad(), fused_on_cpu(model), quantized_once(model):
        for images, labels in distributed.share(batches) if shared else batches:
            logits, loss = in_parts(predict, images.to(device, non_blocking=True)), None
            if criterion is not None:
                loss = criterion(logits.float(), labels.to(logits.device))
            logits, labels = logits.cpu(), labels.cpu()
            meters.append(Meter())
            meters[-1].update(logits, labels, loss)
            so_far.add(meters[-1])
            if keep is not None:
                keep.append(best_class(logits[labels >= 0]))
            if keep_labels is not None:
                keep_labels.append(labels)
            task.advance(images=len(labels), top1=100 * so_far.right1 / max(so_far.images, 1))
    if shared and distributed.count() > 1:
        so_far = Meter()
        for counts in distributed.interleaved(distributed.gathered([vars(meter) for meter in meters])):
            so_far.add(Meter(**counts))
        for kept in (keep, keep_labels):
            if kept is not None:
                kept[:] = distributed.interleaved(distributed.gathered(kept))
    if not so_far.images:
        raise DataError("no image could be read: there is nothing to evaluate")
    return so_far.score()


def score(
    predict: Callable[[Tensor], Tensor],
    loader: Loader,
    title: str,
    device: torch.device,
    progress: Progress,
    name: str = "the model",
    keep: list[Tensor] | None = None,
    keep_labels: list[Tensor] | None = None,
) -> Score:
    """Accuracy and loss of ``predict``, by all ranks together; as ``evaluate``.

    Args:
        predict: as for ``evaluate``; a module is set to eval mode.
        loader: images of a split.
        title: of the task.
        device: of the images that ``predict`` gets.
        progress: reports every batch.
        name: of the model, for messages.
        keep: as for ``evaluate``.
        keep_labels: as for ``evaluate``.

    Raises:
        UnsupportedModel: the loss is NaN or infinite.
    """
    if isinstance(predict, nn.Module):
        predict.eval()
    with progress.task(title, len(loader) // distributed.count()) as task:
        found = evaluate(
            predict, loader, task, device=device, keep=keep, keep_labels=keep_labels, shared=True
        )
    check_score(found.loss, found.images, name)
    return found


def in_parts(predict: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """``predict(images)``, in halves of halves if memory runs out.

    Raises:
        DeviceMemoryError: out of memory with a single image.
    """
    attempt = Attempt()
    with attempt:
        return predict(images)
    if len(images) == 1:
        raise DeviceMemoryError(
            "out of memory with a single image: free memory, or use a smaller `model.input_size` or network"
        )
    return torch.cat([in_parts(predict, half) for half in images.tensor_split(2)])


def train_epoch(
    step: Stepper,
    batches: Batches,
    task: Task,
    meter: Meter,
    *,
    skip: int = 0,
    after_skip: Callable[[], None] = lambda: None,
    after_step: Callable[[int], None] = lambda done: None,
) -> Score:
    """One pass over ``batches``; loss and accuracy are those of the unperturbed model in training mode, over all ranks.

    Args:
        step: takes the steps.
        batches: training images and labels.
        task: reports every step.
        meter: of this rank, to be continued.
        skip: batches to pass over without a step: those done before an interruption.
        after_skip: called once these are passed over; restores the random state.
        after_step: called with the number of steps done in this epoch; may stop the epoch.

    Raises:
        TrainingDiverged: the loss is NaN or infinite, in many steps in a row.
        DeviceMemoryError: out of memory, however small the micro-batches.
    """
    step.model.train()
    for index, (images, labels) in enumerate(batches):
        if index < skip:
            if index == skip - 1:
                after_skip()
            continue
        images = images.to(step.device, non_blocking=True)
        labels = labels.to(step.device, non_blocking=True)
        try:
            pieces = step(images, labels)
        except TrainingDiverged as error:
            raise TrainingDiverged(f"step {index + 1} of this epoch: {error}") from None
        for piece in pieces:
            meter.update(*piece.counted(), piece.reported)
        so_far = meter.score()
        task.advance(images=len(labels), loss=so_far.loss, top1=so_far.top1)
        after_step(index + 1)
    return meter.over_ranks().score()


class Memory(Protocol):
    """Where a search or training keeps its state, to be resumed from."""

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, or None."""

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Save ``state()`` if it is time, at a ``milestone``, such as the end of an epoch, or before an interruption.

        Args:
            state: returns tensors and plain values.
            milestone: save in any case.
            failing: the last step was skipped; save before an interruption only.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
        """

    def restore_random(self) -> None:
        """Restore the global random numbers of the saved state."""


class _NoMemory:
    """Saves nothing."""

    def load(self) -> dict[str, Any] | None:
        """None."""
        return None

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Nothing is saved."""

    def restore_random(self) -> None:
        """Nothing to restore."""


NO_MEMORY: Memory = _NoMemory()
