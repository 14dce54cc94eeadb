"""A search compares configurations with a share of the error of weights, and reports them with all of it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saqcli.quant.convert import Scheme
from saqcli.quant.correction import Corrections
from saqcli.quant.cost import Budget
from saqcli.quant.layer import perturbed, weight_owners
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.quant.search_space import Candidates, search_space
from saqcli.quant.short_steps.absorb import absorb_norms
from saqcli.quant.short_steps.rescaling import can_rescale
from saqcli.searchers import Scorer, SearchProblem, closeness
from saqcli.searchers.baselines import ErrorKnapsack, RandomSearch
from saqcli.searchers.divergences import divergences
from saqcli.searchers.hawq import HAWQ
from saqcli.searchers.sensitivity import Sensitivity
from saqcli.searchers.separable import measure_noise
from saqcli.searchers.supernet import CalibratedNetwork, Comparison, ErrorShare, Supernet
from saqcli.searchers.swaps import Swaps, _Race
from saqcli.searchers.uniforms import untied_uniforms
from tests.support.searching import fresh, random_problem, search_images, tiny_problem

APART = Candidates((2, 3, 4), (2, 3, 4))


def apart(seed: int, share: float = 1.0) -> SearchProblem:
    """A random network whose weights and inputs have widths of their own."""
    problem = random_problem(seed)
    space = search_space("net", problem.space.costs, APART)
    budget = Budget(bops=(space.floor.bops + space.ceiling.bops) // 2)
    return replace(problem, space=space, budget=budget, weight_error=share)


def fewest(problem: SearchProblem) -> list[int]:
    return [0] * len(problem.space.decisions)


def outputs(model: nn.Module, problem: SearchProblem) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(problem.images.scoring[0][0])
    return found


def correcting(images: Tensor, *, biases: bool) -> Callable[[nn.Module], Callable[[], None]]:
    """The corrections of a problem: of norms, and biases if wanted."""

    def corrections(model: nn.Module) -> Callable[[], None]:
        correct = Corrections(model, biases=biases, norms=True)
        return lambda: correct([images])

    return corrections


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("seed", [1, 3, 4])
def test_network_has_a_share_of_the_error(seed: int, share: float) -> None:
    """The same network as one whose quantized weights are moved towards float by hand."""
    problem = apart(seed, share)
    network = CalibratedNetwork(problem)
    found = outputs(network.compared(fewest(problem)), problem)
    whole = Supernet(fresh(problem)).at(fewest(problem))
    owners = weight_owners(whole)
    with torch.no_grad():
        back = [(1 - share) * (layer.effective_weight() - layer.quantized_weight()) for layer in owners]
        with perturbed(owners, back):
            expected = outputs(whole, problem)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, outputs(whole, problem))
    assert torch.equal(outputs(network.at(fewest(problem)), problem), outputs(whole, problem))


def test_whole_error_is_the_calibrated_network() -> None:
    problem = apart(3)
    for choice in untied_uniforms(problem.space, problem.budget):
        assert Comparison(problem)(choice) == Scorer(problem)(choice)


@pytest.mark.parametrize("quantizer", [name for name, entry in QUANTIZERS.items() if entry.weight])
def test_every_quantizer_leaves_the_share(quantizer: str) -> None:
    """Without error the weights are those before rounding, and half of it is halfway, whatever the quantizer."""
    scheme = Scheme(quantizer=quantizer)
    problem = tiny_problem("conv_bn", candidates=Candidates((2,)), scheme=scheme)
    weights = {}
    for share in (1.0, 0.5, 0.0):
        network = CalibratedNetwork(replace(problem, weight_error=share))
        layers = weight_owners(network.compared(fewest(problem)))
        weights[share] = [layer.quantized_weight().detach() for layer in layers]
    for layer, whole, half, none in zip(layers, weights[1.0], weights[0.5], weights[0.0], strict=True):
        assert torch.equal(none, layer.effective_weight())
        torch.testing.assert_close(half, (whole + none) / 2)
        assert not torch.equal(whole, none)


@pytest.mark.parametrize("restored", [False, True])
def test_normalized_weights_are_moved_towards_normalized_ones(restored: bool) -> None:
    scheme = Scheme(weight_normalization=True, restore_deviation=restored)
    problem = tiny_problem("conv_bn", candidates=Candidates((8,)), scheme=scheme)
    problem = replace(problem, weight_error=0.0)
    network = CalibratedNetwork(problem)
    free, whole = (
        [layer.quantized_weight().detach() for layer in weight_owners(at(fewest(problem)))]
        for at in (network.compared, network.at)
    )
    for layer, moved, rounded in zip(weight_owners(network.at(fewest(problem))), free, whole, strict=True):
        if layer.latent_weight().dim() == 4:
            step = float(layer.weight_quantizer.step().detach().max())  # type: ignore[operator]
            torch.testing.assert_close(moved, rounded, rtol=0, atol=step)
            assert not torch.equal(moved, rounded)
            assert moved.mean().abs() < 1e-6
            assert restored or abs(float(moved.std()) - 1) < 1e-3


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(short_steps=4)])
def test_scores_do_not_depend_on_what_was_scored_before(scheme: Scheme) -> None:
    """With corrections, which change latent weights where norms are absorbed; and they help."""
    problem = replace(tiny_problem("conv_bn", candidates=Candidates((2, 3)), scheme=scheme), weight_error=0.5)
    if scheme.short_steps:
        assert absorb_norms(problem.model, problem.images.scoring[0][0])
    images = problem.images.scoring[0][0]

    corrected = replace(problem, corrections=correcting(images, biases=False))
    choices = [[index] * len(problem.space.decisions) for index in (0, 1)]
    alone = [Comparison(fresh(corrected))(choice) for choice in choices]
    together = Comparison(fresh(corrected))
    for choice in (*choices, *choices):
        together(choice)
        together.scored.clear()
    assert [together(choice) for choice in choices] == alone
    assert alone[0].divergence < Comparison(fresh(problem))(choices[0]).divergence


def test_corrections_are_those_of_the_compared_network() -> None:
    problem = replace(tiny_problem("conv_bn", candidates=Candidates((2,))), weight_error=0.5)
    images, choice = problem.images.scoring[0][0], fewest(problem)

    corrections = correcting(images, biases=True)
    network = CalibratedNetwork(fresh(problem, corrections=corrections))
    by_hand = Supernet(fresh(problem)).at(choice)
    ErrorShare(by_hand, 0.5)
    corrections(by_hand)()
    assert torch.equal(outputs(network.compared(choice), problem), outputs(by_hand, problem))
    assert not torch.equal(outputs(network.at(choice), problem), outputs(by_hand, problem))


@pytest.mark.parametrize("quantizer", ["clip", "dorefa"])
def test_weights_can_be_rescaled_with_a_share(quantizer: str) -> None:
    """Absorbed norms are corrected in the weights; what a hook makes of Q(w) is not compared."""
    scheme = Scheme(quantizer=quantizer, short_steps=4)
    problem = tiny_problem("conv_bn", candidates=Candidates((8,)), scheme=scheme)
    model = Supernet(fresh(problem)).at(fewest(problem))
    layers = weight_owners(model)
    able = [can_rescale(layer) for layer in layers]
    ErrorShare(model, 0.5)
    assert [can_rescale(layer) for layer in layers] == able
    assert any(able)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_losses_of_weights_are_quadratic_in_the_share(share: float) -> None:
    problem = apart(3)
    part = replace(problem, weight_error=share)
    whole, found = divergences(fresh(problem), 4), divergences(fresh(part), 4)
    for name, value in whole.items():
        factor = share**2 if name.startswith("weight") else 1.0
        assert found[name] == pytest.approx(factor * value, rel=1e-4, abs=1e-12)
    noise, less = measure_noise(fresh(problem)), measure_noise(fresh(part))
    for key, one in noise.items():
        factor = share**2 if key.operand == "weight" else 1.0
        assert less[key].error == pytest.approx(factor * one.error)
        assert less[key].power == one.power


@pytest.mark.parametrize("searcher", [ErrorKnapsack(), HAWQ(samples=1), Sensitivity()])
def test_weights_without_error_cost_nothing(searcher: Any) -> None:
    """With a share of 0 nothing is gained by more bits of weights."""
    problem = apart(3, share=0.0)
    found = searcher.search(fresh(problem))
    assert found.losses is not None
    for decision, row in zip(problem.space.decisions, found.losses, strict=True):
        by_inputs: dict[int | None, list[float]] = {}
        for bits, loss in zip(decision.options, row, strict=True):
            by_inputs.setdefault(bits.activation, []).append(loss)
        for losses in by_inputs.values():
            assert losses == pytest.approx([losses[0]] * len(losses), abs=1e-6)
        assert len({round(min(losses), 9) for losses in by_inputs.values()}) > 1


def test_sensitivity_is_measured_with_the_share() -> None:
    """Against the loss of a network in which only that layer has a part of its error."""
    share, problem = 0.4, apart(4)
    losses = Sensitivity().losses(fresh(replace(problem, weight_error=share)))
    total = sum(len(part) for _, part in problem.images.scoring)
    supernet = Supernet(fresh(problem))
    model = supernet.at(fewest(problem)).eval()
    kept = {layer: (layer.weight_quantizer, layer.input_quantizer) for layer in weight_owners(model)}
    for layer in kept:
        layer.weight_quantizer = layer.input_quantizer = nn.Identity()

    @torch.no_grad()
    def loss() -> float:
        return sum(
            float(nn.functional.cross_entropy(model(images), labels, reduction="sum"))
            for images, labels in problem.images.scoring
        )

    base = loss()
    for index in range(len(problem.space.decisions)):
        members = supernet.layers_of(index)
        for layer in members:
            layer.weight_quantizer, layer.input_quantizer = kept[layer]
        with torch.no_grad():
            back = [(1 - share) * (m.effective_weight() - m.quantized_weight()) for m in members]
        with perturbed(members, back):
            assert losses[index][0] == pytest.approx((loss() - base) / total, rel=1e-3, abs=1e-6)
        for layer in members:
            layer.weight_quantizer = layer.input_quantizer = nn.Identity()


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("scoring", [1, 512])
def test_swaps_compare_with_the_share(seed: int, scoring: int) -> None:
    """The result is no farther from float than any uniform configuration, each with the share of its error."""
    problem = apart(seed, share=0.0)
    images = search_images((1, 1, problem.model.width), seed, batches=4)
    problem = replace(problem, images=images)
    shared, whole = (
        Swaps(images=4, swaps=12, scoring=scoring).search(fresh(problem, weight_error=share))
        for share in (0.0, 1.0)
    )
    compare = Comparison(fresh(problem))
    mine = closeness(compare(shared.choice))
    assert all(
        mine <= closeness(compare(choice)) for choice in untied_uniforms(problem.space, problem.budget)
    )
    assert mine < closeness(compare(whole.choice))


def test_first_images_are_compared_with_the_share_too() -> None:
    problem = apart(0, share=0.0)
    problem = replace(problem, images=search_images((1, 1, problem.model.width), 0, batches=4))
    first = problem.images.scoring[:1]
    race = _Race(fresh(problem), first, {})
    start = tuple(fewest(problem))
    race.start([start], [start])
    assert race.measured == [
        Comparison(replace(problem, images=replace(problem.images, scoring=first)))(start)
    ]


@pytest.mark.parametrize("searcher", [Swaps(images=4, swaps=4), RandomSearch(draws=6)])
def test_results_report_the_whole_error(searcher: Any) -> None:
    problem = apart(3, share=0.3)
    found = searcher.search(fresh(problem))
    assert found.score is not None
    assert list(found.scored) == [Scorer(fresh(problem))(found.choice)]
    assert found.score(found.choice) == found.scored[0]
    assert found.scored[0] != Comparison(fresh(problem))(found.choice)


def test_random_takes_the_nearest_with_the_share() -> None:
    whole, part = (RandomSearch(draws=12).search(apart(0, share)) for share in (1.0, 0.0))
    compare = Comparison(apart(0, 0.0))
    nearest = min((one.choice for one in whole.scored), key=lambda choice: closeness(compare(choice)))
    assert nearest == tuple(part.choice)
    assert nearest != tuple(whole.choice)
