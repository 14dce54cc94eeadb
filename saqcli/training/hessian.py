"""Differentiating a loss twice: products of its Hessian with vectors, whatever the variables are."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from saqcli.errors import UnsupportedModel

Vector = list[Tensor]  # one tensor a variable


class HessianProduct:
    """The Hessian of a loss, to be multiplied with vectors.

    Args:
        value: the loss, computed ``twice_differentiable``.
        variables: leaves it was computed from.

    Raises:
        UnsupportedModel: an operator has no second derivative in torch.
    """

    def __init__(self, value: Tensor, variables: Sequence[Tensor]) -> None:
        self.variables = variables
        with _second_derivatives():
            self._gradients = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)

    def __call__(self, vector: Sequence[Tensor]) -> Vector:
        """H v, one tensor a variable; zero for a variable that takes no part in the loss."""
        along = [
            (gradient * part).sum()
            for gradient, part in zip(self._gradients, vector, strict=True)
            if gradient is not None and gradient.requires_grad
        ]
        if not along:
            return [torch.zeros_like(part) for part in vector]
        with _second_derivatives():
            product = torch.autograd.grad(
                torch.stack(along).sum(), self.variables, retain_graph=True, materialize_grads=True
            )
        return [part.detach() for part in product]


@contextmanager
def _second_derivatives() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(
            f"this network cannot be differentiated twice ({reason}): choose what needs no Hessian, such as "
            "`quantization.searcher=sensitivity`"
        ) from error


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Within the context gradients have gradients, and no parameter of ``model`` collects a graph."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in moving:
            parameter.requires_grad_(False)
        # The fused attention kernels cannot be differentiated twice; the plain one computes the same.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)
