"""Conversion of a network to quantized layers and back.

wrap      turns every convolution, linear layer and packed attention into a quantized layer that still computes in
          floating point
install   adds the quantizers, once the network is traced and calibrated; ``Scheme`` chooses them
apply     sets the active bits everywhere; the only writer of bits
fold      reduces the weight quantizers to plain rounding, for files
unwrap    restores the float classes of the same modules
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer
from torch import nn

from saqcli.errors import ConfigError, PolicyMismatch, UnsupportedModel
from saqcli.quant.attention import check_attention
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.calibration import ClipInit
from saqcli.quant.clip_init import SQUARED
from saqcli.quant.fold import check_modules, make_plain
from saqcli.quant.grid import AnyGrid, WeightGrid
from saqcli.quant.junctions.quantized import QuantizedJunction, junctions_of, quantized_junctions
from saqcli.quant.junctions.quantized import split_name as split_junction
from saqcli.quant.junctions.sharing import Junctions, common_signs, share_quantizers
from saqcli.quant.layer import WRAPPED, QuantizedLayer, is_convolution, quantized_layers, stores_codes
from saqcli.quant.products import (
    OPERANDS,
    QuantizedProduct,
    operand_name,
    products_of,
    quantized_products,
    split_name,
)
from saqcli.quant.quantizers import QUANTIZERS, NormalizedClipWeight, Quantizer
from saqcli.quant.quantizers.base import Granularity
from saqcli.quant.routing import RoutedParent, routed_class, tell_no_route, tell_route
from saqcli.quant.short_steps.absorb import absorbed_norms as absorbed_norms
from saqcli.quant.short_steps.rounding import MOST_BITS
from saqcli.quant.wrapping import reason_for_float, unwrap_layer, wrap_layer
from saqcli.target import PAPER

ErrorPower = Annotated[float, Field(ge=1, le=4)]
ShortSteps = Annotated[int, Field(ge=1, le=MOST_BITS)]


class Scheme(BaseModel):
    """How a network is quantized, apart from the bits of each layer.

    Attributes:
        quantizer: name in ``QUANTIZERS``, of weights and inputs.
        weight_grid: ``auto`` (the paper's up to 7 bits, int8 at 8), ``paper`` or ``zero``.
        granularity: one clipping level per output ``channel`` of a weight, or one per ``tensor``.
        weight_normalization: quantize the weights of convolutions in standard deviations from their mean (``clip``
            only).
        restore_deviation: multiply normalized weights by the deviation of the float ones again; False as in the SAQ
            paper, and only then in JSON. Without weight normalization it means nothing.
        clip_init: initial levels by least quantization ``error``, by least error of each layer's ``output`` on
            calibration images, or as in the SAQ ``paper`` (``clip`` only).
        weight_quantizer: name in ``QUANTIZERS``, of weights; None for ``quantizer``.
        activation_quantizer: the same of inputs.
        error_power: exponent p of the quantization error, sum |e|**p.
        target: name of the target that it was chosen for (``saqcli.target``). JSON has this and the three before only
            if they are set.
        short_steps: most significant bits of every step, with norms folded into weights, so that sums are exact in
            float32 (``short_steps``); None for all bits, and then not in JSON.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantizer: str = "clip"
    weight_grid: WeightGrid = "auto"
    granularity: Granularity = "channel"
    weight_normalization: bool = False
    restore_deviation: bool = True
    clip_init: ClipInit = "error"
    weight_quantizer: str | None = None
    activation_quantizer: str | None = None
    error_power: ErrorPower = SQUARED
    target: str = PAPER
    short_steps: ShortSteps | None = None

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        defaults = {
            "restore_deviation": True,
            "weight_quantizer": None,
            "activation_quantizer": None,
            "error_power": SQUARED,
            "target": PAPER,
            "short_steps": None,
        }
        return {
            key: value
            for key, value in handler(self).items()
            if key not in defaults or value != defaults[key]
        }

    @property
    def names(self) -> tuple[str, str]:
        """Names of the quantizers of weights and of inputs."""
        return self.weight_quantizer or self.quantizer, self.activation_quantizer or self.quantizer

    @property
    def has_published_levels(self) -> bool:
        """Whether initial levels as in the SAQ paper are defined for weights and inputs."""
        return all(map(_is_published, (self._kind("weight"), self._kind("activation"))))

    def check(self) -> None:
        """Refuse an unknown quantizer, and options that the quantizers do not support.

        Raises:
            ConfigError: names the option.
        """
        weights, name = self._kind("weight"), self.names[0]
        self._kind("activation")
        if self.weight_normalization and QUANTIZERS[name].normalized is None:
            able = ", ".join(name for name, entry in QUANTIZERS.items() if entry.normalized is not None)
            raise ConfigError(
                f"quantizer {name} has no weight normalization: choose {able}, or "
                "`quantization.weight_normalization=False`"
            )
        if self.weight_normalization and not self.restore_deviation:
            self._check_dropped()
        if self.clip_init == "paper" and not self.has_published_levels:
            of = name if not _is_published(weights) else self.names[1]
            able = ", ".join(
                name
                for name, entry in QUANTIZERS.items()
                if _is_published(entry.weight) and _is_published(entry.activation)
            )
            raise ConfigError(
                f"clip_init paper is not defined for quantizer {of}: choose {able}, or clip_init error"
            )
        for setting, value, supported in (
            ("weight_grid", self.weight_grid, weights.weight_grids),
            ("granularity", self.granularity, weights.granularities),
        ):
            if value not in supported:
                raise ConfigError(
                    f"`quantization.{setting}={value}` is not defined for quantizer {name}: choose "
                    f"{', '.join(supported)}, or another `quantization.weight_quantizer`"
                )

    def _check_dropped(self) -> None:
        """Refuse to leave out deviations where a quantizer cannot, or where layers are compared with float ones."""
        needs = None
        if not issubclass(QUANTIZERS[self.names[0]].normalized or Quantizer, NormalizedClipWeight):
            needs = f"is not defined for quantizer {self.names[0]}: remove it, or choose clip"
        elif self.clip_init == "output":
            needs = "changes the scale of outputs, which `quantization.clip_init=output` compares: choose another start"
        elif self.short_steps is not None:
            needs = "is not supported with `quantization.short_steps`: remove one of the two"
        if needs:
            raise ConfigError(f"`quantization.restore_deviation=False` {needs}")

    def level_shape(self, layer: QuantizedLayer) -> tuple[int, ...]:
        """Shape of one clipping level of the layer's weight; broadcasts against the weight."""
        weight = layer.latent_weight()
        if self.granularity == "tensor":
            return ()
        return tuple(size if d == layer.channel_dim else 1 for d, size in enumerate(weight.shape))

    def grid_of_weights(self, bits: int) -> AnyGrid:
        """The grid of weights of ``bits``."""
        return self._kind("weight").weight_grid(bits, self.weight_grid)

    def grid_of_inputs(self, bits: int, *, signed: bool) -> AnyGrid:
        """The grid of the inputs of a layer."""
        return self._kind("activation").activation_grid(bits, signed=signed)

    def new_weight_quantizer(self, layer: QuantizedLayer, candidates: Iterable[int]) -> Quantizer:
        """A quantizer for the layer's weight, not yet fitted."""
        self.check()
        kind = self._kind("weight")
        if self.weight_normalization and is_convolution(layer):
            normalized = QUANTIZERS[self.names[0]].normalized
            assert normalized is not None
            kind = normalized
        by_bits = {bits: kind.weight_grid(bits, self.weight_grid) for bits in candidates}
        quantizer = kind(by_bits, self.level_shape(layer))
        if isinstance(quantizer, NormalizedClipWeight):
            quantizer.restores_deviation = self.restore_deviation
        return self._ready(quantizer, layer)

    def new_input_quantizer(
        self, layer: QuantizedLayer, candidates: Iterable[int], *, signed: bool
    ) -> Quantizer:
        """A quantizer for the layer's input, not yet fitted."""
        by_bits = {bits: self.grid_of_inputs(bits, signed=signed) for bits in candidates}
        return self._ready(self._kind("activation")(by_bits), layer)

    def new_operand_quantizer(
        self, model: nn.Module, candidates: Iterable[int], *, signed: bool
    ) -> Quantizer:
        """A quantizer for an operand of a junction of ``model``, not yet fitted."""
        return self.new_input_quantizer(
            next(iter(quantized_layers(model).values())), candidates, signed=signed
        )

    def _ready(self, quantizer: Quantizer, layer: QuantizedLayer) -> Quantizer:
        quantizer.error_power = self.error_power
        return quantizer.to(layer.latent_weight().device)

    def _kind(self, operand: Literal["weight", "activation"]) -> type[Quantizer]:
        """The quantizer of weights or of inputs."""
        name, other = (self.names[0], "inputs") if operand == "weight" else (self.names[1], "weights")
        kind: type[Quantizer] | None = getattr(QUANTIZERS.find(name), operand)
        if kind is None:
            able = ", ".join(name for name, entry in QUANTIZERS.items() if getattr(entry, operand))
            raise ConfigError(
                f"quantizer {name} is for {other} only: choose `quantization.{operand}_quantizer` from {able}"
            )
        return kind


def _is_published(kind: type[Quantizer] | None) -> bool:
    return kind is not None and kind.fit_as_published is not Quantizer.fit_as_published


def wrap(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Turn every convolution, linear layer and packed attention of ``model`` into a quantized layer, in place.

    Parametrizations and pruning masks are folded into plain weights first (see ``fold.make_plain``).

    Returns:
        The quantized layers by name. They compute in floating point until ``install``.

    Raises:
        UnsupportedModel: nothing to quantize, already wrapped, an attention variant without packed projections, or
            a module that ``check_modules`` refuses.
    """
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise UnsupportedModel("this model is already quantized: start from the float model")
    make_plain(model)
    check_modules(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.MultiheadAttention):
            check_attention(module, name)
    for module in modules.values():
        _forbid_fused_path(module)
        if isinstance(module, WRAPPED) and reason_for_float(module) is None:
            wrap_layer(module)
    layers = quantized_layers(model)
    if not layers:
        reasons = {name: reason_for_float(m) for name, m in modules.items() if isinstance(m, WRAPPED)}
        why = "".join(f" except {name}, where {reason}" for name, reason in list(reasons.items())[:1])
        raise UnsupportedModel(
            f"this model has no convolution and no linear layer{why}: there is nothing to quantize"
        )
    first: dict[int, QuantizedLayer] = {}
    for layer in layers.values():
        one = first.setdefault(id(layer.latent_weight()), layer)
        layer.tied_to = () if one is layer else (one,)
    return layers


def unwrap(model: nn.Module) -> None:
    """Restore the float class of every module, in place; weights keep their trained values."""
    for layer in quantized_layers(model).values():
        unwrap_layer(layer)
    for module in model.modules():
        if products_of(module) is not None:
            del module.products
        if junctions_of(module) is not None:
            del module.junctions
        tell_no_route(module)
        if isinstance(module, RoutedParent):
            module.__class__ = module.float_class  # type: ignore[assignment]
        _allow_fused_path(module)


# Switches of the fused path of torch's encoders, which reads weights and skips the input quantizers.
_FUSED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def _forbid_fused_path(module: nn.Module) -> None:
    for kind, switch, off in _FUSED:
        if isinstance(module, kind):
            module.fused_before = getattr(module, switch)
            setattr(module, switch, off)


def _allow_fused_path(module: nn.Module) -> None:
    for kind, switch, _ in _FUSED:
        if isinstance(module, kind) and "fused_before" in module.__dict__:
            setattr(module, switch, module.__dict__.pop("fused_before"))


def leave_float(model: nn.Module, names: Iterable[str]) -> None:
    """Restore the float class of some layers, in place: those that never run."""
    removed = [model.get_submodule(name) for name in names]
    # by removed first layer of a tied weight, the first one that stays
    successors: dict[QuantizedLayer, QuantizedLayer] = {}
    for layer in quantized_layers(model).values():
        if layer.tied_to and layer.tied_to[0] in removed and layer not in removed:
            first = successors.setdefault(layer.tied_to[0], layer)
            layer.tied_to = () if first is layer else (first,)
    for module in removed:
        assert isinstance(module, QuantizedLayer)
        unwrap_layer(module)


def add_products(model: nn.Module, products: Mapping[str, str]) -> None:
    """Add a quantized product for each multiplication of activations, with the bits of a layer's input.

    Args:
        model: wrapped.
        products: by name of the product, ``OWNER.products.INDEX``, the layer whose input bits it uses.

    Raises:
        UnsupportedModel: an owner already has another attribute ``products``.
    """
    for name, followed in products.items():
        owner_name, index = split_name(name)
        owner, layer = model.get_submodule(owner_name), model.get_submodule(followed)
        assert isinstance(layer, QuantizedLayer)
        if not hasattr(owner, "products"):
            owner.products = nn.ModuleDict()
        owned = products_of(owner)
        if owned is None:
            raise UnsupportedModel(
                f"{owner_name} already has an attribute products: its attention cannot be quantized"
            )
        product = QuantizedProduct()
        owned[str(index)] = product
        layer.followers += (product,)
        if not isinstance(owner, RoutedParent | QuantizedLayer):
            owner.__class__ = routed_class(type(owner))


def add_junctions(model: nn.Module, junctions: Junctions) -> None:
    """Add the quantized junctions of a wrapped model, and note which readers read the same tensor.

    Raises:
        UnsupportedModel: an owner already has another attribute ``junctions``.
    """
    for name, operands in junctions.operators.items():
        owner_name, index = split_junction(name)
        owner = model.get_submodule(owner_name)
        if not hasattr(owner, "junctions"):
            owner.junctions = nn.ModuleDict()
        owned = junctions_of(owner)
        if owned is None:
            raise UnsupportedModel(
                f"{owner_name} already has an attribute junctions: its operands cannot be quantized"
            )
        junction = QuantizedJunction(operands.kind, operands.positions, junctions.bits)
        owned[str(index)] = junction
        junction.tensors_read = tuple(junctions.tensors.get(each, "") for each in junction.places(name))
        if not isinstance(owner, RoutedParent):
            owner.__class__ = routed_class(type(owner))
    for name, layer in quantized_layers(model).items():
        layer.tensor_read = junctions.tensors.get(name, "")
    for owner in [module for module in model.modules() if junctions_of(module) is not None]:
        for module in owner.modules():
            if module is not owner and not isinstance(module, QuantizedJunction):
                tell_route(module)


def route(model: nn.Module, parents: Iterable[str], layers: Iterable[str]) -> None:
    """Make ``parents`` quantize the inputs of ``layers``, whose weights they use in their own forward."""
    for name in parents:
        parent = model.get_submodule(name)
        if not isinstance(parent, RoutedParent):
            parent.__class__ = routed_class(type(parent))
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        layer.routed = True


def install(
    model: nn.Module,
    scheme: Scheme,
    config: BitConfig,
    signed: Mapping[str, bool],
    options: Mapping[str, Iterable[LayerBits]] | None = None,
) -> None:
    """Add the quantizers, not yet fitted, to every quantized layer, and make ``config`` the active bits.

    Args:
        model: wrapped.
        scheme: chooses the quantizers.
        config: the active bits of every quantized layer.
        signed: whether a layer's input has negative values, by name.
        options: further bits that a layer can be switched to later, by name.

    Raises:
        PolicyMismatch: the layers of ``config`` differ from those of the model.
    """
    layers = quantized_layers(model)
    config.check_fits(config.model, list(layers))
    signed = common_signs(model, signed)
    for name, layer in layers.items():
        layer.short_steps = scheme.short_steps
        bits = config.layers[name]
        more = list((options or {}).get(name, ()))
        if bits.weight is not None and layer.tied_to:
            first = config.layers[next(n for n, one in layers.items() if one is layer.tied_to[0])]
            if first.weight != bits.weight:
                raise PolicyMismatch(
                    f"{name} shares its weight with another layer, which has {first.weight} bits where {name} has "
                    f"{bits.weight}: give them the same"
                )
        elif bits.weight is not None:
            widths = {bits.weight, *(option.weight for option in more if option.weight)}
            layer.weight_quantizer = scheme.new_weight_quantizer(layer, widths)
        if bits.activation is not None:
            widths = {bits.activation, *(option.activation for option in more if option.activation)}
            layer.input_quantizer = scheme.new_input_quantizer(layer, widths, signed=signed[name])
            _install_followers(model, layer, scheme, widths, signed)
    for name, junction in quantized_junctions(model).items():
        for operand, place in junction.places(name).items():
            quantizer = scheme.new_operand_quantizer(model, {junction.bits}, signed=signed[operand])
            quantizer.step_bits = scheme.short_steps
            place.put(quantizer)
    share_quantizers(model)
    apply(model, config)


def _install_followers(
    model: nn.Module, layer: QuantizedLayer, scheme: Scheme, widths: set[int], signed: Mapping[str, bool]
) -> None:
    for name, product in quantized_products(model).items():
        if any(product is follower for follower in layer.followers):
            for operand, attribute in OPERANDS.items():
                negative = signed[operand_name(name, operand)]
                setattr(product, attribute, scheme.new_input_quantizer(layer, widths, signed=negative))


def apply(model: nn.Module, config: BitConfig) -> None:
    """Set the active bits of every quantizer."""
    fewest: dict[Quantizer, int] = {}  # significant bits of its step, of all layers that share a quantizer
    for name, layer in quantized_layers(model).items():
        set_bits(layer, config.layers[name])
        quantizer = layer.input_quantizer
        if isinstance(quantizer, Quantizer) and quantizer.step_bits is not None:
            quantizer.step_bits = min(quantizer.step_bits, fewest.get(quantizer, quantizer.step_bits))
            fewest[quantizer] = quantizer.step_bits


def set_bits(layer: QuantizedLayer, bits: LayerBits) -> None:
    """Set the active bits of one layer's quantizers and of the products that follow it.

    An operand without a quantizer is left unchanged.
    """
    for quantizer, width in (
        (layer.weight_quantizer, bits.weight),
        (layer.input_quantizer, bits.activation),
    ):
        if isinstance(quantizer, Quantizer) and width is not None:
            quantizer.select(width)
    if bits.activation is not None:
        for product in layer.followers:
            product.select(bits.activation)
    if layer.short_steps is not None:
        layer.allot_step_bits()


def fold(model: nn.Module) -> None:
    """Replace every weight quantizer by its plain form, in place; no output bit changes.

    Layers that derive their weight from the latent one (standardized convolutions) are left unchanged: files hold their
    float weight.
    """
    for layer in quantized_layers(model).values():
        quantizer, weight = layer.weight_quantizer, layer.latent_weight()
        if isinstance(quantizer, Quantizer) and stores_codes(layer):
            layer.weight_quantizer, folded = quantizer.fold(weight)
            if folded is not weight:  # a new parameter: another layer may share the old one
                layer._parameters[layer.weight_name] = nn.Parameter(folded.detach(), weight.requires_grad)


def active_bits(model: nn.Module, name: str, order: Iterable[str]) -> BitConfig:
    """The active bits of ``model``, read from its layers.

    Args:
        model: wrapped, with quantizers installed.
        name: canonical name of the network.
        order: names of the layers in execution order.
    """
    layers = quantized_layers(model)
    return BitConfig(model=name, layers={layer: layers[layer].bits for layer in order})
