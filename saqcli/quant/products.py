"""Products of two activations in attention, QK and PV, quantized.

Queries are multiplied by keys, and probabilities by values, in the forward of a module, not in a layer. To quantize the
products, the module keeps a ``QuantizedProduct`` for each, numbered in the order of multiplication in its forward, and
its multiplications are redirected through them (``routing``). They have the bits of the input of the layer that
computes their first operand.

torch's fused attention consists of two such products with a softmax in between and is written out as these; the
probabilities inside it are quantized as well.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.quant.quantizers.base import Quantizer

OPERANDS = {"left": "input_quantizer", "right": "weight_quantizer"}  # attributes of their quantizers
ATTENTION = F.scaled_dot_product_attention
_MATMULS = {
    torch.matmul,
    torch.bmm,
    torch.mm,
    Tensor.mm,
    Tensor.matmul,
    Tensor.bmm,
    Tensor.__matmul__,
}
OPERATORS = {ATTENTION, torch.einsum, *_MATMULS}
ADD_OPERATORS = {torch.addmm, torch.baddbmm, Tensor.addmm, Tensor.baddbmm}  # traced, but never redirected


class Pair(NamedTuple):
    """Two operands of a multiplication.

    Attributes:
        left: the first operand, or the tensors it is computed from inside fused attention.
        right: the second operand.
        macs: multiply-accumulates.
    """

    left: tuple[Tensor, ...]
    right: Tensor
    macs: int


def pairs(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> list[Pair]:
    """The products that an operator call computes; empty unless it multiplies exactly two tensors."""
    if func in _MATMULS:
        args, kwargs = operands_first(args, dict(kwargs), ("other", "mat2"))
    if func is ATTENTION:
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        query, key, value = given["query"], given["key"], given["value"]
        scores = query.numel() * key.shape[-2]
        mixing = query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]
        return [Pair((query,), key, scores), Pair((query, key), value, mixing)]
    if func is torch.einsum:
        operands = _einsum_operands(args)
        return (
            [Pair((operands[0],), operands[1], _einsum_macs(args[0], operands))] if len(operands) == 2 else []
        )
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if func in _MATMULS and len(tensors) >= 2:
        return [Pair((tensors[0],), tensors[1], output.numel() * tensors[0].shape[-1])]
    if func in ADD_OPERATORS and len(tensors) >= 3:
        return [Pair((tensors[1],), tensors[2], output.numel() * tensors[1].shape[-1])]
    return []


def operands_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its two operands given by position; ``names`` are the keywords of the second."""
    kwargs = dict(kwargs)
    found = list(args)
    if not found and "input" in kwargs:
        found.append(kwargs.pop("input"))
    if len(found) == 1:
        found += [kwargs.pop(name) for name in names if name in kwargs][:1]
    return tuple(found), kwargs


def _einsum_operands(args: tuple[Any, ...]) -> list[Tensor]:
    rest = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    return list(rest)


def _einsum_macs(equation: str, operands: list[Tensor]) -> int:
    """The product of the sizes of all labels."""
    sizes: dict[str, int] = {}
    for labels, operand in zip(equation.replace(" ", "").split("->")[0].split(","), operands, strict=True):
        first, dots, last = labels.partition("...")
        shape = list(operand.shape)
        sizes |= dict(zip(first, shape, strict=False))
        if dots:
            middle = shape[len(first) : len(shape) - len(last)]
            sizes["..."] = max(math.prod(middle), sizes.get("...", 1))
            sizes |= dict(zip(last, shape[len(shape) - len(last) :], strict=True))
    return math.prod(sizes.values())


class QuantizedProduct(nn.Module):
    """A quantizer for each operand of a product; identities until ``convert.install``.

    Attributes:
        input_quantizer: of the first operand.
        weight_quantizer: of the second operand, which takes the place of a weight.
    """

    input_quantizer: nn.Module
    weight_quantizer: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.input_quantizer, self.weight_quantizer = nn.Identity(), nn.Identity()

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Both operands, quantized."""
        return self.input_quantizer(left), self.weight_quantizer(right)

    def select(self, bits: int) -> None:
        """Set the active bits of both operands."""
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            if isinstance(quantizer, Quantizer):
                quantizer.select(bits)


class Multiplications:
    """The products of one forward pass of their owner, used in order.

    All multiplications during that forward are counted, including those in submodules, as in the trace.
    """

    def __init__(self, products: nn.ModuleDict) -> None:
        self._products, self._done = products, 0
        self.attention_weights: Tensor | None = None

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, owned: bool) -> Any:
        """Run the operator, on quantized operands if it is ``owned``, not called by a submodule."""
        if func in _MATMULS:
            args, kwargs = operands_first(args, kwargs, ("other", "mat2"))
        operands = _einsum_operands(args) if func is torch.einsum else list(args)
        if func is torch.einsum and len(operands) != 2:
            return func(*args, **kwargs)
        if not owned:
            self._done += 2 if func is ATTENTION else 1
            return func(*args, **kwargs)
        if func is ATTENTION:
            output, self.attention_weights = attention(self._next(), self._next(), *args, **kwargs)
            return output
        if func is torch.einsum:
            return func(args[0], *self._quantized(*operands))
        return func(*self._quantized(args[0], args[1]), *args[2:], **kwargs)

    def _next(self) -> QuantizedProduct | None:
        name, self._done = str(self._done), self._done + 1
        found: QuantizedProduct | None = dict(self._products.items()).get(name)  # type: ignore[assignment]
        return found

    def _quantized(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        product = self._next()
        return (left, right) if product is None else product(left, right)


def attention(
    scoring: QuantizedProduct | None,
    mixing: QuantizedProduct | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.scaled_dot_product_attention``, (..., L, E) over (..., S, E), written out on quantized operands.

    Returns:
        The output, and the attention weights; None instead of the weights if no operand is quantized.
    """
    if scoring is None and mixing is None:
        return (
            ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa),
            None,
        )
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    key = key.transpose(-2, -1)
    if scoring is not None:
        query, key = scoring(query, key)
    weights = mixed = probabilities((query @ key) * factor, attn_mask, is_causal, dropout_p)
    if mixing is not None:
        mixed, value = mixing(weights, value)
    return mixed @ value, weights


def probabilities(scores: Tensor, attn_mask: Tensor | None, is_causal: bool, dropout_p: float) -> Tensor:
    """The masked softmax of ``scores``, (..., L, S); arguments as in torch's attention."""
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        scores = scores + attn_mask
    found = scores.softmax(-1)
    if is_causal or attn_mask is not None:  # a fully masked row attends to nothing, as in torch
        found = found.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0.0)
    return F.dropout(found, dropout_p)


def products_of(module: nn.Module) -> nn.ModuleDict | None:
    """The quantized products of ``module``, or None."""
    products = module._modules.get("products")
    holds = isinstance(products, nn.ModuleDict) and all(
        isinstance(p, QuantizedProduct) for p in products.values()
    )
    return products if holds else None  # type: ignore[return-value]


def quantized_products(model: nn.Module) -> dict[str, QuantizedProduct]:
    """Every product by qualified name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedProduct)}


def split_name(product: str) -> tuple[str, int | None]:
    """Name of the owner and index of a product; None if the name is not that of a product."""
    found = re.fullmatch(r"(?:(.+)\.)?products\.(0|[1-9][0-9]{0,5})", product, re.ASCII)
    return (found[1] or "", int(found[2])) if found else ("", None)


def operand_name(product: str, operand: str) -> str:
    """The name of an operand of a product, among inputs of layers, which have the name of their layer."""
    return f"{product}.{operand}"
