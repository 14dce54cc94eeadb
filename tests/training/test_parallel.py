"""Data-parallel training: the state after every step, compared with one process."""

import math
from typing import Any

import pytest
import torch
from test_recovery import Small
from torch.nn import functional as F

from saqcli import distributed
from saqcli.errors import Interrupted
from saqcli.progress import SILENT, Task
from saqcli.searchers.hawq import HAWQ
from saqcli.searchers.sensitivity import Sensitivity
from saqcli.searchers.separable import sums_over_batches
from saqcli.tasks.classification import Meter
from saqcli.training.loop import evaluate
from saqcli.training.objective import Objective
from saqcli.training.step import Recovery, Stepper
from tests.support.joined import ranks_run
from tests.support.networks import NETWORKS, quantize
from tests.support.searching import Stopping, fresh, tiny_problem
from tests.support.steps import assert_bitwise_equal, batch, chunks_of, make, sgd, snapshot, trainable
from tests.support.sweeps import sweep

METHODS: dict[str, dict[str, Any]] = {
    "qat": {},
    "saq": {"interval": 2},
    "sam": {},
    "case1": {},
    "asaq": {"interval": 2, "reuse": 0.5},
}
STEPS, IMAGES = 4, 32
CPU = torch.device("cpu")


def train(method: str) -> dict[str, torch.Tensor]:
    """The weights after a few steps of this rank on its slice of every batch."""
    model = trainable("conv_bn", torch.float64)
    base = sgd(model)
    minimizer = make(method, model, base, **METHODS[method])
    for step in range(STEPS):
        x, labels = (
            part.chunk(distributed.count())[distributed.index()] for part in batch(IMAGES, seed=step)
        )
        minimizer.step(chunks_of(model, (x.double(), labels), len(labels)))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def all_methods() -> dict[str, dict[str, torch.Tensor]]:
    return {method: train(method) for method in METHODS}


@pytest.mark.parametrize("count", sweep([2, 4], lambda count: count == 2))
def test_ranks_equal_one_process_with_chunks(count: int) -> None:
    """Every rank ascends on its own slice; the descents are averaged.

    The sums of ``count`` gradients differ in their order alone: by ``count`` roundings of 2**-53 a step, which a step
    of SGD with momentum 0.9 carries over to at most 10 times as much.
    """
    ends = ranks_run(count, all_methods)
    tolerance = 10 * STEPS * count * 2**-53 * 100  # and the condition number of the network, below 100
    for method, options in METHODS.items():
        for other in ends[1:]:
            assert_bitwise_equal(list(ends[0][method].items()), list(other[method].items()))
        model = trainable("conv_bn", torch.float64)
        minimizer = make(method, model, sgd(model), **options)
        for step in range(STEPS):
            x, labels = batch(IMAGES, seed=step)
            minimizer.step(chunks_of(model, (x.double(), labels), IMAGES // count))

        for name, value in model.named_parameters():
            off = float((value.detach() - ends[0][method][name]).abs().max())
            assert off <= tolerance * max(1.0, float(value.detach().abs().max())), (method, name, off)


def trouble(kind: str) -> tuple[list[tuple[str, torch.Tensor]], Recovery, list[str]]:
    """Steps in which one of two ranks runs out of memory or gets NaN."""
    here = distributed.index()
    model = Small(trainable("conv_bn"), 4 if kind == "memory" and here == 1 else 99)
    base = sgd(model)
    notes: list[str] = []
    step = Stepper(model, make("saq", model, base), Objective(F.cross_entropy), 16, Recovery(), notes.append)
    for number in range(3):
        x, labels = batch(16, seed=10 * number + here)
        if kind == "number" and here == 0 and number == 1:
            x[0] = math.nan
        step(x, labels)
    return snapshot(model, base), step.recovery, notes


def test_all_ranks_skip_failed_steps() -> None:
    """If one rank cannot do a step, none does; all hold the same state afterwards."""
    (one, recovery, _), (other, _, notes) = ranks_run(2, trouble, "memory")
    assert recovery.micro_batch == 4
    assert len(notes) == 2
    assert_bitwise_equal(one, other)

    (one, recovery, notes), (other, _, _) = ranks_run(2, trouble, "number")
    assert recovery.skipped == 1
    assert "step skipped" in notes[0]
    assert_bitwise_equal(one, other)


def scored() -> tuple[dict[str, Any], dict[str, Any]]:
    model = quantize(NETWORKS["conv_bn"]).model.eval()
    data = [batch(size, seed=size) for size in (16, 16, 9, 16, 3)]
    data[1][1][3] = -1  # an image that could not be read
    with SILENT.task("", 0) as task:
        return tuple(vars(evaluate(model, data, task, device=CPU, shared=shared)) for shared in (True, False))  # type: ignore[return-value]


def test_distributed_evaluation_is_exact() -> None:
    found = ranks_run(3, scored)

    assert {together["images"] for together, _ in found} == {59}
    for together, alone in found:
        assert together == alone


def measured() -> dict[str, Any]:
    """The measurements of the searchers that go batch by batch."""
    problem = tiny_problem("residual")
    return {
        "hawq": HAWQ(samples=2).traces(fresh(problem)),
        "sensitivity": Sensitivity().losses(fresh(problem)),
    }


def test_distributed_measurements_are_exact() -> None:
    """Three ranks, two batches."""
    alone = measured()
    for found in ranks_run(3, measured):
        assert found == alone


def values(batch: int, task: Task) -> list[tuple[str, float]]:
    """Values whose sum depends on the order."""
    task.advance()
    return [(name, 10.0 ** ((batch * step) % 17) / 3) for name, step in (("a", 5), ("b", 7))]


def summed(memory: Stopping) -> dict[str, float]:
    return sums_over_batches(fresh(tiny_problem("residual"), memory=memory), "", 11, values)


def test_batch_sums_resume_with_other_world_size() -> None:
    whole, stopped = summed(Stopping()), Stopping(4)
    with pytest.raises(Interrupted):
        summed(stopped)
    gone_on = Stopping(kept=stopped.kept)
    assert gone_on.load() is not None
    assert gone_on.load()["done"] == 4  # type: ignore[index]
    assert ranks_run(3, summed, gone_on) == [whole] * 3


def metered() -> dict[str, Any]:
    meter = Meter(images=distributed.index() + 1, loss=0.5)
    return vars(meter.over_ranks())


def test_training_metrics_cover_all_ranks() -> None:
    for found in ranks_run(2, metered):
        assert (found["images"], found["loss"]) == (3, 1.0)
