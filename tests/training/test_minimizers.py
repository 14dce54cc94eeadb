"""The contract of minimizers: limiting cases, an independent reference, and side effects."""

import io
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnperturbedLayer
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.training.minimizers import MINIMIZERS, Chunk, Minimizer
from saqcli.training.minimizers.cases import SAQ
from saqcli.training.minimizers.qat import QAT
from saqcli.training.minimizers.reference import Problem, Shifts
from saqcli.training.perturbation import PERTURBED, Kind, PerturbedSet, RadiusUnit
from tests.support.networks import NETWORKS, TwoHeads, images, quantize, seeded
from tests.support.steps import (
    RHO,
    Batch,
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
from tests.support.sweeps import sweep


def norms(model: nn.Module) -> Iterator[nn.modules.batchnorm._BatchNorm]:
    return (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))


# An independent SAQ in float64: one convolution with bias, batch norm, ReLU, one linear layer.


def twin_quantize(x: Tensor, level: Tensor, bits: int, kind: str) -> Tensor:
    """The paper's formulas, straight-through by detaching the rounding residual; levels enter as |a|."""
    level = level.abs()
    if kind == "paper":
        n = 2**bits - 1
        u = (torch.clamp(x / level, -1, 1) + 1) / 2
        return level * (2 * (u + (torch.round(u * n) / n - u).detach()) - 1)
    low, n = {
        "integer": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        "int8": (-127, 127),
        "unsigned": (0, 2**bits - 1),
    }[kind]
    u = torch.maximum(torch.minimum(x / level, torch.ones_like(x)), torch.full_like(x, low / n))
    return level * (u + (torch.round(u * n) / n - u).detach())


def twin_loss(p: dict[str, Tensor], e: Shifts, data: Batch, kinds: dict[str, Any]) -> Tensor:
    """Loss at ``p + e``; ``Q(w)`` and ``Q(v)``, the quantized weights, are perturbed after quantization."""
    p = {name: value + e[name] if name in e else value for name, value in p.items()}
    x = twin_quantize(data[0], p["conv_a"], 4, "integer")
    x = F.conv2d(x, twin_quantize(p["w"], p["w_a"], *kinds["w"]) + e.get("Q(w)", 0), p["b"])
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    kinds["seen"].append((mean.detach(), (variance * x.numel() / 3 / (x.numel() / 3 - 1)).detach()))
    shape = (1, -1, 1, 1)
    x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt() * p["g"].view(shape) + p["s"].view(
        shape
    )
    x = twin_quantize(torch.relu(x).flatten(1), p["linear_a"], 3, "unsigned")
    logits = x @ (twin_quantize(p["v"], p["v_a"], *kinds["v"]) + e.get("Q(v)", 0)).T + p["c"]
    return -torch.log_softmax(logits, 1)[torch.arange(len(x)), data[1]].mean()


TWIN_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("w", "v"), "latent_weights"),
    **dict.fromkeys(("b", "c"), "biases"),
    **dict.fromkeys(("g", "s"), "norms"),
    **dict.fromkeys(("conv_a", "linear_a"), "activation_clips"),
    **dict.fromkeys(("w_a", "v_a"), "weight_clips"),
}  # type: ignore[dict-item]


def twin_problem(p: dict[str, Tensor], data: Batch, kinds: dict[str, Any]) -> Problem:
    quantized = {name: twin_quantize(p[name], p[f"{name}_a"], *kinds[name]).detach() for name in "wv"}
    scales = frozenset(p) - {"b", "c", "s"}
    return Problem(p, TWIN_KINDS, scales, quantized, lambda shifts: twin_loss(p, shifts, data, kinds))


def twin_step(
    p: dict[str, Tensor], buffers: dict[str, Tensor], kinds: dict[str, Any], gradients: Mapping[str, Tensor]
) -> None:
    """One in-place update by SGD; statistics are those of the first pass."""
    for name, value in zip(("mean", "var"), kinds["seen"][0], strict=True):
        buffers[name] = 0.9 * buffers[name] + 0.1 * value
    for name, value in p.items():
        gradient = gradients[name] + 0.01 * value.detach()
        velocity = 0.9 * buffers[name] + gradient if name in buffers else gradient
        buffers[name] = velocity
        p[name] = (value.detach() - 0.05 * (gradient + 0.9 * velocity)).requires_grad_(True)


