"""How SAMQ's controller learns: policy gradients on the cost of what it drew.

    minimise  mean over the last ``replay`` draws of  max(r A, clip(r, 1 - c, 1 + c) A)  -  entropy_weight * H
    A = clip((R - baseline) / d, -3, 3),      r = pi(b) / pi(b) when it was drawn

with d the mean distance of R from its baseline: so the entropy's weight means the same for every network, and a
configuration that breaks down, whose loss has no upper bound, does not count for more than three. Without a baseline
A is R itself, as in the paper.

With ``replay`` 1 the ratio r is 1 and the gradient is that of A log pi: REINFORCE (Williams, 1992), as in SAMQ. With
more a draw is learned from several times, as in PPO (Schulman et al., arXiv:1707.06347, Eq. 7, the sign turned).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from saqcli.algorithms.searchers.controller import Controller

Baseline = Literal["ema", "none"]
DECAY = 0.95  # of the moving average
CLIP = 0.2  # of the ratio of probabilities
FARTHEST = 3.0  # distances from the baseline
BROKEN = 100.0  # what a cost that is no finite number counts as without a baseline
TINY = 1e-12  # guards costs that are all the same


class Reinforce:
    """Moves a controller towards draws of low cost.

    Args:
        controller: that draws.
        lr: of Adam.
        weight_decay: likewise; the paper's is 5e-5.
        entropy_weight: of the entropy of a whole sequence.
        baseline: ``ema`` subtracts the moving average of the costs, ``none`` nothing.
        replay: draws that take part in an update.
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
    ) -> None:
        self.controller, self.entropy_weight = controller, entropy_weight
        self.baseline: Baseline = baseline
        self.replay = replay
        self.optimizer = torch.optim.Adam(controller.parameters(), lr=lr, weight_decay=weight_decay)
        self.average: float | None = None  # of the costs
        self.distance = 0.0  # of the costs from it, on average
        self._draws: list[tuple[list[int], float, float]] = []  # choice, log-probability then, advantage

    def learn(self, choice: Sequence[int], cost: float) -> float:
        """Take in one draw and its cost, and move the controller once; returns the entropy of a sequence."""
        advantage = self._advantage(cost)
        with torch.no_grad():
            before = float(self.controller.read(torch.tensor([list(choice)])).log_probability[0])
        self._draws = [*self._draws, (list(choice), before, advantage)][-self.replay :]
        self.optimizer.zero_grad()
        loss, entropy = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(entropy)

    def _advantage(self, cost: float) -> float:
        """How much ``cost`` is above the baseline, which takes it in."""
        if not math.isfinite(cost):  # a configuration that broke down altogether
            return FARTHEST if self.baseline == "ema" else BROKEN
        before = cost if self.average is None else self.average
        self.average = DECAY * before + (1 - DECAY) * cost
        if self.baseline == "none":
            return cost
        above = cost - before
        self.distance = DECAY * self.distance + (1 - DECAY) * abs(above) if self.distance else abs(above)
        return min(max(above / max(self.distance, TINY), -FARTHEST), FARTHEST)

    def _loss(self) -> tuple[Tensor, Tensor]:
        choices, before, advantages = zip(*self._draws, strict=True)
        drawn = self.controller.read(torch.tensor(choices))
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
        """Put back what ``state_dict`` gave."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.distance = state["average"], state["distance"]
        self._draws = [(choice, before, advantage) for choice, before, advantage in state["draws"]]
