"""What an exported file says about itself, beside its tensors: enough to build, feed and check the model again."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from saqcli.quant.bits import BitConfig
from saqcli.quant.convert import Scheme


class ModelFacts(BaseModel):
    """Everything about a quantized model that is no tensor.

    Attributes:
        schema_version: of this description.
        saq_version: that wrote it.
        build: how the float architecture is built: name, classes, channels, keyword arguments.
        preprocessing: input size, mean, standard deviation, interpolation, crop.
        policy: bits of every quantized layer, in execution order.
        scheme: which quantizers.
        signed: whether a layer's input has negative values.
        routed: parents that multiply with their children's weights themselves, and those children.
        class_names: of the data it was trained on, by index; empty where unknown.
        source: where the float weights came from.
        source_sha256: of the file they came from, if one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    build: dict[str, Any]
    preprocessing: dict[str, Any]
    policy: BitConfig
    scheme: Scheme
    signed: dict[str, bool]
    routed: dict[str, list[str]]
    class_names: tuple[str, ...] = ()
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
