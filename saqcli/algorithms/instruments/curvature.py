"""Products of the Hessian with vectors, by differentiating twice.

The variables are the quantized weights of all quantized layers: zero leaves in the ports, so that what is
differentiated is L(Q(w) + leaf) at leaf = 0, averaged over all images. Activation quantizers pass gradients
straight through. Differentiating that again gives the Hessian of the network in which every activation
quantizer is replaced by its straight-through line at the point,

    q(x) = Q(x0) + inside * (x - x0)          inside = 1 where x0 is not clipped, else 0,

which has the value and the gradient that training sees, and no jumps. It is a twice differentiable function
of the weights (almost everywhere, as with ReLU), so its Hessian is symmetric, and power iteration and
Hutchinson's estimate apply.

Source of the choice of variables: Liu et al., arXiv:2111.12273, section 5, which reports the largest
eigenvalue of the quantized models; products as in Pearlmutter (1994).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saqcli.algorithms.instruments.base import Subject
from saqcli.quant.layers import perturbed, zero_ports

Vector = list[Tensor]  # one tensor a layer, in the order of the subject's layers


def hessian_products(subject: Subject, vectors: Sequence[Vector]) -> list[Vector]:
    """H v for every v in ``vectors``, accumulated over all images; every batch is run once for all of them.

    Args:
        subject: in eval mode.
        vectors: one tensor a layer each, in the shape of its weight.

    Returns:
        As ``vectors``; zero for a layer that takes no part in the loss.
    """
    layers = list(subject.layers.values())
    sums: list[Vector] = [[torch.zeros_like(part) for part in vector] for vector in vectors]
    for loss in subject.losses():
        ports = zero_ports(layers)
        with _frozen_parameters(subject.model), perturbed(layers, ports), torch.enable_grad():
            # The fused attention kernels cannot be differentiated twice; the plain one computes the same.
            with sdpa_kernel(SDPBackend.MATH):
                value = loss()
            gradients = torch.autograd.grad(value, ports, create_graph=True, allow_unused=True)
            for index, vector in enumerate(vectors):
                along = [
                    (gradient * part).sum()
                    for gradient, part in zip(gradients, vector, strict=True)
                    if gradient is not None and gradient.requires_grad
                ]
                if not along:
                    continue
                product = torch.autograd.grad(
                    torch.stack(along).sum(), ports, retain_graph=True, materialize_grads=True
                )
                for total, part in zip(sums[index], product, strict=True):
                    total += part.detach()
    return sums


def dot(one: Vector, other: Vector) -> float:
    """Inner product over all layers, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter collects a graph: only the ports are variables."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in moving:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)
