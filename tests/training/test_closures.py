"""``minimizer.step(closure)`` in loops of one's own: accumulation, precision, ranks, compiled modules, schedules."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import saqcli
from saqcli import distributed
from saqcli.errors import ConfigError, TrainingDiverged
from saqcli.quant.layer import quantized_layers
from saqcli.training.minimizers import MINIMIZERS, MicroBatch
from tests.support.joined import ranks_run
from tests.support.networks import NETWORKS
from tests.support.steps import (
    RHO,
    Batch,
    assert_bitwise_equal,
    batch,
    chunks_of,
    make,
    sgd,
    snapshot,
    still,
    trainable,
)

Make = Callable[[nn.Module, torch.optim.Optimizer], Any]


def closure_of(model: nn.Module, data: Batch) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(data[0]), data[1])


def train(
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    method: str = "saq",
    steps: int = 3,
    **options: Any,
) -> list[tuple[str, Tensor]]:
    """Weights and optimizer state after a few steps of a plain loop."""
    model = trainable("conv_bn")
    called, base = wrap(model), sgd(model)
    minimizer = make(method, called, base)
    for step in range(steps):
        minimizer.step(closure_of(called, batch(16, seed=step)), **options)
    return snapshot(model, base)


# What a closure is.


@pytest.mark.parametrize("method", MINIMIZERS)
def test_closures_equal_chunks_bitwise(method: str) -> None:
    data = batch(16)
    halves = [(data[0][part], data[1][part]) for part in (slice(8), slice(8, 16))]
    for chunks, work in (
        (lambda model: chunks_of(model, data, 16), lambda model: closure_of(model, data)),
        (
            lambda model: [[piece for (piece,) in chunks_of(model, data, 8)]],
            lambda model: [closure_of(model, half) for half in halves],
        ),
        (
            lambda model: chunks_of(model, data, 8),
            lambda model: [[closure_of(model, half)] for half in halves],
        ),
    ):
        ends = []
        for given in (chunks, work):
            model = trainable("conv_bn")
            base = sgd(model)
            loss = make(method, model, base).step(given(model))
            ends.append([*snapshot(model, base), ("loss", loss)])
        assert_bitwise_equal(*ends)


def test_returned_loss_is_detached_and_unperturbed() -> None:
    model = trainable("conv_bn")
    expected = closure_of(copy.deepcopy(model), batch())()
    loss = saqcli.SAQ(model, sgd(model), rho=RHO).step(closure_of(model, batch()))

    assert torch.equal(loss, expected.detach())
    assert not loss.requires_grad


def backward(loss: Tensor) -> Tensor:
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def kept(loss: Tensor) -> Tensor:
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("method", ["qat", "saq"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (backward, "called backward"),
        (kept, "called backward"),
        (lambda loss: None, "returned a NoneType"),
        (lambda loss: loss.item(), "returned a float"),
        (lambda loss: loss.detach(), "returned a loss without a graph"),
        (lambda loss: loss.expand(3), r"returned a tensor of shape \(3,\)"),
    ],
)
def test_wrong_closures_are_refused(method: str, change: Callable[[Tensor], Any], says: str) -> None:
    model = trainable("conv_bn")
    before = snapshot(model.get_submodule("0"))
    with pytest.raises(
        ConfigError, match=f"the closure {says}.*: run the forward pass and return the mean loss"
    ):
        make(method, model, sgd(model)).step(lambda: change(closure_of(model, batch())()))
    assert_bitwise_equal(snapshot(model.get_submodule("0")), before)


@pytest.mark.parametrize("work", [[], [[]], 3, None, [3], "loss", [[], [lambda: None]]])
def test_wrong_work_is_refused(work: Any) -> None:
    model = trainable("conv_bn")
    with pytest.raises(ConfigError, match="a step takes a closure that returns the loss"):
        saqcli.SAQ(model, sgd(model)).step(work)


@pytest.mark.parametrize("method", ["qat", "saq"])
@pytest.mark.parametrize("nested", [False, True])
def test_shares_of_micro_batches_count(method: str, nested: bool) -> None:
    """A quarter and three quarters of the images are the whole batch; closures share what is left."""
    data = batch(16)
    parts = [(data[0][part], data[1][part]) for part in (slice(4), slice(4, 16))]
    ends = []
    for shares in (None, (0.25, 0.75), (0.25, None)):
        model = trainable("token_mlp")
        base = sgd(model)
        work: list[Any] = [closure_of(model, data)]
        if shares:
            closures = [closure_of(model, part) for part in parts]
            work = [c if s is None else MicroBatch(c, s) for c, s in zip(closures, shares, strict=True)]
        loss = make(method, model, base).step([work] if nested else work)
        ends.append([*snapshot(model), ("loss", loss)])

    assert_bitwise_equal(*ends[1:])
    for (name, a), (_, b) in zip(*ends[:2], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("shares", [(4, 12), (0.5, 0.25), (1.5, -0.5), (1.0, None), (float("nan"), 0.5)])
def test_shares_must_sum_to_one(shares: tuple[float, float | None]) -> None:
    model = trainable("token_mlp")
    closure = closure_of(model, batch())
    work = [closure if share is None else MicroBatch(closure, share) for share in shares]
    with pytest.raises(ConfigError, match=f"micro-batches have the shares {shares[0]:g}.*1 in all"):
        saqcli.SAQ(model, sgd(model)).step(work)


def test_closures_run_outside_no_grad() -> None:
    """As those of torch's optimizers."""
    model = trainable("conv_bn")
    with torch.no_grad():
        loss = saqcli.SAQ(model, sgd(model)).step(closure_of(model, batch()))
    assert loss.isfinite()


