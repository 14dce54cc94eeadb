"""Cheaper ascents, accumulation and data-parallel steps, each compared with its reference."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import ConfigError
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.training.minimizers import MINIMIZERS, MicroBatch
from saqcli.training.objective import Objective, as_chunks
from tests.support.cases import scheme_with
from tests.support.networks import NETWORKS, quantize
from tests.support.steps import (
    assert_bitwise_equal,
    batch,
    chunks_of,
    loss_of,
    make,
    one_chunk,
    sgd,
    snapshot,
    still,
    taken,
    trainable,
)

ASCENDING = [name for name in MINIMIZERS if len(taken(name, rho=0.0, interval=2, reuse=0.5)) == 3]


def train(method: str, steps: int = 7, **options: Any) -> list[tuple[str, Tensor]]:
    """Weights and optimizer state after a few steps."""
    model = trainable("conv_bn")
    base = sgd(model)
    minimizer = make(method, model, base, **options)
    for step in range(steps):
        minimizer.step(chunks_of(model, batch(16, seed=step), 8))
    return snapshot(model, base)


# Every k-th step.


@pytest.mark.parametrize("method", ASCENDING)
def test_interval_1_equals_the_method(method: str) -> None:
    assert_bitwise_equal(train(method), train(method, interval=1, reuse=0.7))


@pytest.mark.parametrize("method", ASCENDING)
@pytest.mark.parametrize("interval", [2, 3])
def test_interval_alternates_with_plain_steps(method: str, interval: int) -> None:
    model = trainable("conv_bn")
    base = sgd(model)
    ascending, plain = make(method, model, base), make("qat", model, base)
    for step in range(7):
        minimizer = plain if step % interval else ascending
        minimizer.step(chunks_of(model, batch(16, seed=step), 8))

    assert_bitwise_equal(train(method, interval=interval), snapshot(model, base))


@pytest.mark.parametrize(
    "method", [name for name in MINIMIZERS if taken(name, rho=0.0, start=1).keys() >= {"rho", "start"}]
)
def test_steps_before_start_are_plain(method: str) -> None:
    assert_bitwise_equal(train("qat"), train(method, start=7))
    assert_bitwise_equal(train(method), train(method, start=0))
    ends = [[value for _, value in train(method, start=start)] for start in (0, 3, 7)]
    assert not any(all(map(torch.equal, one, other)) for one, other in pairwise(ends))


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0},
        {"interval": 2.5},
        {"reuse": -1},
        {"start": -1},
        {"rho": "abc"},
        {"rho": -0.1},
        {"rho": float("nan")},
        {"eta": -5},
        {"numerator": "foo"},
        {"perturb": "weights"},
        {"perturb": ["weight"]},
        {"bn_second_pass": "sometimes"},
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    model = trainable("conv_bn")
    with pytest.raises(ConfigError, match=next(iter(options))):
        make("asaq", model, sgd(model), **options)


# Reuse of the last ascent.


@pytest.mark.parametrize("method", ASCENDING)
def test_reuse_at_zero_radius_is_plain_training(method: str) -> None:
    """Rounding noise between equal gradients must not be scaled up."""
    assert_bitwise_equal(train("qat"), train(method, rho=0.0, interval=2, reuse=0.7))


def gradients(model: nn.Module, loss: Any) -> Tensor:
    """The gradients of all parameters as one vector."""
    found = torch.autograd.grad(loss(), list(model.parameters()), allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("network", ["token_mlp", "attention"])
def test_reuse_adds_previous_component(network: str) -> None:
    """Algorithm 1 of LookSAM, in float64 on the vector of all gradients."""
    reuse = 0.7
    model = trainable(network, torch.float64)
    data = [(x.double(), labels) for x, labels in (batch(16, seed=0), batch(16, seed=1))]
    twin = copy.deepcopy(model)
    minimizer = make("saq", model, still(model), interval=2, reuse=reuse)
    other = make("saq", twin, still(twin))

    g = gradients(twin, loss_of(twin, data[0]))
    other.step(one_chunk(loss_of(twin, data[0])))
    g_s = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in twin.parameters()]
    )
    g_v = g_s - (g @ g_s) / (g @ g) * g
    g = gradients(twin, loss_of(twin, data[1]))
    expected = g + reuse * g.norm() / g_v.norm() * g_v

    for both in data:
        minimizer.step(one_chunk(loss_of(model, both)))
    found = torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )
    used = torch.cat([torch.full_like(p, p.grad is not None).flatten() for p in model.parameters()]).bool()
    assert (found - expected)[used].abs().max() < 1e-12
    assert abs(float(g_v @ g_s)) > 0


# Ascent on a fraction of the images.


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 16), (0.25, 4), (0.3, 5), (0.01, 2)])
def test_ascent_fraction_subsamples_images(fraction: float, count: int) -> None:
    model = trainable("conv_bn")
    seen: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    pieces = Objective(F.cross_entropy, ascent_fraction=fraction).pieces(model, *batch(16), chunk=16)
    make("saq", model, sgd(model)).step(as_chunks(pieces))

    assert seen == [count, 16]
    logits, labels = pieces[0][0].counted()
    assert len(logits) == len(labels) == count


@pytest.mark.parametrize("method", [name for name in ASCENDING if not MINIMIZERS[name].wants_plain])
def test_ascent_fraction_at_zero_radius(method: str) -> None:
    ends = []
    for name, fraction in (("qat", 1.0), (method, 0.25)):
        model = trainable("conv_bn")
        objective = Objective(F.cross_entropy, ascent_fraction=fraction)
        minimizer = make(name, model, sgd(model), rho=0.0)
        for step in range(4):
            minimizer.step(as_chunks(objective.pieces(model, *batch(16, seed=step), chunk=8)))
        ends.append([(name, p.detach()) for name, p in model.named_parameters()])
    assert_bitwise_equal(*ends)


# Accumulation.


def eval_norms(model: nn.Module) -> nn.Module:
    """Batch norms in eval mode, since batch statistics depend on the micro-batch."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


