"""What every minimizer shares: batches cut into chunks, gradients averaged over ranks, checks for NaN and infinity.

A loss or gradient that is NaN or infinite stops training before it touches the weights.

Fake quantization hides an overflow from later layers, since it clamps: it must be caught in the step that made it.

A minimizer gets the images of a step in chunks, cut into what fits in memory.

step          all images that one update learns from
chunk         the images that share one perturbation (m-sharpness; by default all of them)
micro-batch   the images of one forward pass; gradients of a chunk's micro-batches add up

Between the backward passes and the update, the results of all ranks are averaged and checked.

Every rank passes over its own images, which leaves gradients in its parameters. One all-reduce then gives all of them
the mean, together with the loss, norms and the running statistics of batch norms, so that all ranks hold the same
numbers after every step. NaN or infinity on one rank makes it so on all of them, and no weight is touched.

DistributedDataParallel is not used: it reduces within the backward pass, where a rank that ran out of memory could no
longer notify the others (``docs/decisions/0016-one-all-reduce-a-step.md``).
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import TrainingDiverged, UnsupportedModel
from saqcli.training.perturbation import Gradients, PerturbedSet, add_up


def check_step(loss: Tensor, *norms: Tensor) -> None:
    """Check loss and gradients before the optimizer's step.

    Raises:
        TrainingDiverged: the loss, or a norm of its gradients, is not finite.
    """
    values = [loss.item(), *(norm.item() for norm in norms)]
    if not all(map(math.isfinite, values)):
        what = f"the loss is {values[0]:g}"
        if math.isfinite(values[0]):
            what += " but its gradient is not finite"
        raise TrainingDiverged(f"{what} and cannot be descended: {_advice()}")


def check_epoch(loss: float, largest: float) -> None:
    """Check the validation loss after an epoch.

    Raises:
        TrainingDiverged: it is not finite, or above ``largest``.
    """
    if not loss <= largest:
        raise distributed.reported_once(
            TrainingDiverged(f"the validation loss has become {loss:g}: {_advice()}")
        )


def check_score(loss: float, images: int, name: str) -> None:
    """Check the loss of a network outside training.

    Raises:
        UnsupportedModel: it is not finite.
    """
    if not math.isfinite(loss):
        raise UnsupportedModel(
            f"the loss of {name} is {'NaN' if math.isnan(loss) else 'infinite'} on {images} images: its numbers "
            "overflow; check its weights, `model.mean`, `model.std` and `model.input_size`"
        )


def _advice() -> str:
    return (
        "start again with a lower `training.lr`, or `training.rho`, and `overwrite=True`; checkpoints/ holds the last "
        "good state"
    )


class Loss(Protocol):
    """Runs the forward pass on a micro-batch."""

    def __call__(self, *, ascent: bool = False) -> Tensor:
        """Mean loss over the images; may be called more than once.

        Args:
            ascent: only a direction is sought, so that a part of the images, or a lower precision, may do.
        """


class MicroBatch(NamedTuple):
    """Images of one forward pass.

    Attributes:
        loss: their mean loss.
        share: of the step's images; the shares of a step sum to 1.
    """

    loss: Loss
    share: float


Chunk = Sequence[MicroBatch]


def accumulate(micro_batches: Iterable[MicroBatch]) -> Tensor:
    """Back-propagate the micro-batches one after the other, into ``.grad``; returns their part of the step's loss."""
    losses = []
    for micro_batch in micro_batches:
        loss = micro_batch.loss() * micro_batch.share
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradients_of(
    chunk: Chunk,
    members: PerturbedSet,
    *,
    ascent: bool = False,
    through_rounding: bool = False,
    also: Sequence[nn.Parameter] = (),
) -> tuple[Tensor, Gradients]:
    """Mean loss of the chunk, and its gradients as from ``members.gradients``: none accumulates anywhere."""
    whole = sum(micro_batch.share for micro_batch in chunk)
    losses: list[Tensor] = []
    total: Gradients = []
    for micro_batch in chunk:
        loss, gradients = members.gradients(
            partial(micro_batch.loss, ascent=ascent), through_rounding=through_rounding, also=also
        )
        part = micro_batch.share / whole
        losses.append(loss * part)
        total = add_up(total, gradients, part)
    return torch.stack(losses).sum(), total


_NORMS = nn.modules.batchnorm._NormBase


class Passes(NamedTuple):
    """What the passes of a step found beside the gradients that they left in the parameters.

    Attributes:
        loss: mean over the step's images, at the unperturbed weights.
        norms: further numbers that must be finite.
        plain: gradients at the unperturbed weights, where they are wanted.
        ascended: whether there was an ascent.
    """

    loss: Tensor
    norms: list[Tensor]
    plain: list[Tensor]
    ascended: bool = False


def agree(model: nn.Module, base: torch.optim.Optimizer, passes: Passes) -> Passes:
    """The means over all ranks; those of gradients and running statistics are left in the model.

    Raises:
        TrainingDiverged: loss, norms or gradients are not finite, on all ranks alike.
    """
    passes = passes._replace(loss=passes.loss.clone(), norms=[norm.clone() for norm in passes.norms])
    trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
    average_gradients(trained, [passes.loss, *passes.norms, *running_statistics(model)])
    gradients = [p.grad for p in trained if p.grad is not None]
    check_step(passes.loss, *passes.norms, *([nn.utils.get_total_norm(gradients)] if gradients else []))
    return passes


def average_gradients(parameters: Iterable[nn.Parameter], also: Iterable[Tensor] = ()) -> None:
    """Means over the ranks, in place, of the parameters' gradients and of the tensors ``also``.

    A parameter that took no part on this rank may have taken part on another: it counts with zeros, and stays without
    a gradient where it has none anywhere.
    """
    if distributed.count() == 1:
        return
    parameters = list(parameters)
    given = [p.grad is not None for p in parameters]
    anywhere = distributed.totals(*map(float, given))
    for parameter, count in zip(parameters, anywhere, strict=True):
        if parameter.grad is None and count:
            parameter.grad = torch.zeros_like(parameter)
    distributed.average([*also, *(p.grad for p in parameters if p.grad is not None)])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that batch norms keep."""
    return [
        statistic
        for norm in model.modules()
        if isinstance(norm, _NORMS)
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    ]
