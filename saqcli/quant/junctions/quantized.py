"""Quantized junctions: the operands of an operator in the forward of a module, quantized.

The module that calls the operator is its *owner*. It keeps a ``QuantizedJunction`` for each one to be quantized, named
``OWNER.junctions.INDEX``, and its calls are redirected through them (``saqcli.quant.routing``). INDEX counts all calls
of operators that have a kind, in one forward of the owner itself; those of the modules that it calls have owners of
their own.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant.junctions.kinds import kind_of, taken_apart
from saqcli.quant.junctions.places import Place

JUNCTION_BITS = 8  # of operands, by default


class QuantizedJunction(nn.Module):
    """A quantizer for each operand of a junction that depends on the image; identities until ``convert.install``.

    Attributes:
        kind: of the operator.
        positions: of these operands among all.
        bits: of all of them.
        operands: their quantizers.
        tensors_read: for each, the first reader of the same tensor; empty where there is no other reader (``sharing``).
        requantizes: for each, places of quantizers that its tensor passes first.
    """

    operands: nn.ModuleList

    def __init__(self, kind: str, positions: Sequence[int], bits: int = JUNCTION_BITS) -> None:
        super().__init__()
        self.kind, self.positions, self.bits = kind, tuple(positions), bits
        self.operands = nn.ModuleList(nn.Identity() for _ in self.positions)
        self.tensors_read: tuple[str, ...] = ("",) * len(self.positions)
        self.requantizes: tuple[tuple[Place, ...], ...] = ((),) * len(self.positions)

    def places(self, name: str) -> dict[str, Place]:
        """The places of its quantizers by the names of the operands, if its own name is ``name``."""
        return {f"{name}.{k}": Place(self.operands, str(k)) for k in range(len(self.positions))}

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """The operands at ``positions``, quantized."""
        found = []
        for operand, before, quantizer in zip(operands, self.requantizes, self.operands, strict=True):
            for place in before:
                operand = place.quantizer(operand)
            found.append(quantizer(operand))
        return tuple(found)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the operator on quantized operands; one that writes to its operand still does.

        Raises:
            UnsupportedModel: it has other operands than in the traced pass.
        """
        joined = taken_apart(func, args, kwargs)
        operands, target = list(joined.operands), joined.target
        if max(self.positions) >= len(operands):
            raise UnsupportedModel(
                f"a call of {joined.name} has {len(operands)} operands, in the traced pass it had "
                f"{max(self.positions) + 1} or more: the forward depends on its input"
            )
        if target is not None and torch.is_grad_enabled():
            operands[0] = target.clone()  # what a quantizer saves may not be written to
        chosen = self(*(operands[position] for position in self.positions))
        for position, operand in zip(self.positions, chosen, strict=True):
            operands[position] = operand
        result = joined.run(operands)
        return result if target is None else target.copy_(result)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"kind={self.kind}, positions={self.positions}, bits={self.bits}"


class Joins:
    """The junctions of one forward pass of their owner, used in order."""

    def __init__(self, owned: nn.ModuleDict) -> None:
        self._owned, self._done = owned, 0

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that has a kind, called by the owner itself.

        Raises:
            UnsupportedModel: it is of another kind than in the traced pass.
        """
        name, self._done = str(self._done), self._done + 1
        found: Any = self._owned._modules.get(name)
        if found is None:
            return func(*args, **kwargs)
        if found.kind != kind_of(func):
            raise UnsupportedModel(
                f"a forward calls {func.__name__} where it had {found.kind} in the traced pass: junctions need the "
                "same operators in training and evaluation"
            )
        return found.run(func, args, kwargs)


def junctions_of(module: nn.Module) -> nn.ModuleDict | None:
    """The quantized junctions of ``module``, or None."""
    found = module._modules.get("junctions")
    holds = isinstance(found, nn.ModuleDict) and all(isinstance(j, QuantizedJunction) for j in found.values())
    return found if holds else None  # type: ignore[return-value]


def quantized_junctions(model: nn.Module) -> dict[str, QuantizedJunction]:
    """Every junction by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedJunction)}


def split_name(junction: str) -> tuple[str, int | None]:
    """Name of the owner and index of a junction; None if the name is not that of a junction."""
    found = re.fullmatch(r"(?:(.+)\.)?junctions\.(0|[1-9][0-9]{0,5})", junction, re.ASCII)
    return (found[1] or "", int(found[2])) if found else ("", None)
