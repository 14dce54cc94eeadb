"""The verdict: when a file counts as equal to the model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from saqcli.progress import SILENT
from saqcli.verify.layerwise import LayerCheck, LayerwiseCheck
from saqcli.verify.verdict import LARGEST_MEAN_DIFFERENCE, LEAST_AGREEMENT, Verdict, compare, judge, worst


def logits(count: int = 200) -> Tensor:
    """Rows whose best class is 0, by a margin of at least 6."""
    scores = torch.rand(count, 10)
    scores[:, 0] += 7
    return scores


def test_equal_logits_are_verified() -> None:
    truth = logits()

    assert judge(truth, truth.clone()) == Verdict(200, 1.0, 0.0, 0.0)
    assert judge(truth, truth.clone()).verified


@pytest.mark.parametrize("shape", [(200, 9), (199, 10), (200, 10, 1), (2000,), (0, 10)])
def test_other_shape_fails(shape: tuple[int, ...]) -> None:
    verdict = judge(logits(), torch.zeros(shape))

    assert not verdict.verified
    assert str(shape) in verdict.problems[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_single_nan_fails(bad: float) -> None:
    truth = logits()
    answer = truth.clone()
    answer[7, 3] = bad

    assert not judge(truth, answer).verified
    assert judge(truth, answer).problems


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reference_verifies_nothing(bad: float) -> None:
    truth = logits()
    truth[7, 3] = bad

    assert not judge(truth, truth.clone()).verified
    assert not judge(truth, logits()).verified


@pytest.mark.parametrize(
    ("wrong", "verified"), [(0, True), (1, True), (10, True), (12, True), (13, False), (200, False)]
)
def test_agreement_threshold(wrong: int, verified: bool) -> None:
    truth = logits(200)
    answer = truth.clone()
    answer[:wrong, 0], answer[:wrong, 1] = truth[:wrong, 1], truth[:wrong, 0]
    verdict = judge(truth, answer)

    assert LEAST_AGREEMENT == 0.95
    assert verdict.argmax_agreement == pytest.approx(1 - wrong / 200)
    assert verdict.verified == (verified and verdict.mean_abs_diff <= LARGEST_MEAN_DIFFERENCE)


@pytest.mark.parametrize(("share", "verified"), [(0.5, True), (0.99, True), (1.01, False), (20.0, False)])
def test_mean_difference_scales_with_logits(share: float, verified: bool) -> None:
    """A shift of all logits keeps every best class."""
    truth = logits()
    shift = share * LARGEST_MEAN_DIFFERENCE * float(truth.std())
    verdict = judge(truth, truth + shift)

    assert verdict.argmax_agreement == 1.0
    assert verdict.mean_abs_diff == pytest.approx(share * LARGEST_MEAN_DIFFERENCE, rel=1e-4)
    assert verdict.verified == verified


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_verdict_is_independent_of_logit_scale(scale: float) -> None:
    truth = logits()
    answer = truth + 0.01 * torch.randn_like(truth)
    one, other = judge(truth, answer), judge(scale * truth, scale * answer)

    assert other.mean_abs_diff == pytest.approx(one.mean_abs_diff, rel=1e-3)
    assert other.max_abs_diff == pytest.approx(scale * one.max_abs_diff, rel=1e-3)


@pytest.mark.parametrize(("gap", "agreement"), [(0.0, 1.0), (2.0**-21, 1.0), (2.0**-18, 0.0)])
def test_ties_may_break_either_way(gap: float, agreement: float) -> None:
    """Two logits that differ only by rounding are both best."""
    truth = torch.zeros(8, 5)
    truth[:, 1], truth[:, 3] = 1.0, 1.0 - gap
    answer = truth.clone()
    answer[:, 1] -= 2 * gap + 2.0**-23

    assert (answer.argmax(1) == 3).all()
    assert judge(truth, answer).argmax_agreement == agreement


def test_outlier_shows_in_max_difference() -> None:
    truth = logits()
    answer = truth.clone()
    answer[5, 0] += 3
    verdict = judge(truth, answer)

    assert verdict.verified
    assert verdict.max_abs_diff == pytest.approx(3, rel=1e-5)


@pytest.mark.parametrize("classes", [1, 10])
def test_constant_logits_are_compared(classes: int) -> None:
    truth = torch.full((8, classes), 2.0)

    assert judge(truth, truth.clone()).verified
    assert not judge(truth, truth + 1).verified


def test_file_problem_outweighs_equal_numbers() -> None:
    assert not Verdict(8, 1.0, 0.0, 0.0, ["no facts"]).verified


def test_worst_candidate_decides() -> None:
    images = logits(64)
    batches = [(batch, torch.zeros(len(batch))) for batch in images.split(10)]
    candidates = {
        "equal": lambda x: x,
        "reversed": lambda x: x.flip(1),
        "shifted": lambda x: x + 1e-3,
    }
    verdict = worst(compare(lambda x: x, candidates, batches, len(batches), SILENT).values())

    assert (verdict.images, verdict.argmax_agreement) == (64, 0.0)
    assert compare(lambda x: x, {"equal": lambda x: x}, batches, 7, SILENT)["equal"].verified


def test_failure_outweighs_larger_difference() -> None:
    """One outlier image is allowed; every best class wrong is not."""
    images = torch.rand(200, 10)
    images[:, 0] += 2e-2 + images[:, 1:].amax(1) - images[:, 0]

    def one_far_off(x: Tensor) -> Tensor:
        y = x.clone()
        y[0, 0] += 5
        return y

    def all_slightly_wrong(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] -= 4e-2
        return y

    candidates = {"far": one_far_off, "wrong": all_slightly_wrong}
    verdict = worst(compare(lambda x: x, candidates, [(images, torch.zeros(200))], 1, SILENT).values())

    assert not verdict.verified
    assert verdict.argmax_agreement == 0.0


def test_allowance_grows_with_pytorch_noise() -> None:
    """Networks that amplify rounding disagree with themselves."""
    verdict = Verdict(images=100, argmax_agreement=0.8, max_abs_diff=1.0, mean_abs_diff=0.35)
    assert len(verdict.reasons()) == 2
    verdict.pytorch_agreement, verdict.pytorch_difference = 0.9, 0.2
    assert verdict.verified
    verdict.argmax_agreement, verdict.mean_abs_diff = 0.7, 0.45
    assert len(verdict.reasons()) == 2


def test_remedy_is_for_rounding_alone() -> None:
    right = LayerwiseCheck((LayerCheck("one", 100, 1, 0, 1.1e-6),), 2e-7)
    wrong = LayerwiseCheck((LayerCheck("one", 100, 1, 0, 0.5),), 0.4)
    verdict = Verdict(100, 0.55, 1.0, 0.1, layerwise=right)
    assert verdict.reasons() == ["the best class agrees on 55.00 % of 100 images"]
    assert verdict.remedy is not None
    assert "`style=exact`, or quantize again with `quantization.short_steps=5`" in verdict.remedy
    short = replace(verdict, inexact=()).remedy
    assert short is not None
    assert short.endswith("choose `style=exact`")
    assert replace(verdict, layerwise=wrong).remedy is None
    assert replace(verdict, problems=["no facts"]).remedy is None
    assert replace(verdict, argmax_agreement=1.0).remedy is None


@pytest.mark.parametrize(("pytorch", "most"), [(1.0, 27), (0.99, 37), (0.5, 152)])
def test_documented_allowance_of_images(pytorch: float, most: int) -> None:
    """Of 500 (docs/export.md): 5 %, twice PyTorch's own share but 25 % at most, and two."""
    for wrong, verified in ((most, True), (most + 1, False)):
        verdict = Verdict(500, 1 - wrong / 500, 1.0, 0.1, pytorch_agreement=pytorch)

        assert verdict.verified is verified
