"""Failing steps: out of memory, NaN, zero gradients."""

import gc
import math
import resource
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import DeviceMemoryError, TrainingDiverged
from saqcli.progress import SILENT
from saqcli.training.loop import evaluate, in_parts
from saqcli.training.memory import retry_on_oom
from saqcli.training.minimizers import MINIMIZERS
from saqcli.training.objective import Objective
from saqcli.training.step import Recovery, Stepper
from tests.support.joined import forks
from tests.support.networks import NETWORKS, images, quantize, seeded
from tests.support.steps import (
    AttemptWatch,
    assert_bitwise_equal,
    batch,
    fail_elsewhere,
    make,
    sgd,
    snapshot,
    trainable,
)

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Small(nn.Module):
    """A network on a device with memory for a few images."""

    def __init__(self, model: nn.Module, most: int, error: BaseException = OUT) -> None:
        super().__init__()
        self.model, self.most, self.error = model, most, error
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.dropout(self.model(x))
        if len(x) > self.most:  # after batch norms and random state have changed
            raise type(self.error)(*self.error.args)  # a new one: a kept traceback keeps frames alive
        return logits


def stepper(
    model: nn.Module,
    base: torch.optim.Optimizer,
    method: str = "saq",
    micro: int | None = None,
    **options: Any,
) -> tuple[Stepper, list[str]]:
    notes: list[str] = []
    recovery = Recovery(micro, **options)
    made = Stepper(model, make(method, model, base), Objective(F.cross_entropy), 16, recovery, notes.append)
    return made, notes


