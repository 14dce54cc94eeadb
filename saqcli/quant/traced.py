"""What one traced pass tells of a network: its layers, its products of activations, and what is neither."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerTrace:
    """What one traced forward pass tells about a layer, for one image.

    Attributes:
        name: qualified name in the float model.
        kind: class name of the float layer.
        macs: multiply-accumulates, summed over calls.
        calls: how often its weight is multiplied with.
        weight_count: elements of the weight.
        input_is_signed: the traced input had negative values (calibration measures it on real images).
        group: name of the first layer of its precision group, its own where it is alone.
        norm: the normalization that follows, if any.
        reads_image: nothing but layout operators lies between the image and this layer.
        channels: output channels of the weight.
        stored: its weight is its own; False where an earlier layer has the same one.
        reason: why it is left in floating point, if it is no layer.
    """

    name: str
    kind: str
    weight_count: int
    macs: int = 0
    calls: int = 0
    input_is_signed: bool = False
    group: str = ""
    norm: str | None = None
    reads_image: bool = False
    channels: int = 0
    stored: bool = True
    reason: str = ""


@dataclass
class ProductTrace:
    """A product of two activations.

    Attributes:
        owner: name of the module whose forward multiplies.
        index: of the product in one forward of its owner.
        macs: multiply-accumulates, summed over calls.
        follows: the layer that makes its first operand, whose input bits it has.
    """

    owner: str
    index: int
    macs: int = 0
    follows: str | None = None

    @property
    def name(self) -> str:
        """Of the module that quantizes it."""
        return f"{self.owner}.products.{self.index}".lstrip(".")


@dataclass
class Trace:
    """All layers in execution order, and what the pass found beside them.

    Attributes:
        layers: by name, in order of first execution.
        idle: wrapped layers that never ran (auxiliary heads); they stay in floating point.
        unquantized: modules that multiply with a weight that is no layer's (conditional convolutions), by name.
        products: of two activations, in order of first execution.
        routed: layers whose weight a parent multiplies with itself, by name of that parent.
        outputs: what the model returned for the traced input.
        other_bytes: of everything that is no weight of a layer: biases, norms, buffers, idle layers; 32-bit floats.
    """

    layers: dict[str, LayerTrace]
    idle: list[str]
    unquantized: dict[str, LayerTrace]
    routed: dict[str, list[str]]
    outputs: Tensor
    other_bytes: int = 0
    products: list[ProductTrace] = field(default_factory=list)