def twin_model(grid: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A float64 network with levels set by hand, its tensors under the reference's names, and its grids."""
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5))
    model.double().train()
    convert.wrap(model)
    widths = {"0": LayerBits(weight=8, activation=4), "4": LayerBits(weight=2, activation=3)}
    policy = BitConfig(model="twin", layers=widths)
    convert.install(model, Scheme(weight_grid=grid), policy, {"0": True, "4": False})  # type: ignore[arg-type]
    model.double()
    layers = quantized_layers(model)
    conv, linear, norm = layers["0"], layers["4"], model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():  # levels that clip some values and not others
        for layer in (conv, linear):
            deviation = layer.latent_weight().std()
            layer.weight_quantizer.clipping_level.uniform_(1.1, 1.5).mul_(deviation)  # type: ignore[operator, union-attr]
        conv.input_quantizer.clipping_level.fill_(1.7)  # type: ignore[operator, union-attr]
        linear.input_quantizer.clipping_level.fill_(1.9)  # type: ignore[operator, union-attr]
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 0.5)
    members = {
        "w": conv.latent_weight(), "b": conv.bias, "w_a": conv.weight_quantizer.clipping_level,
        "conv_a": conv.input_quantizer.clipping_level, "g": norm.weight, "s": norm.bias,
        "v": linear.latent_weight(), "c": linear.bias, "v_a": linear.weight_quantizer.clipping_level,
        "linear_a": linear.input_quantizer.clipping_level,
    }  # fmt: skip
    assert {id(p) for p in members.values()} == {id(p) for p in model.parameters()}
    kinds = {
        "paper": {"w": (8, "paper"), "v": (2, "paper")},
        "auto": {"w": (8, "int8"), "v": (2, "paper")},
        "zero": {"w": (8, "int8"), "v": (2, "integer")},
    }[grid]
    return model, members, dict(kinds)  # type: ignore[return-value]


@pytest.mark.parametrize("grid", ["auto", "paper", "zero"])
@pytest.mark.parametrize("unit", ["deviation", "absolute"])
@pytest.mark.parametrize("method", MINIMIZERS)
def test_every_method_matches_its_reference(method: str, unit: RadiusUnit, grid: str) -> None:
    model, members, kinds = twin_model(grid)
    p = {name: value.detach().clone() for name, value in members.items()}
    for name in ("w_a", "v_a", "conv_a", "linear_a"):
        p[name] = p[name][0]
    for value in p.values():
        value.requires_grad_(True)
    buffers = {"mean": torch.zeros(3).double(), "var": torch.ones(3).double()}
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    options = taken(method, rho=RHO, rho_unit=unit)
    minimizer, state = MINIMIZERS[method](model, base, **options), dict[str, Any]()

    for step in range(5):
        x, labels = batch(16, seed=step)
        data = (x.double(), labels)
        kinds["seen"] = []
        expected, gradients = minimizer.reference(twin_problem(p, data, kinds), state, **options)
        twin_step(p, buffers, kinds, gradients)
        loss = minimizer.step(one_chunk(loss_of(model, data)))
        assert abs(loss - expected) < 1e-10

    for name, value in members.items():
        assert (value.detach().reshape(p[name].shape) - p[name]).abs().max() < 1e-10, name
    (norm,) = norms(model)
    assert (norm.running_mean - buffers["mean"]).abs().max() < 1e-10
    assert (norm.running_var - buffers["var"]).abs().max() < 1e-10


# Limiting cases.


@pytest.mark.parametrize(
    ("method", "network"),
    sweep(
        product((name for name in MINIMIZERS if taken(name, rho=0.0)), NETWORKS),
        lambda method, network: network == (network if method == "saq" else "conv_bn"),
    ),
)
def test_zero_radius_is_plain_training(method: str, network: str) -> None:
    ends = []
    for name in ("qat", method):
        model = trainable(network)
        base = sgd(model)
        minimizer = make(name, model, base, rho=0.0)
        for step in range(5):
            minimizer.step(chunks_of(model, batch(16, seed=step), 8))
        ends.append(snapshot(model, base))

    assert any("momentum_buffer" in name for name, _ in ends[0])
    assert_bitwise_equal(*ends)


