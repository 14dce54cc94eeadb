"""Quantized forwards of packed attention and standardized convolutions.

Both are layers whose multiplication is not ``operator(input, self.weight)``. Standardized convolutions (timm's BiT and
NFNet families) derive the weight they multiply with; the derived weight is quantized, since quantizing before
standardization would leave the integer grid. ``nn.MultiheadAttention`` packs three projections into one Parameter and
has a fused path that would bypass the quantizers, so its forward is written out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.quant import products
from saqcli.quant.layer import QuantizedLayer
from saqcli.quant.routing import Route, record_weight

STANDARDIZED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def custom_mixin(float_class: type[nn.Module]) -> type[QuantizedLayer] | None:
    """The mixin for a class that needs a forward of its own; None for all others."""
    if issubclass(float_class, nn.MultiheadAttention):
        return QuantizedAttention
    if any(
        base.__name__ in STANDARDIZED and base.__module__.startswith("timm.") for base in float_class.__mro__
    ):
        return QuantizedStandardized
    return None


class QuantizedStandardized(QuantizedLayer):
    """Weight-standardized convolution: standardize, then quantize, then convolve."""

    def effective_weight(self) -> Tensor:
        """The standardized weight, (C_out, C_in / groups, K, K); gain and scale as timm applies them."""
        layer: Any = self
        weight = self.latent_weight()
        gain = (layer.gain * layer.scale).view(-1) if hasattr(layer, "gain") else None
        flat = weight.reshape(1, weight.shape[0], -1)
        standard = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=layer.eps)
        return standard.reshape_as(weight)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Pad as in the float layer, then convolve with the quantized standardized weight."""
        layer: Any = self
        x = self.quantized_input(input)
        if getattr(layer, "same_pad", False):
            from timm.layers import pad_same

            x = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        padding = (0, 0) if getattr(layer, "same_pad", False) else layer.padding
        weight = record_weight(self.quantized_weight(), self)
        return F.conv2d(x, weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


class QuantizedAttention(QuantizedLayer):
    """``nn.MultiheadAttention`` with a quantized packed input projection; ``out_proj`` is a separate layer."""

    weight_name = "in_proj_weight"

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over (N, L, E), or (L, N, E) where not batch first.

        Returns:
            The output, and with ``need_weights`` the attention weights as torch returns them: (N, L, S), averaged over
            the heads, or (N, heads, L, S); taken before dropout, unless products are quantized.
        """
        layer: Any = self
        same = query is key and key is value
        if not layer.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._projections(query, key, value, same)
        heads, dim = layer.num_heads, layer.head_dim
        q, k, v = (
            x.reshape(*x.shape[:-1], heads, dim).transpose(1, 2) for x in (q, k, v)
        )  # (N, H, L, E / H)
        mask = None if attn_mask is None else _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.reshape(-1, heads, *mask.shape[1:])  # (N * H, L, S): one for every head
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
            mask = padding if mask is None else mask + padding
        dropout = layer.dropout if self.training else 0.0
        causal = is_causal and mask is None
        with Route(products.products_of(self)) as route:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        output = layer.out_proj(mixed.transpose(1, 2).flatten(2))
        weights = route.attention_weights if need_weights else None
        if need_weights and weights is None:
            with torch._C.DisableTorchFunction():  # must not be counted as a product
                scores = q @ k.transpose(-2, -1) * layer.head_dim**-0.5
                weights = products.probabilities(scores, mask, causal, 0.0)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (output if layer.batch_first else output.transpose(0, 1)), weights

    def _projections(self, query: Tensor, key: Tensor, value: Tensor, same: bool) -> Sequence[Tensor]:
        layer: Any = self
        weight = self.quantized_weight()
        if same:
            x = self.quantized_input(query)
            return F.linear(x, record_weight(weight, self), layer.in_proj_bias).chunk(3, dim=-1)
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        return tuple(
            F.linear(self.quantized_input(x), record_weight(w, self), b)
            for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
        )


def supports_products(module: nn.Module) -> bool:
    """Whether products of activations in the forward of ``module`` can be quantized.

    Its own forward must stay in use. That excludes layers with a quantized weight, except attention, which is written
    out in this file.
    """
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return isinstance(module, QuantizedAttention) or not isinstance(module, (QuantizedLayer, *containers))


def supports_junctions(module: nn.Module) -> bool:
    """Whether operators in the forward of ``module`` itself can be redirected: not those of layers."""
    return supports_products(module) and not isinstance(module, QuantizedLayer)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """``mask`` as values to add to the scores; a boolean mask hides positions where it is True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def check_attention(module: nn.MultiheadAttention, name: str) -> None:
    """Refuse the variants of attention that no classifier uses.

    Raises:
        UnsupportedModel: separate projection weights, or learned key and value biases.
    """
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        raise UnsupportedModel(
            f"attention {name} has separate projection weights or extra keys, which saq cannot quantize: "
            "use a model with packed projections"
        )
