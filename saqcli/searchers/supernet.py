"""A supernet that computes at any configuration, and scores of configurations.

The supernet shares weights among all configurations, and has quantizers for every option of every layer. Every
bit-width has its own clipping levels (Liu et al., arXiv:2111.12273, section 4; the idea is AdaBits',
arXiv:1912.09666). Batch norms and layer norms can have a copy for every option of the preceding layer, since fewer
bits change means and variances (slimmable networks, arXiv:1812.08928).

Configurations are scored on the scoring images at the starting point of fine-tuning: float weights with levels fitted
at the configuration's bits, with the corrections of calibration. ``quantize`` with that policy and no epochs
scores exactly that network. To be compared, those that will be trained are scored with a share of the quantization
error of their weights (``Comparison``).
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.quant import calibration, convert
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import QuantizedLayer, quantized_layers, quantized_once, weight_owners
from saqcli.quant.quantizers.base import Quantizer
from saqcli.searchers.problem import Propose, Scored, SearchProblem, SearchResult
from saqcli.tasks.classification import Meter
from saqcli.training.minimizers.base import running_statistics

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
SETTLE_BATCHES = 4  # batches for the initial running statistics, under weight normalization


class Supernet:
    """A problem's model with quantizers installed and fitted for all options.

    Attributes:
        model: the problem's model.
        choice: the current configuration.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.problem, self.model = problem, problem.model
        decisions = problem.space.decisions
        self.choice = [len(decision.options) - 1 for decision in decisions]
        signed = {name: facts.signed for name, facts in problem.statistics.items()}
        options = {layer.name: decision.options for decision in decisions for layer in decision.members}
        convert.install(self.model, problem.scheme, problem.config(self.choice), signed, options)
        calibration.fit(self.model, problem.statistics, problem.scheme.clip_init)
        self._norms: list[list[SwitchableNorm]] = [[] for _ in decisions]
        self._layers = quantized_layers(self.model)
        self.select(self.choice)

    def settle(self) -> None:
        """Under weight normalization, estimate running statistics at the most bits before training."""
        if self.problem.scheme.weight_normalization:
            images = self.problem.images.whole
            images.set_epoch(0)
            batches = (batch.to(self.problem.device) for batch, _ in islice(images, SETTLE_BATCHES))
            calibration.reestimate_batch_norms(self.model, batches)
            distributed.average(running_statistics(self.model))

    def switch_norms(self) -> None:
        """Give every batch norm and layer norm behind a free layer a copy for each of the layer's options."""
        decisions = self.problem.space.decisions
        owners = {layer.name: i for i, decision in enumerate(decisions) for layer in decision.members}
        example = self.problem.images.scoring[0][0][:1].to(self.problem.device)
        for name, layer in layers_before_norms(self.model, example).items():
            if layer in owners:
                norm = self.model.get_submodule(name)
                switch = SwitchableNorm(norm, len(decisions[owners[layer]].options))
                self.model.set_submodule(name, switch)
                self._norms[owners[layer]].append(switch)
        self.select(self.choice)

    def layers_of(self, decision: int) -> list[QuantizedLayer]:
        """The layers of a decision."""
        return [self._layers[layer.name] for layer in self.problem.space.decisions[decision].members]

    def at(self, choice: Sequence[int]) -> nn.Module:
        """Select ``choice`` and return the model."""
        self.select(choice)
        return self.model

    def select(self, choice: Sequence[int]) -> None:
        """Set the bits of ``choice``."""
        self.choice = list(choice)
        for decision, index, norms in zip(self.problem.space.decisions, choice, self._norms, strict=True):
            bits = decision.options[index]
            for member in decision.members:
                convert.set_bits(self._layers[member.name], bits)
            for norm in norms:
                norm.active = index


