"""How the passes of training are computed: compiled graphs, memory formats, and the choice among them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from saqcli.config import TrainingSection
from saqcli.errors import UnsupportedModel
from saqcli.quant.kernels.use import KernelChoice
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import quantizers_of
from saqcli.training import execution
from saqcli.training.execution import Engine, Execution, choose, overruns
from saqcli.training.trainer import Trainer
from tests.support.networks import CLASSES, NETWORKS, images, quantize, same_bits, seeded
from tests.support.steps import assert_bitwise_equal

PLAIN = Execution()
LAST = replace(PLAIN, memory_format="channels_last")
FUSED = replace(PLAIN, kernels="fused")
BOTH = replace(LAST, kernels="fused")
COMPILED = replace(FUSED, compiled=True, evaluates=True, sizes=(16,))
METHODS: dict[str, dict[str, Any]] = {
    "qat": {"method": "qat"},
    "saq": {},
    "saq of norms": {"minimizer": {"perturb": ["norms"]}},
    "efficient": {"ascent_fraction": 0.25},
}


class Counter:
    """Takes the place of the compiler: counts its graphs, and does not generate code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        self._backend = CompileCounterWithBackend("aot_eager")
        monkeypatch.setattr(execution.torch, "compile", partial(torch.compile, backend=self._backend))

    @property
    def graphs(self) -> int:
        return int(self._backend.frame_count)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def data(count: int = 4, last: int = 16) -> list[tuple[Tensor, Tensor]]:
    with seeded(1):
        sizes = [16] * (count - 1) + [last]
        return [(images(size, seed), torch.randint(0, CLASSES, (size,))) for seed, size in enumerate(sizes)]


def trainer(batches: list[tuple[Tensor, Tensor]] | None = None, **settings: Any) -> Trainer:
    with seeded(0):
        model = quantize(NETWORKS["conv_bn"]).model.train()
    training = TrainingSection(**{"epochs": 2, "lr": 0.05, "compile": "on"} | settings)
    return Trainer(model, batches or data(), training, num_classes=CLASSES, image_size=8, validation=data(1))


def weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return list(model.state_dict().items())


def close(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(weights(one), weights(other), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4) for (_, a), (_, b) in pairs)


# Compiled graphs.


@pytest.mark.parametrize("method", METHODS)
def test_steps_after_the_first_compile_nothing(compiler: Counter, method: str) -> None:
    subject, counts = trainer(**METHODS[method]), list[int]()
    subject.validation = None
    inner = subject._stepper.minimizer.update
    subject._stepper.minimizer.update = lambda passes: (counts.append(compiler.graphs), inner(passes))[1]  # type: ignore[method-assign]
    subject.fit()

    assert subject.execution.compiled
    assert counts[0] >= 1
    assert counts == counts[:1] * 8


def test_both_passes_share_a_graph(compiler: Counter) -> None:
    graphs = []
    for method in ("saq", "qat"):
        torch._dynamo.reset()
        trainer(method=method).fit()
        graphs.append(compiler.graphs)

    assert graphs[1] == 2 * graphs[0]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_training_equals_eager(compiler: Counter, method: str) -> None:
    compiled, eager = trainer(**METHODS[method]), trainer(compile="off", **METHODS[method])
    compiled.fit()
    eager.fit()

    assert close(compiled.model, eager.model)


def test_short_batches_are_computed_as_written(compiler: Counter) -> None:
    whole = trainer()
    whole.fit()
    graphs = compiler.graphs
    torch._dynamo.reset()
    trainer(data(last=5)).fit()

    assert compiler.graphs == 2 * graphs


def test_compiled_run_resumes_bitwise(compiler: Counter) -> None:
    whole, states = trainer(), list[Any]()
    whole.run = Keeping(states)
    whole.fit()
    resumed = trainer(compile="auto")
    resumed.load_state_dict(states[2])
    resumed.fit()

    assert states[2]["position"]["step"] == 3
    assert resumed.execution == whole.execution == COMPILED
    assert_bitwise_equal(weights(whole.model), weights(resumed.model))


def test_older_checkpoints_stay_as_written(compiler: Counter) -> None:
    whole, states = trainer(compile="off", precision="bfloat16"), list[Any]()
    whole.run = Keeping(states)
    whole.fit()
    resumed = trainer(precision="bfloat16")
    resumed.load_state_dict({key: value for key, value in states[2].items() if key != "execution"})
    resumed.fit()

    assert resumed.execution == replace(PLAIN, precision="bfloat16")
    assert_bitwise_equal(weights(whole.model), weights(resumed.model))


def test_interrupted_training_restores_and_continues(compiler: Counter) -> None:
    whole, subject = (trainer(memory_format="channels_last") for _ in range(2))
    whole.fit()
    advance = subject._stepper.minimizer.update
    subject._stepper.minimizer.update = _fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        subject.fit()
    kernels = {quantizer.kernel for quantizer in quantizers_of(subject.model)}
    laid_out = all(value.is_contiguous() for value in subject.model.state_dict().values())
    subject._stepper.minimizer.update = advance  # type: ignore[method-assign]
    graphs = compiler.graphs
    subject.fit()

    assert laid_out
    assert kernels == {"eager"}
    assert subject.execution == whole.execution
    assert compiler.graphs == graphs