@pytest.mark.parametrize("method", MINIMIZERS)
def test_out_of_memory_step_equals_micro_batches(method: str) -> None:
    """Bit for bit: the attempt leaves no random numbers or running statistics behind."""
    ends = []
    for most, micro in ((4, None), (99, 4)):
        model = Small(trainable("conv_bn"), most)
        base = sgd(model)
        step, notes = stepper(model, base, method, micro)
        with seeded(0):
            for number in range(3):
                assert step(*batch(16, seed=number))
        ends.append(snapshot(model, base))
        assert step.recovery.micro_batch == 4
        assert ["micro-batches of" in note for note in notes] == ([True, True] if micro is None else [])

    assert_bitwise_equal(*ends)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_attempt_is_freed_before_shrinking(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    shrunk: list[list[bool]] = []
    if elsewhere:
        fail_elsewhere(monkeypatch)

    def work() -> list[Tensor]:
        tensors = [torch.ones(3), torch.ones(4)]
        made.extend(map(weakref.ref, tensors))
        if not elsewhere and not shrunk:
            raise torch.OutOfMemoryError(*OUT.args)
        return tensors

    results = retry_on_oom(work, lambda: shrunk.append([reference() is None for reference in made]))

    assert shrunk == [[True, True]]
    assert [reference() for reference in made[2:]] == results


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("method", MINIMIZERS)
def test_failed_step_is_freed_before_shrinking(
    method: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small(trainable("conv_bn"), 99 if elsewhere else 4)
    step, _ = stepper(model, sgd(model), method)
    watch, gradients = AttemptWatch(monkeypatch), step.minimizer.gradients

    def watched_gradients(chunks: Any) -> Any:
        passes = gradients(chunks)
        watch.add(passes)
        return passes

    monkeypatch.setattr(step.minimizer, "gradients", watched_gradients)
    if elsewhere:
        fail_elsewhere(monkeypatch)

    assert step(*batch(16))
    assert watch.alive == ([0] if elsewhere else [0, 0])


def test_model_exceeding_memory_is_reported() -> None:
    model = Small(trainable("conv_bn"), 1)
    step, _ = stepper(model, sgd(model))

    with pytest.raises(DeviceMemoryError, match="out of memory with 2 images at a time"):
        step(*batch(16))


def test_other_errors_are_not_out_of_memory() -> None:
    model = Small(trainable("conv_bn"), 1, RuntimeError("shapes do not fit"))
    step, _ = stepper(model, sgd(model))

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        step(*batch(16))


@pytest.mark.parametrize("method", MINIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_step_changes_nothing(method: str, value: float) -> None:
    """Training continues as if the batch did not exist."""
    ends = []
    for spoiled in (True, False):
        model = trainable("conv_bn")
        base = sgd(model)
        step, notes = stepper(model, base, method)
        for number in range(4):
            x, labels = batch(16, seed=number)
            if number == 2:
                if not spoiled:
                    continue
                x[0, 0, 0, 0] = value
            assert bool(step(x, labels)) == (number != 2)
        ends.append(snapshot(model, base))
        assert [note.startswith("step skipped: the loss is") for note in notes] == [True] * spoiled
        assert (step.recovery.skipped, step.recovery.in_row) == (int(spoiled), 0)

    assert_bitwise_equal(*ends)


def test_nan_gradient_is_detected() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * math.inf

    model = trainable("conv_bn")
    before = snapshot(model)
    objective = Objective(lambda logits, labels: F.cross_entropy(Steep.apply(logits), labels))
    notes: list[str] = []
    step = Stepper(model, make("qat", model, sgd(model)), objective, 16, Recovery(), notes.append)

    assert not step(*batch(16))
    assert "its gradient is not finite" in notes[0]
    assert_bitwise_equal(before, snapshot(model))


def test_repeated_nan_restores_good_weights() -> None:
    model = trainable("conv_bn")
    base = sgd(model)
    step, notes = stepper(model, base, patience=3)
    step(*batch(16))
    good = snapshot(model, base)
    spoiled = (batch(16)[0] * math.nan, batch(16)[1])
    for _ in range(3):
        step(*spoiled)

    with pytest.raises(
        TrainingDiverged, match=r"4 steps in a row were skipped: the loss is nan .* lower `training.lr`"
    ):
        step(*spoiled)
    assert_bitwise_equal(good, snapshot(model, base))
    assert len(notes) == 1


@pytest.mark.parametrize("method", MINIMIZERS)
def test_zero_gradients_change_nothing(method: str) -> None:
    model = trainable("conv_bn")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = Objective(lambda logits, labels: (logits * 0).sum())
    step = Stepper(model, make(method, model, base), flat, 8, Recovery())

    assert step(*batch(16))
    assert_bitwise_equal(list(before.items()), [(name, p.detach()) for name, p in model.named_parameters()])


def test_evaluation_halves_the_batch_on_oom() -> None:
    model = quantize(NETWORKS["conv_bn"]).model.eval()
    data = [batch(16, seed=number) for number in range(2)]
    with SILENT.task("", 0) as task:
        whole = evaluate(model, data, task, device=torch.device("cpu"))
        halves = evaluate(Small(model, 5).eval(), data, task, device=torch.device("cpu"))

    assert (whole.images, whole.top1, whole.top5) == (halves.images, halves.top1, halves.top5)
    assert halves.loss == pytest.approx(whole.loss, rel=1e-6)
    with pytest.raises(DeviceMemoryError, match="a single image"):
        in_parts(Small(model, 0).eval(), images(3))


def _train_in(mebibytes: int, pipe: Any) -> None:
    """A training step that needs more memory than this process may use."""
    torch.set_num_threads(1)
    gc.collect()
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    notes: list[str] = []
    step = Stepper(
        model, MINIMIZERS["qat"](model, base), Objective(F.cross_entropy), 64, Recovery(), notes.append
    )
    x, labels = torch.zeros(64, 3, 128, 128), torch.zeros(64, dtype=torch.long)
    with open("/proc/self/statm") as statm:
        there = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (there + mebibytes * 2**20, resource.RLIM_INFINITY))
    pieces = step(x, labels)
    pipe.send((len(pieces), step.recovery.micro_batch, notes))


def test_real_out_of_memory_is_recognized() -> None:
    """64 images of 128 x 128 in 32 channels are 128 MiB a tensor."""
    context = forks()
    ours, theirs = context.Pipe()
    process = context.Process(target=_train_in, args=(150, theirs))
    process.start()
    process.join(60)

    assert process.exitcode == 0
    pieces, micro, notes = ours.recv()
    assert pieces > 1
    assert micro in (8, 16, 32)
    assert notes
