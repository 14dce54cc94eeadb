"""Search, fine-tuning, evaluation and analysis of modules and loaders of one's own."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import saqcli as saq
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.searchers import SEARCHERS
from tests.support.modules import CLASSES, HandWritten, build, inputs_of, labels_of

FAST: dict[str, dict[str, Any]] = {"samq": {"epochs": 1}, "asga": {"epochs": 1}, "random": {"draws": 4}}


def images(count: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with a class-dependent pattern, easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    patterns = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(99))
    return patterns[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator), labels


def batches(count: int = 64, size: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(size) for part in images(count, seed)), strict=True))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network of one's own that has learned the patterns."""
    torch.manual_seed(0)
    net = HandWritten().train()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(15):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval()


def test_network_is_worth_measuring(trained: nn.Module) -> None:
    assert saq.evaluate(trained, batches(seed=1)).top1 > 80


def test_evaluate_agrees_with_a_plain_loop(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    score = saq.evaluate(q, batches(seed=1))

    x, y = images(seed=1)
    with torch.no_grad():
        logits = q.eval()(x)
    assert score.images == 64
    assert score.top1 == pytest.approx(100 * float((logits.argmax(1) == y).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-4)


def test_evaluate_takes_a_loader_and_two_inputs() -> None:
    data = TensorDataset(*inputs_of("two_inputs"), labels_of())
    assert saq.evaluate(build("two_inputs"), DataLoader(data, 4)).images == 8


def test_evaluate_needs_labels_and_scores(trained: nn.Module) -> None:
    with pytest.raises(DataError, match="no labels"):
        saq.evaluate(trained, [images()[0]])
    with pytest.raises(UnsupportedModel, match="returns a dict"):
        saq.evaluate(build("two_heads"), batches())
    with pytest.raises(DataError, match="no labelled images"):
        saq.evaluate(trained, [])


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_every_searcher_searches_own_modules(searcher: str, trained: nn.Module) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    found = saq.search(trained, "w4a4", batches(), searcher=searcher, options=FAST.get(searcher))

    assert found.cost.bops <= found.budget.bops
    assert saq.bops(trained, example=images()[0]) > found.cost.bops
    q = saq.quantize_model(trained, policy=found.policy, calibration=batches())
    assert saq.bops(q) == found.cost.bops
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_budget_and_search_agree(trained: nn.Module) -> None:
    found = saq.search(trained, "w4a4", batches(), searcher="sensitivity")
    q = saq.quantize_model(trained, budget="w4a4", searcher="sensitivity", calibration=batches())
    assert saq.bits(q) == found.policy


@pytest.mark.parametrize("name", ["two_inputs", "two_heads", "tied"])
def test_error_searcher_needs_no_scores(name: str) -> None:
    found = saq.search(build(name), "w4a4", [inputs_of(name)])
    assert found.cost.bops <= found.budget.bops


def test_searchers_say_what_they_need(trained: nn.Module) -> None:
    with pytest.raises(DataError, match="needs labelled images"):
        saq.search(trained, "w4a4", [images()[0]], searcher="sensitivity")
    with pytest.raises(UnsupportedModel, match="compares class scores"):
        saq.search(build("two_heads"), "w4a4", batches(), searcher="sensitivity")
    with pytest.raises(ConfigError, match="has no draws"):
        saq.search(trained, "w4a4", batches(), options={"draws": 3})


def test_finetune_improves_with_callbacks(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 2, calibration=batches())
    before, epochs = saq.evaluate(q, batches(seed=1)), list[dict[str, Any]]()
    score = saq.finetune(
        q, batches(), epochs=3, lr=0.01, rho=0.05, validation=batches(seed=1), on_epoch=epochs.append
    )

    assert score is not None
    assert score.loss < before.loss
    assert [each["epoch"] for each in epochs] == [1, 2, 3]
    assert epochs[-1]["val_loss"] == pytest.approx(score.loss)
    assert score == saq.evaluate(q, batches(seed=1))


def test_finetune_takes_a_loss_of_ones_own(trained: nn.Module) -> None:
    called = []

    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        called.append(len(labels))
        return F.multi_margin_loss(scores, labels)

    q = saq.quantize_model(trained, 3, calibration=batches())
    assert saq.finetune(q, batches(), epochs=1, loss=loss, method="qat") is None
    assert called == [16] * 4


def test_finetune_learns_from_a_teacher(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    one, other = (saq.quantize_model(trained, 3, calibration=batches()) for _ in range(2))
    saq.finetune(one, batches(), epochs=1)
    saq.finetune(other, batches(), epochs=1, teacher=trained)
    x = images(seed=1)[0]
    assert not torch.equal(one(x), other(x))
    assert not torch.equal(one(x), q(x))
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_own_loss_is_the_loss_of_every_figure(trained: nn.Module) -> None:
    def loss(scores: Tensor, labels: Tensor) -> Tensor:
        return F.multi_margin_loss(scores, labels)

    q, epochs = saq.quantize_model(trained, 3, calibration=batches()), list[dict[str, Any]]()
    score = saq.finetune(
        q, batches(), epochs=1, loss=loss, validation=batches(seed=1), on_epoch=epochs.append, lr=1e-9
    )

    assert score is not None
    x, y = images(seed=1)
    with torch.no_grad():
        assert score.loss == pytest.approx(float(loss(q(x), y)), rel=1e-4)
    assert epochs[0]["val_loss"] == score.loss
    assert score.top1 == saq.evaluate(q, batches(seed=1)).top1
    assert epochs[0]["loss"] < 0.5 * score.images  # a mean, not a sum


def square(scores: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(scores[:, 0], targets)


TARGETS: dict[str, tuple[Any, Any]] = {
    "several classes": (
        lambda y: F.one_hot(y, CLASSES) | F.one_hot((y + 1) % CLASSES, CLASSES),
        lambda scores, targets: F.binary_cross_entropy_with_logits(scores, targets.float()),
    ),
    "numbers": (lambda y: y / CLASSES, square),
    "shares": (lambda y: F.one_hot(y, CLASSES).double(), None),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_that_are_no_classes_have_no_accuracy(kind: str, trained: nn.Module) -> None:
    targets, loss = TARGETS[kind]
    data = [(x, targets(y)) for x, y in batches()]
    q, epochs = saq.quantize_model(trained, 3, calibration=batches()), list[dict[str, Any]]()
    score = saq.finetune(q, data, epochs=2, loss=loss, validation=data, on_epoch=epochs.append)

    assert score is not None
    assert math.isnan(score.top1)
    assert math.isnan(score.top5)
    assert {each[name] for each in epochs for name in ("top1", "top5", "val_top1", "val_top5")} == {None}
    assert epochs[-1]["val_loss"] == score.loss
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        assert score.loss == pytest.approx(float((loss or F.cross_entropy)(q(x), y.float())), rel=1e-4)


def test_best_epoch_without_accuracy_has_least_loss(trained: nn.Module) -> None:
    data = [(x, y / CLASSES) for x, y in batches()]
    q, epochs = saq.quantize_model(trained, 3, calibration=batches()), list[dict[str, Any]]()
    saq.finetune(
        q,
        data,
        epochs=3,
        lr=0.3,
        loss=square,
        validation=data,
        on_epoch=epochs.append,
        settings={"keep": "best"},
    )
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    with torch.no_grad():
        found = float(square(q.eval()(x), y))
    assert found == pytest.approx(min(each["val_loss"] for each in epochs), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda scores, labels: None, "returns a NoneType"),
        (lambda scores, labels: F.cross_entropy(scores, labels, reduction="none"), r"a tensor of \(16,\)"),
        (lambda scores, labels: F.cross_entropy(scores.detach(), labels), "without a gradient"),
        (lambda scores, labels: scores.mean().item(), "returns a float"),
    ],
)
def test_loss_that_cannot_be_descended_is_refused(loss: Any, match: str, trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    with pytest.raises(ConfigError, match=match) as caught:
        saq.finetune(q, batches(), loss=loss)
    assert len(str(caught.value).splitlines()) == 1


def test_teacher_of_other_classes_is_refused(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 7))
    with pytest.raises(UnsupportedModel, match="teacher returns 7 class scores and the model 5"):
        saq.finetune(q, batches(), teacher=other)
    with pytest.raises(UnsupportedModel, match="teacher returns a dict"):
        saq.finetune(q, batches(), teacher=build("two_heads"))


def test_labels_of_own_loss_have_a_row_each(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    with pytest.raises(DataError, match=r"16 images and labels of \(3,\)"):
        saq.finetune(q, [(x, y[:3] / 2) for x, y in batches()], loss=square)


def test_finetune_refuses_what_it_cannot_train() -> None:
    q = saq.quantize_model(build("two_heads"), 4, calibration=batches())
    with pytest.raises(UnsupportedModel, match=r"step\(closure\)"):
        saq.finetune(q, batches())
    with pytest.raises(ConfigError, match="settings"):
        saq.finetune(
            saq.quantize_model(HandWritten(), 4, calibration=batches()), batches(), settings={"x": 1}
        )


@pytest.mark.parametrize("instrument", ["sharpness", "eigenvalue", "flips", "distributions", "trace"])
def test_instruments_measure_own_modules(instrument: str, trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    before = {name: value.clone() for name, value in q.state_dict().items()}
    readings = saq.analyze(q, batches(32), [instrument], settings={"samples": 4, "iterations": 5})

    assert readings[instrument].to_dict()
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_unknown_instruments_are_refused(trained: nn.Module) -> None:
    q = saq.quantize_model(trained, 3, calibration=batches())
    with pytest.raises(ConfigError, match="there is no instrument 'x'"):
        saq.analyze(q, batches(), ["x"])
    with pytest.raises(ConfigError, match="settings"):
        saq.analyze(q, batches(), settings={"x": 1})


def test_profile_names_what_stays_in_float(trained: nn.Module) -> None:
    text = saq.summary(trained, "w4a4", example=images()[0][:1])
    assert "stays in floating point" in text
    assert "w4a4" in text
    assert "mean bits" in text
