"""What an exported file says about itself: enough to rebuild, feed and check the model.

What an exported file says about itself, beside its tensors: enough to build, feed and check the model again.

What an ONNX file of ours says about itself, in its metadata: everything for ``saq``, the main things for others.
"""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import from_json

from saqcli._version import __version__
from saqcli.errors import CorruptArtifact
from saqcli.quant.bits import BitConfig
from saqcli.quant.convert import Scheme
from saqcli.serialization import json_text, parse_json, printable

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
            raise ValueError(f"whether the input of {unknown[0]} is signed is not recorded")
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


FACTS = "saq.facts"
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def properties(facts: ModelFacts) -> dict[str, str]:
    """The metadata: ``saq.facts`` as JSON, and beside it preprocessing and class names for readers that know no saq."""
    return {
        FACTS: facts.model_dump_json(),
        "preprocessing": json_text(facts.preprocessing),
        "class_names": json_text(list(facts.class_names), ensure_ascii=False),
    }


def read_onnx(path: Path) -> onnx.ModelProto:
    """A file as it stands; nothing is run, and no other file is read.

    Raises:
        CorruptArtifact: it is no ONNX file, or keeps tensors in other files, which saq never writes.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        elsewhere = any(_elsewhere(graph) for graph in (model.graph, *model.functions))
    except (DecodeError, OSError, ValueError) as error:
        raise CorruptArtifact(f"{path} cannot be read as ONNX: {printable(str(error), 200)}") from None
    if elsewhere:
        raise CorruptArtifact(
            f"{path} keeps tensors in other files, which saq does not read: give a file that holds all of its own"
        )
    return model


def _elsewhere(part: Message) -> bool:
    """Whether a tensor anywhere in a part of a model says that its numbers are in another file."""
    found: list[Message] = [part]
    while found:
        for field, value in found.pop().ListFields():
            if field.name in ("external_data", "data_location") and value:
                return True
            if field.message_type is not None:
                found += value if field.is_repeated else [value]
    return False


def _check_numbers(model: onnx.ModelProto, path: Path) -> None:
    """Refuse NaN in the tensors of the graph; infinity stands where masks and limits have it.

    Raises:
        CorruptArtifact: names the first tensor.
    """
    constants = [
        (node.output[0], attribute.t)
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.TENSOR
    ]
    for name, tensor in [*((each.name, each) for each in model.graph.initializer), *constants]:
        if tensor.data_type in _FLOATS:
            try:
                numbers = onnx.numpy_helper.to_array(tensor)
            except ValueError as error:
                reason = printable(str(error), 200)
                raise CorruptArtifact(
                    f"{path} is damaged, {printable(name, 100)} cannot be read: {reason}"
                ) from None
            if np.isnan(numbers).any():
                raise CorruptArtifact(f"{path} has NaN values in {printable(name, 200)}: export it again")


def read_onnx_facts(path: Path) -> ModelFacts:
    """The description that an exporter left in the file.

    Raises:
        CorruptArtifact: no ONNX file, not one of saq's, or one with a NaN among its numbers.
    """
    model = read_onnx(path)
    found = {entry.key: entry.value for entry in model.metadata_props}
    if FACTS not in found:
        raise CorruptArtifact(f"{path} was not exported by saq: its preprocessing is unknown")
    _check_numbers(model, path)
    try:
        check_schema(from_json(found[FACTS]), str(path))
    except ValueError:
        raise CorruptArtifact(f"{path} does not say what it is: its {FACTS} are not JSON") from None
    return parse_json(ModelFacts, found[FACTS], str(path), CorruptArtifact)
