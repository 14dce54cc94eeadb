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
from saqcli.quant.short_steps.absorb import absorb_norms
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
    """

    model: nn.Module
    name: str
    traced: Trace
    costs: CostModel
    products: dict[str, str] = field(default_factory=dict)


def trace_network(
    model: nn.Module,
    example: Tensor | Call,
    name: str,
    classifiers: Iterable[str] = (),
    *,
    pin_returned: bool = False,
    quantize_attention: bool = False,
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
        fold_norms: batch norms are folded into the layers in front of them first, for exact sums.

    Raises:
        UnsupportedModel: it does not run on the sample, or with none of its layers.
    """
    if fold_norms:
        absorb_norms(model, example)
    traced = trace(model, example)
    convert.leave_float(model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(model, [parent], children)
    followed = {product.name: product.follows for product in traced.products if product.follows}
    products = followed if quantize_attention else {}
    convert.add_products(model, products)
    if pin_returned:
        classifiers = (*classifiers, *traced.returned)
    costs = cost_model(traced, classifiers, products=quantize_attention)
    return Network(model, name, traced, costs, products)
