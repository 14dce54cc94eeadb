"""Training and evaluation loops: counts, reports, and resume."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import DataError, TrainingDiverged
from saqcli.progress import Task
from saqcli.tasks.classification import Meter, Score
from saqcli.training.loop import evaluate, train_epoch
from saqcli.training.minimizers import MINIMIZERS, Chunk, Minimizer, Passes
from saqcli.training.minimizers.cases import SAQ
from saqcli.training.minimizers.qat import QAT
from saqcli.training.objective import Objective
from saqcli.training.step import Recovery, Stepper
from tests.support.networks import CLASSES, NETWORKS, images, quantize, seeded
from tests.support.steps import taken

CPU = torch.device("cpu")


class Watch:
    """A task that records its calls."""

    def __init__(self) -> None:
        self.images = 0
        self.steps = 0
        self.figures: dict[str, float] = {}

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        self.steps += steps
        self.images += images
        self.figures = figures


def one_epoch(
    model: nn.Module,
    minimizer: Any,
    data: Iterable[tuple[Tensor, Tensor]],
    m: int = 8,
    *,
    task: Task | None = None,
    meter: Meter | None = None,
    recovery: Recovery | None = None,
    **options: Any,
) -> Score:
    step = Stepper(model, minimizer, Objective(F.cross_entropy), m, recovery or Recovery())
    return train_epoch(step, data, task or Watch(), meter or Meter(), **options)


def random_logits(count: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(count, classes), torch.randint(0, classes, (count,))


def batches(count: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    with seeded(1):
        return [(images(size, seed), torch.randint(0, CLASSES, (size,))) for seed in range(count)]


# Metrics.


def test_score_covers_all_images_jointly() -> None:
    logits, labels = random_logits(100)
    score = Meter()
    score.update(logits, labels)
    found = score.score()
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)

    assert found.images == 100
    assert found.top1 == float((ranks == 0).sum())
    assert found.top5 == float((ranks < 5).sum())
    assert found.loss == pytest.approx(float(F.cross_entropy(logits.double(), labels)), rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_counts_are_independent_of_batching(size: int) -> None:
    logits, labels = random_logits(100)
    whole, split = Meter(), Meter()
    whole.update(logits, labels)
    for part in zip(logits.split(size), labels.split(size), strict=True):
        split.update(*part)

    assert (split.images, split.right1, split.right5) == (whole.images, whole.right1, whole.right5)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)


def test_unreadable_images_are_skipped() -> None:
    logits, labels = random_logits(40)
    readable, all_of_them = Meter(), Meter()
    readable.update(logits[::2], labels[::2])
    labels[1::2] = -1
    all_of_them.update(logits, labels)

    assert all_of_them.skipped == 20
    assert vars(all_of_them) == {**vars(readable), "skipped": 20}


def test_unreadable_batch_counts_nothing() -> None:
    meter = Meter()
    meter.update(torch.randn(4, 10), torch.full((4,), -1))

    assert meter.score() == Score(skipped=4)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_top5_is_100_with_few_classes(classes: int) -> None:
    meter = Meter()
    meter.update(*random_logits(30, classes))

    assert meter.score().top5 == 100.0


def test_meter_is_restored_from_its_state() -> None:
    meter = Meter()
    logits, labels = random_logits(30)
    labels[3] = -1
    meter.update(logits, labels)

    assert Meter(**vars(meter)).score() == meter.score()


def test_evaluate_counts_and_keeps_predictions() -> None:
    logits, labels = random_logits(50)
    labels[[0, 20]] = -1
    meter, task, kept = Meter(), Watch(), []
    meter.update(logits, labels)
    data = zip(logits.split(16), labels.split(16), strict=True)
    score = evaluate(lambda x: x, data, task, device=CPU, keep=kept)

    assert (score.images, score.skipped, score.top1, score.top5) == (
        48, 2, meter.score().top1, meter.score().top5)  # fmt: skip
    assert score.loss == pytest.approx(meter.score().loss, rel=1e-5)
    assert torch.equal(torch.cat(kept), logits[labels >= 0].argmax(1))
    assert (task.steps, task.images) == (4, 50)
    assert task.figures["top1"] == score.top1


@pytest.mark.parametrize("data", [[], [(torch.randn(2, 3), torch.tensor([-1, -1]))]])
def test_empty_evaluation_is_refused(data: list[tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(lambda x: x, data, Watch(), device=CPU)


# Epochs.


# A step of MSAM has one pass, at the perturbed point.
@pytest.mark.parametrize("method", [name for name in MINIMIZERS if name != "msam"])
def test_epoch_metrics_are_unperturbed(method: str) -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    minimizer = MINIMIZERS[method](model, still, **taken(method, rho=0.5))
    task = Watch()
    score = one_epoch(model, minimizer, batches(3), task=task)
    expected = evaluate(model.eval(), batches(3), Watch(), device=CPU)

    assert (score.images, score.top1, score.top5) == (expected.images, expected.top1, expected.top5)
    assert score.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (task.steps, task.images) == (3, 48)
    assert task.figures["loss"] == score.loss


def test_epoch_uses_training_mode() -> None:
    model = quantize(NETWORKS["conv_bn"]).model.eval()
    one_epoch(model, QAT(model, torch.optim.SGD(model.parameters(), lr=0.1)), batches(2))

    assert model.training
    assert int(model.get_submodule("1").num_batches_tracked) == 4  # 2 batches of 2 chunks  # type: ignore[arg-type]


class Recorder:
    """A minimizer that records its chunks and changes nothing."""

    def __init__(self) -> None:
        self.shares: list[list[list[float]]] = []
        self.losses: list[float] = []

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        return self.update(self.gradients(chunks))

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        values = [loss() * share for chunk in chunks for loss, share in chunk]
        self.shares.append([[micro_batch.share for micro_batch in chunk] for chunk in chunks])
        self.losses.append(sum(value.item() for value in values))
        return Passes(torch.stack(values).sum().detach(), [], [])

    def update(self, passes: Passes) -> Tensor:
        return passes.loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(("m", "sizes"), [(8, [8, 8]), (16, [16]), (128, [16]), (6, [6, 5, 5])])
def test_batch_is_split_into_chunks(m: int, sizes: list[int]) -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    recorder = Recorder()
    ((x, labels),) = batches(1)
    one_epoch(model, recorder, [(x, labels)], m)

    assert recorder.shares == [[[size / 16] for size in sizes]]
    assert recorder.losses[0] == pytest.approx(float(F.cross_entropy(model(x), labels).detach()), rel=1e-5)


def test_chunk_is_split_into_micro_batches() -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    recorder = Recorder()
    ((x, labels),) = batches(1)
    one_epoch(model, recorder, [(x, labels)], recovery=Recovery(micro_batch=3))

    assert recorder.shares == [[[size / 16 for size in (3, 3, 2)]] * 2]
    assert recorder.losses[0] == pytest.approx(float(F.cross_entropy(model(x), labels).detach()), rel=1e-5)


def test_after_step_gets_the_step_count() -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    heard: list[int] = []
    for skip in (0, 3):
        one_epoch(model, Recorder(), batches(5), after_step=heard.append, skip=skip)

    assert heard == [1, 2, 3, 4, 5, 4, 5]


@pytest.mark.parametrize("skip", [0, 1, 3, 5])
def test_after_skip_runs_once_before_first_step(skip: int) -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    heard: list[object] = []
    hooks: dict[str, Any] = {"after_step": heard.append, "after_skip": lambda: heard.append("skipped")}
    one_epoch(model, Recorder(), batches(5), skip=skip, **hooks)

    assert heard == (["skipped"] if skip else []) + list(range(skip + 1, 6))


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stopped_at", [1, 3, 5])
@pytest.mark.parametrize("method", MINIMIZERS)
def test_interrupted_epoch_resumes_bit_identically(method: str, stopped_at: int) -> None:
    """With augmentation and dropout, which both use the random state."""

    def network() -> nn.Module:
        return nn.Sequential(NETWORKS["conv_bn"](), nn.Dropout(0.5))

    def augmented() -> list[tuple[Tensor, Tensor]]:
        return ((x + 0.1 * torch.randn_like(x), labels) for x, labels in batches(6))  # type: ignore[return-value]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Minimizer]:
        model = quantize(network).model
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, base, MINIMIZERS[method](model, base, **taken(method, rho=0.1))

    model, base, minimizer = start()
    torch.manual_seed(5)
    whole = one_epoch(model, minimizer, augmented())

    first, base, minimizer = start()
    meter = Meter()
    state = {}

    def stop(done: int) -> None:
        if done == stopped_at:
            state.update(rng=torch.get_rng_state(), meter=dict(vars(meter)))
            raise _Stop

    torch.manual_seed(5)
    with pytest.raises(_Stop):
        one_epoch(first, minimizer, augmented(), meter=meter, after_step=stop)

    kept = minimizer.state_dict()
    second, other, minimizer = start()
    minimizer.load_state_dict(kept)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(base.state_dict())
    torch.manual_seed(99)
    resumed = one_epoch(
        second,
        minimizer,
        augmented(),
        meter=Meter(**state["meter"]),
        skip=stopped_at,
        after_skip=lambda: torch.set_rng_state(state["rng"]),
    )

    assert resumed == whole
    for name, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_nan_loss_stops_training_before_saving() -> None:
    model = quantize(NETWORKS["token_mlp"]).model
    heard: list[int] = []
    data = batches(3)
    data[1][0].fill_(math.nan)
    base = torch.optim.SGD(model.parameters(), lr=0.01)

    with pytest.raises(TrainingDiverged, match=r"step 2 of this epoch: .* the loss is nan"):
        one_epoch(
            model,
            SAQ(model, base, rho=0.1),
            data,
            recovery=Recovery(patience=0),
            after_step=heard.append,
        )
    assert heard == [1]


def test_autocast_keeps_the_loss_in_float32() -> None:
    seen: list[torch.dtype] = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(logits.dtype)
        return F.cross_entropy(logits, labels)

    model = quantize(NETWORKS["conv_bn"]).model
    raw: list[torch.dtype] = []
    model.register_forward_hook(lambda module, args, output: raw.append(output.dtype))
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    objective = Objective(criterion, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    step = Stepper(model, SAQ(model, base, rho=0.1), objective, 16, Recovery())
    train_epoch(step, batches(1), Watch(), Meter())

    assert set(raw) == {torch.bfloat16}
    assert set(seen) == {torch.float32}


def test_watch_implements_task() -> None:
    task: Task = Watch()
    task.advance(images=3)
