"""ASGA: its step compared with explicit formulas, a toy problem with known optimum, and resume."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import ConfigError, InfeasibleBudget, Interrupted, TrainingDiverged
from saqcli.quant.cost import Budget
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers.base import Quantizer, quantizers_of
from saqcli.quant.search_space import Candidates
from saqcli.searchers.asga import ASGA, Descent
from saqcli.searchers.mixture import Mixture, Mixtures
from saqcli.searchers.problem import SearchProblem, SearchResult
from saqcli.searchers.supernet import Supernet
from saqcli.training.minimizers import Chunk, MicroBatch
from saqcli.training.objective import micro_batches
from tests.support import tiny
from tests.support.steps import AttemptWatch, fail_elsewhere
from tests.support.sweeps import sweep
from tests.support.toys import (
    RIGHT,
    Kept,
    Shuffled,
    branches,
    every_choice,
    layers_of,
    problem_of,
    runs_out_of_memory,
)

UNTIED = Candidates((2, 4), (3, 6))


def twin_quantize(x: Tensor, level: Tensor, bits: int, kind: str) -> Tensor:
    """Straight-through by detaching the rounding residual."""
    if kind == "paper":
        n = 2**bits - 1
        u = (torch.clamp(x / level, -1, 1) + 1) / 2
        return level * (2 * (u + (torch.round(u * n) / n - u).detach()) - 1)
    low, n = {
        "signed": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        "int8": (-127, 127),
        "unsigned": (0, 2**bits - 1),
    }[kind]
    u = torch.maximum(torch.minimum(x / level, torch.ones_like(x)), torch.full_like(x, low / n))
    return level * (u + (torch.round(u * n) / n - u).detach())


# The mixed quantizer.


def mixture(kind: str, widths: tuple[int, ...] = (2, 3, 5)) -> tuple[Mixture, nn.Parameter, Tensor]:
    """In float64, with levels that clip some values, for weights or for inputs without negative values."""
    problem = branches(candidates=Candidates(widths))
    layer = Supernet(problem).layers_of(0)[0]
    quantizer = (layer.weight_quantizer if kind == "paper" else layer.input_quantizer).double()
    assert isinstance(quantizer, Quantizer)
    logits = nn.Parameter(torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64))
    x = layer.latent_weight().detach().double() if kind == "paper" else torch.rand(4, 4, 6, 6).double()
    with torch.no_grad():
        for level in quantizer.parameters():
            level.mul_(0.8)
    return Mixture(quantizer, widths, lambda: logits.softmax(0)), logits, x.requires_grad_(True)


@pytest.mark.parametrize("kind", ["paper", "unsigned"])
def test_mixture_matches_formula_with_gradients(kind: str) -> None:
    mixed, logits, x = mixture(kind)
    levels = mixed.quantizer.clipping_level
    upstream = torch.randn(x.shape, dtype=torch.float64)
    got = mixed(x)
    gradients = torch.autograd.grad((got * upstream).sum(), [x, logits, levels])

    shares = [math.exp(a) for a in logits.tolist()]
    shares = [share / sum(shares) for share in shares]
    twin_x, twin_levels = (
        x.detach().clone().requires_grad_(True),
        levels.detach().clone().requires_grad_(True),
    )
    parts = [twin_quantize(twin_x, twin_levels[j], bits, kind) for j, bits in enumerate((2, 3, 5))]
    expected = sum(share * part for share, part in zip(shares, parts, strict=True))
    of_x, of_levels = torch.autograd.grad((expected * upstream).sum(), [twin_x, twin_levels])
    useful = [float((part.detach() * upstream).sum()) for part in parts]
    mean = sum(share * value for share, value in zip(shares, useful, strict=True))
    of_logits = [share * (value - mean) for share, value in zip(shares, useful, strict=True)]

    assert (got - expected).abs().max() < 1e-12
    assert (gradients[0] - of_x).abs().max() < 1e-12
    assert (gradients[1] - torch.tensor(of_logits, dtype=torch.float64)).abs().max() < 1e-10
    assert (gradients[2] - of_levels).abs().max() < 1e-10


@pytest.mark.parametrize("place", range(3))
def test_one_hot_mixture_equals_plain_quantizer(place: int) -> None:
    mixed, logits, x = mixture("paper")
    with torch.no_grad():
        logits.fill_(-1000.0)[place] = 1000.0
    mixed.quantizer.select((2, 3, 5)[place])
    plain = mixed.quantizer(x)
    assert torch.equal(mixed(x), plain)


@pytest.mark.parametrize("candidates", [Candidates((2, 4, 6)), UNTIED])
def test_expected_cost_is_the_mean(
    candidates: Candidates,
) -> None:
    problem = branches(candidates=candidates)
    budget = Budget(bops=problem.space.ceiling.bops, size=problem.space.ceiling.size)
    mixtures = Mixtures(Supernet(problem))
    for logits in mixtures.parameters():
        nn.init.normal_(logits)
    expected = list(map(float, problem.space.fixed_cost))
    for decision, losses in zip(problem.space.decisions, mixtures.losses(), strict=True):
        assert abs(sum(math.exp(-loss) for loss in losses) - 1) < 1e-6
        for cost, loss in zip(decision.costs, losses, strict=True):
            expected = [so_far + math.exp(-loss) * part for so_far, part in zip(expected, cost, strict=True)]
    bounds = [bound for _, bound in budget.bounds()]
    got = [used * bound for used, bound in zip(mixtures.used(budget).tolist(), bounds, strict=True)]
    assert got == pytest.approx(expected, rel=1e-6)

    for logits in mixtures.parameters():
        with torch.no_grad():
            logits.mul_(1e4)
    choice = [min(range(len(group)), key=group.__getitem__) for group in mixtures.losses()]
    got = [used * bound for used, bound in zip(mixtures.used(budget).tolist(), bounds, strict=True)]
    assert got == pytest.approx(list(problem.space.cost(choice)), rel=1e-6)
    assert mixtures.entropy() == pytest.approx(0, abs=1e-6)


def test_untied_share_is_product_of_both_shares() -> None:
    mixtures = Mixtures(Supernet(branches(candidates=UNTIED)))
    preference = mixtures.preferences[0]
    for logits in preference.logits:
        nn.init.normal_(logits)
    weights, inputs = preference.weight_shares(), preference.input_shares()
    decision = branches(candidates=UNTIED).space.decisions[0]
    for bits, share in zip(decision.options, preference.log_shares().exp().tolist(), strict=True):
        w, a = (
            preference.weights.index(bits.weight or 0),
            preference.activations.index(bits.activation or 0),
        )
        assert share == pytest.approx(float((weights[w] * inputs[a]).detach()), rel=1e-5)


def test_logits_are_not_model_parameters() -> None:
    problem = branches()
    before = {id(p) for p in problem.model.parameters()}
    mixtures = Mixtures(Supernet(problem))
    model = problem.model
    found = {id(p) for p in model.parameters()} - before
    levels = {id(p) for part in model.modules() if isinstance(part, Quantizer) for p in part.parameters()}
    assert found == levels
    assert not {id(logits) for logits in mixtures.parameters()} & {id(p) for p in model.parameters()}
    addresses = {value.data_ptr() for value in model.state_dict().values()}
    assert not {logits.data_ptr() for logits in mixtures.parameters()} & addresses
    assert any(isinstance(part, Mixture) for part in model.modules())


# One step, in float64, with loops.


class Twin:
    """A convolution and three linear layers, first and last with fixed bits; the two between are mixtures."""

    def __init__(self, descent: Descent, unit: str, align: str) -> None:
        self.unit, self.align, self.search = unit, align, descent.settings
        model, self.members = descent.model, dict[str, nn.Parameter]()
        self.layers = list(quantized_layers(model).values())
        for i, layer in enumerate(self.layers):
            quantizers = [getattr(layer, f"{kind}_quantizer") for kind in ("weight", "input")]
            plain = [q.quantizer if isinstance(q, Mixture) else q for q in quantizers]
            self.members |= {f"w{i}": layer.latent_weight(), f"b{i}": layer.bias}  # type: ignore[dict-item]
            self.members |= {f"wl{i}": plain[0].clipping_level, f"al{i}": plain[1].clipping_level}
        self.members |= {"g": model.get_submodule("1").weight, "s": model.get_submodule("1").bias}  # type: ignore[dict-item]
        self.preferences = descent.mixtures.preferences
        for i, preference in enumerate(self.preferences):
            self.members |= {f"A{i}{part}": logits for part, logits in enumerate(preference.logits)}
        self.p = {name: value.detach().clone().requires_grad_(True) for name, value in self.members.items()}
        self.state: dict[str, Any] = {"mean": torch.zeros(3).double(), "var": torch.ones(3).double()}
        self.rho, self.gap, self.done = self.search.rho_max, None, 0
        self.problem, self.total = descent.problem, descent.total

    def shares(self, p: dict[str, Tensor], decision: int) -> list[Tensor]:
        """The shares of weight widths and of input widths."""
        parts = [p[name] for name in (f"A{decision}0", f"A{decision}1") if name in p]
        exponents = [[torch.exp(a) for a in part] for part in (parts[0], parts[-1])]
        return [torch.stack([e / sum(part) for e in part]) for part in exponents]  # type: ignore[arg-type]

    def loss(self, p: dict[str, Tensor], e: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        p = {name: value + e[name] if name in e else value for name, value in p.items()}
        for i in range(4):
            if i in (0, 3):
                weight = twin_quantize(p[f"w{i}"], p[f"wl{i}"][0], 8, "int8")
                x = twin_quantize(x, p[f"al{i}"][0], 8, "unsigned" if i else "signed")
            else:
                preference, shares = self.preferences[i - 1], self.shares(p, i - 1)
                weight, z = torch.zeros_like(p[f"w{i}"]), torch.zeros_like(x)
                for j, bits in enumerate(preference.weights):
                    weight = weight + shares[0][j] * twin_quantize(p[f"w{i}"], p[f"wl{i}"][j], bits, "paper")
                for j, bits in enumerate(preference.activations):
                    z = z + shares[1][j] * twin_quantize(x, p[f"al{i}"][j], bits, "unsigned")
                x = z
            weight = weight + e[f"Q{i}"]
            if i:
                x = x @ weight.T + p[f"b{i}"]
            else:
                x = F.conv2d(x, weight, p["b0"])
                mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
                count = x.numel() / 3
                self.seen = mean.detach(), (variance * count / (count - 1)).detach()
                shape = (1, -1, 1, 1)
                x = (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
                x = (x * p["g"].view(shape) + p["s"].view(shape)).clamp_min(0).flatten(1)
            x = x.clamp_min(0) if 0 < i < 3 else x
        return -torch.log_softmax(x, 1)[torch.arange(len(x)), labels].mean()

    def step(self, x: Tensor, labels: Tensor) -> float:
        small = ["g", "s", *(f"b{i}" for i in range(4))]
        zero = {name: torch.zeros_like(self.p[name]) for name in small}
        zero |= {f"Q{i}": torch.zeros_like(self.p[f"w{i}"]) for i in range(4)}
        for value in zero.values():
            value.requires_grad_(True)
        first = self.loss(self.p, zero, x, labels)
        for name, value in zip(("mean", "var"), self.seen, strict=True):
            self.state[name] = 0.9 * self.state[name] + 0.1 * value
        names = list(self.p)
        g = dict(zip(zero, torch.autograd.grad(first, list(zero.values()), retain_graph=True), strict=True))
        d = dict(zip(names, torch.autograd.grad(first, [self.p[name] for name in names]), strict=True))
        gap = 0.0
        if self.align == "sagm":
            s = dict.fromkeys(g, 1.0)
            if self.unit == "deviation":
                s |= {f"Q{i}": float(self.p[f"w{i}"].detach().std()) for i in range(4)}
            norm = math.sqrt(sum(float((s[name] * value).square().sum()) for name, value in g.items()))
            e = {n: (self.rho / norm - self.search.alignment) * s[n] ** 2 * value for n, value in g.items()}
            second = self.loss(self.p, e, x, labels)
            above = torch.autograd.grad(second, [self.p[name] for name in names])
            d = {name: 0.5 * d[name] + 0.5 * other for name, other in zip(names, above, strict=True)}
            gap = max(0.0, float((second - first).detach()))
        self.update(d)
        self.gap = gap if self.gap is None else 0.9 * self.gap + 0.1 * gap
        self.rho = min(self.search.rho_max, max(self.search.rho_min, math.log(1 + self.gap)))
        self.done += 1
        return float(first.detach())

    def prices(self) -> dict[str, Tensor]:
        """The cost gradients of the logits, written out."""
        weight = self.search.cost_weight * min(1.0, self.done / (0.1 * self.total))
        decisions, bound = self.problem.space.decisions, self.problem.budget.bops
        assert bound is not None
        expected, slopes = float(self.problem.space.fixed_cost.bops), {}
        for i, decision in enumerate(decisions):
            preference = self.preferences[i]
            shares = [part.detach() for part in self.shares(self.p, i)]
            tied = f"A{i}1" not in self.p
            for part in range(1 if tied else 2):
                slopes[f"A{i}{part}"] = torch.zeros_like(self.p[f"A{i}{part}"])
            for bits, cost in zip(decision.options, decision.costs, strict=True):
                at = (
                    preference.weights.index(bits.weight or 0),
                    preference.activations.index(bits.activation or 0),
                )
                share = float(shares[0][at[0]] * (1.0 if tied else shares[1][at[1]]))
                expected += share * cost.bops
                for part in range(1 if tied else 2):
                    for k in range(len(shares[part])):
                        slopes[f"A{i}{part}"][k] += (
                            share * cost.bops * ((at[part] == k) - float(shares[part][k]))
                        )
        slope = (2 * weight * max(0.0, expected / bound - 1) + 1e-3) / bound
        return {name: slope * value for name, value in slopes.items()}

    def update(self, d: dict[str, Tensor]) -> None:
        """SGD with Nesterov momentum, and Adam for the logits."""
        prices, cosine = self.prices(), 0.5 * (1 + math.cos(math.pi * self.done / self.total))
        for name, value in self.p.items():
            if name.startswith("A"):
                gradient = d[name] + prices[name]
                m, v = self.state.get(name, (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
                self.state[name] = (m, v)
                t = self.done + 1
                step = self.search.logit_lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
            else:
                gradient = d[name] + 1e-4 * value.detach()
                velocity = self.state[name] = (
                    0.9 * self.state[name] + gradient if name in self.state else gradient
                )
                step = 0.05 * (gradient + 0.9 * velocity)
            self.p[name] = (value.detach() - cosine * step).requires_grad_(True)


def twin_problem(candidates: Candidates) -> SearchProblem:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(),
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5),
    )  # fmt: skip
    model = model.double().eval()
    images, labels = torch.randn(32, 3, 6, 6).double(), torch.randint(0, 5, (32,))
    return problem_of(
        model, images, labels, candidates=candidates,
        optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    )  # fmt: skip


@pytest.mark.parametrize("candidates", [Candidates((2, 3, 4)), UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("unit", ["deviation", "absolute"])
@pytest.mark.parametrize("align", ["sagm", "none"])
def test_every_step_matches_the_formulas(candidates: Candidates, unit: Any, align: Any) -> None:
    search = ASGA(epochs=4, align=align, rho_unit=unit, alignment=0.05, rho_max=0.3)
    descent = Descent(search, twin_problem(candidates))
    descent.model.double().train()
    with torch.no_grad():  # fitted levels could equal a value, which would then lie on the clipping edge
        for quantizer in quantizers_of(descent.model):
            for level in quantizer.parameters():
                level.mul_(0.93)
    twin = Twin(descent, unit, align)
    for _ in range(5):
        x, labels = torch.randn(16, 3, 6, 6).double(), torch.randint(0, 5, (16,))
        descent.step(whole(partial(cross_entropy, descent.model, x, labels)), 16)
        assert descent.trace[-1][0] == pytest.approx(twin.step(x, labels), abs=1e-9)
        assert descent.rho == pytest.approx(twin.rho, abs=1e-9)
    for name, value in twin.members.items():
        assert (value.detach() - twin.p[name]).abs().max() < 1e-9, name
    norm = descent.model.get_submodule("1")
    assert (norm.running_mean - twin.state["mean"]).abs().max() < 1e-9  # type: ignore[operator]
    assert (norm.running_var - twin.state["var"]).abs().max() < 1e-9  # type: ignore[operator]


@pytest.mark.parametrize("weights", [True, False])
def test_zero_radius_and_alignment_are_plain(weights: bool) -> None:
    ends = []
    for align in ("sagm", "none"):
        descent = Descent(ASGA(epochs=2, align=align, rho_min=0, rho_max=0, alignment=0), branches())  # type: ignore[arg-type]
        model = descent.model.train()
        for x, y in descent.problem.images.scoring[:3]:
            descent.step(whole(partial(cross_entropy, model, x, y)), len(y), weights=weights)
        ends.append([*model.state_dict().values(), *descent.logits])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def test_only_selected_parameters_are_updated() -> None:
    for weights, logits in ((True, False), (False, True)):
        descent = Descent(ASGA(epochs=2), branches())
        descent.model.train()
        before = {name: value.clone() for name, value in descent.model.state_dict().items()}
        images, labels = descent.problem.images.scoring[0]
        loss = partial(cross_entropy, descent.model, images, labels)
        descent.step(whole(loss), len(labels), weights=weights, logits=logits)
        same = all(torch.equal(value, before[name]) for name, value in descent.model.state_dict().items())
        assert same == (not weights)
        assert all(bool(a.detach().any()) for a in descent.logits) == logits


def test_every_layer_is_perturbed() -> None:
    descent = Descent(ASGA(epochs=2), branches())
    layers = layers_of(descent.problem)
    seen: list[dict[str, bool]] = []

    def loss(**_: bool) -> Tensor:
        seen.append({name: bool(layer.perturbation.detach().any()) for name, layer in layers.items()})
        images, labels = descent.problem.images.scoring[0]
        return F.cross_entropy(descent.model(images), labels)

    descent.model.train()
    descent.step(whole(loss), 32)
    assert seen == [dict.fromkeys(layers, False), dict.fromkeys(layers, True)]


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor, **_: bool) -> Tensor:
    return F.cross_entropy(model(images), labels)


def whole(loss: Callable[..., Tensor]) -> Callable[[int | None], Chunk]:
    """The images of a step in one forward pass."""
    return lambda most: [MicroBatch(loss, 1.0)]


@pytest.mark.parametrize(
    ("align", "training", "later"), [("sagm", True, 0), ("sagm", False, 1), ("none", False, 0)]
)
def test_out_of_memory_step_equals_micro_batches(align: Any, training: bool, later: int) -> None:
    """Bit for bit; where batch norms ignore the batch, equal to the whole batch up to rounding."""
    ends: list[list[Tensor]] = []
    for most, micro in ((12, None), (99, 8), (99, None)):
        descent = Descent(ASGA(align=align), branches())
        descent.recovery.micro_batch = micro
        model = descent.model.train(training)
        hook = model.register_forward_hook(partial(runs_out_of_memory, most, passes=[later]))
        for images, labels in descent.problem.images.scoring[:3]:
            descent.step(partial(micro_batches, model, images, labels), len(labels))
        hook.remove()
        assert descent.recovery.micro_batch == (8 if most == 12 else micro)
        ends.append([*model.state_dict().values(), *descent.logits, torch.tensor(descent.trace)])
    assert all(torch.equal(one, other) for one, other in zip(ends[0], ends[1], strict=True))
    if not training:
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ends[0], ends[2], strict=True))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_failed_step_is_freed_before_shrinking(elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    descent = Descent(ASGA(), branches())
    watch, passes = AttemptWatch(monkeypatch), descent._passes

    def watched_passes(*arguments: Any) -> Any:
        found = passes(*arguments)
        watch.add(found)
        return found

    monkeypatch.setattr(descent, "_passes", watched_passes)
    if elsewhere:
        fail_elsewhere(monkeypatch)
    else:
        descent.model.register_forward_hook(partial(runs_out_of_memory, 16))
    images, labels = descent.problem.images.scoring[0]
    descent.step(partial(micro_batches, descent.model, images, labels), len(labels))
    assert watch.alive
    assert not any(watch.alive)


# The whole search.


def test_toy_problem_has_one_optimum() -> None:
    for seed in range(3):
        best, second, *_ = every_choice(branches(seed))
        assert list(best.choice) == RIGHT
        assert best.loss < 0.97 * second.loss


ALIGNMENTS: list[dict[str, Any]] = [{}, {"align": "none"}, {"temperature_end": 0.3}]


@pytest.mark.parametrize(
    ("seed", "options"),
    sweep(product(range(3), ALIGNMENTS), lambda seed, options: options == ALIGNMENTS[seed]),
    ids=str,
)
def test_optimum_is_found(seed: int, options: dict[str, Any]) -> None:
    problem = branches(seed)
    found = ASGA(epochs=2, **options).search(problem)
    assert found.choice == RIGHT
    assert [list(scored.choice) for scored in found.scored] == [RIGHT]
    assert found.propose(problem.budget) == [RIGHT]
    (other,) = found.propose(Budget(bops=problem.space.cost([0, 0, 2]).bops))
    assert problem.space.cost(other).bops <= problem.space.cost([0, 0, 2]).bops
    assert found.score is not None
    assert found.score(other).loss > found.scored[0].loss


@pytest.mark.parametrize("seed", sweep(range(3), lambda seed: seed == 0))
def test_bilevel_search_keeps_key_branch_bits(seed: int) -> None:
    problem = branches(seed)
    found = ASGA(bilevel=True, epochs=4).search(problem)
    assert problem.budget.used_by(problem.space.cost(found.choice))
    assert found.choice[2] == 2


def outcome(problem: SearchProblem, search: ASGA) -> tuple[SearchResult, dict[str, Tensor]]:
    return search.search(problem), problem.model.state_dict()


@pytest.mark.parametrize("options", [{}, {"bilevel": True, "temperature_end": 0.5}], ids=str)
def test_search_is_deterministic_and_resumable(options: dict[str, Any]) -> None:
    search = ASGA(epochs=2, **options)
    whole = outcome(branches(count=256), search)
    torch.manual_seed(99)
    again = outcome(branches(count=256), search)
    memory = Kept(stop_at=11)
    with pytest.raises(Interrupted):
        search.search(replace(branches(count=256), memory=memory))
    torch.manual_seed(98)
    resumed = outcome(replace(branches(count=256), memory=memory), search)

    for found, state in (again, resumed):
        assert found.choice == whole[0].choice
        assert found.scored == whole[0].scored
        assert found.propose(Budget(bops=400_000)) == whole[0].propose(Budget(bops=400_000))
        assert state.keys() == whole[1].keys()
        for name, value in state.items():
            assert torch.equal(value, whole[1][name]), name


def test_finished_search_has_no_steps_left() -> None:
    memory = Kept(stop_at=16)
    with pytest.raises(Interrupted):
        ASGA(epochs=2).search(replace(branches(count=256), memory=memory))
    again = replace(branches(count=256), memory=memory)
    found = ASGA(epochs=2).search(again)
    assert memory.steps == 16
    assert found.choice == ASGA(epochs=2).search(branches(count=256)).choice


def test_search_leaves_the_model_trained() -> None:
    problem = branches(count=256)
    before = {name: layer.latent_weight().detach().clone() for name, layer in layers_of(problem).items()}
    ASGA(epochs=1).search(problem)
    for name, layer in layers_of(problem).items():
        assert layer.perturbation is None
        assert not torch.equal(layer.latent_weight(), before[name])  # of fixed layers too


BUDGETS = {
    "bytes": lambda space: Budget(size=space.cost(RIGHT).size),
    "both": lambda space: Budget(bops=space.cost([2, 2, 0]).bops, size=space.cost(RIGHT).size),
}


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS.keys())
@pytest.mark.parametrize("candidates", [Candidates((2, 4, 6)), UNTIED], ids=["tied", "untied"])
def test_all_budget_bounds_are_met(budget: Any, candidates: Candidates) -> None:
    problem = branches(count=256, budget=budget, candidates=candidates)
    choice = ASGA(epochs=1).search(problem).choice
    cost = problem.space.cost(choice)
    assert problem.budget.admits(cost)
    assert problem.budget.used_by(cost)


def test_larger_cost_weight_nears_the_budget() -> None:
    used = []
    for weight in (0.0, 1.0, 30.0):
        problem = branches(budget=lambda space: Budget(bops=int(1.3 * space.floor.bops)))
        descent = Descent(ASGA(epochs=2, cost_weight=weight), problem)
        descent.run()
        used.append(float(descent.mixtures.used(problem.budget).detach()))
    assert used == sorted(used, reverse=True)
    assert used[0] > 1.2
    assert used[-1] < 1.03


def test_pinned_operands_are_not_mixed() -> None:
    rules = {"branches.0": "w4a2-8", "branches.1": "w4a6"}
    problem = branches(
        count=256, candidates=UNTIED, rules=rules, budget=lambda space: Budget(bops=space.floor.bops)
    )
    Mixtures(Supernet(problem))
    layers = layers_of(problem)
    kinds = {
        name: (type(layer.weight_quantizer), type(layer.input_quantizer)) for name, layer in layers.items()
    }
    mixtures = {name: tuple(kind is Mixture for kind in pair) for name, pair in kinds.items()}
    assert mixtures["stem"] == mixtures["head"] == mixtures["branches.1"] == (False, False)
    assert mixtures["branches.0"] == (False, True)
    assert mixtures["branches.2"] == (True, True)


def token_problem(**options: Any) -> SearchProblem:
    net, _ = tiny.build("tokens")
    images = tiny.images((3, 8, 8), 64, seed=7)
    with torch.no_grad():
        labels = net(images).argmax(1)
    return problem_of(net, images, labels, candidates=Candidates((2, 3, 4)), **options)


def test_layer_norm_networks_are_searched() -> None:
    problem = token_problem()
    found = ASGA(epochs=2).search(problem)
    assert problem.budget.admits(problem.space.cost(found.choice))


def test_reachable_ceiling_needs_no_training() -> None:
    problem = branches(count=256, budget=lambda space: Budget(bops=space.ceiling.bops))
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    found = ASGA(epochs=2).search(problem)
    assert found.choice == [2, 2, 2]
    assert found.score is None
    assert problem.model.state_dict().keys() == before.keys()
    (other,) = found.propose(Budget(bops=problem.space.cost(RIGHT).bops))
    assert problem.space.cost(other).bops <= problem.space.cost(RIGHT).bops


def test_unreachable_budget_is_refused() -> None:
    with pytest.raises(InfeasibleBudget):
        ASGA(epochs=2).search(branches(count=256, budget=lambda space: Budget(bops=space.floor.bops - 1)))


def test_nan_loss_ends_the_search() -> None:
    for align in ("sagm", "none"):
        problem = branches(count=256)
        whole = problem.images.whole
        assert isinstance(whole, Shuffled)
        whole.images = whole.images * math.nan
        with pytest.raises(TrainingDiverged):
            ASGA(align=align).search(problem)  # type: ignore[arg-type]


def test_nan_step_changes_nothing() -> None:
    problem = branches(count=256)
    descent = Descent(ASGA(), problem)
    images, labels = next(iter(problem.images.whole))
    descent.model.train()
    parts = partial(micro_batches, descent.model, images[:32], labels[:32])
    descent.step(parts, 32)
    before = {name: value.clone() for name, value in descent.model.state_dict().items()}

    descent.step(partial(micro_batches, descent.model, images[:32] * math.nan, labels[:32]), 32)

    assert (len(descent.trace), descent.recovery.skipped) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in descent.model.state_dict().items())
    descent.step(parts, 32)
    assert (len(descent.trace), descent.recovery.in_row) == (2, 0)


class RecordingProgress:
    """A progress that records its calls."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.figures: list[dict[str, float]] = []
        self.titles: list[str] = []

    @contextmanager
    def task(self, title: str, total: int) -> Iterator["RecordingProgress"]:
        self.titles.append(title)
        yield self

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        self.figures.append(figures)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_progress_is_reported() -> None:
    told = RecordingProgress()
    ASGA(epochs=2).search(branches(count=256, progress=told))
    assert told.titles == ["search epoch 1 of 2", "search epoch 2 of 2"]
    assert len(told.notes) == 2
    assert told.notes[1].startswith("search epoch 2 of 2: loss ")
    assert told.notes[1].endswith("BOPs")
    assert {"loss", "entropy", "cost"} <= told.figures[-1].keys()


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0}, {"rho_min": -1}, {"rho_min": 0.2, "rho_max": 0.1}, {"alignment": math.nan},
        {"align": "sam"}, {"rho_unit": "relative"}, {"cost_weight": -1}, {"logit_lr": "high"}, {"temperature_end": 0},
    ],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ASGA(**options)
