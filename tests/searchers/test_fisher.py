"""Predicted divergences, against exact ones in float64; and swaps, against every uniform configuration."""

import itertools
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import Interrupted
from saqcli.quant.cost import Budget
from saqcli.quant.grid import fake_quantize
from saqcli.quant.layer import QuantizedLayer, perturbed, quantized_layers
from saqcli.quant.search_space import Candidates, search_space
from saqcli.searchers import Scorer, closeness
from saqcli.searchers.divergences import (
    TEMPERATURE,
    _inputs,
    _movements,
    _weight_errors,
    add_divergences,
    divergences,
)
from saqcli.searchers.fisher import Fisher
from saqcli.searchers.fit import fitted, tied
from saqcli.searchers.problem import Scored, SearchProblem
from saqcli.searchers.separable import Key, Losses, relative_noise
from saqcli.searchers.supernet import CalibratedNetwork
from saqcli.searchers.swaps import Swaps, _filled, _Race, simple_choices
from saqcli.searchers.uniforms import largest_uniform, untied_uniforms
from tests.support.searching import Stopping, fresh, random_problem, search_images, tiny_problem


class Added(nn.Module):
    """An input quantizer that adds a given error, scaled."""

    def __init__(self, error: Tensor) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        return x + self.error


def in_doubles() -> tuple[SearchProblem, dict[str, QuantizedLayer], Tensor]:
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 4)))
    problem.model.double().eval()
    return problem, quantized_layers(problem.model), problem.images.scoring[0][0][:1].double()


def exact(problem: SearchProblem, layers: dict[str, QuantizedLayer], image: Tensor, key: Key) -> float:
    """1/2 d^T F d for the first-order movement d of the logits over the temperature, by central differences."""
    errors, inputs = _weight_errors(problem, layers), _inputs(problem, layers)
    layer, tiny = layers[key.layer], 1e-6
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        logits = problem.model(image)
        hook.remove()
        ends = []
        for side in (tiny, -tiny):
            if key.operand == "weight":
                with perturbed([layer], [side * errors[key]]):
                    ends.append(problem.model(image))
                continue
            level, grid = inputs[key]
            before = layer.input_quantizer
            layer.input_quantizer = Added(side * (fake_quantize(seen[0], level, grid) - seen[0]))
            ends.append(problem.model(image))
            layer.input_quantizer = before
    moved = ((ends[0] - ends[1]) / (2 * tiny * TEMPERATURE))[0]
    p = (logits[0] / TEMPERATURE).softmax(0)
    return float(0.5 * ((p * moved**2).sum() - (p * moved).sum() ** 2))


@pytest.mark.parametrize("operand", ["weight", "activation"])
def test_sketch_is_unbiased(operand: str) -> None:
    """4,000 sketches: the standard error of a mean of squares of Gaussians is sqrt(2 / 4000), 2.2 %."""
    problem, layers, image = in_doubles()
    inputs, errors = _inputs(problem, layers), _weight_errors(problem, layers)
    name = list(layers)[1]
    key = next(key for key in (*errors, *inputs) if key == Key(name, operand, 2))  # type: ignore[arg-type]
    kept_errors = {k: e for k, e in errors.items() if k == key}
    kept_inputs = {k: q for k, q in inputs.items() if k == key}
    generator = torch.Generator().manual_seed(0)
    total, count = 0.0, 4000
    for _ in range(count):
        for _, moved in _movements(problem, layers, image, kept_inputs, kept_errors, generator):
            total += 0.5 * moved**2
    expected = exact(problem, layers, image, key)
    assert expected > 0
    assert total / count == pytest.approx(expected, rel=0.12)


