"""What a perturbation is computed on: the statements of docs/python.md, each by a test that fails if it is untrue."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli
from saqcli import distributed
from saqcli.errors import ConfigError
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import quantizers_of
from saqcli.training.minimizers import SharpnessAware
from saqcli.training.perturbation import Perturbation, PerturbedSet
from tests.support import tiny
from tests.support.joined import ranks_run
from tests.support.networks import NETWORKS, quantize
from tests.support.steps import RHO, Batch, assert_bitwise_equal, batch, sgd, snapshot, still, trainable

Named = list[tuple[str, Tensor]]


def closure_of(model: nn.Module, data: Batch) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(data[0]), data[1])


@contextmanager
def recorded(found: list[Perturbation]) -> Iterator[None]:
    """Within the context all perturbations are kept in ``found``."""
    ascent = PerturbedSet.ascent

    def watched(self: PerturbedSet, *arguments: Any) -> Perturbation:
        found.append(ascent(self, *arguments))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerturbedSet, "ascent", watched)
        yield


def perturbations(
    work: Callable[[nn.Module], Any],
    base: Callable[[nn.Module], torch.optim.Optimizer] = still,
    network: str = "token_mlp",
    **options: Any,
) -> list[Named]:
    """Those of one step, one per chunk."""
    model = trainable(network)
    found: list[Perturbation] = []
    with recorded(found):
        saqcli.SAQ(model, base(model), rho=RHO).step(work(model), **options)
    return [[(str(i), e) for i, e in enumerate((*one.weights, *one.parameters))] for one in found]


def slices(data: Batch, count: int) -> list[Batch]:
    return list(zip(data[0].chunk(count), data[1].chunk(count), strict=True))


def close(one: Named, other: Named) -> bool:
    """To the rounding of sums in another order."""
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for (_, a), (_, b) in zip(one, other, strict=True))


# Ranks, micro-batches, chunks.


def on_rank() -> Named:
    data = slices(batch(16), distributed.count())[distributed.index()]
    (found,) = perturbations(lambda model: closure_of(model, data))
    return found


def test_ranks_ascend_on_their_own_images() -> None:
    found = ranks_run(2, on_rank)

    for one, data in zip(found, slices(batch(16), 2), strict=True):
        (alone,) = perturbations(lambda model, data=data: closure_of(model, data))  # type: ignore[misc]
        assert_bitwise_equal(one, alone)
    assert not close(*found)


def test_micro_batches_share_one_perturbation() -> None:
    """That of all their images."""
    (shared,) = perturbations(lambda model: [closure_of(model, part) for part in slices(batch(16), 4)])
    (whole,) = perturbations(lambda model: closure_of(model, batch(16)))

    assert close(shared, whole)


def test_chunks_have_their_own_perturbations() -> None:
    halves = slices(batch(16), 2)
    found = perturbations(lambda model: [[closure_of(model, half)] for half in halves])

    for one, half in zip(found, halves, strict=True):
        (alone,) = perturbations(lambda model, half=half: closure_of(model, half))  # type: ignore[misc]
        assert_bitwise_equal(one, alone)
    assert not close(*found)


# Precision.


def test_autocast_leaves_perturbations_in_float32() -> None:
    """The forward pass is in bfloat16, quantizers and what the ascent adds in float32."""
    model = trainable("token_mlp")
    seen: dict[str, set[torch.dtype]] = {"quantized": set(), "layers": set()}
    for module in quantizers_of(model):
        module.register_forward_hook(lambda m, inputs, output: seen["quantized"].add(output.dtype))
    for layer in quantized_layers(model).values():
        layer.register_forward_hook(lambda m, inputs, output: seen["layers"].add(output.dtype))

    def closure() -> Tensor:
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            return closure_of(model, batch())()

    found: list[Perturbation] = []
    with recorded(found):
        saqcli.SAQ(model, sgd(model), rho=RHO).step(closure)

    assert seen == {"quantized": {torch.float32}, "layers": {torch.bfloat16}}
    assert {e.dtype for e in (*found[0].weights, *found[0].parameters, found[0].norm)} == {torch.float32}


def test_bfloat16_parameters_are_perturbed_in_bfloat16() -> None:
    model = NETWORKS["token_mlp"]().bfloat16()
    found: list[Perturbation] = []
    with recorded(found):
        saqcli.SAM(model, still(model), rho=RHO).step(
            lambda: F.cross_entropy(model(batch()[0].bfloat16()).float(), batch()[1])
        )
    assert {e.dtype for e in found[0].parameters} == {torch.bfloat16}


def test_scale_does_not_reach_the_perturbation() -> None:
    (scaled,) = perturbations(
        lambda model: closure_of(model, batch()), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**20)
    )
    (plain,) = perturbations(lambda model: closure_of(model, batch()))

    assert_bitwise_equal(scaled, plain)


# Gradient clipping and weight decay.


def test_clipping_does_not_reach_the_perturbation() -> None:
    (clipped,) = perturbations(lambda model: closure_of(model, batch()), clip_grad=1e-6)
    (plain,) = perturbations(lambda model: closure_of(model, batch()))

    assert_bitwise_equal(clipped, plain)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_decay_does_not_reach_the_perturbation(optimizer: Any) -> None:
    """It changes the update instead."""
    ends, found = [], []
    for decay in (0.0, 10.0):
        model = trainable("token_mlp")
        steps: list[Perturbation] = []
        with recorded(steps):
            base = optimizer(model.parameters(), lr=0.01, weight_decay=decay)
            saqcli.SAQ(model, base, rho=RHO).step(closure_of(model, batch()))
        ends.append(snapshot(model))
        found.append([(str(i), e) for i, e in enumerate((*steps[0].weights, *steps[0].parameters))])

    assert_bitwise_equal(*found)
    assert not close(*ends)


# Batch norms and dropout.


def test_batch_statistics_are_those_of_each_pass() -> None:
    """Pass 2 normalizes by its own batch; the running statistics are those of pass 1."""
    model = trainable("conv_bn")
    norm = model.get_submodule("1")
    plain, outputs = copy.deepcopy(model), []
    norm.register_forward_hook(
        lambda m, inputs, output: outputs.append((inputs[0].detach(), output.detach()))
    )
    saqcli.SAQ(model, still(model), rho=RHO, perturb=["weights"]).step(closure_of(model, batch()))
    with torch.no_grad():
        plain(batch()[0])

    for inputs, output in outputs:
        expected = F.batch_norm(inputs, None, None, norm.weight, norm.bias, training=True)  # type: ignore[arg-type]
        assert torch.equal(output, expected.detach())
    assert not torch.equal(outputs[0][0], outputs[1][0])
    assert_bitwise_equal(snapshot(norm), snapshot(plain.get_submodule("1")))


def test_instance_statistics_update_once_a_step() -> None:
    norm = nn.InstanceNorm2d(4, track_running_stats=True)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Flatten(), nn.Linear(144, 5))
    model = quantize(lambda: net).model.train()
    plain = copy.deepcopy(model)
    saqcli.SAQ(model, still(model), rho=RHO).step(closure_of(model, batch()))
    saqcli.QAT(plain, still(plain)).step(closure_of(plain, batch()))

    assert_bitwise_equal(snapshot(model), snapshot(plain))


def with_dropout() -> tuple[nn.Module, list[Tensor]]:
    """A quantized network, and the masks that its dropout draws."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 32), nn.Dropout(0.5), nn.Linear(32, 5))
    model = quantize(lambda: net).model.train()
    masks: list[Tensor] = []
    model.get_submodule("2").register_forward_hook(
        lambda m, inputs, output: masks.append(output.detach() == 0)
    )
    return model, masks