def test_case_1_equals_saq_without_clipping() -> None:
    for widen, same in ((100.0, True), (0.5, False)):
        ends = []
        for method in ("saq", "case1"):
            model = trainable("conv_bn")
            with torch.no_grad():
                for layer in quantized_layers(model).values():
                    layer.weight_quantizer.clipping_level.mul_(widen)  # type: ignore[operator, union-attr]
            base = sgd(model)
            make(method, model, base).step(chunks_of(model, batch(16), 16))
            ends.append(snapshot(model, base))
        equal = all(torch.equal(one, other) for (_, one), (_, other) in zip(*ends, strict=True))
        assert equal == same


def test_saq_moves_more_weights_than_sam() -> None:
    """Rounding absorbs a perturbation of the float weights: the reason for SAQ."""
    shares = {}
    for method in ("sam", "saq"):
        model = trainable("conv_bn")
        layers = list(quantized_layers(model).values())
        before = [layer.quantized_weight().detach() for layer in layers]
        kind = "latent_weights" if method == "sam" else "weights"
        minimizer = MINIMIZERS[method](model, still(model), rho=0.05, perturb=(kind,))
        _, gradients = minimizer.set.gradients(loss_of(model, batch()))  # type: ignore[attr-defined]
        perturbation = minimizer.set.ascent(gradients, 0.05, "deviation")  # type: ignore[attr-defined]
        with minimizer.set.applied(perturbation):  # type: ignore[attr-defined]
            moved = [
                layer.quantized_weight().detach() != old for layer, old in zip(layers, before, strict=True)
            ]
        shares[method] = float(torch.cat([m.flatten() for m in moved]).double().mean())

    assert shares["saq"] > 0.9
    assert 0 < shares["sam"] < 0.2 * shares["saq"]


def test_nonzero_radius_differs_from_plain() -> None:
    model = trainable("conv_bn")
    other = deepcopy(model)
    data = batch()
    QAT(model, sgd(model)).step(chunks_of(model, data, 16))
    SAQ(other, sgd(other), rho=RHO).step(chunks_of(other, data, 16))

    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert all(moved)


# The perturbation.


@pytest.mark.parametrize("unit", ["deviation", "absolute"])
@pytest.mark.parametrize("network", NETWORKS)
def test_scaled_perturbation_has_norm_rho(network: str, unit: RadiusUnit) -> None:
    model = trainable(network, torch.float64)
    x, labels = batch()
    members = PerturbedSet(model)
    _, gradients = members.gradients(loss_of(model, (x.double(), labels)))
    found = members.ascent(gradients, RHO, unit)

    total = sum(float(step.square().sum()) for step in found.parameters)
    for layer, step in zip(members.layers, found.weights, strict=True):
        scale = layer.effective_weight().detach().std() if unit == "deviation" else torch.tensor(1.0)
        total += float((step / scale).square().sum())
    assert total**0.5 == pytest.approx(RHO, rel=1e-9)


@pytest.mark.parametrize("network", NETWORKS)
def test_only_second_pass_is_perturbed(network: str) -> None:
    model = trainable(network)
    layers = quantized_layers(model)
    data = batch()
    seen: list[dict[str, float]] = []

    def loss(*, ascent: bool = False) -> Tensor:
        seen.append({name: float((now(layer) - before[name]).abs().max()) for name, layer in layers.items()})
        return loss_of(model, data)()

    def now(layer: QuantizedLayer) -> Tensor:
        return layer.quantized_weight().detach()

    before = {name: now(layer) for name, layer in layers.items()}
    SAQ(model, sgd(model), rho=RHO).step(one_chunk(loss))
    first, second = seen
    assert not any(first.values())
    assert all(second.values())


