"""What an exported file says about itself, beside its tensors: enough to build, feed and check the model again."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from saqcli._version import __version__
from saqcli.errors import CorruptArtifact
from saqcli.quant.bits import BitConfig
from saqcli.quant.convert import Scheme

SCHEMA_VERSION = 1


class ModelFacts(BaseModel):
    """Everything about a quantized model that is no tensor.

    Attributes:
        schema_version: of this description.
        saq_version: that wrote it.
        versions: of the libraries that it was written with, by name.
        build: how the float architecture is built: name, classes, channels, keyword arguments.
        preprocessing: input size, mean, standard deviation, interpolation, crop.
        policy: bits of every quantized layer, in execution order.
        scheme: which quantizers.
        signed: whether a layer's input has negative values.
        routed: parents that multiply with their children's weights themselves, and those children.
        products: of activations that are quantized, and the layers whose input bits they have.
        class_names: of all logits, by index; empty where unknown. Files of earlier versions may have fewer, of the
            folders that were trained on.
        folders: class folders that it was trained on, and their labels; empty where unknown.
        class_order: what decided on these labels: ``timm``, ``torchvision``, ``imagenet``, a file; empty where unknown.
        exif_transpose: whether images were turned as their EXIF orientation says.
        source: where the float weights came from.
        source_sha256: of the file they came from, if one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    versions: dict[str, str] = {}
    build: dict[str, Any]
    preprocessing: dict[str, Any]
    policy: BitConfig
    scheme: Scheme
    signed: dict[str, bool]
    routed: dict[str, list[str]]
    products: dict[str, str] = {}
    class_names: tuple[str, ...] = ()
    folders: dict[str, int] = {}
    class_order: str = ""
    exif_transpose: bool = False
    source: str = ""
    source_sha256: str | None = None

    @model_validator(mode="after")
    def _signs_are_known(self) -> Self:
        unknown = [
            name for name, bits in self.policy.layers.items() if bits.activation and name not in self.signed
        ]
        if unknown:
            raise ValueError(f"whether the input of {unknown[0]} is signed is not told")
        return self


def check_schema(facts: object, source: str) -> None:
    """Refuse the description, a tree of JSON, of a newer saq before its strict schema does so less clearly.

    Raises:
        CorruptArtifact: it is of a newer version.
    """
    version = facts.get("schema_version") if isinstance(facts, dict) else None
    if isinstance(facts, dict) and type(version) is int and version > SCHEMA_VERSION:
        raise CorruptArtifact(
            f"{source} was written by saq {facts.get('saq_version')}, description version {version}; this saq "
            f"{__version__} reads up to {SCHEMA_VERSION}: upgrade saq"
        )