class SwitchableNorm(nn.Module):
    """A norm for every option of the preceding layer; all start as copies of the pretrained one."""

    def __init__(self, norm: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(norm) for _ in range(count))
        self.active = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the active norm."""
        normalized: Tensor = self.copies[self.active](x, *args, **kwargs)
        return normalized


@torch.no_grad()
def layers_before_norms(model: nn.Module, example: Tensor) -> dict[str, str]:
    """The quantized layer that runs last before each batch norm or layer norm, by name of the norm.

    In a network that normalizes before its layers, this is the last layer of the preceding block, as in SAMQ's released
    code. A norm that runs behind several layers is omitted.

    Args:
        model: wrapped; its mode is restored.
        example: an image (1, C, H, W).
    """
    last: list[str] = []
    behind: dict[str, set[str]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            # hook the input quantizer: another module may multiply with the layer's weight
            hook = module.input_quantizer.register_forward_hook(lambda *_, name=name: last.append(name))
            handles.append(hook)
        elif isinstance(module, _NORMS):
            handles.append(
                module.register_forward_pre_hook(
                    lambda *_, name=name: behind.setdefault(name, set()).update(last[-1:])
                )
            )
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {norm: layers.pop() for norm, layers in behind.items() if len(layers) == 1}


class ErrorShare:
    """Leaves a share of the quantization error of a model's weights: Q(w) becomes w + share * (Q(w) - w).

    Args:
        model: with quantizers, which get a hook.
        share: from 0 to 1; may be set at any time.
    """

    def __init__(self, model: nn.Module, share: float = 1.0) -> None:
        self.share = share
        for layer in weight_owners(model):
            if isinstance(layer.weight_quantizer, Quantizer):
                layer.weight_quantizer.register_forward_hook(self._moved)

    def _moved(self, quantizer: Quantizer, given: tuple[Tensor], quantized: Tensor) -> Tensor | None:
        return None if self.share == 1 else torch.lerp(quantizer.unrounded(given[0]), quantized, self.share)


class CalibratedNetwork:
    """The network that fine-tuning would start from, at any configuration.

    Its weights are a copy of those of the problem's model at construction; levels are fitted at the first use.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = replace(problem, model=copy.deepcopy(problem.model))
        self._supernet: Supernet | None = None
        self._correct: Callable[[], None] = lambda: None
        self._state: tuple[tuple[int, ...], float] | None = None  # choice and share that it is calibrated at

    def at(self, choice: Sequence[int]) -> nn.Module:
        """The network, calibrated at the bits of ``choice``; the same object each time, not to be changed."""
        return self._calibrated(tuple(choice), 1.0)

    def compared(self, choice: Sequence[int]) -> nn.Module:
        """The same, with the share of the error of weights that the problem compares configurations with."""
        return self._calibrated(tuple(choice), self.problem.weight_error)

    def _calibrated(self, choice: tuple[int, ...], share: float) -> nn.Module:
        if self._supernet is None:
            self._supernet = Supernet(self.problem)
            self._error = ErrorShare(self._supernet.model)
            self._correct = self.problem.corrections(self.problem.model)
        if self._state != (choice, share):
            self._state = None  # until it is calibrated
            self._supernet.select(choice)
            self._error.share = share
            self._correct()
            self._state = choice, share
        return self._supernet.model


@torch.no_grad()
def float_targets(problem: SearchProblem) -> list[Tensor]:
    """Log-probabilities (N, classes) of the problem's float model for every scoring batch of this rank."""
    model = problem.model.eval()
    batches = distributed.share(problem.images.scoring)
    return [model(images.to(problem.device)).float().log_softmax(1).cpu() for images, _ in batches]


