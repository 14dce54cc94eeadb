"""Parts of the searchers: sampling, controller, learner, perturbed cost, supernet, losses and resume."""

import copy
import io
import math
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import DeviceMemoryError, Interrupted, UnsupportedModel
from saqcli.progress import SILENT
from saqcli.quant import calibration, convert
from saqcli.quant.convert import Scheme
from saqcli.quant.correction import Corrections, correct
from saqcli.quant.cost import BUDGET_USE, USE_MIDDLE, Budget, CostModel, LayerCost
from saqcli.quant.layer import quantized_layers
from saqcli.quant.search_space import Candidates, SearchSpace, search_space
from saqcli.searchers import SEARCHERS, SearchProblem, SearchResult
from saqcli.searchers.controller import Controller, Reinforce
from saqcli.searchers.hawq import HAWQ
from saqcli.searchers.knapsack import Sampler, budget_logits, in_window
from saqcli.searchers.samq import SharpnessAwareCost
from saqcli.searchers.sensitivity import Sensitivity
from saqcli.searchers.separable import Key, measure_noise
from saqcli.searchers.supernet import Scorer, Supernet, SwitchableNorm, layers_before_norms
from saqcli.training.loop import evaluate
from saqcli.training.minimizers.cases import SAQ
from saqcli.training.objective import micro_batches
from saqcli.training.perturbation import PerturbedSet
from tests.support import tiny
from tests.support.searching import (
    CLASSES,
    Stopping,
    fresh,
    problem_of,
    search_images,
    tiny_problem,
    traced_problem,
)
from tests.support.spaces import admitted, budget_within, every_cost, random_space, spaces, used
from tests.support.steps import AttemptWatch, fail_elsewhere
from tests.support.sweeps import examples, sweep
from tests.support.toys import runs_out_of_memory

