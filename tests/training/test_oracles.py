"""SAM and ASAM of ``pytorch_optimizer`` where ours reduce to them.

The mapping: radius ``absolute``, one chunk, no batch norm (theirs updates the running statistics in both passes).

    SAM(rho)                  ``sam`` on a float model
    SAM(rho, adaptive=True)   ``asaq`` with ``eta=0`` on wrapped layers without quantizers, where Q(w) is w. Ours is
                              relative for weights and norm scales alone, theirs for biases too: the networks have none.

Both add 1e-12 to the norm, which theirs takes in float32: the perturbations differ by 1e-7 of their size, the weights
after a few steps by less.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli
from saqcli.quant import convert
from tests.support.steps import Batch, batch

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
RHO, STEPS, RATE = 0.3, 5, 0.05


def network(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5, bias=bias)]
    return nn.Sequential(*layers).double()


def closure_of(model: nn.Module, data: Batch) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(data[0].double()), data[1])


def theirs(model: nn.Module, adaptive: bool) -> list[Tensor]:
    optimizer = pytorch_optimizer.SAM(
        model.parameters(), torch.optim.SGD, rho=RHO, adaptive=adaptive, lr=RATE, momentum=0.9
    )
    for step in range(STEPS):
        loss = closure_of(model, batch(16, seed=step))

        def closure(loss: Callable[[], Tensor] = loss) -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        closure()
        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


def ours(model: nn.Module, minimizer: Callable[..., saqcli.SAM], **options: float) -> list[Tensor]:
    base = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    found = minimizer(model, base, rho=RHO, rho_unit="absolute", **options)
    for step in range(STEPS):
        found.step(closure_of(model, batch(16, seed=step)))
    return [p.detach() for p in model.parameters()]


def distance(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def test_sam_equals_the_oracle() -> None:
    model = network(bias=True)
    expected = theirs(copy.deepcopy(model), adaptive=False)

    assert distance(ours(model, saqcli.SAM), expected) < 1e-8


def test_asaq_equals_asam_of_the_oracle() -> None:
    model = network(bias=False)
    expected = theirs(copy.deepcopy(model), adaptive=True)
    plain = theirs(copy.deepcopy(model), adaptive=False)
    convert.wrap(model.float())
    model.double()

    assert distance(ours(model, saqcli.ASAQ, eta=0.0), expected) < 1e-8
    assert distance(plain, expected) > 1e-3
