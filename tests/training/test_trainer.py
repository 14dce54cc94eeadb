"""A trainer without a run directory: fitting, saving, resuming."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saqcli.config import TrainingSection
from saqcli.errors import RunDirectoryError, TrainingDiverged
from saqcli.tasks.classification import Score, largest_loss
from saqcli.training import trainer as trainers
from saqcli.training.trainer import NO_RUN, Trainer, TrainingRun
from tests.support.networks import NETWORKS, quantize
from tests.support.steps import assert_bitwise_equal, batch, snapshot

SETTINGS = TrainingSection(epochs=2, lr=0.05, ema_decay=0.9, sam_interval=2, sam_reuse=0.5, dampening=0.5)
BATCHES = [batch(8, seed) for seed in range(3)]
VALIDATION = [batch(16, 9)]


class _Stop(Exception):
    pass


class Recorder:
    """A run that keeps what it is given, and stops after a number of offers."""

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at, self.offers = stop_at, 0
        self.metrics: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}

    def offer(self, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        self.offers += 1
        if self.offers == self.stop_at:
            self.state = copy.deepcopy(state())
            raise _Stop

    def log(self, **values: Any) -> None:
        self.metrics.append(values)

    def check_signal(self) -> None: ...


def trainer(
    validation: list[tuple[Tensor, Tensor]] | None = None,
    run: TrainingRun = NO_RUN,
    training: TrainingSection = SETTINGS,
    **options: Any,
) -> Trainer:
    model: nn.Module = quantize(NETWORKS["conv_bn"]).model
    return Trainer(
        model, BATCHES, training, num_classes=5, image_size=8, validation=validation, run=run, **options
    )


def fitted(**options: Any) -> Trainer:
    made = trainer(**options)
    made.fit()
    return made


def test_fitting_needs_no_run() -> None:
    made = fitted()

    assert (made.epoch, made.step, made.best, made.last) == (2, 0, None, None)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1.001 * largest_loss(5)])
def test_absurd_validation_loss_stops_training(loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers, "evaluate", lambda *_, **__: Score(16, loss))

    with pytest.raises(TrainingDiverged, match="the validation loss has become"):
        fitted(validation=VALIDATION)


def test_largest_loss_is_a_multiple_of_guessing() -> None:
    assert largest_loss(5) == 100 * math.log(5)
    assert largest_loss(1) == largest_loss(2)


def test_metrics_of_every_epoch_are_logged() -> None:
    run = Recorder()
    made = fitted(validation=VALIDATION, run=run)

    assert [(line["phase"], line["epoch"]) for line in run.metrics] == [
        ("train", 1), ("val", 1), ("train", 2), ("val", 2),
    ]  # fmt: skip
    assert made.last == Score(**{name: run.metrics[-1][name] for name in vars(made.last)})
    assert run.offers == 2 * (len(BATCHES) + 1)


@pytest.mark.parametrize("stop_at", range(1, 9))
@pytest.mark.parametrize("validation", [None, VALIDATION])
def test_resume_is_bit_identical_at_any_offer(stop_at: int, validation: Any) -> None:
    whole = fitted(validation=validation)
    run = Recorder(stop_at)
    with pytest.raises(_Stop):
        trainer(validation, run).fit()

    resumed = trainer(validation)
    resumed.load_state_dict(run.state)
    resumed.fit()

    assert_bitwise_equal(snapshot(whole.model, whole.optimizer), snapshot(resumed.model, resumed.optimizer))
    assert resumed.last == whole.last


def test_a_saved_trainer_is_loaded(tmp_path: Path) -> None:
    first, second = fitted(validation=VALIDATION), trainer(VALIDATION)
    first.save(tmp_path / "last.ckpt")
    second.load(tmp_path / "last.ckpt")

    assert (second.epoch, second.last) == (2, first.last)
    assert_bitwise_equal(snapshot(first.model, first.optimizer), snapshot(second.model, second.optimizer))
    with pytest.raises(RunDirectoryError, match="no checkpoint"):
        second.load(tmp_path / "none.ckpt")


def test_the_best_state_can_be_kept() -> None:
    initial = Score(images=16, top1=100.0, loss=0.0)  # nothing is better
    made = trainer(VALIDATION, training=SETTINGS.model_copy(update={"keep": "best"}), initial=initial)
    before = snapshot(made.model)
    made.fit()

    assert made.best is not None
    assert made.best.epoch == 0
    assert_bitwise_equal(before, snapshot(made.model))


def test_checkpoints_of_earlier_versions_are_loaded() -> None:
    run = Recorder(stop_at=2)
    with pytest.raises(_Stop):
        trainer(VALIDATION, run).fit()
    state = {name: value for name, value in run.state.items() if name not in ("minimizer", "best", "ranks")}

    made = trainer(VALIDATION, initial=Score())
    made.load_state_dict(state)

    assert (made.epoch, made.step, made.best) == (0, 2, None)
    assert torch.equal(next(made.model.parameters()), next(iter(state["model"].values())))


@pytest.mark.parametrize(
    ("seconds", "epoch", "said"), [(0.5, 1000, True), (0.01, 1000, False), (0.5, 10, False), (0.5, 20, True)]
)
def test_long_trainings_say_how_long(
    seconds: float, epoch: int, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time between epochs does not count: an epoch of 10 steps is too short to measure."""
    now = iter(range(1000))
    monkeypatch.setattr(trainers.time, "perf_counter", lambda: next(now) * 15 * seconds)
    notes: list[str] = []
    clock = trainers._Clock(notes.append)
    for step in range(1000):
        clock.tick(step % epoch + 1, 999 - step)
    assert notes == (["steps of training take about 8:10 more, 0.5 s each"] if said else [])
