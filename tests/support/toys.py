"""Search problems small enough to enumerate, with one clearly optimal configuration.

The network of ``branches`` sees an image through a first layer, three branches of equal cost side by side, and a
classifier over all of them. Branches are scaled by fixed factors that differ widely, and labels are the float network's
predictions: only a searcher that measures the effect on the loss finds the optimum.
"""

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import Interrupted
from saqcli.quant import calibration, convert
from saqcli.quant.cost import Budget, cost_model
from saqcli.quant.layer import quantized_layers
from saqcli.quant.search_space import Candidates, parse_rule, search_space
from saqcli.quant.tracer import trace
from saqcli.searchers.problem import Batch, Scored, SearchImages, SearchProblem
from saqcli.searchers.supernet import Scorer

FACTORS = (0.6, 0.03, 2.0)  # factors of the branches, in execution order
RIGHT = [1, 0, 2]  # the optimum under a budget for one of each option
CLASSES = 5


class Branches(nn.Module):
    """Three convolutions of equal cost and different importance."""

    def __init__(self, factors: tuple[float, ...] = FACTORS, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in factors)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(9 * width * len(factors), CLASSES)
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        parts = [
            factor * torch.relu(branch(x))[:, :, ::2, ::2].flatten(1)
            for factor, branch in zip(self.factors, self.branches, strict=True)
        ]
        return self.head(torch.cat(parts, 1))


class Shuffled:
    """Batches in another order every epoch with perturbed images, drawn from the global generator."""

    def __init__(
        self, images: Tensor, labels: Tensor, size: int = 32, seed: int = 0, noise: float = 0.05
    ) -> None:
        self.images, self.labels, self.size, self.seed, self.noise = images, labels, size, seed, noise

    def __len__(self) -> int:
        return len(self.labels) // self.size

    def set_epoch(self, epoch: int) -> None:
        torch.manual_seed(1000 * self.seed + epoch)

    def __iter__(self) -> Iterator[Batch]:
        for index in torch.randperm(len(self.labels))[: len(self) * self.size].split(self.size):
            images = self.images[index]
            yield images + self.noise * torch.randn_like(images), self.labels[index]


@dataclass
class Kept:
    """A memory that keeps every step's state, and interrupts the search at the requested step."""

    stop_at: int = 0
    steps: int = 0
    state: dict[str, Any] | None = None
    random: Tensor = field(default_factory=torch.get_rng_state)

    def load(self) -> dict[str, Any] | None:
        return self.state

    def offer(self, state: Callable[[], dict[str, Any]], *, milestone: bool = False) -> None:
        self.steps += 1
        if self.steps == self.stop_at:
            self.state, self.random = deepcopy(state()), torch.get_rng_state()
            raise Interrupted("stopped")

    def restore_random(self) -> None:
        torch.set_rng_state(self.random)


def sgd(model: nn.Module, lr: float = 0.001) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)


def problem_of(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    candidates: Candidates = Candidates((2, 4, 6)),
    rules: dict[str, str] | None = None,
    budget: Callable[[Any], Budget] | None = None,
    **options: Any,
) -> SearchProblem:
    """The search for a float network in eval mode; half of the images are held out.

    Args:
        budget: of the space; None for BOPs that are the mean of floor and ceiling.
        options: further fields of the problem.
    """
    convert.wrap(model.float())
    model.to(images.dtype)
    traced = trace(model, images[:1])
    space = search_space(
        "toy",
        cost_model(traced),
        candidates,
        {name: parse_rule(rule) for name, rule in (rules or {}).items()},
    )
    middle = Budget(bops=(space.floor.bops + space.ceiling.bops) // 2)
    half, size = len(labels) // 2, min(64, len(labels) // 2)
    held_out = images[half:], labels[half:]
    return SearchProblem(
        model=model,
        space=space,
        budget=middle if budget is None else budget(space),
        scheme=options.pop("scheme", convert.Scheme()),
        statistics=calibration.observe(model, [images[:64]]),
        images=SearchImages(
            training=Shuffled(images[:half], labels[:half], size=min(32, half), seed=seed),
            held_out=Shuffled(*held_out, size=min(32, half), seed=seed, noise=0.0),
            scoring=list(zip(held_out[0].split(size), held_out[1].split(size), strict=True)),
            whole=Shuffled(images, labels, size=min(32, half), seed=seed),
        ),
        optimizer=options.pop("optimizer", sgd),
        seed=seed,
        **options,
    )


def branches(seed: int = 0, count: int = 1024, temperature: float = 4.0, **options: Any) -> SearchProblem:
    """Three branches, budget for one of each option: ``RIGHT`` is right for every seed.

    Args:
        seed: of weights, images and order.
        count: of images.
        temperature: the labels are the classes of the largest logits; in their own deviation logits reach this far.
        options: as for ``problem_of``.
    """
    torch.manual_seed(seed)
    model = Branches()
    images = torch.randn(count, 3, 6, 6)
    with torch.no_grad():
        model.train()
        for part in images.split(256):
            model(part)
        model.eval()
        logits = model(images)
        scale = temperature / logits.std(0).mean()
        model.head.weight.mul_(scale)
        model.head.bias.copy_((model.head.bias - logits.mean(0)) * scale)
        labels = model(images).argmax(1)
    options.setdefault("budget", lambda space: Budget(bops=space.cost(RIGHT).bops))
    return problem_of(model, images, labels, seed=seed, **options)


def every_choice(problem: SearchProblem) -> list[Scored]:
    """All choices within the budget by their loss with fitted levels, best first."""
    scorer = Scorer(problem)
    choices = itertools.product(*(range(len(decision.options)) for decision in problem.space.decisions))
    admitted = [choice for choice in choices if problem.budget.admits(problem.space.cost(choice))]
    return sorted((scorer(choice) for choice in admitted), key=lambda scored: scored.loss)


def layers_of(problem: SearchProblem) -> dict[str, Any]:
    """The problem's quantized layers by name."""
    return dict(quantized_layers(problem.model))


def runs_out_of_memory(most: int, *hooked: Any, passes: list[int] | None = None) -> None:
    """A forward hook: the device holds that many images; to be told once batch norms have moved.

    ``passes`` counts down: how often it is told later than it could be.
    """
    _, (images, *_), _ = hooked
    if len(images) > most:
        if passes and passes[0]:
            passes[0] -= 1
            return
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