@pytest.mark.parametrize("network", NETWORKS)
def test_perturbation_increases_the_loss(network: str) -> None:
    model = trainable(network, torch.float64)
    x, labels = batch()
    loss = loss_of(model, (x.double(), labels))
    members = PerturbedSet(model, ["weights"])  # where the loss is smooth, except for later codes
    before, gradients = members.gradients(loss)
    with members.applied(members.ascent(gradients, 0.05, "deviation")), torch.no_grad():
        assert loss() > before


KINDS: dict[Kind, set[str]] = {
    "biases": {"3.bias", "7.bias"},
    "norms": {"1.weight", "1.bias", "4.weight", "4.bias"},
    "activation_clips": {f"{name}.input_quantizer.clipping_level" for name in "037"},
    "weight_clips": {f"{name}.weight_quantizer.clipping_level" for name in "037"},
    "weights": set(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_only_selected_kinds_are_perturbed(kind: Kind) -> None:
    model = trainable("conv_bn")
    members = PerturbedSet(model, [kind])
    _, gradients = members.gradients(loss_of(model, batch()))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with members.applied(members.ascent(gradients, RHO, "deviation")):
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        ports = {layer.perturbation is not None for layer in quantized_layers(model).values()}

    assert moved == KINDS[kind]
    assert ports == {kind == "weights"}


def test_frozen_parameters_are_not_perturbed() -> None:
    model = trainable("conv_bn")
    frozen = [value for norm in norms(model) for value in norm.parameters()]
    for value in frozen:
        value.requires_grad_(False)

    assert not {id(p) for p in PerturbedSet(model).parameters} & {id(p) for p in frozen}


def test_unused_layer_counts_as_zero() -> None:
    model = quantize(TwoHeads).model.double().train()
    assert isinstance(model, TwoHeads)
    model.use_auxiliary = False
    x, labels = batch()
    members = PerturbedSet(model, ["weights"])
    _, gradients = members.gradients(loss_of(model, (x.double(), labels)))
    found = members.ascent(gradients, RHO, "absolute")

    steps = dict(zip(quantized_layers(model), found.weights, strict=True))
    assert not steps["auxiliary"].any()
    assert sum(float(step.square().sum()) for step in steps.values()) ** 0.5 == pytest.approx(RHO, rel=1e-9)


@pytest.mark.parametrize("method", MINIMIZERS)
def test_unused_layer_is_unchanged(method: str) -> None:
    model = quantize(TwoHeads).model.train()
    assert isinstance(model, TwoHeads)
    model.use_auxiliary = False
    before = snapshot(model.auxiliary)
    make(method, model, sgd(model)).step(chunks_of(model, batch(), 8))

    assert_bitwise_equal(snapshot(model.auxiliary), before)
    assert all(value.isfinite().all() for _, value in snapshot(model))


def test_loss_without_quantized_layers_fails() -> None:
    model = trainable("conv_bn")
    norm = next(norms(model))

    with pytest.raises(UnperturbedLayer, match="nothing to perturb"):
        SAQ(model, sgd(model), rho=RHO).step(one_chunk(lambda *, ascent=False: norm.weight.square().sum()))
    assert all(layer.perturbation is None for layer in quantized_layers(model).values())


@pytest.mark.parametrize("method", MINIMIZERS)
def test_zero_gradients_leave_finite_weights(method: str) -> None:
    model = trainable("conv_bn")
    x, _ = batch()
    make(method, model, sgd(model)).step(one_chunk(lambda *, ascent=False: model(x).sum() * 0))

    assert all(value.isfinite().all() for _, value in snapshot(model))


@pytest.mark.parametrize("method", MINIMIZERS)
def test_single_weight_layer_stays_finite(method: str) -> None:
    """The standard deviation of a single number is undefined."""
    network = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(36, 5))
    model = quantize(lambda: network).model.train()
    minimizer = make(method, model, sgd(model))
    for _ in range(2):
        minimizer.step(chunks_of(model, batch(), 8))

    assert all(value.isfinite().all() for _, value in snapshot(model))


def test_empty_perturbed_set_is_refused() -> None:
    """Instead of training silently without perturbation."""
    model = quantize(lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 5, bias=False))).model.train()

    with pytest.raises(UnperturbedLayer, match="nothing to perturb"):
        SAQ(model, sgd(model), rho=RHO, perturb=["biases"]).step(chunks_of(model, batch(), 16))


