"""Codes by coordinate descent, compared with brute force, direct errors and the networks they leave."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from saqcli.quant.calls import Call
from saqcli.quant.convert import wrap
from saqcli.quant.grid import Grid, integer_weights, paper_weights
from saqcli.quant.layer import quantized_layers
from saqcli.reconstruction.blocks import find_blocks
from saqcli.reconstruction.coordinate_descent import (
    Problem,
    best_step,
    can_descend,
    descend,
    descend_block,
    descend_layer,
    norms_after,
    sweep,
)
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.reconstruct import reconstruct
from saqcli.reconstruction.second_moments import Operands, SecondMoments, count_patches, patches
from tests.support import tiny

GRIDS = [paper_weights(2), integer_weights(2), integer_weights(3)]


def problem(d: int = 4, channels: int = 3, seed: int = 0, *, diagonal: bool = False) -> Problem:
    """A random problem of one group, with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, d, generator=generator) @ torch.randn(d, d, generator=generator)
    f = x + 0.3 * torch.randn(50, d, generator=generator)
    moments = SecondMoments()
    moments.add(x.unsqueeze(1), f.unsqueeze(1))
    if diagonal:
        moments.quantized = torch.diag_embed(moments.quantized.diagonal(dim1=1, dim2=2))
    return Problem.of(torch.randn(1, channels, d, generator=generator).double(), moments, offset=False)


def nearest(of: Problem, step: Tensor, grid: Grid) -> Tensor:
    """The codes nearest to the float weight."""
    return grid.nearest(of.float_weight / step)


def all_codes(grid: Grid, d: int) -> Tensor:
    """Every vector of ``d`` codes, (count, d)."""
    codes = range(grid.lowest, grid.highest + 1, grid.stride)
    return torch.tensor(list(itertools.product(codes, repeat=d)), dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(3))
def test_diagonal_moments_give_the_optimum(grid: Grid, seed: int) -> None:
    of, step = problem(seed=seed, diagonal=True), torch.full((1, 3, 1), 0.4).double()
    found = sweep(of, nearest(of, step, grid), step, grid)
    every = all_codes(grid, 4)
    for c in range(3):
        one = Problem(of.h, of.r[:, c : c + 1], of.float_weight)
        errors = torch.stack([one.objective(k.view(1, 1, -1), step[:, :1]) for k in every])
        torch.testing.assert_close(of.objective(found, step)[0, c], errors.min())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", range(5))
def test_descent_lies_between_optimum_and_nearest(grid: Grid, seed: int) -> None:
    of, step = problem(seed=seed), torch.full((1, 3, 1), 0.4).double()
    start = nearest(of, step, grid)
    codes, steps = descend(of, start, step, grid, 6)
    every = all_codes(grid, 4)
    for c in range(3):
        one = Problem(of.h, of.r[:, c : c + 1], of.float_weight)
        errors = []
        for k in every:
            k = k.view(1, 1, -1)
            errors.append(one.objective(k, best_step(one, k, step[:, :1], shared=False)))
        found = of.objective(codes, steps)[0, c]
        assert min(errors) - 1e-9 <= found <= of.objective(start, step)[0, c] + 1e-9
    assert set(codes.flatten().tolist()) <= set(range(grid.lowest, grid.highest + 1, grid.stride))


def test_descent_finds_most_optima() -> None:
    grid, found = paper_weights(2), 0
    for seed in range(20):
        of, step = problem(3, 1, seed), torch.full((1, 1, 1), 0.4).double()
        codes, steps = descend(of, nearest(of, step, grid), step, grid, 6)
        errors = [
            of.objective(k.view(1, 1, -1), best_step(of, k.view(1, 1, -1), step, shared=False))
            for k in all_codes(grid, 3)
        ]
        found += bool(of.objective(codes, steps) < min(errors) + 1e-6)
    assert found >= 12


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_objective_never_rises(grid: Grid, shared: bool) -> None:
    of, step = problem(12, 5), torch.full((1, 5, 1), 0.3).double()
    codes = nearest(of, step, grid)
    before = of.objective(codes, step)
    for _ in range(6):
        codes = sweep(of, codes, step, grid)
        after = of.objective(codes, step)
        assert (after <= before + 1e-9).all()
        step = best_step(of, codes, step, shared=shared)
        before = of.objective(codes, step)
        assert (before.sum() if shared else before - after).max() <= (after.sum() if shared else 0) + 1e-9


LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "tokens": (nn.Linear(6, 4), (5, 3, 6)),
    "convolution": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (5, 3, 7, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, padding="same", groups=2, bias=False), (5, 4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, (3, 2), padding=(1, 0), dilation=(2, 1), groups=4), (5, 4, 6, 6)),
    "one_dimension": (nn.Conv1d(3, 4, 3, padding=2), (5, 3, 9)),
    "three_dimensions": (nn.Conv3d(2, 4, 2, padding=1), (5, 2, 4, 4, 3)),
}


