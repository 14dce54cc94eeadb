"""A float network made ready for quantizers: wrapped, traced, its costs known.

Everything after this step, from the choice of bits to exported files, works on a ``Network``: the pipelines make one
from a network's name, the library from any module.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from saqcli.quant import convert
from saqcli.quant.calls import Call
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.junctions.kinds import check_kinds, chosen_kind
from saqcli.quant.junctions.quantized import JUNCTION_BITS
from saqcli.quant.junctions.sharing import JunctionOperands, Junctions
from saqcli.quant.junctions.tensors import first_readers
from saqcli.quant.tracer import Trace, trace


@dataclass(frozen=True)
class Network:
    """A float model with wrapped layers that still compute in floating point.

    Attributes:
        model: wrapped in place.
        name: canonical name of the network.
        traced: the traced forward pass.
        costs: costs of its layers.
        products: quantized products of activations, and the layers whose input bits they share.
        junctions: quantized junctions; None without any.
    """

    model: nn.Module
    name: str
    traced: Trace
    costs: CostModel
    products: dict[str, str] = field(default_factory=dict)
    junctions: Junctions | None = None


def trace_network(
    model: nn.Module,
    example: Tensor | Call,
    name: str,
    classifiers: Iterable[str] = (),
    *,
    pin_returned: bool = False,
    quantize_attention: bool = False,
    junctions: Iterable[str] = (),
    junction_bits: int = JUNCTION_BITS,
    count_junctions: bool = False,
) -> Network:
    """Trace a wrapped model on one sample, and prepare it for quantizers, in place.

    Args:
        model: from ``convert.wrap``, still in floating point.
        example: one image (1, C, H, W), or another call with one sample.
        name: canonical name of the network.
        classifiers: names of layers that are pinned to 8 bits besides the first and the last one.
        pin_returned: also pin all layers whose output the model returns.
        quantize_attention: products of two activations are quantized, and counted, too.
        junctions: kinds of operators whose operands are quantized too (``junctions.kinds.KINDS``); with any, every
            tensor has one quantizer for all that read it.
        junction_bits: of these operands.
        count_junctions: each number that a quantized junction gives is counted as one multiply-accumulate of these
            bits; by default junctions are free, as in the paper.

    Raises:
        ConfigError: there is no such kind.
        UnsupportedModel: it does not run on the sample, or with none of its layers.
    """
    kinds = check_kinds(junctions)
    traced = trace(model, example)
    convert.leave_float(model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(model, [parent], children)
    followed = {product.name: product.follows for product in traced.products if product.follows}
    products = followed if quantize_attention else {}
    convert.add_products(model, products)
    found = quantized_among(traced, kinds, junction_bits) if kinds else None
    if found is not None:
        convert.add_junctions(model, found)
    if pin_returned:
        classifiers = (*classifiers, *traced.returned)
    counted = junction_bops(traced, found) if count_junctions and found is not None else 0
    costs = cost_model(traced, classifiers, products=quantize_attention, joined_bops=counted)
    return Network(model, name, traced, costs, products, found)


def quantized_among(traced: Trace, kinds: frozenset[str], bits: int = JUNCTION_BITS) -> Junctions:
    """The junctions of ``kinds``, and the readers of every tensor."""
    operators = {
        junction.name: JunctionOperands(kind=junction.kind, positions=junction.positions)
        for junction in traced.junctions
        if chosen_kind(junction.kind, kinds)
    }
    tensors = first_readers(traced.junctions, traced.reads, kinds)
    return Junctions(bits=bits, operators=operators, tensors=tensors)


def junction_bops(traced: Trace, junctions: Junctions) -> int:
    """Bit-operations of junctions for one image, if each number that they give is one multiply-accumulate."""
    numbers = sum(each.numbers for each in traced.junctions if each.name in junctions.operators)
    return numbers * junctions.bits**2
