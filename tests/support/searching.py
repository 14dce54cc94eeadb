"""Small search problems: tiny networks, images in memory, and interrupting memories."""

import copy
import io
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import Interrupted
from saqcli.quant import calibration, convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import Budget, cost_model
from saqcli.quant.search_space import Candidates, SearchSpace, parse_rule, search_space
from saqcli.quant.tracer import trace
from saqcli.random_state import random_state, set_random_state
from saqcli.searchers import SearchImages, SearchProblem
from tests.support import tiny
from tests.support.spaces import budget_within, random_space

CLASSES, BATCH = 5, 8


class InMemory:
    """Batches of given images in another order every epoch; like a loader, seeds the global generator."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int = 0) -> None:
        self.images, self.labels, self.seed, self.epoch = images, labels, seed, 0

    def __len__(self) -> int:
        return len(self.images) // BATCH

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(1000 * self.seed + self.epoch)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        for rows in order[: BATCH * len(self)].split(BATCH):
            yield self.images[rows], self.labels[rows]


def some_images(shape: Sequence[int], batches: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal images with a class-dependent mean, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (BATCH * batches,), generator=generator)
    noise = torch.randn(len(labels), *shape, generator=generator)
    return noise + 0.5 * labels.view(-1, *[1] * len(shape)), labels


def search_images(shape: Sequence[int], seed: int = 0, batches: int = 2) -> SearchImages:
    """Two batches of each kind, three where all images are used."""
    training, held_out, whole = (some_images(shape, n, seed + k) for k, n in enumerate((batches, batches, 3)))
    scoring = list(zip(*(part.split(BATCH) for part in held_out), strict=True))
    return SearchImages(InMemory(*training), InMemory(*held_out, 1), scoring, InMemory(*whole, 2))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


class Chain(nn.Module):
    """Linear layers in the order of ``names``, some with a batch norm, some with dropout."""

    def __init__(self, names: Sequence[str], rng: random.Random) -> None:
        super().__init__()
        self.width = rng.randint(2, 6)
        widths = [self.width, *(rng.randint(2, 6) for _ in names[1:]), CLASSES]
        self.part0, self.part1 = nn.ModuleDict(), nn.ModuleDict()
        self.behind = nn.ModuleList()
        self.names = list(names)
        for name, (inputs, outputs) in zip(names, pairwise(widths), strict=True):
            part, key = name.split(".")
            getattr(self, part)[key] = nn.Linear(inputs, outputs)
            norm = nn.BatchNorm1d(outputs) if rng.random() < 0.5 else nn.Identity()
            self.behind.append(nn.Sequential(norm, nn.ReLU() if rng.random() < 0.7 else nn.Dropout(0.1)))
        self.behind[-1] = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name, behind in zip(self.names, self.behind, strict=True):
            x = behind(self.get_submodule(name)(x))
        return x


def problem_of(
    model: nn.Module,
    space: SearchSpace,
    budget: Budget,
    images: SearchImages,
    scheme: Scheme | None = None,
    seed: int = 0,
) -> SearchProblem:
    """A search problem for ``model``, which is wrapped and in eval mode."""
    statistics = calibration.observe(model, [batch for batch, _ in images.scoring])
    return SearchProblem(model, space, budget, scheme or Scheme(), statistics, images, sgd, seed)


def random_problem(seed: int) -> SearchProblem:
    """A random network, space and scheme, and a reachable budget, all determined by ``seed``."""
    rng = random.Random(seed)
    space = random_space(rng, 2, 5)
    budget = budget_within(space, rng, ("bops", "size", "both")[seed % 3])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Chain([layer.name for layer in space.costs.layers], rng).eval()
    convert.wrap(model)
    grid = rng.choice(["auto", "paper", "zero"])
    scheme = Scheme(weight_grid=grid, granularity=rng.choice(["channel", "tensor"]))  # type: ignore[arg-type]
    return problem_of(model, space, budget, search_images((1, 1, model.width), seed), scheme, seed)


def traced_problem(
    net: nn.Module,
    shape: tuple[int, ...],
    *,
    candidates: Candidates = Candidates((2, 4, 8)),
    rules: dict[str, str] | None = None,
    budget: Budget | None = None,
    scheme: Scheme | None = None,
    seed: int = 0,
) -> SearchProblem:
    """``net`` wrapped and traced as in the pipelines; the default budget is the cost of uniform 4 bits."""
    convert.wrap(net.eval())
    traced = trace(net, tiny.images(shape, 1))  # type: ignore[arg-type]
    convert.leave_float(net, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(net, [parent], children)
    parsed = {pattern: parse_rule(text) for pattern, text in (rules or {}).items()}
    space = search_space("tiny", cost_model(traced), candidates, parsed)
    four = space.cost(space.nearest(LayerBits(weight=4, activation=4)))
    return problem_of(net, space, budget or Budget(four.bops), search_images(shape, seed), scheme, seed)


def tiny_problem(name: str, **options: Any) -> SearchProblem:
    """One of ``tiny.TINY``."""
    net, x = tiny.build(name)
    return traced_problem(net, tuple(x.shape[1:]), **options)


def fresh(problem: SearchProblem, **changes: Any) -> SearchProblem:
    """The same problem with a copy of the model, since a search changes it."""
    return replace(problem, model=copy.deepcopy(problem.model), **changes)


class Stopping:
    """A memory that requests an interrupt after a number of steps; its state goes through a file.

    Attributes:
        offers: steps so far.
        kept: the bytes of the file.
    """

    def __init__(self, stop_after: int | None = None, kept: bytes | None = None) -> None:
        self.stop_after, self.kept, self.offers = stop_after, kept, 0
        self._random: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        if self.kept is None:
            return None
        kept = torch.load(io.BytesIO(self.kept), weights_only=True)
        self._random = kept["random"]
        state: dict[str, Any] = kept["search"]
        return state

    def offer(self, state: Callable[[], dict[str, Any]], *, milestone: bool = False) -> None:
        self.offers += 1
        if self.offers == self.stop_after:
            file = io.BytesIO()
            torch.save({"search": state(), "random": random_state()}, file)
            self.kept = file.getvalue()
            raise Interrupted("stopped as asked")

    def restore_random(self) -> None:
        if self._random is not None:
            set_random_state(self._random)