def measured(name: str) -> tuple[nn.Sequential, Tensor, Tensor, SecondMoments]:
    """A quantized layer, inputs of it and of its float twin, and their moments at all positions; float64."""
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    net = nn.Sequential(copy.deepcopy(module))
    x = torch.randn(shape).relu()
    tiny.quantized(net, x, 2)
    net.double()
    x, f = x.double(), (x + 0.2 * torch.randn(shape)).double()
    layer = quantized_layers(net)["0"]
    with torch.no_grad(), Operands(layer) as quantized:
        net(x)
    layer.input_quantizer = nn.Identity()
    with torch.no_grad(), Operands(layer) as in_float:
        net(f)
    moments = SecondMoments()
    for one, other in zip(quantized.calls, in_float.calls, strict=True):
        every = torch.arange(count_patches(layer, one))
        moments.add(patches(layer, one, every), patches(layer, other, every))
    return net, quantized.calls[0][0], f, moments


@pytest.mark.parametrize("name", LAYERS)
def test_moments_give_error_of_output(name: str) -> None:
    """The quadratic form is the squared error of every output channel, in float64."""
    net, x, f, moments = measured(name)
    layer = quantized_layers(net)["0"]
    weight, groups = layer.latent_weight().detach(), getattr(layer, "groups", 1)
    rows = (groups, len(weight) // groups, -1)
    of = Problem.of(weight.reshape(rows), moments, offset=False)
    damping = of.h - moments.quantized
    quantized = layer.weight_quantizer(weight).detach()
    form = of.objective(quantized.reshape(rows), torch.ones(*rows[:2], 1).double())
    gone = quantized - weight
    form = form - torch.einsum("gci,gij,gcj->gc", gone.reshape(rows), damping, gone.reshape(rows))
    form = form + torch.einsum("gci,gij,gcj->gc", weight.reshape(rows), damping, weight.reshape(rows))
    outputs = []
    for value, input in ((quantized, x), (weight, f)):
        twin = copy.deepcopy(LAYERS[name][0]).double()
        twin.weight.data.copy_(value)
        twin.bias = None
        outputs.append(twin(input).detach().transpose(1, -1 if name == "tokens" else 1))
    error, power = (outputs[0] - outputs[1]).square(), outputs[1].square()
    dims = [d for d in range(error.dim()) if d != 1]
    torch.testing.assert_close(form.flatten(), (error - power).mean(dims))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("offset", [False, True])
def test_layer_gets_the_codes_and_less_error(name: str, offset: bool) -> None:
    net, _, _, moments = measured(name)
    layer = quantized_layers(net)["0"]
    weight, groups = layer.latent_weight().detach().clone(), getattr(layer, "groups", 1)
    rows = (groups, len(weight) // groups, -1)
    of, one = Problem.of(weight.reshape(rows), moments, offset=offset), torch.ones(*rows[:2], 1).double()
    before = of.objective(layer.weight_quantizer(weight).reshape(rows), one)
    assert descend_layer(layer, weight, moments, offset=offset)
    quantizer, latent = layer.weight_quantizer, layer.latent_weight()
    after = of.objective(quantizer(latent).reshape(rows), one)
    assert (after <= before + 1e-6).all()
    assert after.sum() < before.sum()
    torch.testing.assert_close(latent, quantizer(latent))
    assert torch.equal(quantizer.codes(latent) * quantizer.step(), quantizer(latent))


@pytest.mark.parametrize("name", [name for name in tiny.TINY if name != "functional"])
def test_no_block_becomes_worse(name: str) -> None:
    net, _ = tiny.build(name)
    x = tiny.images(tiny.TINY[name]()[1], 24)
    in_float = copy.deepcopy(net)
    wrap(in_float)
    tiny.quantized(net, x, 3)
    blocks, norms = find_blocks(net, x[:2]), norms_after(in_float, Call.of(x))
    given = made = x
    improved = 0
    with torch.no_grad():
        for block in blocks:
            target, before = block(in_float, made), block(net, given)
            kept = {key: value.clone() for key, value in net.state_dict().items()}
            assert descend_block(block, net, in_float, given, made, target, norms, sweeps=0)
            assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
            error = descend_block(block, net, in_float, given, made, target, norms)
            after = block(net, given)
            assert error.after <= error.before
            assert ((after - target).square().mean() <= (before - target).square().mean() + 1e-7).all()
            if error.after == error.before:
                assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())
            improved += error.after < error.before
            given, made = after, target
    assert improved


def test_norms_after_layers_are_found() -> None:
    net, x = tiny.build("residual")
    wrap(net)
    found = norms_after(net, Call.of(x))
    assert found["3.main.0"] == "3.main.1"
    assert found["3.shortcut.0"] == "3.shortcut.1"
    assert len(found) == 6
    assert norms_after(tiny.build("tokens")[0], Call.of(tiny.build("tokens")[1])) == {}


def test_layers_that_share_a_weight_are_left() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    x = torch.randn(8, 6)
    tiny.quantized(net, x)
    layers = quantized_layers(net)
    assert not any(can_descend(layer, net) for layer in layers.values())


def test_reconstruction_by_descent_lowers_errors() -> None:
    net, _ = tiny.build("residual")
    x = tiny.images(tiny.TINY["residual"]()[1], 24)
    in_float = copy.deepcopy(net)
    wrap(in_float)
    tiny.quantized(net, x, 2)
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    nothing = reconstruct(net, in_float, [x], Reconstruction(iterations=0, form="descent"))
    assert all(error.before == error.after for error in nothing)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    wanted = in_float(x).detach()
    before = (net(x) - wanted).square().mean()
    found = reconstruct(net, in_float, [x], Reconstruction(form="descent"))
    assert all(error.after <= error.before for error in found)
    assert any(error.after < error.before for error in found)
    assert (net(x) - wanted).square().mean() < before
