"""What a model carries beside its tensors: its origin, its preprocessing, and how it was quantized.

``load_model``, ``quantize_model`` and ``load`` attach a ``ModelInfo`` to the module they return, as a plain attribute:
it is copied and moved with the module, and no state dict contains it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.models.load import LoadedModel
from saqcli.models.preprocessing import Preprocessing
from saqcli.quant.bits import BitConfig
from saqcli.quant.calls import Call
from saqcli.quant.convert import Scheme, active_bits
from saqcli.quant.cost import CostModel
from saqcli.quant.junctions.sharing import Junctions
from saqcli.quant.network import Network
from saqcli.quant.tracer import Trace

ATTRIBUTE = "saq_info"


@dataclass(frozen=True)
class Quantization:
    """How a module was quantized.

    Attributes:
        scheme: its quantizers.
        example: the call that it was traced with, of one sample.
        traced: the traced forward pass of the float module.
        costs: costs of its layers.
        signed: whether the input of each layer has negative values.
        products: quantized products of activations, and the layers whose input bits they share.
        junctions: quantized junctions; None without any.
        corrected: biases and running statistics before and after the corrections of calibration, by name; None for a
            module from a file, where those before are unknown.
        arguments: how many arguments its batches start with; None for those that the forward requires.
    """

    scheme: Scheme
    example: Call
    traced: Trace
    costs: CostModel
    signed: Mapping[str, bool]
    products: Mapping[str, str]
    corrected: Mapping[str, tuple[Tensor, Tensor]] | None = None
    arguments: int | None = None
    junctions: Junctions | None = None

    def network(self, model: nn.Module, name: str) -> Network:
        """The network of ``model`` as it was traced."""
        return Network(model, name, self.traced, self.costs, dict(self.products), self.junctions)


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a module.

    Attributes:
        name: canonical name of the network, or the class of a module of one's own, ``MODULE:CLASS``.
        preprocessing: of its images; None if unknown.
        class_names: names of all logits by index; empty if unknown.
        build: arguments that build the float architecture again; None if only the caller can build it.
        source: source of the float weights.
        source_sha256: hash of their file; None without one.
        classifiers: names of the layers that give class scores.
        quantization: how it was quantized; None for a float module.
        folders: class folders of the training data and their labels; empty if unknown.
        class_order: source of these labels; empty if unknown.
        exif_transpose: whether training images were rotated by their EXIF orientation.
    """

    name: str
    preprocessing: Preprocessing | None = None
    class_names: tuple[str, ...] = ()
    build: Mapping[str, Any] | None = None
    source: str = ""
    source_sha256: str | None = None
    classifiers: tuple[str, ...] = ()
    quantization: Quantization | None = None
    folders: Mapping[str, int] = field(default_factory=dict)
    class_order: str = ""
    exif_transpose: bool = False

    @classmethod
    def of_loaded(cls, loaded: LoadedModel) -> "ModelInfo":
        """The information about a network that was loaded by its name."""
        return cls(
            loaded.name,
            loaded.preprocessing,
            loaded.class_names,
            loaded.build,
            loaded.weights_source,
            loaded.weights_sha256,
            loaded.classifiers,
        )


def attach(model: nn.Module, about: ModelInfo) -> None:
    """Attach ``about`` to ``model``."""
    model.__dict__[ATTRIBUTE] = about


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and data-parallel wrappers.

    Raises:
        ConfigError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"`model` is a {type(model).__name__}, not a module: give an nn.Module, such as saqcli.load_model returns"
        )
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def info(model: nn.Module) -> ModelInfo:
    """What is known of ``model``: name, preprocessing, class names, and how it was quantized.

    Args:
        model: any module; inside ``torch.compile`` and data-parallel wrappers too.

    Example:
        >>> import saqcli as saq
        >>> net = saq.load_model("saq/resnet20", pretrained=False, num_classes=10)
        >>> saq.info(net).name, saq.info(net).preprocessing.input_size
        ('saq/resnet20', (3, 32, 32))
    """
    model = unwrapped(model)
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, ModelInfo) else ModelInfo(class_of(model))


def class_of(model: nn.Module) -> str:
    """The class of a module, ``MODULE:CLASS``."""
    kind = getattr(type(model), "float_class", type(model))
    return f"{kind.__module__}:{kind.__qualname__}"


def quantization_of(model: nn.Module) -> tuple[nn.Module, ModelInfo, Quantization]:
    """The module inside its wrappers, its information, and how it was quantized.

    Raises:
        ConfigError: it was not quantized.
    """
    model = unwrapped(model)
    about = info(model)
    if about.quantization is None:
        raise ConfigError(
            f"{about.name} is not quantized: give what quantize_model or load returned, not the float module"
        )
    return model, about, about.quantization


def bits_of(model: nn.Module) -> BitConfig:
    """The active bits of every layer of a quantized module, as a policy.

    Raises:
        ConfigError: it was not quantized.
    """
    model, about, found = quantization_of(model)
    return active_bits(model, about.name, [layer.name for layer in found.costs.layers])


bits = bits_of  # the public name, which is that of a parameter in most functions