def test_passes_draw_different_dropout_masks() -> None:
    model, masks = with_dropout()
    saqcli.SAQ(model, sgd(model), rho=RHO).step(closure_of(model, batch()))

    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_seeded_closure_draws_equal_masks() -> None:
    """The way that docs/python.md names."""
    model, masks = with_dropout()
    closure = closure_of(model, batch())

    def seeded() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return closure()

    saqcli.SAQ(model, sgd(model), rho=RHO).step(seeded)
    assert torch.equal(*masks)


# Frozen parameters and tied weights.


def test_frozen_parameters_are_not_perturbed() -> None:
    """Neither quantized weights whose float weights are frozen nor norms; their gradients do not count."""
    model = trainable("conv_bn")
    layers: dict[str, QuantizedLayer] = quantized_layers(model)
    layers["0"].requires_grad_(False)
    model.get_submodule("1").requires_grad_(False)
    moved: list[list[bool]] = []
    closure = closure_of(model, batch())
    before = [layer.quantized_weight().detach() for layer in layers.values()]

    def watched() -> Tensor:
        now = [layer.quantized_weight() for layer in layers.values()]
        moved.append([not torch.equal(a, b) for a, b in zip(now, before, strict=True)])
        return closure()

    minimizer = saqcli.SAQ(model, sgd(model), rho=RHO)
    minimizer.step(watched)

    assert moved == [[False] * 3, [False, True, True]]
    frozen = {id(p) for p in (*layers["0"].parameters(), *model.get_submodule("1").parameters())}
    assert not frozen & {id(p) for p in minimizer.set.parameters}


