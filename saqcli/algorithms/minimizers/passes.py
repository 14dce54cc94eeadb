"""Between the backward passes and the update: what the ranks found is averaged, and looked at.

Every rank passes over its own images, which leaves gradients in its parameters. One all-reduce then gives all of them
the mean, together with the loss, norms and the running statistics of batch norms, so that all ranks hold the same
numbers after every step. A number that is no number on one rank is none on all of them, and no weight is touched.

DistributedDataParallel is not used: it reduces within the backward pass, where a rank that ran out of memory could not
tell the others any more (``docs/decisions/0016-one-all-reduce-a-step.md``).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saqcli import ranks
from saqcli.algorithms.divergence import check_step

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
    if ranks.count() == 1:
        return
    parameters = list(parameters)
    given = [p.grad is not None for p in parameters]
    anywhere = ranks.totals(*map(float, given))
    for parameter, count in zip(parameters, anywhere, strict=True):
        if parameter.grad is None and count:
            parameter.grad = torch.zeros_like(parameter)
    ranks.average([*also, *(p.grad for p in parameters if p.grad is not None)])


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that batch norms keep."""
    return [
        statistic
        for norm in model.modules()
        if isinstance(norm, _NORMS)
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    ]
