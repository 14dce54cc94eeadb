"""SAMQ's recurrent controller, and its training by policy gradients.

The controller draws the bits of one decision after the other:

    first input 0;  h = LSTM(input, h);  logits = W h;  draw an option;  input = embedding(option)

A layer's bits therefore depend on those drawn before it. Source: Liu et al., arXiv:2111.12273, section 4 and its
released code: embeddings and cell of size 64, all parameters uniform in [-0.1, 0.1], no temperature.

Differs from the paper: a ``prior`` is added to the logits, by default the one whose configurations cost the budget on
average (``knapsack.budget_logits``), so that the controller learns which layers deserve more bits than others, not
the total number of bits; options of untied bits share logits by width, the sum of one for weights and one for inputs.

The controller is trained on the cost R of its draws:

    minimize  mean over the last ``replay`` draws of  max(r A, clip(r, 1 - c, 1 + c) A)  -  entropy_weight * H
    A = clip((R - baseline) / d, -3, 3),      r = pi(b) / pi(b) at the time of the draw

with d the mean distance of R from its baseline, so that the entropy's weight has the same meaning for every network,
and a configuration that fails, whose loss has no upper bound, counts at most 3. Without a baseline A is R itself, as
in the paper.

With ``replay`` 1 the ratio r is 1 and the gradient is that of A log pi: REINFORCE (Williams, 1992), as in SAMQ. With
more, every draw is used several times, as in PPO (Schulman et al., arXiv:1707.06347, Eq. 7, with the sign changed).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.knapsack import best_choice, in_window

HIDDEN = 64
DRAWS_PER_ROUND = 64  # sequences per round
ROUNDS = 40  # rounds before draws are moved into the window
INITIAL = 0.1
Baseline = Literal["ema", "none"]
DECAY = 0.95  # decay of the moving averages
CLIP = 0.2  # clipping range of the probability ratio
MAX_ADVANTAGE = 3.0  # largest advantage, in mean distances from the baseline
FAILED_COST = 100.0  # replaces a cost that is NaN or infinite, without a baseline
EPSILON = 1e-12  # avoids division by zero if all costs are equal


class DrawnSequences(NamedTuple):
    """N sequences over D decisions with at most O options.

    Attributes:
        choices: (N, D), one option index per decision.
        log_probability: (N,), of the whole sequence.
        entropy: (N,), summed over decisions along the sequence.
        options: (N, D, O), log-probability of every option given the preceding draws; -inf for padding.
    """

    choices: Tensor
    log_probability: Tensor
    entropy: Tensor
    options: Tensor


class Controller(nn.Module):
    """Draws choices of a search space.

    Args:
        space: the search space.
        prior: log-probabilities of every option, by decision; added to the logits.
        generator: of the initial parameters.
    """

    prior: Tensor
    weight_index: Tensor
    activation_index: Tensor

    def __init__(self, space: SearchSpace, prior: Sequence[Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self.space = space
        options = [decision.options for decision in space.decisions]
        weights = sorted({bits.weight or 0 for row in options for bits in row})
        activations = sorted({bits.activation or 0 for row in options for bits in row})
        self.tied = all(bits.weight == bits.activation for row in options for bits in row)
        widest = max((len(row) for row in options), default=1)
        self.register_buffer("weight_index", torch.zeros(len(options), widest, dtype=torch.long))
        self.register_buffer("activation_index", torch.zeros(len(options), widest, dtype=torch.long))
        for d, row in enumerate(options):
            for o, bits in enumerate(row):
                self.weight_index[d, o] = weights.index(bits.weight or 0)
                self.activation_index[d, o] = len(weights) + activations.index(bits.activation or 0)
        self.register_buffer("prior", torch.empty(len(options), widest))
        self.set_prior(prior)
        count = len(weights) + (0 if self.tied else len(activations))
        self.embedding = nn.Embedding(count, HIDDEN)
        self.cell = nn.LSTMCell(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, count)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.uniform_(-INITIAL, INITIAL, generator=generator)

    def set_prior(self, prior: Sequence[Tensor]) -> None:
        """Replace the prior."""
        self.prior.fill_(-torch.inf)
        for d, row in enumerate(prior):
            self.prior[d, : len(row)] = row.float()

    def draw(self, count: int, generator: torch.Generator) -> DrawnSequences:
        """Draw ``count`` sequences."""
        return self._run(count, None, generator)

    def evaluate(self, choices: Tensor) -> DrawnSequences:
        """Evaluate the sequences ``choices`` (N, D); differentiable."""
        return self._run(len(choices), choices, None)

    def _run(self, count: int, given: Tensor | None, generator: torch.Generator | None) -> DrawnSequences:
        x = torch.zeros(count, HIDDEN)
        state = (torch.zeros(count, HIDDEN), torch.zeros(count, HIDDEN))
        choices, rows, chosen, entropy = [], [], [], torch.zeros(count)
        for d in range(len(self.prior)):
            state = self.cell(x, state)
            row = torch.log_softmax(self._logits(state[0], d) + self.prior[d], 1)  # (N, O)
            probabilities = row.exp()
            entropy = entropy - (probabilities * row.masked_fill(probabilities == 0, 0.0)).sum(1)
            if given is None:
                choice = torch.multinomial(probabilities.detach(), 1, generator=generator)[:, 0]
            else:
                choice = given[:, d]
            choices.append(choice)
            rows.append(row)
            chosen.append(row.gather(1, choice[:, None])[:, 0])
            x = self.embedding(self.weight_index[d][choice])
            if not self.tied:
                x = x + self.embedding(self.activation_index[d][choice])
        return DrawnSequences(
            torch.stack(choices, 1), torch.stack(chosen, 1).sum(1), entropy, torch.stack(rows, 1)
        )

    def _logits(self, hidden: Tensor, decision: int) -> Tensor:
        by_width = self.head(hidden)  # (N, widths)
        logits: Tensor = by_width[:, self.weight_index[decision]]
        return logits if self.tied else logits + by_width[:, self.activation_index[decision]]


@torch.no_grad()
def draw_within(
    controller: Controller, budget: Budget, count: int, generator: torch.Generator, rounds: int = ROUNDS
) -> list[list[int]]:
    """Draw distinct configurations that are within ``budget`` and use it.

    If too few draws fall into the window, the knapsack moves draws into it: to the choice that is likeliest by the
    probabilities met along the draw. Returns fewer than ``count`` if no more are found.

    Args:
        controller: to draw from.
        budget: to be used.
        count: number of configurations.
        generator: of random numbers.
        rounds: of ``DRAWS_PER_ROUND`` draws before draws are moved; 1 if the window is empty.
    """
    space = controller.space
    found: dict[tuple[int, ...], list[int]] = {}
    for _ in range(rounds):
        drawn = controller.draw(DRAWS_PER_ROUND, generator)
        for choice in drawn.choices.tolist():
            if in_window(space, budget, choice):
                found.setdefault(tuple(choice), choice)
                if len(found) == count:
                    return list(found.values())
    for rows in drawn.options:
        losses = [(-row[: len(d.options)]).tolist() for row, d in zip(rows, space.decisions, strict=True)]
        choice = best_choice(space, budget, losses)
        found.setdefault(tuple(choice), choice)
        if len(found) == count:
            break
    return list(found.values())


class Reinforce:
    """Moves a controller towards draws of low cost.

    Args:
        controller: to be trained.
        lr: learning rate of Adam.
        weight_decay: of Adam; the paper's is 5e-5.
        betas: of Adam; those of the released code are (0.5, 0.999).
        entropy_weight: weight of the entropy of a whole sequence.
        baseline: ``ema`` subtracts the moving average of the costs, ``none`` nothing.
        replay: number of draws per update.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        lr: float,
        weight_decay: float,
        entropy_weight: float,
        baseline: Baseline,
        replay: int,
        betas: Sequence[float] = (0.9, 0.999),
    ) -> None:
        self.controller, self.entropy_weight = controller, entropy_weight
        self.baseline: Baseline = baseline
        self.replay = replay
        first, second = betas
        self.optimizer = torch.optim.Adam(
            controller.parameters(), lr=lr, weight_decay=weight_decay, betas=(first, second)
        )
        self.average: float | None = None  # moving average of the costs
        self.distance = 0.0  # mean distance of the costs from the average
        self._draws: list[
            tuple[list[int], float, float]
        ] = []  # choice, log-probability when drawn, advantage

    def learn(self, choice: Sequence[int], cost: float) -> float:
        """Update the controller once with a draw and its cost; returns the entropy of a sequence."""
        advantage = self._advantage(cost)
        with torch.no_grad():
            before = float(self.controller.evaluate(torch.tensor([list(choice)])).log_probability[0])
        self._draws = [*self._draws, (list(choice), before, advantage)][-self.replay :]
        self.optimizer.zero_grad()
        loss, entropy = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(entropy)

    def _advantage(self, cost: float) -> float:
        """The distance of ``cost`` above the baseline; updates the baseline."""
        if not math.isfinite(cost):  # the configuration failed
            return MAX_ADVANTAGE if self.baseline == "ema" else FAILED_COST
        before = cost if self.average is None else self.average
        self.average = DECAY * before + (1 - DECAY) * cost
        if self.baseline == "none":
            return cost
        above = cost - before
        self.distance = DECAY * self.distance + (1 - DECAY) * abs(above) if self.distance else abs(above)
        return min(max(above / max(self.distance, EPSILON), -MAX_ADVANTAGE), MAX_ADVANTAGE)

    def _loss(self) -> tuple[Tensor, Tensor]:
        choices, before, advantages = zip(*self._draws, strict=True)
        drawn = self.controller.evaluate(torch.tensor(choices))
        advantage = torch.tensor(advantages)
        ratio = (drawn.log_probability - torch.tensor(before)).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy = torch.maximum(ratio * advantage, clipped * advantage).mean()
        entropy = drawn.entropy.mean()
        return policy - self.entropy_weight * entropy, entropy.detach()

    def state_dict(self) -> dict[str, Any]:
        """Controller, optimizer, average and draws."""
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "distance": self.distance,
            "draws": [list(draw) for draw in self._draws],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.distance = state["average"], state["distance"]
        self._draws = [(choice, before, advantage) for choice, before, advantage in state["draws"]]