def test_losses_ignore_labels_and_leave_the_model_alone() -> None:
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 4)))
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    one = divergences(problem, 4)
    relabelled = [(images, (labels + 1) % 2) for images, labels in problem.images.scoring]
    other = divergences(replace(problem, images=replace(problem.images, scoring=relabelled)), 4)
    assert one == other
    assert all(torch.equal(before[name], value) for name, value in problem.model.state_dict().items())
    assert not any(layer.perturbation is not None for layer in quantized_layers(problem.model).values())
    losses = add_divergences(problem.space, one)
    fewer, more = (sum(row[index] for row in losses) for index in (0, -1))
    assert fewer > more  # noise of 2 bits and of 4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_optimum_counts_a_share_of_the_error_of_weights(share: float) -> None:
    """Divergences are quadratic in the error; the least sum of all configurations is found."""
    problem = random_problem(3)
    space = search_space("net", problem.space.costs, Candidates((2, 4), (2, 4)))
    problem = replace(problem, space=space, budget=Budget(bops=(space.floor.bops + space.ceiling.bops) // 2))
    alone = divergences(problem, 4)

    def total(choice: tuple[int, ...]) -> float:
        found = 0.0
        for decision, option in zip(space.decisions, choice, strict=True):
            bits = decision.options[option]
            for layer in decision.members:
                found += share**2 * alone.get(f"weight {layer.name} {bits.weight}", 0.0)
                found += alone.get(f"activation {layer.name} {bits.activation}", 0.0)
        return found

    within = [
        choice
        for choice in itertools.product(*(range(len(decision.options)) for decision in space.decisions))
        if problem.budget.admits(space.cost(choice))
    ]
    result = Fisher(images=4).search(replace(problem, weight_error=share))
    assert problem.budget.admits(space.cost(result.choice))
    assert total(tuple(result.choice)) == pytest.approx(min(map(total, within)), rel=1e-9)


def raced_problem(seed: int) -> SearchProblem:
    """One with eight scoring batches and widths apart, so that the first batch can mislead."""
    problem = random_problem(seed)
    space = search_space("net", problem.space.costs, Candidates((2, 3, 4, 5, 6), (2, 3, 4, 5, 6)))
    budget = Budget(bops=space.floor.bops + (space.ceiling.bops - space.floor.bops) // 3)
    width = problem.model.width
    return replace(problem, space=space, budget=budget, images=search_images((1, 1, width), seed, batches=8))


@pytest.mark.parametrize("seed", [0, 1, 2, 29, 31, 33])
@pytest.mark.parametrize("make", [random_problem, raced_problem])
def test_swaps_are_never_worse_than_a_uniform_configuration(
    make: Callable[[int], SearchProblem], seed: int
) -> None:
    """On all scoring images, of which proposals are first measured on one batch."""
    problem = make(seed)
    found = Swaps(images=4, scoring=1, swaps=6).search(fresh(problem))
    scorer = Scorer(fresh(problem))
    best = closeness(scorer(found.choice))
    for choice in untied_uniforms(problem.space, problem.budget):
        assert best <= closeness(scorer(choice))


def test_what_is_nearer_on_the_first_images_only_is_not_taken() -> None:
    problem = raced_problem(31)
    race = _Race(problem, problem.images.scoring[:1], {})
    uniforms = [tuple(choice) for choice in untied_uniforms(problem.space, problem.budget)]
    best = race.start(uniforms, uniforms)
    first, whole = Scorer(race._problem), Scorer(fresh(problem))
    misleading = [c for c in uniforms if closeness(first(c)) < closeness(first(best.choice))]
    assert misleading
    assert race.better(misleading[0], best) is best
    assert best == min(map(whole, uniforms), key=closeness)


def test_search_ends_when_patience_does(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, asked = raced_problem(1), []
    monkeypatch.setattr(_Race, "better", lambda race, choice, best: asked.append(choice) or best)
    Swaps(images=4, swaps=9, patience=3).search(fresh(problem))
    assert len(asked) == 3


def test_network_stays_calibrated_until_its_bits_change() -> None:
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 4)))
    calls: list[int] = []
    problem = replace(problem, corrections=lambda model: lambda: calls.append(1))
    network = CalibratedNetwork(problem)
    one = [value.clone() for value in network.at([0]).state_dict().values()]
    network.at((0,))
    assert len(calls) == 1
    network.at([1])
    again = network.at([0]).state_dict().values()
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))


def test_swap_is_kept_where_sums_mislead() -> None:
    problem = random_problem(21)
    found = Swaps(images=8, swaps=12).search(fresh(problem))
    losses = add_divergences(problem.space, divergences(fresh(problem), 8))
    starts = simple_choices(problem.space, problem.budget, losses, relative_noise(fresh(problem)))
    scorer = Scorer(fresh(problem))
    assert closeness(scorer(found.choice)) < min(closeness(scorer(start)) for start in starts)


def all_measured(problem: SearchProblem, truth: Losses) -> list[Scored]:
    """Every configuration, with a divergence that is the sum of ``truth``."""
    space = problem.space
    return [
        Scored(tuple(choice), space.cost(choice), 50.0, 1.0, sum(map(list.__getitem__, truth, choice)))
        for choice in itertools.product(*(range(len(decision.options)) for decision in space.decisions))
    ]


def relative_errors(problem: SearchProblem, losses: Losses, measured: list[Scored]) -> list[float]:
    return [abs(sum(map(list.__getitem__, losses, one.choice)) / one.divergence - 1) for one in measured]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_factors_of_operands_are_found_again(scale: float) -> None:
    """From divergences that are sums with known factors, of any size."""
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 3, 4), (2, 3, 4)))
    space, alone = problem.space, divergences(fresh(problem), 4)
    truth = add_divergences(space, alone, 0.5 * scale, 3.0 * scale)
    measured = all_measured(problem, truth)
    assert len(measured) == 9
    for found, wanted in zip(fitted(space, alone, measured), truth, strict=True):
        assert found == pytest.approx(wanted)