def test_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the optimizer holds no parameter of the model"):
        saqcli.QAT(trainable("conv_bn"), sgd(trainable("conv_bn")))


def test_state_is_saved_as_in_torch() -> None:
    model = trainable("conv_bn")
    minimizer = saqcli.SAQ(model, sgd(model), interval=2, reuse=0.5)
    minimizer.step(closure_of(model, batch()))
    file = io.BytesIO()
    torch.save(minimizer.state_dict(), file)
    file.seek(0)
    other = saqcli.SAQ(model, sgd(model), interval=2, reuse=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))

    assert other.done == 1


@pytest.mark.parametrize(("weight", "rho"), [(2, 0.15), (3, 0.15), (4, 0.3), (8, 0.3)])
def test_default_radius_is_the_papers(weight: int, rho: float) -> None:
    from saqcli.quant.bits import LayerBits
    from tests.support.networks import quantize

    bits = LayerBits(weight=weight, activation=4)
    model = quantize(NETWORKS["conv_bn"], lambda layers: dict.fromkeys(layers, bits)).model
    assert saqcli.SAQ(model, sgd(model)).rho == rho


@pytest.mark.parametrize(
    "rho", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), torch.tensor([0.25])]
)
def test_radius_is_any_number(rho: Any) -> None:
    model = trainable("token_mlp")
    found = saqcli.SAQ(model, sgd(model), rho=rho).rho
    assert found == 0.25
    assert isinstance(found, float)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rho": "0.1"}, "rho '0.1' is not possible"),
        ({"rho": True}, "rho True is not possible"),
        ({"rho": torch.tensor([0.1, 0.2])}, "rho tensor.* is not possible"),
        ({"rho": np.float32("nan")}, "rho nan is not possible"),
        ({"rho_unit": "absolute"}, "give `rho` with an absolute unit"),
        ({"perturb": []}, "perturb is empty"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str) -> None:
    model = trainable("token_mlp")
    with pytest.raises(ConfigError, match=says):
        saqcli.SAQ(model, sgd(model), **options)


def test_optimizers_with_closures_are_refused() -> None:
    model = trainable("token_mlp")
    with pytest.raises(ConfigError, match="LBFGS calls a closure in its step"):
        saqcli.QAT(model, torch.optim.LBFGS(model.parameters()))


# Models without quantizers.


