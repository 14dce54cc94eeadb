"""Sensitivity: the loss with one layer at fewer bits and all others in floating point.

The loss of quantizing one layer to a width is measured on images, and assumed to be additive over layers:

    loss of an option = L(only these layers, at these bits) - L(float)

The knapsack is solved exactly. Layers that run before the quantized ones have the inputs of the float model, so their
outputs are computed once per batch and reused.

Weights are quantized without weight normalization, even if the scheme has it: the batch norms of a floating-point
network expect weights with their mean.

Source: the indicator of ZeroQ (Cai et al., arXiv:2001.00281, section 3.3), with the loss itself in place of its
divergence.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.progress import Task
from saqcli.quant import convert
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.products import QuantizedProduct, quantized_products
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import Batch, SearchProblem, SearchResult
from saqcli.searchers.separable import Losses, sums_over_batches
from saqcli.searchers.supernet import ErrorShare, Supernet
from saqcli.tasks import classification


class Sensitivity:
    """Minimizes the sum of losses, each measured with one decision quantized and all else in floating point."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Measure every option of every decision, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = self.losses(problem)
        choice = best_choice(problem.space, problem.budget, losses)
        return SearchResult(
            choice, lambda budget: [best_choice(problem.space, budget, losses)], losses=losses
        )

    @torch.no_grad()
    def losses(self, problem: SearchProblem) -> Losses:
        """Mean increase of the loss on the scoring images, of every option by decision."""
        decisions = problem.space.decisions
        batches = problem.images.scoring
        plain = {"weight_normalization": False, "clip_init": "error"}
        supernet = Supernet(replace(problem, scheme=problem.scheme.model_copy(update=plain)))
        ErrorShare(supernet.model, problem.weight_error)
        quantizers = _QuantizerSwitch(supernet.model.eval())
        trials = sum(len(decision.options) for decision in decisions)

        def measure(number: int, task: Task) -> Iterator[tuple[str, float]]:
            for decision, option, rise in _loss_increases(supernet, batches[number], quantizers):
                task.advance(images=len(batches[number][1]))
                yield f"{decision} {option}", rise

        sums = sums_over_batches(problem, "one layer at a time", len(batches), measure, trials)
        count = sum(len(labels) for _, labels in batches)
        return [
            [sums[f"{number} {option}"] / count for option in range(len(decision.options))]
            for number, decision in enumerate(decisions)
        ]


def _loss_increases(
    supernet: Supernet, batch: Batch, quantizers: "_QuantizerSwitch"
) -> Iterator[tuple[int, int, float]]:
    """Decision, option and increase of the summed loss of a batch."""
    images, labels = batch
    with _OutputCache(supernet.model) as cache:
        base = _summed_loss(supernet.model, images, labels)
        for index, decision in enumerate(supernet.problem.space.decisions):
            members = supernet.layers_of(index)
            cache.reuse_before(members)
            with quantizers.on(members):
                for option, bits in enumerate(decision.options):
                    for layer in members:
                        convert.set_bits(layer, bits)
                    yield index, option, _summed_loss(supernet.model, images, labels) - base


def _summed_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float(classification.total_loss(model(images).float(), labels))


class _QuantizerSwitch:
    """Removes the quantizers from all layers, and restores those of some layers temporarily."""

    def __init__(self, model: nn.Module) -> None:
        modules: list[QuantizedLayer | QuantizedProduct] = [
            *quantized_layers(model).values(),
            *quantized_products(model).values(),
        ]
        self._own = {module: (module.weight_quantizer, module.input_quantizer) for module in modules}
        for module in modules:
            module.weight_quantizer, module.input_quantizer = nn.Identity(), nn.Identity()

    @contextmanager
    def on(self, layers: Sequence[QuantizedLayer]) -> Iterator[None]:
        """Within the context ``layers`` are quantized, and the products that follow them."""
        modules: list[QuantizedLayer | QuantizedProduct] = list(layers)
        modules += [product for layer in layers for product in layer.followers]
        try:
            for module in modules:
                module.weight_quantizer, module.input_quantizer = self._own[module]
            yield
        finally:
            for module in modules:
                module.weight_quantizer, module.input_quantizer = nn.Identity(), nn.Identity()


class _OutputCache:
    """Caches every layer's output in the first pass, and returns it in later passes.

    A layer that runs more than once in a pass, or returns no tensor, is computed every time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = list(quantized_layers(model).values())
        self._outputs: dict[QuantizedLayer, Tensor] = {}
        self._runs: Counter[QuantizedLayer] = Counter()
        self._before: dict[
            QuantizedLayer, set[QuantizedLayer]
        ] = {}  # layers that had returned before its first run
        self._reused: set[QuantizedLayer] | None = None  # None in the first pass

    def __enter__(self) -> "_OutputCache":
        for layer in self._layers:
            layer.forward = partial(self._call, layer, layer.forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            del layer.forward

    def reuse_before(self, layers: Sequence[QuantizedLayer]) -> None:
        """Recompute ``layers``, their submodules and later layers from now on; reuse all earlier outputs."""
        # a layer without forward has no entry: its parent uses the weight
        before = [self._before.get(layer, set()) for layer in layers]
        self._reused = {layer for layer in set.intersection(*before) if self._runs[layer] == 1}

    def _call(self, layer: QuantizedLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._reused is not None and layer in self._reused:
            return self._outputs[layer].clone()  # the next activation may work in place
        if self._reused is None:
            self._runs[layer] += 1
            self._before.setdefault(layer, set(self._outputs))
        output = forward(*args, **kwargs)
        if self._reused is None and isinstance(output, Tensor):
            self._outputs[layer] = output.clone()
        return output