def test_factor_of_one_operand_is_learned() -> None:
    """An operand far from the common factor of its kind is found by measurements."""
    problem = random_problem(3)
    problem = replace(problem, space=search_space("net", problem.space.costs, Candidates((2, 4), (2, 4))))
    space, alone = problem.space, divergences(fresh(problem), 4)
    odd = next(iter(name for name in alone if name.startswith("weight"))).split()[1]
    changed = {name: value * (6.0 if f"weight {odd} " in name else 1.0) for name, value in alone.items()}
    measured = all_measured(problem, add_divergences(space, changed))
    learned, plain = (
        sum(relative_errors(problem, losses, measured))
        for losses in (fitted(space, alone, measured), add_divergences(space, alone))
    )
    assert 0 < learned < 0.2 * plain


def test_one_factor_where_nothing_tells_operands_apart() -> None:
    """Equal configurations give one scale for both; infinite and missing divergences none."""
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 4)))
    space, alone = problem.space, divergences(fresh(problem), 4)
    losses = add_divergences(space, alone)
    one = Scored((0,), space.cost([0]), 50.0, 1.0, 2 * losses[0][0])
    for measured in ([one], [one, one, one._replace(divergence=math.inf)]):
        assert fitted(space, alone, measured)[0] == pytest.approx([2 * loss for loss in losses[0]])
    for measured in ([], [one._replace(divergence=math.nan)], [one._replace(divergence=0.0)]):
        assert fitted(space, alone, measured) == losses
    unknown = fitted(space, dict.fromkeys(alone, math.nan), [one])
    assert all(map(math.isnan, unknown[0]))


def test_same_width_is_filled_up_in_steps_of_both_operands() -> None:
    problem = random_problem(3)
    space = search_space("net", problem.space.costs, Candidates((2, 3, 4), (2, 3, 4)))
    losses = [
        [-float((bits.weight or 0) + (bits.activation or 0)) for bits in d.options] for d in space.decisions
    ]
    budget = Budget(bops=(space.floor.bops + space.ceiling.bops) // 2)
    start = tuple(largest_uniform(space, budget))
    found = _filled(space, budget, start, tied(space, losses))
    assert found != start
    for decision, before, after in zip(space.decisions, start, found, strict=True):
        bits = decision.options[after]
        assert bits.weight == bits.activation
        assert (bits.weight or 0) >= (decision.options[before].weight or 0)


def test_swaps_report_scores_on_all_scoring_images() -> None:
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 3)))
    images, labels = problem.images.scoring[0]
    scoring = [(images, labels), (images.flip(0), labels.flip(0)), (images * 0.5, labels)]
    problem = replace(problem, images=replace(problem.images, scoring=scoring))
    found = Swaps(images=4, scoring=1, swaps=4).search(fresh(problem))
    assert found.score is not None
    chosen = found.score(found.choice)
    assert chosen == Scorer(fresh(problem))(found.choice)
    assert chosen == min(found.scored, key=closeness)
    assert {tuple(choice) for choice in untied_uniforms(problem.space, problem.budget)} <= {
        one.choice for one in found.scored
    }


def test_uniform_pairs_are_the_widest() -> None:
    problem = tiny_problem("conv_bn", candidates=Candidates((2, 3, 4)))
    space, budget = problem.space, problem.budget
    pairs = untied_uniforms(space, budget)
    costs = [space.cost(choice) for choice in pairs]
    assert pairs
    assert all(map(budget.admits, costs))
    for choice in pairs:
        dearer = [
            other
            for other in pairs
            if other != choice and all(a >= b for a, b in zip(other, choice, strict=True))
        ]
        assert not dearer


@pytest.mark.parametrize(
    ("make", "seed", "share"), [(random_problem, 1, 0.5), (random_problem, 27, 1.0), (raced_problem, 31, 0.5)]
)
@pytest.mark.parametrize("stop_after", [1, 6, 12, 16])
def test_interrupted_swaps_resume_bit_identically(
    make: Callable[[int], SearchProblem], seed: int, share: float, stop_after: int
) -> None:
    problem = replace(make(seed), weight_error=share)
    settings = {"images": 4, "scoring": 1, "swaps": 12}
    straight = Swaps(**settings).search(fresh(problem))
    memory = Stopping(stop_after)
    with suppress(Interrupted):  # a search may end before
        Swaps(**settings).search(fresh(problem, memory=memory))
    resumed = Swaps(**settings).search(fresh(problem, memory=Stopping(kept=memory.kept)))
    assert resumed.choice == straight.choice
    assert resumed.scored == straight.scored
    for other in (problem.space.floor, problem.budget, problem.space.ceiling):
        budget = Budget(bops=other.bops)
        assert resumed.propose(budget) == straight.propose(budget)