# Side effects.


@pytest.mark.parametrize("method", MINIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_zero_learning_rate_changes_nothing(network: str, method: str) -> None:
    model = trainable(network)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    make(method, model, still(model)).step(chunks_of(model, batch(), 8))

    assert_bitwise_equal([(n, v.detach()) for n, v in model.named_parameters()], list(before.items()))
    assert all(layer.perturbation is None for layer in quantized_layers(model).values())
    assert all(norm.track_running_stats for norm in norms(model))


@pytest.mark.parametrize("fails_in", [1, 2])
def test_exception_leaves_the_model_unchanged(fails_in: int) -> None:
    model = trainable("conv_bn")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    data, calls = batch(), []

    def loss(*, ascent: bool = False) -> Tensor:
        calls.append(1)
        value = loss_of(model, data)()
        if len(calls) == fails_in:
            raise KeyboardInterrupt
        return value

    with pytest.raises(KeyboardInterrupt):
        SAQ(model, sgd(model), rho=RHO).step(one_chunk(loss))

    assert len(calls) == fails_in
    assert_bitwise_equal([(n, v.detach()) for n, v in model.named_parameters()], list(before.items()))
    assert all(layer.perturbation is None for layer in quantized_layers(model).values())
    assert all(norm.track_running_stats for norm in norms(model))
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms(model))  # type: ignore[arg-type]


def test_statistics_come_from_the_first_pass() -> None:
    model = trainable("conv_bn")
    plain = deepcopy(model)
    data = batch()
    SAQ(model, still(model), rho=RHO).step(chunks_of(model, data, 16))
    with torch.no_grad():
        plain(data[0])

    assert all(int(norm.num_batches_tracked) == 1 for norm in norms(model))  # type: ignore[arg-type]
    assert_bitwise_equal(snapshot(model), snapshot(plain))


def test_both_passes_may_update_statistics() -> None:
    model = trainable("conv_bn")
    plain = deepcopy(model)
    data = batch()
    SAQ(model, still(model), rho=RHO, bn_second_pass="update").step(chunks_of(model, data, 16))
    with torch.no_grad():
        plain(data[0])

    for norm, once in zip(norms(model), norms(plain), strict=True):
        assert int(norm.num_batches_tracked) == 2  # type: ignore[arg-type]
        assert not torch.equal(norm.running_mean, once.running_mean)  # type: ignore[arg-type]


def test_eval_norms_are_unchanged() -> None:
    model = trainable("conv_bn")
    frozen = next(norms(model)).eval()
    before = snapshot(frozen)
    SAQ(model, still(model), rho=RHO).step(chunks_of(model, batch(), 16))

    assert_bitwise_equal(snapshot(frozen), before)
    assert frozen.track_running_stats


@pytest.mark.parametrize("method", MINIMIZERS)
def test_returned_loss_is_unperturbed(method: str) -> None:
    model = trainable("conv_bn")
    plain = deepcopy(model)
    data = batch(16)
    loss = make(method, model, sgd(model)).step(chunks_of(model, data, 12))  # chunks of 12 and 4
    expected = [chunk[0].loss() * chunk[0].share for chunk in chunks_of(plain, data, 12)]

    assert torch.equal(loss, torch.stack(expected).sum().detach())
    assert not loss.requires_grad


# Chunks.


