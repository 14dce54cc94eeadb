"""HAWQ: quantization errors weighted by the curvature of the loss.

At a minimum of the loss, noise e on a tensor of n values raises it to second order by 1/2 e^T H e. In a random
direction that is

    loss of a width = 1/2 * tr(H) / n * ||Q(x) - x||**2

for the weights of a layer, and in the same way for its inputs, where H is the Hessian of one image's loss with respect
to the layer's input. Traces come from Hutchinson's estimate: random signs z over all tensors at once,
tr H_l = E <z_l, (H z)_l>, since the blocks between two tensors average to zero. The losses are summed over layers, and
the knapsack is solved exactly. Of the error of weights the share ``SearchProblem.weight_error`` counts.

Source: HAWQ-V2 (Dong et al., arXiv:1911.03852), sections 3.2 and 3.3. Differs from the paper: weights and inputs are in
one sum, so both decide one width where they are tied; and an integer program replaces the Pareto frontier, as in
HAWQ-V3 (arXiv:2011.10680).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from saqcli.progress import Task
from saqcli.quant.layer import QuantizedLayer, perturbed, quantized_layers, zero_ports
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import Batch, SearchProblem, SearchResult
from saqcli.searchers.separable import OPERANDS, Losses, Operand, add_losses, measure_noise, sums_over_batches
from saqcli.tasks import classification
from saqcli.training.hessian import HessianProduct, twice_differentiable
from saqcli.training.options import check_count

Traces = dict[tuple[str, Operand], float]
SMALL, LARGE_BATCH = 64, 16  # image side up to which batches stay whole; images at a time for larger ones


class HAWQ:
    """Minimizes the sum of second-order losses.

    Args:
        samples: random vectors per batch of images.
        images: number of scoring images for the traces, rounded up to whole batches.
    """

    def __init__(self, *, samples: int = 8, images: int = 512) -> None:
        check_count("samples", samples)
        check_count("images", images)
        self.samples, self.images = samples, images

    def search(self, problem: SearchProblem) -> SearchResult:
        """Estimate traces, measure errors, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = self.losses(problem, self.traces(problem))
        choice = best_choice(problem.space, problem.budget, losses)
        return SearchResult(
            choice, lambda budget: [best_choice(problem.space, budget, losses)], losses=losses
        )

    def losses(self, problem: SearchProblem, traces: Traces) -> Losses:
        """Half the trace times the mean squared error; a negative trace is noise and counts as 0."""
        noise = measure_noise(problem)
        return add_losses(
            problem.space,
            lambda key: 0.5 * max(traces[key.layer, key.operand], 0.0) * noise[key].error,
        )

    def traces(self, problem: SearchProblem) -> Traces:
        """Traces of the Hessian of the mean loss, of every layer's weights and of one image's inputs."""
        batches = self._batches(problem)
        count = sum(len(labels) for _, labels in batches)
        layers = quantized_layers(problem.model.eval())

        def measure(index: int, task: Task) -> Iterator[tuple[str, float]]:
            generator = torch.Generator().manual_seed(problem.seed * 1_000_003 + index)
            for key, value in self._batch_traces(problem.model, layers, batches[index], generator):
                yield key, value / count
            task.advance(images=len(batches[index][1]))

        sums = sums_over_batches(problem, "Hessian traces", len(batches), measure)
        return {
            (name, operand): sums.get(f"{operand} {name}", 0.0) for name in layers for operand in OPERANDS
        }

    def _batches(self, problem: SearchProblem) -> list[Batch]:
        """Whole batches of the scoring images, cut into parts whose graphs fit in memory."""
        size, side = len(problem.images.scoring[0][1]), problem.images.scoring[0][0].shape[-1]
        most = size if side <= SMALL else LARGE_BATCH
        whole = islice(problem.images.scoring, max(1, -(-self.images // size)))
        return [
            (images.to(problem.device), labels.to(problem.device))
            for batch in whole
            for images, labels in zip(*(torch.split(tensor, most) for tensor in batch), strict=True)
        ]

    def _batch_traces(
        self, model: nn.Module, layers: dict[str, QuantizedLayer], batch: Batch, generator: torch.Generator
    ) -> Iterator[tuple[str, float]]:
        """Estimates of the traces of a batch's summed loss, by operand and layer."""
        images, labels = batch
        ports = zero_ports(layers.values())
        with (
            twice_differentiable(model),
            perturbed(list(layers.values()), ports),
            input_ports(layers) as inputs,
        ):
            value = classification.total_loss(model(images), labels)
            names = [f"weight {name}" for name in layers]
            names += [f"activation {name}" for name, leaves in inputs.items() for _ in leaves]
            variables = [*ports, *(leaf for leaves in inputs.values() for leaf in leaves)]
            product_with = HessianProduct(value, variables)
            for _ in range(self.samples):  # one at a time: a vector is as large as all layers' inputs
                vector = [_signs(leaf, generator) for leaf in variables]
                for name, z, h in zip(names, vector, product_with(vector), strict=True):
                    yield name, float((z * h).double().sum()) / self.samples


@contextmanager
def input_ports(layers: dict[str, QuantizedLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context a zero leaf is added to every layer's input at each call; yields the leaves by layer."""
    leaves: dict[str, list[Tensor]] = {name: [] for name in layers}
    before = {name: layer.input_quantizer for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.input_quantizer = _InputPort(leaves[name])
        yield leaves
    finally:
        for name, layer in layers.items():
            layer.input_quantizer = before[name]


class _InputPort(nn.Module):
    """Adds a zero leaf to its input, and keeps the leaf."""

    def __init__(self, leaves: list[Tensor]) -> None:
        super().__init__()
        self.leaves = leaves

    def forward(self, x: Tensor) -> Tensor:
        """``x`` plus a zero leaf."""
        leaf = torch.zeros_like(x, requires_grad=True)
        self.leaves.append(leaf)
        return x + leaf


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)
