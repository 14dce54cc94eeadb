"""A network as a chain of modules, where its pass cannot be recorded operator by operator.

One pass shows which modules are called once, with one tensor in and one tensor out. A module follows another one if it
receives the very tensor that the other returned. The longest such chain from the network's input to its output gives
the parts; what lies between two modules cannot be run, so there must be nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant.calls import Call
from saqcli.quant.junctions.sharing import quantized_joins
from saqcli.quant.layer import in_eval_mode, quantized_layers


@dataclass(frozen=True)
class Chain:
    """Modules that are called one after the other.

    Attributes:
        modules: their names.
        layers: quantized layers, products and junctions in them.
    """

    modules: tuple[str, ...]
    layers: tuple[str, ...]

    def __call__(self, model: nn.Module, x: Tensor | Call) -> Tensor:
        """The output of the last module for the first one's input."""
        (tensor,) = Call.of(x).tensors
        tensor = tensor.clone()  # a module may write to its input
        for name in self.modules:
            module = model.get_submodule(name)
            with in_eval_mode(module):
                tensor = module(tensor)
        return tensor


@dataclass(frozen=True)
class _Called:
    name: str
    x: Tensor
    output: Tensor


def chain_of(model: nn.Module, example: Call, same: Mapping[str, str]) -> list[Chain]:
    """The parts of the longest chain of modules in ``model``.

    Args:
        model: is run once, in eval mode.
        example: a call with one tensor.
        same: for every layer a name that is the same for layers that must share a part.

    Raises:
        UnsupportedModel: there is no chain of at least two modules.
    """
    if len(example.tensors) != 1:
        raise UnsupportedModel("the network has several inputs")
    calls, output = _calls(model, example)
    counts = [call.name for call in calls]
    calls = [call for call in calls if counts.count(call.name) == 1]
    best: dict[int, list[str]] = {id(example.tensors[0]): []}
    for call in calls:  # in order of return: what gives a module's input has returned before
        before = best.get(id(call.x))
        if before is not None and len(before) >= len(best.get(id(call.output), [])):
            best[id(call.output)] = [*before, call.name]
    names = best.get(id(output), [])
    if len(names) < 2:
        raise UnsupportedModel("its modules are no chain")
    return _parts(model, names, same)


@torch.no_grad()
def _calls(model: nn.Module, example: Call) -> tuple[list[_Called], Any]:
    calls: list[_Called] = []
    handles = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
            if plain and isinstance(output, Tensor):
                calls.append(_Called(name, args[0], output))

        return hook

    try:
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_hook(note(name), with_kwargs=True))
        with in_eval_mode(model):
            output = example.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _parts(model: nn.Module, names: Sequence[str], same: Mapping[str, str]) -> list[Chain]:
    placed = [*quantized_layers(model), *quantized_joins(model)]
    groups: list[tuple[list[str], list[str]]] = []
    for name in names:
        inside = [layer for layer in placed if layer == name or layer.startswith(f"{name}.")]
        if groups and (not inside or not groups[-1][1]):
            groups[-1][0].append(name)
            groups[-1][1].extend(inside)
        else:
            groups.append(([name], inside))
    chains: list[Chain] = []
    for modules, layers in groups:
        keys = {same.get(layer, layer) for layer in layers}
        first = next(
            (i for i, each in enumerate(chains) if keys & {same.get(layer, layer) for layer in each.layers}),
            None,
        )
        joined = Chain((), ())
        if first is not None:
            joined = Chain(
                tuple(module for each in chains[first:] for module in each.modules),
                tuple(layer for each in chains[first:] for layer in each.layers),
            )
            del chains[first:]
        chains.append(Chain((*joined.modules, *modules), (*joined.layers, *layers)))
    return chains