def gradients_of(minimizer: Callable[[nn.Module, torch.optim.Optimizer], Minimizer], model: nn.Module,
                 chunks: Callable[[nn.Module], list[Chunk]]) -> list[Tensor]:  # fmt: skip
    """The gradients the minimizer passes to the optimizer; ``model`` is unchanged."""
    model = deepcopy(model)
    minimizer(model, still(model)).step(chunks(model))
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    """To the rounding of float64 sums of fewer than 10,000 terms: 10,000 * 2**-53 is 1.1e-12."""
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1.1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("network", ["conv_bn", "token_mlp"])
def test_every_chunk_has_its_own_perturbation(network: str) -> None:
    model = trainable(network, torch.float64)
    x, labels = batch(32)
    data = (x.double(), labels)

    def saq(model: nn.Module, base: torch.optim.Optimizer) -> Minimizer:
        return SAQ(model, base, rho=RHO)

    together = gradients_of(saq, model, lambda model: chunks_of(model, data, 8))
    alone = [
        gradients_of(saq, model, lambda model, i=i: one_chunk(chunks_of(model, data, 8)[i][0].loss))  # type: ignore[misc]
        for i in range(4)
    ]
    assert_close(together, [torch.stack(parts).mean(0) for parts in zip(*alone, strict=True)])
    whole = gradients_of(saq, model, lambda model: chunks_of(model, data, 32))
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(together, whole, strict=True))


@pytest.mark.parametrize("sizes", [8, 12])
@pytest.mark.parametrize("network", ["token_mlp", "attention", "standardized", "transposed"])
def test_chunks_do_not_change_plain_training(network: str, sizes: int) -> None:
    model = trainable(network, torch.float64)
    x, labels = batch(32)
    data = (x.double(), labels)

    assert_close(
        gradients_of(QAT, model, lambda model: chunks_of(model, data, sizes)),
        gradients_of(QAT, model, lambda model: chunks_of(model, data, 32)),
    )


# State.


STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {},
    "interval": {"interval": 2},
    "reuse": {"interval": 2, "reuse": 0.7},
}


def strategies(method: str) -> list[str]:
    """Those whose options the method takes."""
    return [name for name, options in STRATEGIES.items() if taken(method, **options) == options]


@pytest.mark.parametrize(
    ("method", "strategy"),
    [(method, name) for method in MINIMIZERS for name in strategies(method)],
)
def test_saved_state_resumes_bit_identically(method: str, strategy: str) -> None:
    """Saved after three steps, within an interval."""
    straight = trainable("conv_bn")
    base = sgd(straight)
    minimizer = make(method, straight, base, **STRATEGIES[strategy])
    saved = io.BytesIO()
    for step in range(6):
        if step == 3:
            torch.save(
                {"model": straight.state_dict(), "base": base.state_dict(), "own": minimizer.state_dict()},
                saved,
            )
        minimizer.step(chunks_of(straight, batch(16, seed=step), 8))

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = quantize(NETWORKS["conv_bn"], seed=9).model.train()
    resumed.load_state_dict(state["model"])
    other = sgd(resumed)
    other.load_state_dict(state["base"])
    minimizer = make(method, resumed, other, **STRATEGIES[strategy])
    minimizer.load_state_dict(state["own"])
    for step in range(3, 6):
        minimizer.step(chunks_of(resumed, batch(16, seed=step), 8))

    assert_bitwise_equal(snapshot(resumed, other), snapshot(straight, base))


@pytest.mark.parametrize("method", MINIMIZERS)
def test_base_optimizer_state_is_unchanged(method: str) -> None:
    model = trainable("conv_bn")
    base = sgd(model)
    make(method, model, base).step(chunks_of(model, batch(16), 8))

    assert {key for state in base.state.values() for key in state} == {"momentum_buffer"}


@pytest.mark.parametrize(
    ("method", "network"),
    sweep(
        product(MINIMIZERS, NETWORKS),
        lambda method, network: network == (network if method == "saq" else "conv_bn"),
    ),
)
def test_training_lowers_the_loss(method: str, network: str) -> None:
    """Linearly separable classes: the sign of a channel's mean, in two bits."""
    with seeded(0):
        model = trainable(network)
    x = images(64, seed=5)
    labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    minimizer = make(method, model, base, rho=0.05)
    losses = [float(minimizer.step(chunks_of(model, (x, labels), 64))) for _ in range(40)]

    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_perturbed_kinds_by_default() -> None:
    """As in the released code; clipping levels of weights are trained but not perturbed."""
    assert set(PERTURBED) == {"weights", "biases", "norms", "activation_clips"}
