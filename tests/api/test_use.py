"""Search, fine-tuning, evaluation and analysis of modules and loaders of one's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import saqcli as saq
from saqcli.api.searching import search
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.search import SEARCHERS
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
    found = search(trained, "w4a4", batches(), searcher=searcher, options=FAST.get(searcher))

    assert found.cost.bops <= found.budget.bops
    assert saq.bops(trained, example=images()[0]) > found.cost.bops
    q = saq.quantize_model(trained, policy=found.policy, calibration=batches())
    assert saq.bops(q) == found.cost.bops
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_budget_and_search_agree(trained: nn.Module) -> None:
    found = search(trained, "w4a4", batches(), searcher="sensitivity")
    q = saq.quantize_model(trained, budget="w4a4", searcher="sensitivity", calibration=batches())
    assert saq.bits(q) == found.policy


@pytest.mark.parametrize("name", ["two_inputs", "two_heads", "tied"])
def test_error_searcher_needs_no_scores(name: str) -> None:
    found = search(build(name), "w4a4", [inputs_of(name)])
    assert found.cost.bops <= found.budget.bops


def test_searchers_say_what_they_need(trained: nn.Module) -> None:
    with pytest.raises(DataError, match="needs labelled images"):
        search(trained, "w4a4", [images()[0]], searcher="sensitivity")
    with pytest.raises(UnsupportedModel, match="compares class scores"):
        search(build("two_heads"), "w4a4", batches(), searcher="sensitivity")
    with pytest.raises(ConfigError, match="has no draws"):
        search(trained, "w4a4", batches(), options={"draws": 3})


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
