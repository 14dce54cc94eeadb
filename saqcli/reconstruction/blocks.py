"""Blocks of a network: what reconstruction fits one after the other, each from its input tensor to its output tensor.

Names do not tell where a network can be taken apart, since a forward adds and concatenates between its modules. The
flow of tensors does: where all that the network computes from its input passes a single tensor, the network is a first
part followed by a second one. Between two such points that follow each other lies a *piece*: one operator in a plain
chain, a whole residual block with its addition, the branches of an inception block.

    block    a piece with quantized layers, and the pieces without one that follow and keep the shape: norm, activation.
             What changes the shape (pooling, flattening) goes to the next block, or to the last one
    merged   pieces that share a layer or a weight, with all between them, since a block is fitted on its own
    large    a densely connected network passes no single tensor, and is one block: legal, and said in its ``note``

A block runs on the live modules of the model that it is given: a recorded pass in parts (``tape``). Every result is
compared with the network's own on a second batch, bit for bit. A network that cannot be recorded, such as one with
scripted operators, is taken apart at modules that pass one tensor (``chains``), or is one block.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel, out_of_memory
from saqcli.quant.calls import Call, tensors_in
from saqcli.quant.junctions.sharing import quantized_joins
from saqcli.quant.layer import in_eval_mode, quantized_layers
from saqcli.quant.tracer import try_model
from saqcli.reconstruction.chains import chain_of
from saqcli.reconstruction.cuts import Part, parts_of
from saqcli.reconstruction.tape import Tapes

MANY_LAYERS = 16  # a block of more has a note

Runner = Callable[[nn.Module, Tensor | Call], Tensor]


@dataclass(frozen=True)
class Block:
    """A part of a network between two tensors.

    Attributes:
        name: the common part of its layers' names, or the first and the last one.
        layers: its quantized layers, products and junctions, in order of execution.
        run: computes its output from its input.
        note: what is special about it, in one line, or empty.
    """

    name: str
    layers: tuple[str, ...]
    run: Runner
    note: str = ""

    def __call__(self, model: nn.Module, x: Tensor | Call) -> Tensor:
        """The block's output, as ``model`` computes it in eval mode; differentiable.

        Args:
            model: the one in which the block was found, or a copy of it, such as the float model.
            x: the output of the block before, (N, ...), which is not changed; the images for the first block, or a call
                for a network with several inputs.

        Returns:
            (N, ...); the last block of a network with several outputs gives them side by side, (N, numbers).
        """
        return self.run(model, x)


def output_of(result: Any) -> Tensor:
    """The one tensor that a model returned, or all of them side by side, (N, numbers).

    Raises:
        UnsupportedModel: there is none.
    """
    return _joined(tensors_in(result))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        raise UnsupportedModel("the model returns no tensor")
    if len(tensors) == 1:
        return tensors[0]
    kind = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), tensors[0].dtype)
    return torch.cat([tensor.reshape(len(tensor), -1).to(kind) for tensor in tensors], 1)


def find_blocks(model: nn.Module, example: Tensor | Call) -> list[Block]:
    """The blocks of ``model``, in order of execution; run one after the other they compute what ``model`` does.

    Args:
        model: wrapped, quantized or still in floating point; it is run a few times in eval mode and not changed.
        example: a batch of images (N, C, H, W), or another call.

    Raises:
        UnsupportedModel: the forward fails, or the inputs are a list of tensors.
    """
    example = Call.of(example)
    if not example.tensors or example.count == 0 or example.count != len(_first_batched(example)):
        raise UnsupportedModel(
            "reconstruction needs inputs with the images along dimension 0 of a tensor: this model takes lists"
        )
    example = example.map(torch.detach)
    with in_eval_mode(model):
        try_model(model, example)
    layers = [*quantized_layers(model), *quantized_joins(model)]
    notes: list[str] = []
    for find in (_recorded_blocks, _chained_blocks):
        try:
            blocks = find(model, example)
            _check(model, blocks, example)
            return [_noted(block, notes) for block in blocks]
        except Exception as error:  # a forward may raise anything
            if out_of_memory(error):
                raise
            notes.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    note = f"the network could not be taken apart and is one block ({notes[0]})"
    return [Block(_name(layers), tuple(layers), _whole, note)]


def _first_batched(call: Call) -> Tensor:
    return next((tensor for tensor in call.tensors if tensor.dim()), call.tensors[0])


def _noted(block: Block, notes: list[str]) -> Block:
    text = block.note
    if notes:
        text = f"the network was taken apart at its modules ({notes[0]})"
    elif not text and len(block.layers) > MANY_LAYERS:
        text = f"{len(block.layers)} layers are one block: no single tensor passes between them"
    return Block(block.name, block.layers, block.run, text)


def _whole(model: nn.Module, x: Tensor | Call) -> Tensor:
    with in_eval_mode(model):
        return output_of(Call.of(x).run(model))


def _recorded_blocks(model: nn.Module, example: Call) -> list[Block]:
    """Blocks between the single tensors of a recorded pass."""
    tapes = Tapes(example)
    parts = parts_of(tapes.of(model, 2), tapes.of(model, 3), _same_block(model))
    return [
        Block(name, part.layers, _PartRunner(tapes, part))
        for name, part in zip(_names(parts), parts, strict=True)
    ]


@dataclass(frozen=True)
class _PartRunner:
    """Runs a part of a recorded pass."""

    tapes: Tapes
    part: Part

    def __call__(self, model: nn.Module, x: Tensor | Call) -> Tensor:
        call, part = Call.of(x), self.part
        tape = self.tapes.of(model, call.count)
        given = {
            value: tensor.clone() if value in part.changed else tensor
            for value, tensor in zip(part.inputs, call.tensors, strict=True)
        }
        modules = [
            module
            for name in part.layers
            for module in model.get_submodule(name).modules()
            if module.training
        ]
        for module in modules:
            module.training = False
        try:
            return _joined(tape.run(model, part.operators, given, part.outputs))
        finally:
            for module in modules:
                module.training = True


def _chained_blocks(model: nn.Module, example: Call) -> list[Block]:
    """Blocks between modules that are called one after the other."""
    chains = chain_of(model, example, _same_block(model))
    names = _names(chains)
    return [Block(name, chain.layers, chain) for name, chain in zip(names, chains, strict=True)]


def _same_block(model: nn.Module) -> dict[str, str]:
    """For every layer and product the first layer with its weight; layers with the same one share a block."""
    layers = quantized_layers(model)
    names = {layer: name for name, layer in layers.items()}
    found = {name: names[layer.tied_to[0]] if layer.tied_to else name for name, layer in layers.items()}
    return found | {name: name for name in quantized_joins(model)}


def _names(parts: Iterable[Any]) -> list[str]:
    """A name for every part: the common part of its layers' names where no other has it too."""
    layers = [part.layers for part in parts]
    short = [_name(each) for each in layers]
    return [name if short.count(name) == 1 else _ends(each) for name, each in zip(short, layers, strict=True)]


