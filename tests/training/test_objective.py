"""The objective of a batch: same images in both passes, one teacher pass, explicit formulas."""

import pytest
import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.tasks.classification import Distillation
from saqcli.training.objective import Objective, as_chunks
from tests.support.networks import CLASSES, images
from tests.support.steps import batch, make, sgd, trainable


def mixing() -> Mixup:
    return Mixup(mixup_alpha=0.4, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)


@pytest.mark.parametrize("method", ["qat", "saq", "sam"])
def test_both_passes_use_the_same_mixed_images(method: str) -> None:
    model = trainable("conv_bn")
    seen: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    x, labels = batch(16)
    pieces = Objective(nn.CrossEntropyLoss(), mix=mixing()).pieces(model, x.clone(), labels, chunk=16)
    make(method, model, sgd(model)).step(as_chunks(pieces))

    assert len(seen) == (1 if method == "qat" else 2)
    assert all(torch.equal(seen[0], other) for other in seen)
    assert not torch.equal(seen[0], x)


def test_odd_batch_drops_the_last_image() -> None:
    model = trainable("conv_bn")
    chunks = Objective(nn.CrossEntropyLoss(), mix=mixing()).pieces(model, *batch(15), chunk=16)

    assert [len(piece.labels) for chunk in chunks for piece in chunk] == [14]


def test_mixed_targets_count_as_the_largest() -> None:
    model = trainable("conv_bn")
    ((piece,),) = Objective(nn.CrossEntropyLoss(), mix=mixing()).pieces(model, *batch(16), chunk=16)
    piece()

    assert piece.targets.shape == (16, CLASSES)
    assert torch.allclose(piece.targets.sum(1), torch.ones(16))
    assert torch.equal(piece.counted()[1], piece.targets.argmax(1))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_matches_its_formula(weight: float, temperature: float) -> None:
    model = trainable("token_mlp")
    answers = torch.randn(16, CLASSES)
    objective = Objective(
        nn.CrossEntropyLoss(), distillation=Distillation(lambda x: answers, weight, temperature)
    )
    x, labels = batch(16)
    ((piece,),) = objective.pieces(model, x, labels, chunk=16)
    p = (answers.double() / temperature).softmax(1)
    logits = model(x).double()
    q = (logits / temperature).softmax(1)
    expected = (1 - weight) * F.cross_entropy(logits, labels)
    expected = expected + weight * temperature**2 * (p * (p / q).log()).sum(1).mean()

    assert piece().item() == pytest.approx(expected.item(), rel=1e-5)


def test_teacher_runs_once_per_image() -> None:
    model, teacher = trainable("conv_bn"), nn.Sequential(nn.Flatten(), nn.Linear(108, CLASSES))
    asked: list[Tensor] = []

    def answer(x: Tensor) -> Tensor:
        asked.append(x)
        return teacher(x)  # type: ignore[no-any-return]

    objective = Objective(nn.CrossEntropyLoss(), mix=mixing(), distillation=Distillation(answer))
    pieces = objective.pieces(model, *batch(16), chunk=8, micro_batch=4)
    make("saq", model, sgd(model)).step(as_chunks(pieces))

    assert torch.equal(torch.cat(asked), torch.cat([piece.images for chunk in pieces for piece in chunk]))
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_low_precision_ascent_keeps_descent() -> None:
    model = trainable("conv_bn")
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    objective = Objective(
        nn.CrossEntropyLoss(), ascent_autocast=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    make("saq", model, sgd(model)).step(as_chunks(objective.pieces(model, *batch(16), chunk=16)))

    assert seen == [torch.bfloat16, torch.float32]


def test_counting_before_any_loss_raises() -> None:
    ((piece,),) = Objective(nn.CrossEntropyLoss()).pieces(
        trainable("conv_bn"), images(4), torch.zeros(4), chunk=4
    )
    with pytest.raises(RuntimeError, match="never asked"):
        piece.counted()