CASES = [
    *((method, network, "clip") for method in MINIMIZERS for network in ("conv_bn", "token_mlp")),
    *(("saq", network, "clip") for network in ("residual", "attention", "standardized")),
    *(("saq", "token_mlp", quantizer) for quantizer in QUANTIZERS if quantizer != "clip"),
]


@pytest.mark.parametrize(("method", "network", "quantizer"), CASES)
def test_four_micro_batches_equal_one_batch(method: str, network: str, quantizer: str) -> None:
    """In float64: sums of 128 terms in another order differ by at most 128 eps of their terms, here of order 1; a
    hundredfold is allowed for the way through the network and three steps."""
    ends = []
    for size in (128, 32):
        model = quantize(NETWORKS[network], scheme=scheme_with(quantizer)).model.double().train()
        minimizer = make(
            method,
            eval_norms(model),
            sgd(model),
            **taken(method, interval=2, reuse=0.5),
        )
        for step in range(3):
            x, labels = batch(128, seed=step)
            pieces = Objective(F.cross_entropy).pieces(model, x.double(), labels, chunk=128, micro_batch=size)
            assert [len(chunk) for chunk in pieces] == [128 // size]
            minimizer.step(as_chunks(pieces))
        ends.append({name: p.detach() for name, p in model.named_parameters()})

    for name, value in ends[0].items():
        scale = max(1.0, float(value.abs().max()))
        assert (value - ends[1][name]).abs().max() <= 128 * 2**-52 * 100 * scale, name


def test_chunk_shares_one_perturbation() -> None:
    model = eval_norms(trainable("conv_bn"))
    layers = quantized_layers(model)
    seen: list[list[Tensor]] = []

    def watched(loss: Any) -> Any:
        def run(*, ascent: bool = False) -> Tensor:
            if not ascent:
                seen.append([layer.quantized_weight().detach() for layer in layers.values()])
            value: Tensor = loss(ascent=ascent)
            return value

        return run

    (whole,) = [[MicroBatch(watched(piece.loss), piece.share) for (piece,) in chunks_of(model, batch(16), 4)]]
    make("saq", model, sgd(model)).step([whole])

    assert len(seen) == 4
    assert all(torch.equal(a, b) for later in seen[1:] for a, b in zip(seen[0], later, strict=True))
