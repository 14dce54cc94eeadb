"""Eigenvalues and traces of ``curvlinops``, on a network that computes the same in operators it can differentiate.

Its Hessian is that of a module's parameters. Here these are zeros that are added to constant quantized weights, so it
is the Hessian over the quantized weights, which the instruments measure.
"""

import copy
from typing import Any

import pytest
import torch
from scipy.sparse.linalg import eigsh
from test_instruments import line_through, subject_of
from torch import Tensor, nn

from saqcli.analysis import AnalysisInput, Session, Settings
from saqcli.analysis.base import hessian_products
from saqcli.analysis.eigenvalue import measure_eigenvalue
from saqcli.analysis.hessian_trace import measure_trace
from saqcli.quant.layer import quantized_layers
from tests.support.networks import same_bits

curvlinops = pytest.importorskip("curvlinops")


class Line(nn.Module):
    """An input quantizer in plain operators."""

    def __init__(self, quantizer: Any) -> None:
        super().__init__()
        self.quantizer = [quantizer]

    def forward(self, x: Tensor) -> Tensor:
        return line_through(x, self.quantizer[0])


class Shifted(nn.Module):
    """A weight that was quantized before, plus a parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.shift = weight.detach(), nn.Parameter(torch.zeros_like(weight))

    def forward(self, latent: Tensor) -> Tensor:
        return self.weight + self.shift


def shifted(model: nn.Module) -> nn.Module:
    """The network as a function of what is added to its quantized weights, its only trained parameters."""
    model = copy.deepcopy(model).requires_grad_(False)
    for layer in quantized_layers(model).values():
        layer.weight_quantizer = Shifted(layer.quantized_weight())
        layer.input_quantizer = Line(layer.input_quantizer)
    return model


@pytest.fixture(scope="module", params=[pytest.param(8, marks=pytest.mark.slow), 3])
def measured(request: pytest.FixtureRequest) -> tuple[AnalysisInput, Any]:
    """The network and the oracle's Hessian."""
    torch.manual_seed(0)
    subject = subject_of(bits=same_bits(request.param))
    model = shifted(subject.model)
    shifts = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hessian = curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), shifts, subject.batches)
    return subject, hessian


def test_products_equal_the_oracle(measured: tuple[AnalysisInput, Any]) -> None:
    subject, hessian = measured
    shapes = [layer.latent_weight().shape for layer in subject.layers.values()]
    vector = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    (found,) = hessian_products(subject, [vector])

    expected = hessian @ torch.cat([part.flatten() for part in vector])
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), expected)


def test_eigenvalue_equals_the_oracle(measured: tuple[AnalysisInput, Any]) -> None:
    subject, hessian = measured
    found = measure_eigenvalue(subject, Settings(tolerance=1e-10, iterations=2000), Session())
    (expected,) = eigsh(hessian.to_scipy(), k=1, which="LA", return_eigenvectors=False)

    assert found.eigenvalue == pytest.approx(float(expected), rel=1e-6)


def test_trace_agrees_with_the_oracle(measured: tuple[AnalysisInput, Any]) -> None:
    """Both are estimates from random signs: within five of the standard errors of ours, as both use as many."""
    subject, hessian = measured
    samples = 100
    found = measure_trace(subject, Settings(samples=samples), Session())
    torch.manual_seed(1)
    expected = float(curvlinops.hutchinson_trace(hessian, samples))

    assert abs(found.trace - expected) < 5 * 2**0.5 * found.standard_error
