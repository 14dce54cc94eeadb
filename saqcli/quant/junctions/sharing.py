"""One quantizer for every tensor: the quantizers of its readers, shared or one after the other.

Of all readers of a tensor (``tensors``) those with the most bits share one quantizer, that of the first. One with fewer
bits has its own, which acts on the quantized tensor, as a runtime requantizes codes. A reader whose bits a search may
change has its own too. The grid is signed for all if it is for one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import nn

from saqcli.quant.bits import Bits
from saqcli.quant.junctions.kinds import KINDS
from saqcli.quant.junctions.places import Place
from saqcli.quant.junctions.quantized import JUNCTION_BITS, QuantizedJunction, quantized_junctions
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.products import OPERANDS, QuantizedProduct, operand_name, quantized_products
from saqcli.quant.quantizers.base import Quantizer


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} of junctions")
    return kind


class JunctionOperands(BaseModel):
    """What of a junction is quantized.

    Attributes:
        kind: of the operator.
        positions: of the quantized operands among all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Annotated[str, AfterValidator(_known)]
    positions: tuple[int, ...]


class Junctions(BaseModel):
    """The quantized junctions of a network, as files record them.

    Attributes:
        bits: of their operands.
        operators: by name, ``OWNER.junctions.INDEX``.
        tensors: for every reader of a tensor that others read too, a layer or an operand, the first of them.
        counted: whether they count as bit-operations; in JSON only if they do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Bits = JUNCTION_BITS
    operators: dict[str, JunctionOperands]
    tensors: dict[str, str]
    counted: bool = False

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "counted" or value}


def quantized_joins(model: nn.Module) -> dict[str, QuantizedProduct | QuantizedJunction]:
    """Every product and junction by qualified name: what is quantized besides layers."""
    return {**quantized_products(model), **quantized_junctions(model)}


def activation_places(model: nn.Module) -> dict[str, Place]:
    """The places of all quantizers of activations: inputs of layers, operands of products and of junctions."""
    places = {name: Place(layer, "input_quantizer") for name, layer in quantized_layers(model).items()}
    for name, join in quantized_joins(model).items():
        places |= places_of(name, join)
    return places


def places_of(name: str, module: nn.Module) -> dict[str, Place]:
    """The places of the quantizers of activations of one layer, product or junction, which has ``name``."""
    if isinstance(module, QuantizedJunction):
        return module.places(name)
    if isinstance(module, QuantizedProduct):
        return {operand_name(name, operand): Place(module, key) for operand, key in OPERANDS.items()}
    return {name: Place(module, "input_quantizer")}


def owners(model: nn.Module) -> dict[str, str]:
    """For every place with a quantizer that an earlier place holds too, the name of the first such place."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, place in activation_places(model).items():
        if isinstance(place.quantizer, Quantizer):
            owner = first.setdefault(id(place.quantizer), name)
            if owner != name:
                found[name] = owner
    return found


class _Reader(NamedTuple):
    """A layer, or an operand of a junction, and its place."""

    place: Place
    module: QuantizedLayer | QuantizedJunction
    operand: int | None

    def read_after(self, places: tuple[Place, ...]) -> None:
        """Have its tensor pass the quantizers at ``places`` first."""
        module = self.module
        if isinstance(module, QuantizedJunction):
            module.requantizes = tuple(
                places if k == self.operand else each for k, each in enumerate(module.requantizes)
            )
        else:
            module.requantizes = places


def _readers(model: nn.Module) -> dict[str, list[tuple[str, _Reader]]]:
    """The readers of every tensor that has several, by the first of them; layers before operands."""
    found: dict[str, list[tuple[str, _Reader]]] = {}
    for name, layer in quantized_layers(model).items():
        if layer.tensor_read:
            reader = _Reader(Place(layer, "input_quantizer"), layer, None)
            found.setdefault(layer.tensor_read, []).append((name, reader))
    for name, junction in quantized_junctions(model).items():
        for k, (operand, place) in enumerate(junction.places(name).items()):
            if junction.tensors_read[k]:
                reader = _Reader(place, junction, k)
                found.setdefault(junction.tensors_read[k], []).append((operand, reader))
    return found


def common_signs(model: nn.Module, signed: Mapping[str, bool]) -> dict[str, bool]:
    """``signed``, where all readers of a tensor are signed if one of them is."""
    found = dict(signed)
    for readers in _readers(model).values():
        names = [name for name, _ in readers if name in signed]
        found |= dict.fromkeys(names, any(signed[name] for name in names))
    return found


def share_quantizers(model: nn.Module) -> None:
    """Let the readers of every tensor share its quantizer; each has its own installed."""
    for readers in _readers(model).values():
        quantized = [
            (reader, reader.place.quantizer)
            for _, reader in readers
            if isinstance(reader.place.quantizer, Quantizer)
        ]
        for reader, _ in quantized:
            reader.read_after(())
        fixed = [each for each in quantized if len(each[1].candidates) == 1]
        if len(quantized) < 2 or not fixed:
            continue
        widest = max(quantizer.bits for _, quantizer in fixed)
        first, shared = next(each for each in fixed if each[1].bits == widest)
        for reader, quantizer in quantized:
            if len(quantizer.candidates) == 1 and quantizer.bits == widest:
                reader.place.put(shared)
            elif max(quantizer.candidates) <= widest:
                reader.read_after((first.place,))


@contextmanager
def without_requantization(model: nn.Module) -> Iterator[None]:
    """Within the context every reader of a tensor applies its own quantizer alone."""
    layers = [(layer, layer.requantizes) for layer in quantized_layers(model).values()]
    junctions = [(junction, junction.requantizes) for junction in quantized_junctions(model).values()]
    try:
        for layer, _ in layers:
            layer.requantizes = ()
        for junction, before in junctions:
            junction.requantizes = ((),) * len(before)
        yield
    finally:
        for layer, places in layers:
            layer.requantizes = places
        for junction, before in junctions:
            junction.requantizes = before
