"""Products of the Hessian with vectors, by double differentiation.

The variables are the quantized weights of all quantized layers: zero leaves in the ports, so that the function
is L(Q(w) + leaf) at leaf = 0, averaged over all images. Activation quantizers pass gradients straight through.
Differentiating twice gives the Hessian of the network in which every activation quantizer is replaced by its
straight-through line at the point,

    q(x) = Q(x0) + inside * (x - x0)          inside = 1 where x0 is not clipped, else 0,

which has the value and the gradient of training, and no jumps. It is a twice differentiable function of the weights
(almost everywhere, as with ReLU), so its Hessian is symmetric, and power iteration and Hutchinson's estimate apply.

Source of the choice of variables: Liu et al., arXiv:2111.12273, section 5, which reports the largest
eigenvalue of the quantized models; products as in Pearlmutter (1994).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from saqcli.analysis.base import AnalysisInput
from saqcli.quant.layer import perturbed, zero_ports
from saqcli.training import hessian

Vector = list[Tensor]  # one tensor per layer, in the order of the input's layers


def hessian_products(analyzed: AnalysisInput, vectors: Sequence[Vector]) -> list[Vector]:
    """H v for every v in ``vectors``, accumulated over all images; every batch runs once for all of them.

    Args:
        analyzed: analysis input, in eval mode.
        vectors: one tensor per layer each, in the shape of its weight.

    Returns:
        In the structure of ``vectors``; zero for a layer without influence on the loss.
    """
    layers = list(analyzed.layers.values())
    sums: list[Vector] = [[torch.zeros_like(part) for part in vector] for vector in vectors]
    for loss in analyzed.losses():
        ports = zero_ports(layers)
        with hessian.twice_differentiable(analyzed.model), perturbed(layers, ports):
            product_with = hessian.HessianProduct(loss(), ports)
            for total, vector in zip(sums, vectors, strict=True):
                for part, more in zip(total, product_with(vector), strict=True):
                    part += more
    return sums


def dot(one: Vector, other: Vector) -> float:
    """Inner product over all layers, summed in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other, strict=True))