def test_sam_trains_a_float_model() -> None:
    model = NETWORKS["conv_bn"]()
    minimizer = saqcli.SAM(model, sgd(model))
    losses = [float(minimizer.step(closure_of(model, batch()))) for _ in range(10)]

    assert {id(p) for p in minimizer.set.parameters} == {id(p) for p in model.parameters()}
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["saq", "asaq", "case1"])
def test_float_model_without_weights_is_refused(method: str) -> None:
    model = NETWORKS["conv_bn"]()
    with pytest.raises(
        ConfigError, match="perturbs quantized weights and the model has none: quantize it first"
    ):
        make(method, model, sgd(model))


# Mixed precision.


@pytest.mark.parametrize("method", MINIMIZERS)
def test_autocast_in_the_closure(method: str) -> None:
    model = trainable("conv_bn")
    minimizer = make(method, model, sgd(model))
    x, labels = batch()

    def closure() -> Tensor:
        with torch.amp.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float(), labels)

    losses = [float(minimizer.step(closure)) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("method", MINIMIZERS)
def test_scale_changes_no_bit(method: str) -> None:
    """In float32, where multiplication by a power of two is exact."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    assert_bitwise_equal(train(method=method, scaler=scaler), train(method=method))
    assert scaler.get_scale() == 2.0**10


def test_disabled_scaler_does_nothing() -> None:
    assert_bitwise_equal(train(scaler=torch.amp.GradScaler("cpu", enabled=False)), train())


@pytest.mark.parametrize("method", MINIMIZERS)
def test_overflow_skips_step_and_lowers_scale(method: str) -> None:
    model = trainable("conv_bn")
    base = sgd(model)
    minimizer = make(method, model, base)
    before = [(name, p.detach().clone()) for name, p in model.named_parameters()]
    state = copy.deepcopy(minimizer.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    loss = minimizer.step(lambda: 8 * closure_of(model, batch())(), scaler=scaler)

    assert loss.isfinite()
    assert_bitwise_equal([(name, p.detach()) for name, p in model.named_parameters()], before)
    assert (minimizer.state_dict(), base.state_dict()["state"]) == (state, {})
    assert scaler.get_scale() == 2.0**7
    minimizer.step(closure_of(model, batch()), scaler=scaler)
    assert any(not torch.equal(p, old) for p, (_, old) in zip(model.parameters(), before, strict=True))


def test_overflow_in_first_pass_skips_the_step() -> None:
    """Quantizers clamp, so pass 2 may be finite at a perturbed point that is not."""
    model = trainable("conv_bn")
    before, calls = snapshot(model.get_submodule("0")), []

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            return gradient * (torch.inf if len(calls) == 1 else 0)

    def closure() -> Tensor:
        calls.append(1)
        return (
            Overflow.apply(closure_of(model, batch())())
            if len(calls) < 2
            else model(batch()[0] * 0).sum() * 0
        )

    minimizer = saqcli.SAQ(model, sgd(model), rho=RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    minimizer.step(closure, scaler=scaler)

    assert scaler.get_scale() == 2.0
    assert minimizer.done == 0
    assert_bitwise_equal(snapshot(model.get_submodule("0")), before)


@pytest.mark.parametrize("method", ["saq", "msam"])
def test_infinite_loss_of_an_ascent_skips_the_step(method: str) -> None:
    model = trainable("conv_bn")
    minimizer = make(method, model, sgd(model))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    minimizer.step(closure_of(model, batch()), scaler=scaler)  # from then on both ascend
    before, calls = snapshot(model.get_submodule("0")), []

    def closure() -> Tensor:
        calls.append(1)
        last = minimizer.one_pass or len(calls) == 2
        return closure_of(model, batch())() * (torch.inf if last else 1)

    minimizer.step(closure, scaler=scaler)

    assert scaler.get_scale() == 2.0
    assert_bitwise_equal(snapshot(model.get_submodule("0")), before)


def test_infinite_loss_is_not_a_matter_of_scale() -> None:
    model = trainable("conv_bn")
    with pytest.raises(
        TrainingDiverged,
        match="the loss is inf and cannot be descended: no weight was changed; lower the learning rate",
    ):
        saqcli.QAT(model, sgd(model)).step(
            lambda: closure_of(model, batch())() * torch.inf, scaler=torch.amp.GradScaler("cpu")
        )


def test_float16_trains_with_a_scaler() -> None:
    model = trainable("token_mlp")
    minimizer = saqcli.SAQ(model, sgd(model), rho=0.05)
    scaler = torch.amp.GradScaler("cpu")
    x, labels = batch()

    def closure() -> Tensor:
        with torch.amp.autocast("cpu", dtype=torch.float16):
            return F.cross_entropy(model(x), labels)

    losses = [float(minimizer.step(closure, scaler=scaler)) for _ in range(20)]
    assert losses[-1] < losses[0]


# Ranks.


def on_ranks(method: str) -> list[list[tuple[str, Tensor]]]:
    """The state after a few steps on this rank's images: bare, in DDP, and in DDP that the minimizer does not know."""
    ends = []
    for called_in_ddp, known_to_minimizer in ((False, False), (True, True), (True, False)):
        model = trainable("conv_bn")
        called = DistributedDataParallel(model) if called_in_ddp else model
        minimizer = make(method, called if known_to_minimizer else model, sgd(model))
        for step in range(3):
            data = [part.chunk(distributed.count())[distributed.index()] for part in batch(16, seed=step)]
            halves = [(data[0][part], data[1][part]) for part in (slice(4), slice(4, 8))]
            minimizer.step([closure_of(called, half) for half in halves])
        ends.append(snapshot(model))
    return ends


def all_on_ranks() -> dict[str, list[list[tuple[str, Tensor]]]]:
    return {method: on_ranks(method) for method in ("qat", "saq", "asaq", "sam")}


def test_ddp_equals_the_bare_module() -> None:
    """DDP that only the closure knows reduces by itself: averaged again, gradients are the same but for rounding."""
    first, second = ranks_run(2, all_on_ranks)

    for method in first:
        bare, known, unknown = first[method]
        for other in (known, *second[method][:2]):
            assert_bitwise_equal(bare, other)
        for (name, a), (_, b) in zip(bare, unknown, strict=True):
            assert "running" in name or torch.allclose(a, b, atol=1e-5), name


# Compiled modules.


def compiled(backend: str) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        result: nn.Module = torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[assignment]
        return result

    return wrap


@pytest.mark.parametrize("method", ["saq", "sam"])
def test_compiled_module_equals_eager(method: str) -> None:
    """The graph is compiled again for a filled port: not one bit differs."""
    assert_bitwise_equal(train(compiled("eager"), method), train(method=method))


def test_compiled_gradients_equal_eager() -> None:
    assert_bitwise_equal(train(compiled("aot_eager"), steps=2), train(steps=2))


@pytest.mark.slow
def test_compiled_kernels_equal_eager() -> None:
    """To the rounding of fused float32 kernels, over two steps."""
    for (name, a), (_, b) in zip(train(compiled("inductor"), steps=2), train(steps=2), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


# Schedules and clipping.


def test_torch_schedules_follow_the_steps() -> None:
    model = trainable("conv_bn")
    base = sgd(model, lr=1.0)
    minimizer, schedule = saqcli.SAQ(model, base), torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            minimizer.step(closure_of(model, batch(seed=step)))
            schedule.step()
    assert base.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("method", MINIMIZERS)
def test_clipping_bounds_what_the_optimizer_gets(method: str) -> None:
    model = trainable("conv_bn")
    make(method, model, still(model)).step(closure_of(model, batch()), clip_grad=1e-3)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]

    assert float(nn.utils.get_total_norm(gradients)) == pytest.approx(1e-3, rel=1e-3)


def test_clipping_equals_a_hook() -> None:
    model = trainable("conv_bn")
    base = sgd(model)
    base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.5) and None)
    minimizer = saqcli.SAQ(model, base, rho=RHO)
    for step in range(3):
        minimizer.step(closure_of(model, batch(16, seed=step)))

    assert_bitwise_equal(snapshot(model, base), train(clip_grad=0.5))


def test_layers_are_left_unperturbed() -> None:
    model = trainable("conv_bn")
    saqcli.SAQ(model, sgd(model)).step(closure_of(model, batch()))
    assert all(layer.perturbation is None for layer in quantized_layers(model).values())