class Scorer:
    """Accuracy of configurations, and divergence from the float network, on the scoring images; each evaluated once.

    Args:
        problem: of the search; its model is in floating point.
        at: returns the network of a configuration; ``CalibratedNetwork`` by default.
        targets: as of ``float_targets``; None for those of the problem's model.

    Attributes:
        at: the network of a configuration.
        scored: all scores so far, by choice.
        targets: what divergences are measured from.
    """

    def __init__(
        self,
        problem: SearchProblem,
        at: Callable[[Sequence[int]], nn.Module] | None = None,
        targets: Sequence[Tensor] | None = None,
    ) -> None:
        self.problem = problem
        self.targets = float_targets(problem) if targets is None else targets
        self.at = CalibratedNetwork(problem).at if at is None else at
        self.scored: dict[tuple[int, ...], Scored] = {}

    def __call__(self, choice: Sequence[int]) -> Scored:
        """Score ``choice``."""
        key = tuple(choice)
        if key not in self.scored:
            self.scored[key] = self._measure(key, self.at(choice).eval())
        return self.scored[key]

    @torch.no_grad()
    def _measure(self, choice: tuple[int, ...], model: nn.Module) -> Scored:
        """All ranks call this, each looks at its part of the batches, and all get the same score."""
        problem, rows = self.problem, []
        with fused_on_cpu(model), quantized_once(model):
            batches = distributed.share(problem.images.scoring)
            for (images, labels), target in zip(batches, self.targets, strict=True):
                logits, meter = model(images.to(problem.device)).float().cpu(), Meter()
                meter.update(logits, labels)
                known = labels >= 0
                apart = (target.exp() * (target - logits.log_softmax(1))).sum(1)[known]
                rows.append((vars(meter), float(apart.double().sum())))
        meter, total = Meter(), 0.0
        for counts, divergence in distributed.interleaved(distributed.gathered(rows)):
            meter.add(Meter(**counts))
            total += divergence
        score = meter.score()
        top1, loss = (score.top1, score.loss) if problem.images.labelled else (math.nan, math.nan)
        return Scored(choice, problem.space.cost(choice), top1, loss, total / max(score.images, 1))

    def state_dict(self) -> dict[str, Any]:
        """All scores so far, as plain values."""
        return {
            "configurations": [[list(s.choice), s.top1, s.loss, s.divergence] for s in self.scored.values()]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        for choice, *figures in state["configurations"]:
            cost = self.problem.space.cost(choice)
            self.scored[tuple(choice)] = Scored(tuple(choice), cost, *figures)


class Comparison(Scorer):
    """Scores with the share of the error of weights that the problem compares configurations with.

    Attributes:
        whole: scores with the whole error, as results report them; the same object if the share is 1.
    """

    def __init__(self, problem: SearchProblem) -> None:
        network = CalibratedNetwork(problem)
        super().__init__(problem, network.compared)
        self.whole = self if problem.weight_error == 1 else Scorer(problem, network.at, self.targets)

    def result(self, choice: Sequence[int], propose: Propose) -> SearchResult:
        """The result ``choice``, with what was scored with the whole error of weights, itself at least."""
        self.whole(choice)
        return SearchResult(list(choice), propose, self.whole, list(self.whole.scored.values()))


def score_all(
    problem: SearchProblem,
    scorer: Scorer,
    choices: Sequence[Sequence[int]],
    extra_state: Mapping[str, Any] | None = None,
    key: str = "calibrated",
) -> Scored:
    """Score ``choices`` one after the other and return the best; resumes an interrupted call.

    Args:
        problem: whose memory and progress are used.
        scorer: of the configurations.
        choices: at least one.
        extra_state: further state to save in the memory.
        key: of the scorer's state in the memory.
    """
    scorer.load_state_dict((problem.memory.load() or {}).get(key, {"configurations": []}))
    found: list[Scored] = []
    images = sum(len(labels) for _, labels in problem.images.scoring)
    with problem.progress.task("scoring configurations", len(choices)) as task:
        for choice in choices:
            new = tuple(choice) not in scorer.scored
            found.append(scorer(choice))
            best = min(found, key=closeness)
            task.advance(images=images if new else 0, divergence=best.divergence, MBOPs=best.cost.bops / 1e6)
            problem.memory.offer(lambda: {**(extra_state or {}), key: scorer.state_dict()})
    return min(found, key=closeness)


def rank(scored: Scored) -> tuple[float, float]:
    """Higher is better: accuracy, then loss."""
    return scored.top1, -scored.loss


def closeness(scored: Scored) -> tuple[float, float]:
    """Lower is better: divergence from the float network, then loss; NaN is worst.

    On a few hundred images the divergence tells configurations apart that accuracy cannot: every image counts, not only
    those whose best class changes.
    """
    return (math.inf if math.isnan(scored.divergence) else scored.divergence), scored.loss
