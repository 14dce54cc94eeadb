"""A quantizer that blends all options, in shares that a search learns.

A layer computes with every option, weighted by its share, so that the bits become differentiable:

    p_j   = exp(a_j / T) / sum_k exp(a_k / T)                       shares of the widths, from logits a
    W~    = sum_j p_j Q_j(w)          X~ = sum_j p_j Q_j(x)         w is shared; every width has its clipping level
    E[c]  = sum_o p_o c_o                                           of a decision, o over its options

If weights and inputs of a decision always have the same width, one logit per width gives the shares of both.
Otherwise each operand has its own logits, and an option's share is the product of its widths' shares, normalized over
the existing options.

Source: EdMIPS (Cai and Vasconcelos, arXiv:2004.05795). Differs from it: the expected cost averages over options,
where EdMIPS multiplies expected widths. If the shares are 0 or 1 both equal the cost of the choice; before, with one
width for both operands, E[b] E[b] < E[b b]: with 2 and 6 bits at equal shares EdMIPS counts 16, although the choice
costs 4 or 36, 20 on average.

The logits do not belong to the model: neither its optimizer nor a perturbation of its parameters sees them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from saqcli.quant.cost import Budget
from saqcli.quant.products import OPERANDS
from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.search_space import Decision
from saqcli.searchers.supernet import Supernet

MIN_SHARE = 0.01  # widths below it are skipped: they change little and take as long as others


class Mixture(nn.Module):
    """Replaces a layer's quantizer; blends its results at several widths.

    Attributes:
        quantizer: with levels for all widths.
        widths: to blend.
        shares: returns one share per width, (widths,); they sum to 1.
    """

    def __init__(self, quantizer: Quantizer, widths: Sequence[int], shares: Callable[[], Tensor]) -> None:
        super().__init__()
        self.quantizer, self.widths, self.shares = quantizer, tuple(widths), shares

    def forward(self, x: Tensor) -> Tensor:
        """The blend, in the shape of ``x``; exactly one width's result if that width has the whole share."""
        blend: Tensor | None = None
        shares = self.shares()
        values = shares.tolist()
        for bits, share, value in zip(self.widths, shares.unbind(), values, strict=True):
            if value < MIN_SHARE and value < max(values):
                continue
            self.quantizer.select(bits)
            part: Tensor = self.quantizer(x)
            blend = part * share if blend is None else torch.addcmul(blend, part, share)
        assert blend is not None
        return blend

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"widths={self.widths}"


class Preference:
    """The learned shares of one decision's options.

    Attributes:
        weights: distinct widths of the options' weights, ascending.
        activations: distinct widths of the options' inputs, ascending.
        logits: of the weights' widths, then of the inputs'; a single tensor if the two are always the same.
        temperature: divisor of the logits.
    """

    def __init__(self, decision: Decision, device: torch.device, dtype: torch.dtype) -> None:
        """All options start with equal shares."""
        pairs = [(bits.weight or 0, bits.activation or 0) for bits in decision.options]
        self.weights = sorted({weight for weight, _ in pairs})
        self.activations = sorted({activation for _, activation in pairs})
        tied = all(weight == activation for weight, activation in pairs)
        parts = [self.weights] if tied else [self.weights, self.activations]
        self.logits = [nn.Parameter(torch.zeros(len(part), device=device, dtype=dtype)) for part in parts]
        self.temperature = 1.0
        self._places = [  # index of every option's width, by part
            torch.tensor([part.index(pair[i]) for pair in pairs], device=device)
            for i, part in enumerate(parts)
        ]

    def weight_shares(self) -> Tensor:
        """Share of every weight width."""
        return torch.softmax(self.logits[0] / self.temperature, 0)

    def input_shares(self) -> Tensor:
        """Share of every input width."""
        return torch.softmax(self.logits[-1] / self.temperature, 0)

    def log_shares(self) -> Tensor:
        """Logarithm of every option's share."""
        scores = [logits[places] for logits, places in zip(self.logits, self._places, strict=True)]
        return torch.log_softmax(torch.stack(scores).sum(0) / self.temperature, 0)


class Mixtures:
    """A supernet whose free layers compute with all their options at once.

    Quantizers of fixed layers, and of operands with a single width, stay unchanged.

    Attributes:
        preferences: by decision.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._space = supernet.problem.space
        weight = next(supernet.model.parameters())
        self.preferences = [
            Preference(decision, weight.device, weight.dtype) for decision in self._space.decisions
        ]
        self._costs = [
            torch.tensor(decision.costs, device=weight.device, dtype=torch.float64)
            for decision in self._space.decisions
        ]
        for index, preference in enumerate(self.preferences):
            for layer in supernet.layers_of(index):
                self._install(layer, "weight_quantizer", preference.weights, preference.weight_shares)
                self._install(layer, "input_quantizer", preference.activations, preference.input_shares)
                for product in layer.followers:
                    for name in OPERANDS.values():
                        self._install(product, name, preference.activations, preference.input_shares)

    def _install(
        self, owner: nn.Module, name: str, widths: Sequence[int], shares: Callable[[], Tensor]
    ) -> None:
        plain = getattr(owner, name)
        if len(widths) > 1 and isinstance(
            plain, Quantizer
        ):  # a layer with a tied weight has no weight quantizer
            setattr(owner, name, Mixture(plain, widths, shares))

    def parameters(self) -> list[nn.Parameter]:
        """All logits."""
        return [logits for preference in self.preferences for logits in preference.logits]

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of all decisions; below 1 the largest logit gets more than its share."""
        for preference in self.preferences:
            preference.temperature = temperature

    def used(self, budget: Budget) -> Tensor:
        """Expected cost relative to the budget, per bound; differentiable, fixed layers included."""
        fixed = torch.tensor(self._space.fixed_cost, device=self._costs[0].device, dtype=torch.float64)
        shares = [preference.log_shares().exp().double() for preference in self.preferences]
        paid = [share @ costs for share, costs in zip(shares, self._costs, strict=True)]
        cost = torch.stack(paid).sum(0) + fixed
        return torch.stack([cost[index] / bound for index, bound in budget.bounds()])

    @torch.no_grad()
    def entropy(self) -> float:
        """Entropy of the options' shares in nats, mean over decisions; 0 if all shares are 0 or 1."""
        logs = [preference.log_shares() for preference in self.preferences]
        return sum(float(-(log.exp() * log).sum()) for log in logs) / max(len(logs), 1)

    @torch.no_grad()
    def losses(self) -> list[list[float]]:
        """-log of every option's share, by decision; the temperature does not change which choice has the least sum."""
        return [(-preference.log_shares()).tolist() for preference in self.preferences]
