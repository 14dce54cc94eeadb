"""One model that computes at any configuration: shared weights, quantizers for every option of every layer.

Clipping levels belong to a bit-width, weights to all of them (Liu et al., arXiv:2111.12273, section 4; the idea is
AdaBits', arXiv:1912.09666). Batch norms, and the layer norms of transformers, can have a copy for every option of the
layer that runs before them, since fewer bits mean other means and variances (slimmable networks, arXiv:1812.08928).
"""

import copy
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import ranks
from saqcli.algorithms.minimizers.passes import running_statistics
from saqcli.algorithms.searchers.problem import SearchProblem
from saqcli.quant import calibrate, convert
from saqcli.quant.layers import QuantizedLayer, quantized_layers

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
SETTLING = 4  # batches that running statistics are settled on, under weight normalization


class Supernet:
    """A problem's model with quantizers installed and fitted for all options.

    Attributes:
        model: the problem's.
        choice: what it computes with right now.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.problem, self.model = problem, problem.model
        decisions = problem.space.decisions
        self.choice = [len(decision.options) - 1 for decision in decisions]
        signed = {name: facts.signed for name, facts in problem.statistics.items()}
        options = {layer.name: decision.options for decision in decisions for layer in decision.members}
        convert.install(self.model, problem.scheme, problem.config(self.choice), signed, options)
        calibrate.fit(self.model, problem.statistics, problem.scheme.clip_init)
        self._norms: list[list[SwitchableNorm]] = [[] for _ in decisions]
        self._layers = quantized_layers(self.model)
        self.select(self.choice)

    def settle(self) -> None:
        """Under weight normalization, estimate running statistics at the most bits, to train from."""
        if self.problem.scheme.weight_normalization:
            images = self.problem.images.whole
            images.set_epoch(0)
            batches = (batch.to(self.problem.device) for batch, _ in islice(images, SETTLING))
            calibrate.settle_batch_norms(self.model, batches)
            ranks.average(running_statistics(self.model))

    def switch_norms(self) -> None:
        """Give every batch norm and layer norm behind a free layer a copy for each of its options."""
        decisions = self.problem.space.decisions
        owners = {layer.name: i for i, decision in enumerate(decisions) for layer in decision.members}
        example = self.problem.images.scoring[0][0][:1].to(self.problem.device)
        for name, layer in norms_behind(self.model, example).items():
            if layer in owners:
                norm = self.model.get_submodule(name)
                switch = SwitchableNorm(norm, len(decisions[owners[layer]].options))
                self.model.set_submodule(name, switch)
                self._norms[owners[layer]].append(switch)
        self.select(self.choice)

    def layers_of(self, decision: int) -> list[QuantizedLayer]:
        """The layers that share a decision."""
        return [self._layers[layer.name] for layer in self.problem.space.decisions[decision].members]

    def at(self, choice: Sequence[int]) -> nn.Module:
        """The model, computing with the bits of ``choice``."""
        self.select(choice)
        return self.model

    def select(self, choice: Sequence[int]) -> None:
        """Compute with the bits of ``choice`` from now on."""
        self.choice = list(choice)
        for decision, index, norms in zip(self.problem.space.decisions, choice, self._norms, strict=True):
            bits = decision.options[index]
            for member in decision.members:
                convert.set_bits(self._layers[member.name], bits)
            for norm in norms:
                norm.active = index


class SwitchableNorm(nn.Module):
    """A norm for every option of the layer in front of it; all start as copies of the pretrained one."""

    def __init__(self, norm: nn.Module, count: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(norm) for _ in range(count))
        self.active = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The active norm of ``x``."""
        normalized: Tensor = self.copies[self.active](x, *args, **kwargs)
        return normalized


@torch.no_grad()
def norms_behind(model: nn.Module, example: Tensor) -> dict[str, str]:
    """The quantized layer that runs last before each batch norm or layer norm, by name of the norm.

    In a network with norms in front of its layers that is the last layer of the block before, as in the released SAMQ
    code. A norm that runs behind several layers is left out.

    Args:
        model: wrapped; its mode is restored.
        example: an image (1, C, H, W).
    """
    last: list[str] = []
    behind: dict[str, set[str]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            # whoever multiplies with its weight, its input is quantized first
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
