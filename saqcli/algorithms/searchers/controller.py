"""SAMQ's controller: a recurrent network that draws the bits of one decision after the other.

    first input 0;  h = LSTM(input, h);  logits = W h;  draw an option;  input = embedding(option)

A layer's bits so depend on those drawn before it. Source: Liu et al., arXiv:2111.12273, section 4 and its released
code: embeddings and cell of size 64, all parameters uniform in [-0.1, 0.1], no temperature.

Differs from the paper: a ``prior`` is added to the logits, by default the one with which configurations cost the budget
on average (``sampling.budget_logits``), so that what is learned is which layers deserve more bits than others and not
how many bits there are; options of untied bits share logits by width, weights and inputs adding up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saqcli.algorithms.searchers.knapsack import best_choice
from saqcli.algorithms.searchers.sampling import in_window
from saqcli.quant.cost import Budget
from saqcli.quant.space import SearchSpace

HIDDEN = 64
TOGETHER = 64  # sequences drawn at a time
ROUNDS = 40  # of them, before draws are moved into the window
INITIAL = 0.1


class Drawn(NamedTuple):
    """N sequences over D decisions with at most O options.

    Attributes:
        choices: (N, D), an option's index each.
        log_probability: (N,), of the whole sequence.
        entropy: (N,), summed over decisions along the sequence.
        options: (N, D, O), log-probability of every option given those drawn before; -inf where there is none.
    """

    choices: Tensor
    log_probability: Tensor
    entropy: Tensor
    options: Tensor


class Controller(nn.Module):
    """Draws choices of a space.

    Args:
        space: what may be chosen.
        prior: log-probabilities of every option, by decision, that the logits are added to.
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
        """Put another prior in the place of the present one."""
        self.prior.fill_(-torch.inf)
        for d, row in enumerate(prior):
            self.prior[d, : len(row)] = row.float()

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """``count`` sequences."""
        return self._run(count, None, generator)

    def read(self, choices: Tensor) -> Drawn:
        """How probable ``choices`` (N, D) are; differentiable."""
        return self._run(len(choices), choices, None)

    def _run(self, count: int, given: Tensor | None, generator: torch.Generator | None) -> Drawn:
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
        return Drawn(torch.stack(choices, 1), torch.stack(chosen, 1).sum(1), entropy, torch.stack(rows, 1))

    def _logits(self, hidden: Tensor, decision: int) -> Tensor:
        by_width = self.head(hidden)  # (N, widths)
        logits: Tensor = by_width[:, self.weight_index[decision]]
        return logits if self.tied else logits + by_width[:, self.activation_index[decision]]


@torch.no_grad()
def draw_within(
    controller: Controller, budget: Budget, count: int, generator: torch.Generator, rounds: int = ROUNDS
) -> list[list[int]]:
    """Different configurations that ``budget`` admits and that use it, as ``controller`` draws them.

    Where too few of its draws do, draws are moved into the window by the knapsack: to the choice that is likeliest
    by the probabilities met along the draw. Fewer than ``count`` where no more are found.

    Args:
        controller: that draws.
        budget: to be used.
        count: of configurations.
        generator: of the random numbers.
        rounds: of ``TOGETHER`` draws, before they are moved; 1 where nothing is in the window.
    """
    space = controller.space
    found: dict[tuple[int, ...], list[int]] = {}
    for _ in range(rounds):
        drawn = controller.draw(TOGETHER, generator)
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