NORMED = ["conv_bn", "residual", "depthwise"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simple_space(layers: int, widths: tuple[int, ...], inputs: tuple[int, ...] | None = None) -> SearchSpace:
    """Free layers of equal cost."""
    costs = tuple(LayerCost(f"l{i}", "Linear", 1000, 1000, f"l{i}", None) for i in range(layers))
    return search_space("simple", CostModel(costs), Candidates(widths, inputs))


def uneven_space() -> SearchSpace:
    """Decisions with 2, 4 and 3 options."""
    costs = tuple(LayerCost(f"l{i}", "Linear", 1000, 1000, f"l{i}", None) for i in range(3))
    rules = {"l0": "2-3", "l2": "3-6"}
    from saqcli.quant.search_space import parse_rule

    parsed = {pattern: parse_rule(text) for pattern, text in rules.items()}
    return search_space("uneven", CostModel(costs), Candidates((2, 3, 4, 6)), parsed)


# Sampling


def shares(space: SearchSpace, budget: Budget, logits: list[Tensor]) -> np.ndarray:
    """Mean cost of draws with these probabilities, as a share of every bound."""
    bounds = budget.bounds()
    found = np.array([space.fixed_cost[index] / bound for index, bound in bounds])
    for decision, row in zip(space.decisions, logits, strict=True):
        costs = np.array([[cost[index] / bound for index, bound in bounds] for cost in decision.costs])
        found = found + row.exp().numpy() @ costs
    return found


@given(spaces(), st.integers(0, 10**6), st.sampled_from(["bops", "size"]))
@settings(max_examples=examples(300), deadline=None, derandomize=True)
def test_mean_draw_cost_is_mid_window(space: SearchSpace, seed: int, kind: str) -> None:
    budget = budget_within(space, random.Random(seed), kind)
    ((index, bound),) = budget.bounds()
    middle = (1 + BUDGET_USE) / 2
    logits = budget_logits(space, budget)
    (share,) = shares(space, budget, logits)
    even = [torch.full((len(d.options),), -math.log(len(d.options))) for d in space.decisions]
    (evenly,) = shares(space, budget, even)

    assert all(abs(float(row.exp().sum()) - 1) < 1e-12 for row in logits)
    if evenly <= middle:
        assert share == pytest.approx(evenly, rel=1e-5)
        assert all(torch.allclose(row, row.mean()) for row in logits)
    elif space.floor[index] < 0.99 * bound:  # otherwise near the floor, where the multiplier is unbounded
        assert share == pytest.approx(middle, abs=1e-6)
    else:
        assert share <= max(space.floor[index] / bound, middle) + 1e-3


@given(spaces(), st.integers(0, 10**6))
@settings(max_examples=examples(200), deadline=None, derandomize=True)
def test_two_bounds_hold_on_average(space: SearchSpace, seed: int) -> None:
    budget = budget_within(space, random.Random(seed), "both")
    middle = (1 + BUDGET_USE) / 2
    even = [torch.full((len(d.options),), -math.log(len(d.options))) for d in space.decisions]
    evenly = shares(space, budget, even)
    near_floor = any(space.floor[index] >= 0.99 * bound for index, bound in budget.bounds())
    if near_floor or (evenly <= middle).all():
        return
    found = shares(space, budget, budget_logits(space, budget))
    assert (found <= middle + 1e-6).all()
    assert found.max() == pytest.approx(middle, abs=1e-6)


def test_equal_cost_options_are_equally_likely() -> None:
    """Probabilities depend only on the cost."""
    rng = random.Random(3)
    for _ in range(50):
        space = random_space(rng)
        budget = budget_within(space, rng)
        for decision, row in zip(space.decisions, budget_logits(space, budget), strict=True):
            for (one, p), (other, q) in product(zip(decision.costs, row, strict=True), repeat=2):
                assert one != other or p == q


def test_without_budget_draws_are_uniform() -> None:
    rows = budget_logits(uneven_space(), Budget())
    assert [len(row) for row in rows] == [2, 4, 3]
    assert all(torch.allclose(row.exp(), torch.full_like(row, 1 / len(row))) for row in rows)


@pytest.mark.parametrize("dice", sweep([7, 8], lambda dice: dice == 7))
def test_draws_are_distinct_and_within_budget(dice: int) -> None:
    rng = random.Random(dice)
    with_window = 0
    for seed in range(20):
        space = random_space(rng, 2, 5)
        budget = budget_within(space, rng)
        costs = every_cost(space)
        window = int((admitted(costs, budget) & used(costs, budget)).sum())
        drawn = Sampler(space, budget, generator(seed)).draw_distinct(8)
        assert 1 <= len(drawn) <= 8
        assert len({tuple(choice) for choice in drawn}) == len(drawn)
        assert all(budget.admits(space.cost(choice)) for choice in drawn)
        if window:
            with_window += 1
            assert len(drawn) <= window or budget.admits(space.ceiling)
            assert all(in_window(space, budget, choice) for choice in drawn), seed
    assert with_window > 10


def test_equal_cost_configurations_are_uniform() -> None:
    """Six ways to give two of four layers 4 bits; chi-square at 5 degrees of freedom, 20.5 for one in a thousand."""
    space = simple_space(4, (2, 4))
    budget = Budget(1000 * (2 * 16 + 2 * 4))
    sampler = Sampler(space, budget, generator(5))
    count = 3000
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(count):
        choice = tuple(sampler.draw())
        seen[choice] = seen.get(choice, 0) + 1
    assert set(seen) == {choice for choice in product((0, 1), repeat=4) if sum(choice) == 2}
    assert sum((n - count / 6) ** 2 / (count / 6) for n in seen.values()) < 20.5


# The controller


def controller_of(space: SearchSpace, scale: float = 1.0, prior: list[Tensor] | None = None) -> Controller:
    """``scale`` enlarges the parameters, so that probabilities are far from uniform."""
    made = Controller(space, prior or budget_logits(space, Budget()), generator(1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    return made


SPACES = {
    "tied": simple_space(3, (2, 4)),
    "apart": simple_space(2, (2, 4, 8), (3, 8)),
    "uneven": uneven_space(),
}


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_read_reproduces_draw_probabilities(space: SearchSpace) -> None:
    controller = controller_of(space, 5)
    drawn = controller.draw(50, generator())
    read = controller.evaluate(drawn.choices)
    assert torch.equal(drawn.choices, read.choices)
    for one, other in ((0, 0), (1, 1), (2, 2), (3, 3)):
        assert torch.equal(drawn[one], read[other])
    picked = drawn.options.gather(2, drawn.choices[..., None])[..., 0].sum(1)
    torch.testing.assert_close(picked, drawn.log_probability)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_sequence_probabilities_sum_to_one(
    space: SearchSpace,
) -> None:
    every = torch.tensor(list(product(*(range(len(d.options)) for d in space.decisions))))
    with torch.no_grad():
        read = controller_of(space, 5).evaluate(every)
    p = read.log_probability.double().exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert float((p * read.entropy).sum()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-5)
    assert p.max() > 1.5 * p.min()  # they differ


def test_sequence_entropies_match_enumeration() -> None:
    space = simple_space(2, (2, 4))
    with torch.no_grad():
        read = controller_of(space, 8).evaluate(torch.tensor(list(product((0, 1), repeat=2))))
    p = read.log_probability.double().exp().view(2, 2)
    first = p.sum(1)
    for choice, entropy in zip(product((0, 1), repeat=2), read.entropy, strict=True):
        then = p[choice[0]] / first[choice[0]]
        expected = -(first * first.log()).sum() - (then * then.log()).sum()
        assert float(entropy) == pytest.approx(float(expected), abs=1e-5)


def test_draw_frequencies_match_probabilities() -> None:
    space = simple_space(2, (2, 4))
    controller = controller_of(space, 8)
    count = 4000
    with torch.no_grad():
        drawn = controller.draw(count, generator(2))
        p = controller.evaluate(torch.tensor(list(product((0, 1), repeat=2)))).log_probability.exp()
    for choice, probability in zip(product((0, 1), repeat=2), p, strict=True):
        seen = int((drawn.choices == torch.tensor(choice)).all(1).sum())
        spread = math.sqrt(count * float(probability * (1 - probability)))
        assert abs(seen - count * float(probability)) < 4 * spread


def test_unavailable_options_are_never_drawn() -> None:
    space = uneven_space()
    controller = controller_of(space, 20)
    drawn = controller.draw(2000, generator())
    for d, decision in enumerate(space.decisions):
        count = len(decision.options)
        assert set(drawn.choices[:, d].tolist()) <= set(range(count))
        assert drawn.options[:, d, :count].isfinite().all()
        assert (drawn.options[:, d, count:] == -torch.inf).all()
    assert drawn.entropy.isfinite().all()


@pytest.mark.parametrize("apart", [False, True])
def test_zero_head_draws_from_the_prior(apart: bool) -> None:
    space = SPACES["apart" if apart else "uneven"]
    budget = budget_within(space, random.Random(1), "bops")
    prior = budget_logits(space, budget)
    controller = controller_of(space, prior=prior)
    with torch.no_grad():
        controller.head.weight.zero_()
        controller.head.bias.zero_()
    for rows in (prior, budget_logits(space, Budget())):
        controller.set_prior(rows)
        drawn = controller.draw(3, generator())
        for d, row in enumerate(rows):
            torch.testing.assert_close(drawn.options[:, d, : len(row)], row.float().expand(3, -1))


def test_untied_options_share_logits_by_width() -> None:
    space = SPACES["apart"]
    drawn = controller_of(space, 10).draw(5, generator())
    for d, decision in enumerate(space.decisions):
        at = {(o.weight, o.activation): drawn.options[:, d, i] for i, o in enumerate(decision.options)}
        for weight in (4, 8):
            torch.testing.assert_close(at[weight, 3] - at[weight, 8], at[2, 3] - at[2, 8], atol=1e-5, rtol=0)


def test_later_bits_depend_on_earlier_draws() -> None:
    read = controller_of(simple_space(2, (2, 4)), 8).evaluate(torch.tensor([[0, 0], [1, 0]]))
    assert torch.equal(read.options[0, 0], read.options[1, 0])
    assert (read.options[0, 1] - read.options[1, 1]).abs().max() > 1e-3


def test_initial_parameters_are_small() -> None:
    one, other = controller_of(SPACES["tied"]), controller_of(SPACES["tied"])
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.abs().max() <= 0.1


# Its learning


def learner_of(controller: Controller, **options: Any) -> Reinforce:
    given: dict[str, Any] = {
        "lr": 5e-3,
        "weight_decay": 5e-5,
        "entropy_weight": 0.01,
        "baseline": "none",
        "replay": 1,
    }
    return Reinforce(controller, **{**given, **options})


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_plain_step_is_reinforce_with_adam(
    space: SearchSpace,
) -> None:
    controller = controller_of(space, 3)
    before = copy.deepcopy(controller)
    choice, cost, lr, decay, weight = [1] * len(space.decisions), 0.7, 5e-3, 5e-5, 0.01
    learner_of(controller).learn(choice, cost)

    twin = copy.deepcopy(before).double()
    torch.set_default_dtype(torch.float64)
    try:
        read = twin.evaluate(torch.tensor([choice]))
        (cost * read.log_probability - weight * read.entropy).mean().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    for after, was, exact in zip(
        controller.parameters(), before.parameters(), twin.parameters(), strict=True
    ):
        assert after.grad is not None
        scale = float(exact.grad.abs().max())  # type: ignore[union-attr]
        torch.testing.assert_close(after.grad.double(), exact.grad, rtol=1e-4, atol=1e-5 * scale + 1e-9)
        g = after.grad.double() + decay * was.detach().double()
        expected = was.detach().double() - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(after.detach().double(), expected, rtol=1e-6, atol=1e-7)


def test_ema_advantages_are_normalized() -> None:
    learner = learner_of(controller_of(SPACES["tied"]), baseline="ema")
    average, distance = None, 0.0
    for cost in (2.0, 1.0, 4.0, 1.5, 90.0, 2.0):
        learner.learn([0, 1, 0], cost)
        above = 0.0 if average is None else cost - average
        distance = 0.95 * distance + 0.05 * abs(above) if distance else abs(above)
        expected = min(max(above / distance if distance else 0.0, -3.0), 3.0)
        assert learner.state_dict()["draws"][-1][2] == pytest.approx(expected)
        average = cost if average is None else 0.95 * average + 0.05 * cost
        assert learner.average == pytest.approx(average)


@pytest.mark.parametrize("baseline", ["ema", "none"])
def test_nan_cost_counts_as_bad(baseline: str) -> None:
    controller = controller_of(SPACES["tied"])
    learner = learner_of(controller, baseline=baseline)
    for cost in (1.0, 2.0, float("inf"), float("nan"), 1.5):
        learner.learn([0, 1, 0], cost)
    advantages = [draw[2] for draw in learner.state_dict()["draws"]]
    assert max(advantages) > 0
    assert all(math.isfinite(advantage) for advantage in advantages)
    assert learner.average is not None
    assert math.isfinite(learner.average)
    assert controller.draw(4, generator(0)).log_probability.isfinite().all()


@pytest.mark.parametrize("replay", [1, 8])
def test_replay_uses_the_latest_draws(replay: int) -> None:
    learner = learner_of(controller_of(SPACES["tied"]), replay=replay)
    for number in range(12):
        learner.learn([number % 2, 1, 0], float(number))
    assert [draw[2] for draw in learner.state_dict()["draws"]] == [float(n) for n in range(12)][-replay:]


@pytest.mark.parametrize("replay", sweep([1, 8], lambda replay: replay == 1))
def test_controller_finds_the_best_sequence(replay: int) -> None:
    """The cost is the number of wrong decisions."""
    space = simple_space(3, (2, 3, 4, 8))
    best = [3, 0, 2]
    controller = controller_of(space)
    learner = learner_of(controller, baseline="ema", replay=replay, entropy_weight=0.05)
    random_ = generator(4)
    for _ in range(700):
        choice = controller.draw(1, random_).choices[0].tolist()
        learner.learn(choice, float(sum(a != b for a, b in zip(choice, best, strict=True))))
    drawn = controller.draw(100, random_).choices
    assert (drawn == torch.tensor(best)).all(1).float().mean() > 0.5
    assert drawn.mode(0).values.tolist() == best


def test_learning_resumes_bit_identically() -> None:
    space = SPACES["uneven"]
    rng = random.Random(0)
    steps = [([rng.randrange(len(d.options)) for d in space.decisions], rng.random()) for _ in range(20)]
    whole, part = (learner_of(controller_of(space), baseline="ema", replay=4) for _ in range(2))
    for choice, cost in steps:
        whole.learn(choice, cost)
    for choice, cost in steps[:9]:
        part.learn(choice, cost)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    again = learner_of(controller_of(space, 7), baseline="ema", replay=4)
    again.load_state_dict(torch.load(file, weights_only=True))
    for choice, cost in steps[9:]:
        again.learn(choice, cost)
    assert again.average == whole.average
    for one, other in zip(again.controller.parameters(), whole.controller.parameters(), strict=True):
        assert torch.equal(one, other)


# The supernet


def supernet_of(name: str, *, switch_norms: bool = False, **options: Any) -> Supernet:
    net = Supernet(tiny_problem(name, **options))
    if switch_norms:
        net.switch_norms()
    net.model.eval()
    return net


@torch.no_grad()
def answer(supernet: Supernet, seed: int = 0) -> Tensor:
    shape = supernet.problem.images.scoring[0][0].shape[1:]
    found: Tensor = supernet.model(tiny.images(tuple(shape), seed=seed))  # type: ignore[arg-type]
    return found.clone()


@pytest.mark.parametrize("switch_norms", [False, True])
@pytest.mark.parametrize("name", tiny.TINY)
def test_selection_is_reversible(name: str, switch_norms: bool) -> None:
    supernet = supernet_of(name, switch_norms=switch_norms)
    decisions = supernet.problem.space.decisions
    low, high = [0] * len(decisions), [len(d.options) - 1 for d in decisions]
    supernet.select(low)
    first = answer(supernet)
    supernet.select(high)
    second = answer(supernet)
    assert not torch.equal(first, second)
    for d in range(len(decisions)):  # every decision matters
        one = [*high[:d], 0, *high[d + 1 :]]
        supernet.select(one)
        assert supernet.choice == one
        assert not torch.equal(answer(supernet), second), decisions[d].name
    supernet.select(low)
    assert torch.equal(answer(supernet), first)


@pytest.mark.parametrize("name", tiny.TINY)
def test_active_bits_equal_the_choice(name: str) -> None:
    supernet = supernet_of(name, candidates=Candidates((2, 4), (3, 8)))
    space = supernet.problem.space
    rng = random.Random(0)
    for _ in range(3):
        choice = [rng.randrange(len(d.options)) for d in space.decisions]
        supernet.select(choice)
        order = [layer.name for layer in space.costs.layers]
        assert convert.active_bits(supernet.model, "tiny", order) == space.config(choice)


@pytest.mark.parametrize("name", NORMED)
def test_switchable_norms_start_equal_to_plain(name: str) -> None:
    plain, switched = supernet_of(name), supernet_of(name, switch_norms=True)
    for choice in ([0] * len(plain.problem.space.decisions), plain.choice):
        plain.select(choice)
        switched.select(choice)
        assert torch.equal(answer(plain), answer(switched))


@pytest.mark.parametrize("name", tiny.TINY)
@pytest.mark.parametrize(("biases", "norms"), [(True, True), (True, False)])
def test_scores_equal_calibrated_networks(name: str, biases: bool, norms: bool) -> None:
    """Independent of earlier scores and of changes of the weights; with real corrections."""
    problem = tiny_problem(name, candidates=Candidates((2, 3)))
    images = [batch for batch, _ in problem.images.scoring]

    def corrections(model: nn.Module) -> Callable[[], None]:
        return partial(Corrections(model, biases=biases, norms=norms), images)

    asked = fresh(problem, corrections=corrections)
    scorer = Scorer(asked)
    with torch.no_grad():
        for parameter in asked.model.parameters():
            parameter.zero_()
    decisions = len(problem.space.decisions)
    for choice in ([1] * decisions, [0] * decisions, [0] + [1] * (decisions - 1)):
        alone = fresh(problem).model
        signed = {layer: facts.signed for layer, facts in problem.statistics.items()}
        convert.install(alone, problem.scheme, problem.config(choice), signed)
        calibration.fit(alone, problem.statistics)
        correct(alone, images, biases=biases, norms=norms)
        with SILENT.task("", 0) as task:
            expected = evaluate(alone.eval(), problem.images.scoring, task, device=problem.device)
        assert scorer(choice)[2:4] == (expected.top1, expected.loss)
        with torch.no_grad():
            there = torch.cat([alone(batch) for batch in images]).double().log_softmax(1)
            origin = (
                torch.cat([fresh(problem).model.eval()(batch) for batch in images]).double().log_softmax(1)
            )
        apart = float((origin.exp() * (origin - there)).sum(1).mean())
        assert scorer(choice).divergence == pytest.approx(apart, rel=1e-4, abs=1e-6)


def test_reported_scores_are_always_calibrated() -> None:
    """The report is independent of where draws were compared."""
    problem = PROBLEMS["conv_bn"]()  # type: ignore[no-untyped-call]
    options = {"epochs": 1, "warmup": 0, "draws": 3}
    found = [
        SEARCHERS["samq"].make(**options, score_in=where).search(fresh(problem))
        for where in ("calibrated", "supernet")
    ]
    assert found[0].scored == found[1].scored
    scorer = Scorer(fresh(problem))
    assert [scorer(one.choice) for one in found[0].scored] == found[0].scored


def test_only_selected_norm_is_trained() -> None:
    supernet = supernet_of("conv_bn", switch_norms=True, rules={"0": "2-8"})
    space = supernet.problem.space
    switches = {n: m for n, m in supernet.model.named_modules() if isinstance(m, SwitchableNorm)}
    assert list(switches) == ["1", "4"]
    assert [d.name for d in space.decisions] == ["0", "3"]
    before = {key: value.clone() for key, value in supernet.model.state_dict().items()}
    supernet.select([0, 2])
    supernet.model.train()
    answer(supernet)
    moved = {key for key, value in supernet.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[0] for key in moved} == {"1.copies.0", "4.copies.2"}


def test_norm_after_pinned_layer_is_unchanged() -> None:
    supernet = supernet_of("conv_bn", switch_norms=True)
    assert isinstance(supernet.model.get_submodule("1"), nn.BatchNorm2d)
    assert isinstance(supernet.model.get_submodule("4"), SwitchableNorm)


class PreActivation(nn.Module):
    """A network with norms before their convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm3, self.head = nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return self.head(F.relu(self.norm3(x)).mean((2, 3)))


class OneNormTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.two(self.norm(self.one(x)))).mean((2, 3)))


def behind(net: nn.Module, shape: tuple[int, ...]) -> dict[str, str]:
    convert.wrap(net.train())
    found = layers_before_norms(net, tiny.images(shape, 1))  # type: ignore[arg-type]
    assert net.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    return found


def test_norm_belongs_to_the_last_layer_before() -> None:
    assert behind(*tiny.conv_bn()) == {"1": "0", "4": "3"}
    assert behind(*tiny.residual()) == {
        "1": "0",
        "3.main.1": "3.main.0",
        "3.main.4": "3.main.3",
        "3.shortcut.1": "3.shortcut.0",
        "4.main.1": "4.main.0",
        "4.main.4": "4.main.3",
    }
    assert behind(PreActivation(), (3, 6, 6)) == {"norm1": "stem", "norm2": "conv1", "norm3": "conv2"}


def test_layer_norms_belong_to_previous_layer() -> None:
    assert behind(*tiny.tokens()) == {"norm": "patches"}
    transformer = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2, num_classes=CLASSES
    )
    assert behind(transformer, (3, 16, 16)) == {
        "blocks.0.norm1": "patch_embed.proj",
        "blocks.0.norm2": "blocks.0.attn.proj",
        "blocks.1.norm1": "blocks.0.mlp.fc2",
        "blocks.1.norm2": "blocks.1.attn.proj",
        "norm": "blocks.1.mlp.fc2",
    }


def test_norm_after_several_layers_is_skipped() -> None:
    assert behind(OneNormTwice(), (3, 4, 4)) == {}
    assert behind(*tiny.attention()) == {}


def test_clipping_levels_are_per_width() -> None:
    """A step at one width leaves the levels of all others unchanged."""
    supernet = supernet_of("conv_bn")
    supernet.select([1])
    model = supernet.model.train()
    layer = supernet.layers_of(0)[0]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    images, labels = supernet.problem.images.scoring[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    SAQ(model, optimizer, rho=0.1).step([micro_batches(model, images, labels, None)])
    levels = [key for key in before if "clipping_level" in key]
    assert len(levels) == 2
    for key in levels:
        after = layer.state_dict()[key]
        assert len(after) == 3
        same = [torch.equal(a, b) for a, b in zip(after, before[key], strict=True)]
        assert same == [True, False, True]


# The sharp cost


def sharp_cost_of(name: str, rho: float, budget: Budget | None = None, **options: Any) -> SharpnessAwareCost:
    supernet = supernet_of(name, switch_norms=True, budget=budget, **options)
    perturbed = PerturbedSet(supernet.model)
    reference = [len(decision.options) - 1 for decision in supernet.problem.space.decisions]
    return SharpnessAwareCost(
        supernet,
        perturbed,
        rho=rho,
        rho_unit="deviation",
        cost_weight=6.0,
        cost_unit="budget",
        center=USE_MIDDLE,
        reference=reference,
    )


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def plain_loss(supernet: Supernet, choice: list[int], images: Tensor, labels: Tensor) -> float:
    supernet.select(choice)
    with torch.no_grad():
        return float(cross_entropy(supernet.model, images, labels))


@pytest.mark.parametrize("name", tiny.TINY)
def test_perturbation_reaches_searched_layers(name: str) -> None:
    cost = sharp_cost_of(name, 0.5, candidates=Candidates((3, 4, 8)))
    supernet = cost.supernet
    batch = supernet.problem.images.scoring[0]
    choice = [1] * len(supernet.problem.space.decisions)
    met: dict[str, Tensor] = {}
    layers = quantized_layers(supernet.model)
    for key, layer in layers.items():  # what the layer adds to its weight, in the pass without gradients

        def note(original: Any = layer.quantized_weight, layer: Any = layer, key: str = key) -> Tensor:
            found: Tensor = original()
            if not torch.is_grad_enabled() and layer.perturbation is not None:
                met[key] = layer.perturbation.clone()
            return found

        layer.quantized_weight = note  # type: ignore[method-assign]
    cost(choice, *batch)
    searched = {member.name for d in supernet.problem.space.decisions for member in d.members}
    assert searched <= set(met)
    for key in searched:
        assert met[key].abs().max() > 0, key
    assert all(layer.perturbation is None for layer in layers.values())


@pytest.mark.parametrize("name", [*NORMED, "attention"])
def test_controller_cost_matches_its_formula(name: str) -> None:
    cost = sharp_cost_of(name, 0.3)
    supernet = cost.supernet
    decisions = supernet.problem.space.decisions
    images, labels = supernet.problem.images.scoring[0]
    for choice in ([0] * len(decisions), [1] * len(decisions)):
        found = cost(choice, images, labels)
        assert supernet.choice == choice
        least = plain_loss(supernet, [len(d.options) - 1 for d in decisions], images, labels)
        supernet.select(choice)
        model = supernet.model
        _, gradients = cost.perturbed.gradients(partial(cross_entropy, model, images, labels))
        with cost.perturbed.applied(cost.perturbed.ascent(gradients, 0.3, "deviation")), torch.no_grad():
            sharp = float(cross_entropy(model, images, labels))
        assert found == pytest.approx(sharp - least + cost.penalty(choice), abs=1e-6)
        assert sharp > plain_loss(supernet, choice, images, labels)


@pytest.mark.parametrize("radius", [0.3, 0.0])
def test_out_of_memory_cost_uses_micro_batches(radius: float) -> None:
    """In eval mode the mean over micro-batches is the mean over all images."""
    cost = sharp_cost_of("residual", radius)
    choice = [0] * len(cost.supernet.problem.space.decisions)
    images, labels = cost.supernet.problem.images.scoring[0]
    found = cost(choice, images, labels)
    later = 2 * bool(radius)  # the reference, the ascent, and then
    cost.supernet.model.register_forward_hook(partial(runs_out_of_memory, 5, passes=[later]))
    assert cost(choice, images, labels) == pytest.approx(found, abs=1e-5)
    assert cost.recovery.micro_batch in (2, 3, 4, 5)
    cost.supernet.model.register_forward_hook(partial(runs_out_of_memory, 0))
    with pytest.raises(DeviceMemoryError, match="out of memory with 2 images at a time"):
        cost(choice, images, labels)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_failed_cost_is_freed_before_shrinking(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cost = sharp_cost_of("residual", 0.3)
    watch = AttemptWatch(monkeypatch)
    if elsewhere:
        fail_elsewhere(monkeypatch)
    else:
        cost.supernet.model.register_forward_hook(partial(runs_out_of_memory, 5))
    cost([0] * len(cost.supernet.problem.space.decisions), *cost.supernet.problem.images.scoring[0])
    assert watch.alive
    assert not any(watch.alive)


@pytest.mark.parametrize("name", [*NORMED, "attention"])
def test_zero_radius_cost_is_the_plain_loss(name: str) -> None:
    cost = sharp_cost_of(name, 0.0)
    decisions = cost.supernet.problem.space.decisions
    images, labels = cost.supernet.problem.images.scoring[0]
    choice = [0] * len(decisions)
    found = cost(choice, images, labels)
    plain = plain_loss(cost.supernet, choice, images, labels)
    least = plain_loss(cost.supernet, [len(d.options) - 1 for d in decisions], images, labels)
    assert found == pytest.approx(plain - least + cost.penalty(choice), abs=1e-7)
    assert cost.sharpness(choice) == 0
    cost.reference = None
    assert cost(choice, images, labels) == pytest.approx(plain + cost.penalty(choice), abs=1e-7)


def test_cost_is_finite_and_network_unchanged() -> None:
    cost = sharp_cost_of("residual", 0.5)
    model = cost.supernet.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = cost([0] * len(cost.supernet.problem.space.decisions), *cost.supernet.problem.images.scoring[0])
    assert type(found) is float
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_penalty_is_the_squared_relative_miss() -> None:
    problem = tiny_problem("residual")
    space = problem.space
    middle = (1 + BUDGET_USE) / 2
    bops, size = space.cost([1] * len(space.decisions))
    for budget in (Budget(bops), Budget(size=size), Budget(bops, 2 * size), Budget(2 * bops, size)):
        cost = sharp_cost_of("residual", 0.0, budget)
        for choice in ([0] * len(space.decisions), [1] * len(space.decisions), [2, 1, 0, 1]):
            paid = space.cost(choice[: len(space.decisions)])
            share = max(paid[index] / bound for index, bound in budget.bounds())
            expected = 6.0 * (share / middle - 1) ** 2
            assert cost.penalty(choice[: len(space.decisions)]) == pytest.approx(expected, rel=1e-12)


def test_penalty_has_the_unit_and_center_of_the_paper() -> None:
    """beta (c - C)**2 with costs in 10**6 bit-operations and C the budget: no penalty at the budget itself."""
    space = tiny_problem("residual").space
    bops = space.cost([1] * len(space.decisions)).bops
    cost = sharp_cost_of("residual", 0.0, Budget(bops))
    cost.cost_unit, cost.center, cost.cost_weight = "M", 1.0, 1e-4
    for option in (0, 1, 2):
        choice = [option] * len(space.decisions)
        expected = 1e-4 * ((space.cost(choice).bops - bops) / 1e6) ** 2
        assert cost.penalty(choice) == pytest.approx(expected, rel=1e-9)


# Losses measured one decision at a time


class Shared(nn.Module):
    """A layer that runs twice, with others before, between and after, and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.twice, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.twice(self.act(self.one(self.act(self.stem(x))))))
        x = self.act(self.twice(self.act(self.two(x))))
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Every output is changed in place by its successor; the shortcut also adds in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.two, self.head = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu_()
        z = self.one(y).mul_(2).relu_()
        z = self.two(z).relu_()
        z += y
        return self.head(z.mean((2, 3)))


class BorrowedPair(nn.Module):
    """A routed weight shares bits with a layer that runs later: their sum is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.borrower = nn.Linear(12, 8), tiny.Borrower(8)
        self.middle, self.late, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1)).relu()
        early = self.borrower(x)
        late = self.late(self.middle(x * 1.5).relu())
        return self.head((early + late).relu())


def brute_force_losses(problem: SearchProblem) -> list[list[float]]:
    """Mean loss with only one decision quantized, minus that of the float network, without caching."""

    @torch.no_grad()
    def mean_loss(model: nn.Module) -> float:
        model.eval()
        sums = [float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in problem.images.scoring]
        return sum(sums) / sum(len(y) for _, y in problem.images.scoring)

    base = mean_loss(copy.deepcopy(problem.model))
    found: list[list[float]] = []
    for index, decision in enumerate(problem.space.decisions):
        found.append([])
        for option in range(len(decision.options)):
            supernet = Supernet(fresh(problem))
            supernet.select([option] * index + [option] + [0] * (len(problem.space.decisions) - index - 1))
            members = {member.name for member in decision.members}
            for name, layer in quantized_layers(supernet.model).items():
                if name not in members:
                    layer.weight_quantizer, layer.input_quantizer = nn.Identity(), nn.Identity()
            found[-1].append(mean_loss(supernet.model) - base)
    return found


WITH_MEMORY = {
    **{name: lambda name=name: tiny_problem(name) for name in tiny.TINY},
    "apart": lambda: tiny_problem("residual", candidates=Candidates((2, 4), (2, 8))),
    "first layer free": lambda: tiny_problem("conv_bn", rules={"*": "2-8"}),
    "shared": lambda: traced_problem(Shared(), (3, 6, 6)),
    "in place": lambda: traced_problem(InPlace(), (3, 6, 6)),
    "borrowed pair": lambda: traced_problem(BorrowedPair(), (3, 2, 2)),
    "one norm twice": lambda: traced_problem(OneNormTwice(), (3, 4, 4)),
}


# Of the plain chains of layers, two.
@pytest.mark.parametrize(
    "name",
    sweep(WITH_MEMORY, lambda name: name not in tiny.TINY or name in ("conv_bn", "residual", "attention")),
)
def test_cached_outputs_leave_losses_unchanged(name: str) -> None:
    problem = WITH_MEMORY[name]()  # type: ignore[no-untyped-call]
    found = Sensitivity().losses(fresh(problem))
    expected = brute_force_losses(problem)
    assert [len(row) for row in found] == [len(d.options) for d in problem.space.decisions]
    for row, exact in zip(found, expected, strict=True):
        assert row == pytest.approx(exact, abs=1e-6)
    assert max(abs(value) for row in found for value in row) > 1e-4


# Curvature


def smooth_problem() -> SearchProblem:
    """Two layers with a smooth activation between, in float64."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, CLASSES)).eval()
    convert.wrap(net)
    costs = CostModel(
        (LayerCost("1", "Linear", 9, 9, "1", None), LayerCost("3", "Linear", 15, 15, "3", None))
    )
    space = search_space("smooth", costs, Candidates((2, 4)))
    asked = problem_of(net, space, Budget(10**9), search_images((1, 1, 3)))
    net.double()
    images = asked.images
    scoring = [(x.double(), y) for x, y in images.scoring]
    from dataclasses import replace

    return replace(asked, images=replace(images, scoring=scoring))


def test_traces_match_the_explicit_hessian() -> None:
    problem = smooth_problem()
    one, two = (problem.model.get_submodule(name) for name in ("1", "3"))
    names = [("1", "weight"), ("3", "weight"), ("1", "activation"), ("3", "activation")]
    exact, variance = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    count = sum(len(y) for _, y in problem.images.scoring)
    for x, y in problem.images.scoring:
        flat = x.flatten(1)

        def loss(v: Tensor, w: Tensor, d: Tensor, e: Tensor, flat: Tensor = flat, y: Tensor = y) -> Tensor:
            hidden = torch.tanh(F.linear(flat + d, v, one.bias)) + e  # type: ignore[arg-type]
            return F.cross_entropy(F.linear(hidden, w, two.bias), y, reduction="sum")  # type: ignore[arg-type]

        point = (one.weight.detach(), two.weight.detach(), torch.zeros_like(flat), torch.zeros_like(flat))
        blocks = torch.autograd.functional.hessian(loss, point)  # type: ignore[no-untyped-call,arg-type]
        sizes = [part.numel() for part in point]
        whole = torch.cat(
            [torch.cat([blocks[i][j].reshape(sizes[i], sizes[j]) for j in range(4)], 1) for i in range(4)]
        )
        edges = np.cumsum([0, *sizes])
        for index, name in enumerate(names):
            rows = whole[edges[index] : edges[index + 1]]
            own = rows[:, edges[index] : edges[index + 1]]
            exact[name] += float(own.trace()) / count
            # z_i H_ij z_j of two different numbers: a pair within the block is met twice.
            off = float((own - own.diag().diag()).square().sum())
            across = float(rows.square().sum() - own.square().sum())
            variance[name] += (2 * off + across) / count**2
    samples = 2000
    found = HAWQ(samples=samples, images=count).traces(fresh(problem))
    for name in names:
        error = 4 * math.sqrt(variance[name] / samples)
        assert error < 0.8 * abs(exact[name])  # the test is sensitive
        assert abs(found[name] - exact[name]) < error, name  # type: ignore[index]


def test_images_are_rounded_to_whole_batches() -> None:
    problem = smooth_problem()
    one = HAWQ(samples=3, images=8).traces(fresh(problem))
    rounded = HAWQ(samples=3, images=5).traces(fresh(problem))
    both = HAWQ(samples=3, images=16).traces(fresh(problem))
    assert one == rounded
    assert one != both


def test_loss_is_half_trace_times_mse() -> None:
    problem = tiny_problem("residual", candidates=Candidates((2, 4), (3, 8)))
    layers = list(quantized_layers(problem.model))
    rng = random.Random(0)
    traces = {(n, o): rng.uniform(-1, 2) for n in layers for o in ("weight", "activation")}
    noise = measure_noise(fresh(problem))
    found = HAWQ().losses(fresh(problem), traces)  # type: ignore[arg-type]
    for decision, row in zip(problem.space.decisions, found, strict=True):
        for bits, loss in zip(decision.options, row, strict=True):
            expected = 0.0
            for m in decision.members:
                assert bits.weight is not None
                assert bits.activation is not None
                expected += (
                    0.5 * max(traces[m.name, "weight"], 0) * noise[Key(m.name, "weight", bits.weight)].error
                )
                inputs = noise[Key(m.name, "activation", bits.activation)]
                expected += 0.5 * max(traces[m.name, "activation"], 0) * inputs.error
            assert loss == pytest.approx(expected, rel=1e-12)
    assert any(trace < 0 for trace in traces.values())


@pytest.mark.parametrize("name", ["conv_bn", "depthwise", "tokens", "transposed"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weight_noise_matches_its_quantizer(name: str, granularity: str) -> None:
    scheme = convert.Scheme(granularity=granularity)  # type: ignore[arg-type]
    problem = tiny_problem(name, scheme=scheme)
    noise = measure_noise(fresh(problem))
    supernet = Supernet(fresh(problem))
    for index, decision in enumerate(problem.space.decisions):
        for option, bits in enumerate(decision.options):
            supernet.select([option if d == index else 0 for d in range(len(problem.space.decisions))])
            for member, layer in zip(decision.members, supernet.layers_of(index), strict=True):
                weight = layer.latent_weight().detach()
                error = float((layer.quantized_weight().detach() - weight).square().mean())
                assert bits.weight is not None
                measured = noise[Key(member.name, "weight", bits.weight)]
                assert measured.error == pytest.approx(error, rel=1e-3, abs=1e-12)
                assert measured.power == pytest.approx(float(weight.square().mean()), rel=1e-6)


# Stopped and resumed

RESUMED: dict[str, dict[str, Any]] = {
    "samq": {"epochs": 2, "warmup": 0, "draws": 3},
    "random": {"draws": 4},
    "sensitivity": {},
    "hawq": {"samples": 2},
    "samq in the supernet": {"epochs": 1, "warmup": 0, "draws": 3, "score_in": "supernet"},
}
MANY = Candidates((2, 3, 4, 5, 6, 7, 8))


class Dropout(PreActivation):
    """Randomness beyond the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.2, self.training))


PROBLEMS = {
    "conv_bn": lambda: tiny_problem("conv_bn", rules={"*": "2-8"}, candidates=MANY),
    "tokens": lambda: tiny_problem("tokens", rules={"*": "2-8"}, candidates=MANY),
    "dropout": lambda: traced_problem(Dropout(), (3, 6, 6), rules={"*": "2-8"}, candidates=MANY),
}


def outcome(method: str, problem: SearchProblem, memory: Stopping, noise: int) -> tuple[Any, ...]:
    """The full result of a search; ``noise`` seeds the global random numbers before."""
    torch.manual_seed(noise)
    asked = fresh(problem, memory=memory)
    found: SearchResult = SEARCHERS[method.split()[0]].make(**RESUMED[method]).search(asked)
    space = problem.space
    other = Budget(*((a + b) // 2 for a, b in zip(space.floor, space.ceiling, strict=True)))
    weights = {key: value.clone().numpy().tobytes() for key, value in asked.model.state_dict().items()}
    return found.choice, list(found.scored), found.propose(other), weights


@pytest.mark.parametrize(
    ("method", "name", "stride"),
    sweep(
        product(RESUMED, PROBLEMS, (7, 1)),
        lambda method, name, stride: stride == 7 and name == ("dropout" if method == "samq" else "tokens"),
    ),
)
def test_resume_after_any_step_is_identical(method: str, name: str, stride: int) -> None:
    """Interrupted after every ``stride`` steps, and after the last one."""
    problem = PROBLEMS[name]()  # type: ignore[no-untyped-call]
    whole = Stopping()
    expected = outcome(method, problem, whole, 1)
    assert whole.offers >= 2
    for k in sorted({*range(1, whole.offers + 1, stride), whole.offers}):
        stopped = Stopping(stop_after=k)
        with pytest.raises(Interrupted):
            outcome(method, problem, stopped, 2)
        resumed = Stopping(kept=stopped.kept)
        assert outcome(method, problem, resumed, 3) == expected, k
        assert resumed.offers <= whole.offers


def test_search_can_be_interrupted_repeatedly() -> None:
    problem = PROBLEMS["tokens"]()  # type: ignore[no-untyped-call]
    expected = outcome("samq", problem, Stopping(), 1)
    kept, stops = None, 0
    while True:
        memory = Stopping(stop_after=4, kept=kept)
        try:
            found = outcome("samq", problem, memory, stops)
        except Interrupted:
            kept, stops = memory.kept, stops + 1
            assert stops < 9
            continue
        break
    assert stops >= 2
    assert found == expected


@pytest.mark.parametrize(("warmup", "steps"), [(0, 2 * (2 + 2)), (1, 2 * 2 + 2), (2, 2 * 2 + 2)])
def test_controller_phases_start_after_warmup(warmup: int, steps: int) -> None:
    memory = Stopping()
    asked = fresh(PROBLEMS["tokens"](), memory=memory)  # type: ignore[no-untyped-call]
    found = SEARCHERS["samq"].make(epochs=2, warmup=warmup, draws=3).search(asked)
    assert memory.offers == steps + len(found.scored)  # the last epoch always has one


def test_every_norm_copy_is_recalibrated() -> None:
    problem = tiny_problem("conv_bn", scheme=Scheme(weight_normalization=True))
    supernet = Supernet(problem)
    supernet.settle()
    supernet.switch_norms()
    switches = [module for module in supernet.model.modules() if isinstance(module, SwitchableNorm)]
    assert switches
    for switch in switches:
        first, *others = switch.copies
        assert (first.running_var - 1).abs().max() > 1e-3
        for other in others:
            assert torch.equal(other.running_mean, first.running_mean)
            assert torch.equal(other.running_var, first.running_var)


def test_missing_second_derivatives_are_refused() -> None:
    problem = tiny_problem("conv_bn")
    activations = [name for name, module in problem.model.named_modules() if isinstance(module, nn.ReLU)]
    problem.model.set_submodule(activations[0], nn.Hardsigmoid())
    with pytest.raises(UnsupportedModel, match=r"`quantization\.searcher=sensitivity`"):
        HAWQ(samples=1, images=4).traces(problem)