def _fail(*_: Any) -> Tensor:
    raise KeyboardInterrupt


def test_smaller_micro_batches_are_compiled_too(compiler: Counter) -> None:
    subject = trainer()
    inner, failed = subject._stepper._passes, list[int]()

    def passes(*given: Tensor) -> Any:
        if subject._stepper.recovery.micro_batch is None and len(failed) < 2:  # the trial, then the step
            failed.append(1)
            raise MemoryError
        return inner(*given)

    subject._stepper._passes = passes  # type: ignore[method-assign]
    subject.fit()

    assert subject.execution == replace(COMPILED, sizes=(8,))


def test_uncompilable_networks_train_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, **_: Any) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            raise RuntimeError("no compiler\nsecond line")

        return call

    monkeypatch.setattr(execution.torch, "compile", fail)
    notes: list[str] = []
    subject, fused = trainer(), trainer()
    subject._stepper.engine._note = notes.append
    fused._stepper.choose = lambda *_: FUSED
    subject.fit()
    fused.fit()

    assert notes == ["torch.compile fails for this network, which runs without it: no compiler"]
    assert subject.execution == fused.execution
    assert_bitwise_equal(weights(subject.model), weights(fused.model))


def test_errors_of_the_network_are_its_own() -> None:
    def broken(x: Tensor) -> Tensor:
        raise ValueError("of the network")

    engine = Engine(broken)
    engine._compiled = broken
    engine.execution = COMPILED
    with pytest.raises(ValueError, match="of the network"):
        engine(torch.ones(16, 3, 8, 8))


@pytest.mark.slow
def test_generated_code_trains_and_resumes() -> None:
    whole, eager, states = trainer(), trainer(compile="off"), list[Any]()
    whole.run = Keeping(states)
    whole.fit()
    eager.fit()
    resumed = trainer()
    resumed.load_state_dict(states[2])
    resumed.fit()

    assert whole.execution.compiled
    assert close(whole.model, eager.model)
    assert_bitwise_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("last", [16, 5])
def test_compiled_evaluation_equals_eager(compiler: Counter, last: int) -> None:
    """A short last batch is padded: nothing is compiled for it."""
    model = quantize(NETWORKS["conv_bn"]).model.eval()
    engine = Engine(model)
    engine.set(COMPILED)
    with torch.no_grad():
        for batch, _ in data(3, last):
            assert torch.allclose(engine.evaluate(batch), model(batch), atol=1e-6)

    assert compiler.graphs == 1


def test_many_networks_compile_in_one_process(compiler: Counter) -> None:
    """More than dynamo's limit for one function, above which it stops compiling silently."""
    for width in range(1, 11):
        engine = Engine(nn.Sequential(nn.Linear(3, width)))
        engine.set(COMPILED)
        engine(torch.ones(16, 3))

    assert compiler.graphs == 10


# Memory formats and kernels.


def test_no_compiler_leaves_quantizers_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "use_kernels", lambda *_: KernelChoice("eager", "no compiler"))
    notes: list[str] = []
    engine = Engine(quantize(NETWORKS["conv_bn"]).model, notes.append)
    engine.set(FUSED)
    engine.set(replace(BOTH, compiled=True))

    assert engine.execution == replace(LAST, compiled=True)
    assert notes == ["no compiler"]


@pytest.mark.parametrize("method", METHODS)
def test_fused_kernels_equal_eager_training(method: str) -> None:
    fused, eager = (trainer(compile="off", **METHODS[method]) for _ in range(2))
    fused._stepper.choose = lambda *_: FUSED
    fused.fit()
    eager.fit()

    assert fused.execution == FUSED
    assert {quantizer.kernel for quantizer in quantizers_of(fused.model)} == {"eager"}  # restored
    assert close(fused.model, eager.model)


def test_weights_are_laid_out_as_before_at_the_end() -> None:
    subject, plain = trainer(memory_format="channels_last", compile="off"), trainer(compile="off")
    seen: list[bool] = []
    layer = next(iter(quantized_layers(subject.model).values()))
    layer.register_forward_pre_hook(
        lambda *_: seen.append(layer.latent_weight().is_contiguous(memory_format=torch.channels_last))
    )
    subject.fit()
    plain.fit()

    assert all(seen)
    assert all(value.is_contiguous() for value in subject.model.state_dict().values())
    assert subject.best is not None
    assert all(value.is_contiguous() for value in subject.best.model.values())
    assert close(subject.model, plain.model)


