"""A float network made ready for quantizers: wrapped, traced, its costs known.

Everything after this step, from the choice of bits to exported files, works on a ``Network``: the pipelines make one
from a network's name, the library from any module.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.quant import convert
from saqcli.quant.calls import Call
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.junctions.kinds import check_kinds, chosen_kind
from saqcli.quant.junctions.quantized import JUNCTION_BITS
from saqcli.quant.junctions.sharing import JunctionOperands, Junctions
from saqcli.quant.junctions.tensors import first_readers
from saqcli.quant.short_steps.absorb import absorb_norms
from saqcli.quant.tracer import Trace, trace
from saqcli.serialization import printable


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
    junctions: Iterable[str] | Junctions = (),
    junction_bits: int = JUNCTION_BITS,
    count_junctions: bool = False,
    fold_norms: bool = False,
) -> Network:
    """Trace a wrapped model on one sample, and prepare it for quantizers, in place.

    Args:
        model: from ``convert.wrap``, still in floating point.
        example: one image (1, C, H, W), or another call with one sample.
        name: canonical name of the network.
        classifiers: names of layers that are pinned to 8 bits besides the first and the last one.
        pin_returned: also pin all layers whose output the model returns.
        quantize_attention: products of two activations are quantized, and counted, too.
        junctions: kinds of operators whose operands are quantized too (``junctions.kinds.KINDS``), or those that a file
            records, which has the next two; with any, every tensor has one quantizer for all that read it.
        junction_bits: of these operands.
        count_junctions: each number that a quantized junction gives is counted as one multiply-accumulate of these
            bits; by default junctions are free, as in the paper.
        fold_norms: batch norms are folded into the layers in front of them first, for exact sums.

    Raises:
        ConfigError: there is no such kind.
        UnsupportedModel: it does not run on the sample, or with none of its layers, or has no such junctions.
    """
    recorded = junctions if isinstance(junctions, Junctions) else None
    kinds = frozenset[str]() if isinstance(junctions, Junctions) else check_kinds(junctions)
    if fold_norms:
        absorb_norms(model, example)
    traced = trace(model, example)
    convert.leave_float(model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(model, [parent], children)
    followed = {product.name: product.follows for product in traced.products if product.follows}
    products = followed if quantize_attention else {}
    convert.add_products(model, products)
    found = recorded
    if recorded is not None:
        _check_known(recorded, traced)
    elif kinds:
        found = quantized_among(traced, kinds, junction_bits, counted=count_junctions)
    if found is not None:
        convert.add_junctions(model, found)
    if pin_returned:
        classifiers = (*classifiers, *traced.returned)
    counted = junction_bops(traced, found) if found is not None and found.counted else 0
    costs = cost_model(traced, classifiers, products=quantize_attention, joined_bops=counted)
    return Network(model, name, traced, costs, products, found)


def _check_known(junctions: Junctions, traced: Trace) -> None:
    """Check that junctions which a file records are those of a network.

    Raises:
        UnsupportedModel: names one that it has not.
    """
    positions = {each.name: each.positions for each in traced.junctions}
    readers = {
        *traced.layers,
        *(f"{name}.{k}" for name, found in positions.items() for k in range(len(found))),
    }
    named = (*junctions.tensors, *junctions.tensors.values())
    unknown = [name for name, each in junctions.operators.items() if positions.get(name) != each.positions]
    unknown += [name for name in named if name not in readers]
    if unknown:
        raise UnsupportedModel(
            f"it has no quantized junction {printable(unknown[0], 80)}, which its file records"
        )


def quantized_among(
    traced: Trace, kinds: frozenset[str], bits: int = JUNCTION_BITS, *, counted: bool = False
) -> Junctions:
    """The junctions of ``kinds``, and the readers of every tensor."""
    operators = {
        junction.name: JunctionOperands(kind=junction.kind, positions=junction.positions)
        for junction in traced.junctions
        if chosen_kind(junction.kind, kinds)
    }
    tensors = first_readers(traced.junctions, traced.reads, kinds)
    return Junctions(bits=bits, operators=operators, tensors=tensors, counted=counted)


def junction_bops(traced: Trace, junctions: Junctions) -> int:
    """Bit-operations of junctions for one image, if each number that they give is one multiply-accumulate."""
    numbers = sum(each.numbers for each in traced.junctions if each.name in junctions.operators)
    return numbers * junctions.bits**2