def _name(layers: Sequence[str]) -> str:
    if len(layers) == 1:
        return layers[0] or "model"
    levels = zip(*(name.split(".") for name in layers), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return ".".join(common) or _ends(layers)


def _ends(layers: Sequence[str]) -> str:
    return " to ".join(dict.fromkeys((layers[0] or "model", layers[-1] or "model")))


@torch.no_grad()
def _check(model: nn.Module, blocks: Sequence[Block], example: Call) -> None:
    """Compare the blocks with the model on another batch than the recorded one, of another size.

    Raises:
        UnsupportedModel: a layer is in no block or in two, or an output differs in one bit.
    """
    placed = [name for block in blocks for name in block.layers]
    if sorted(placed) != sorted({*quantized_layers(model), *quantized_joins(model)}):
        raise UnsupportedModel("a quantized layer is in no block or in several")
    count = example.count
    index = torch.arange(5) % count
    batch = example.map(lambda tensor: tensor[index] if tensor.dim() and len(tensor) == count else tensor)
    batch = batch.map(lambda tensor: tensor.flip(-1) * 0.75 if tensor.is_floating_point() else tensor)
    with in_eval_mode(model):
        expected = output_of(batch.run(model))
    x: Tensor | Call = batch
    for block in blocks:
        x = block(model, x)
    if not torch.equal(torch.nan_to_num(expected), torch.nan_to_num(output_of(x))):
        raise UnsupportedModel("its recorded pass computes something else on other images")