class Viewing(nn.Module):
    """A layer that views a tensor as only a contiguous one can be viewed."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape)


def viewing(**settings: Any) -> Trainer:
    subject = trainer(compile="off", **settings)
    assert isinstance(subject.model, nn.Sequential)
    subject.model.insert(1, Viewing())
    return subject


def test_networks_that_need_contiguous_tensors_are_refused() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"fails in channels_last \(view size .*memory_format=contiguous"
    ):
        viewing(memory_format="channels_last").fit()


def test_networks_that_need_contiguous_tensors_keep_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "LEAST_STEPS", 1)
    monkeypatch.setattr(execution, "LEAST_SECONDS", 0.0)
    subject = viewing()
    subject.fit()

    assert subject.execution.memory_format == "contiguous"


# The choice.


class Timed:
    """A trial of settings whose seconds are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Execution], float]) -> None:
        self.now, self.seconds = 0.0, seconds
        self.tried: list[Execution] = []
        monkeypatch.setattr(execution.time, "perf_counter", lambda: self.now)

    def __call__(self, wanted: Execution) -> Execution:
        self.tried.append(wanted)
        self.now += self.seconds(wanted)
        return wanted


def chosen(timed: Timed, steps: int, bits: int = 4, **settings: Any) -> Execution:
    model = quantize(NETWORKS["conv_bn"], same_bits(bits)).model
    return choose(TrainingSection(**settings), timed, (16,), steps, True, model, lambda _: None)


def seconds_of(wanted: Execution) -> float:
    spared = 0.1 * (wanted.memory_format == "channels_last") + 0.2 * (wanted.precision == "bfloat16")
    return 1.0 - spared - 0.1 * (wanted.kernels == "fused") - 0.4 * wanted.compiled


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        (100, {}, PLAIN),
        (10_000, {}, replace(COMPILED, memory_format="channels_last")),
        (130, {"compile": "off"}, LAST),
        (10_000, {"compile": "off"}, LAST),
        (10_000, {"memory_format": "contiguous"}, COMPILED),
        (10_000, {"memory_format": "contiguous", "compile": "off"}, PLAIN),
        (1, {"compile": "on"}, COMPILED),
        (1, {"compile": "kernels"}, FUSED),
        (10_000, {"compile": "kernels"}, BOTH),
        (1, {"memory_format": "channels_last"}, LAST),
        (1, {"precision": "bfloat16"}, replace(PLAIN, precision="bfloat16")),
        (10_000, {"precision": "auto", "compile": "off"}, replace(LAST, precision="bfloat16")),
    ],
)
def test_fastest_way_is_chosen(
    monkeypatch: pytest.MonkeyPatch, steps: int, settings: dict[str, Any], expected: Execution
) -> None:
    assert chosen(Timed(monkeypatch, seconds_of), steps, **settings) == expected


@pytest.mark.parametrize(("bits", "precision"), [(2, "float32"), (3, "bfloat16")])
def test_few_bits_stay_in_float32(monkeypatch: pytest.MonkeyPatch, bits: int, precision: str) -> None:
    found = chosen(Timed(monkeypatch, seconds_of), 10_000, bits=bits, precision="auto", compile="off")
    assert found.precision == precision


@pytest.mark.parametrize("seconds", [seconds_of, lambda wanted: 1.0 - 0.6 * wanted.compiled])
def test_recorded_way_gives_the_same_again(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Execution], float]
) -> None:
    first = chosen(Timed(monkeypatch, seconds), 10_000, precision="auto")
    found = first.recorded()
    assert found.pop("compiled")
    assert found.pop("kernels") == "fused"

    assert chosen(Timed(monkeypatch, seconds), 10_000, compile="on", **found) == first


def test_lack_of_memory_refuses_no_format(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Execution) -> float:
        raise MemoryError

    assert chosen(Timed(monkeypatch, full), 1, memory_format="channels_last") == LAST


def test_convolutions_that_overrun_memory_stay_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1))
    model = quantize(lambda: network).model

    def chosen(steps: int, **settings: Any) -> Execution:
        timed = Timed(monkeypatch, seconds_of)
        return choose(TrainingSection(**settings), timed, (16,), steps, True, model, lambda _: None)

    assert [overruns(layer) for layer in quantized_layers(model).values()] == [False, True, False]
    assert chosen(10_000).memory_format == "contiguous"
    with pytest.raises(UnsupportedModel, match=r"^1 is a strided convolution .*memory_format=contiguous"):
        chosen(1, memory_format="channels_last")


def test_slower_ways_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = Timed(monkeypatch, lambda wanted: 1.0 if wanted == PLAIN else 0.97)

    assert chosen(timed, 10_000, precision="auto") == PLAIN
    assert len({*timed.tried}) == 5


def test_trials_leave_everything_as_it_was() -> None:
    subject = trainer(compile="off")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    state = torch.get_rng_state()
    trial = subject._stepper.trial(*data()[0])
    trial(replace(LAST, precision="bfloat16"))
    trial(PLAIN)

    assert_bitwise_equal(weights(subject.model), list(before.items()))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in subject.model.parameters())


class Keeping:
    """A run that keeps a copy of every state."""

    def __init__(self, states: list[Any]) -> None:
        self.states = states

    def offer(self, state: Callable[[], Any], *, milestone: bool = False, failing: bool = False) -> None:
        self.states.append(_copied(state()))

    def log(self, **values: Any) -> None:
        pass

    def check_signal(self) -> None:
        pass


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list | tuple) else value