@pytest.mark.parametrize("options", [{}, {"interval": 2, "reuse": 0.5}])
@pytest.mark.parametrize("first", [True, False])
def test_freezing_later_needs_a_new_minimizer(first: bool, options: dict[str, Any]) -> None:
    model = trainable("conv_bn")
    layer = model.get_submodule("0").requires_grad_(first)
    base = sgd(model)
    minimizer = saqcli.SAQ(model, base, rho=RHO, **options)
    minimizer.step(closure_of(model, batch()))
    layer.requires_grad_(not first)
    before = snapshot(model, base)

    with pytest.raises(ConfigError, match="make the minimizer anew"):
        minimizer.step(closure_of(model, batch()))
    assert_bitwise_equal(snapshot(model, base), before)
    saqcli.SAQ(model, base, rho=RHO, **options).step(closure_of(model, batch()))


def test_parameters_outside_the_optimizer_are_perturbed() -> None:
    """As those in it; their gradients do not accumulate."""
    model = trainable("conv_bn")
    part = torch.optim.SGD(model.get_submodule("0").parameters(), lr=0.0)
    minimizer, found = saqcli.SAQ(model, part, rho=RHO), list[Perturbation]()
    gradients = []
    with recorded(found):
        for _ in range(2):
            minimizer.step(closure_of(model, batch()))
            gradients.append([(n, p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None])
    (whole,) = perturbations(lambda model: closure_of(model, batch()), network="conv_bn")

    assert_bitwise_equal(
        [(str(i), e) for i, e in enumerate((*found[0].weights, *found[0].parameters))], whole
    )
    assert_bitwise_equal(*gradients)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.two(torch.relu(self.one(x.flatten(1)[:, :8]))))
        return output


class TiedToEmbedding(nn.Module):
    """One weight in a linear layer and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.head, self.table = nn.Linear(8, 8), nn.Linear(8, 5), nn.Embedding(8, 8)
        self.table.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x.flatten(1)[:, :8]))
        output: Tensor = self.head(hidden + self.table(torch.arange(len(x)) % 8))
        return output


def test_tied_weights_have_one_perturbation() -> None:
    """Its direction is the sum of the gradients of both uses."""
    net = Tied()
    tiny.quantized(net, batch()[0], 3)
    net.train()
    weights: list[list[Tensor]] = []
    found: list[Perturbation] = []

    def closure() -> Tensor:
        weights.append([layer.quantized_weight().detach() for layer in (net.one, net.two)])  # type: ignore[operator]
        return closure_of(net, batch())()

    with recorded(found):
        saqcli.SAQ(net, still(net), rho=RHO).step(closure)

    (plain, _), (perturbed, other) = weights
    assert torch.equal(perturbed, other)
    one, two, _ = found[0].weights
    assert torch.equal(perturbed, plain + one)
    assert one.any()
    assert not two.any()


def test_uses_outside_quantized_layers_are_not_perturbed() -> None:
    """An embedding that shares the weight of a linear layer looks up the float weight."""
    net = TiedToEmbedding()
    tiny.quantized(net, batch()[0], 3)
    net.train()
    seen: list[Tensor] = []
    net.table.register_forward_hook(lambda m, inputs, output: seen.append(output.detach().clone()))
    quantized: list[Tensor] = []

    def closure() -> Tensor:
        quantized.append(net.one.quantized_weight().detach())  # type: ignore[operator]
        return closure_of(net, batch())()

    seen.clear()
    saqcli.SAQ(net, still(net), rho=RHO).step(closure)
    assert torch.equal(*seen)
    assert not torch.equal(*quantized)


# SAM and the others state the same.


@pytest.mark.parametrize(
    "statement", ["ranks", "micro-batches", "chunks", "autocast", "GradScaler", "dropout"]
)
def test_docstring_names_every_circumstance(statement: str) -> None:
    assert statement in str(SharpnessAware.__doc__)
