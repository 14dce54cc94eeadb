"""Metadata of exported files, to rebuild, feed and check a model.

ONNX files hold all of it for ``saq``, and preprocessing and class names in separate entries for other readers.
"""

from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import from_json

from saqcli._version import __version__
from saqcli.errors import CorruptArtifact
from saqcli.quant.bits import BitConfig
from saqcli.quant.convert import Scheme
from saqcli.quant.junctions.sharing import Junctions
from saqcli.serialization import json_text, parse_json, printable

SCHEMA_VERSION = 2  # the newest
JUNCTIONS_SINCE: Literal[2] = 2  # metadata without junctions has version 1


class ModelMetadata(BaseModel):
    """Everything about a quantized model except its tensors.

    Attributes:
        schema_version: version of this schema.
        saq_version: version of saq that wrote it.
        versions: versions of the libraries it was written with, by name.
        build: arguments that build the float architecture: name, classes, channels, keyword arguments.
        preprocessing: input size, mean, standard deviation, interpolation, crop.
        policy: bits of every quantized layer, in execution order.
        scheme: choice of the quantizers.
        signed: whether a layer's input has negative values, by layer.
        routed: parents that multiply with their children's weights, and those children.
        products: quantized products of activations, and the layers whose input bits they have.
        junctions: quantized junctions; None without any, and then JSON does not have it.
        absorbed: batch norms folded into layers before quantization, and these layers; JSON has it only where there are
            some.
        class_names: names of all logits, by index; empty if unknown. Files of earlier versions may have only those of
            the training folders.
        folders: class folders of the training data and their labels; empty if unknown.
        class_order: source of these labels: ``timm``, ``torchvision``, ``imagenet``, a file; empty if unknown.
        exif_transpose: whether images were rotated by their EXIF orientation.
        source: source of the float weights.
        source_sha256: SHA-256 of the file of the float weights, if there was one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = 1
    saq_version: str
    versions: dict[str, str] = {}
    build: dict[str, Any]
    preprocessing: dict[str, Any]
    policy: BitConfig
    scheme: Scheme
    signed: dict[str, bool]
    routed: dict[str, list[str]]
    products: dict[str, str] = {}
    junctions: Junctions | None = None
    absorbed: dict[str, str] = {}
    class_names: tuple[str, ...] = ()
    folders: dict[str, int] = {}
    class_order: str = ""
    exif_transpose: bool = False
    source: str = ""
    source_sha256: str | None = None

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused: dict[str, Any] = {"junctions": None, "absorbed": {}}
        return {
            key: value for key, value in handler(self).items() if key not in unused or value != unused[key]
        }

    @model_validator(mode="after")
    def _check_version(self) -> Self:
        if (self.junctions is not None) != (self.schema_version == JUNCTIONS_SINCE):
            raise ValueError(f"junctions belong to version {JUNCTIONS_SINCE} of the description")
        return self

    @model_validator(mode="after")
    def _check_signs(self) -> Self:
        unknown = [
            name for name, bits in self.policy.layers.items() if bits.activation and name not in self.signed
        ]
        if unknown:
            raise ValueError(f"the sign of the input of {unknown[0]} is missing")
        return self


def check_schema(metadata: object, source: str) -> None:
    """Refuse JSON metadata of a newer saq with a clear message, before validation by the strict schema.

    Raises:
        CorruptArtifact: the metadata is of a newer version.
    """
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if isinstance(metadata, dict) and type(version) is int and version > SCHEMA_VERSION:
        raise CorruptArtifact(
            f"{source} was written by saq {metadata.get('saq_version')}, description version {version}; this saq "
            f"{__version__} reads up to {SCHEMA_VERSION}: upgrade saq"
        )


METADATA_KEY = "saq.facts"
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


def properties(metadata: ModelMetadata) -> dict[str, str]:
    """The entries of an ONNX file: all metadata as JSON; preprocessing and class names also for other readers."""
    return {
        METADATA_KEY: metadata.model_dump_json(),
        "preprocessing": json_text(metadata.preprocessing),
        "class_names": json_text(list(metadata.class_names), ensure_ascii=False),
    }


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without running it, and without reading any other file.

    Raises:
        CorruptArtifact: not an ONNX file, or one with tensors in other files, which saq never writes.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
        external = any(_has_external_data(graph) for graph in (model.graph, *model.functions))
    except (DecodeError, OSError, ValueError) as error:
        raise CorruptArtifact(f"{path} cannot be read as ONNX: {printable(str(error), 200)}") from None
    if external:
        raise CorruptArtifact(
            f"{path} stores tensors in other files, which saq does not read: give a file that contains all its tensors"
        )
    return model


def _has_external_data(part: Message) -> bool:
    """Whether any tensor in a part of a model refers to data in another file."""
    found: list[Message] = [part]
    while found:
        for field, value in found.pop().ListFields():
            if field.name in ("external_data", "data_location") and value:
                return True
            if field.message_type is not None:
                found += value if field.is_repeated else [value]
    return False


def _check_numbers(model: onnx.ModelProto, path: Path) -> None:
    """Refuse NaN in the tensors of the graph; infinity is allowed, for masks and limits.

    Raises:
        CorruptArtifact: a tensor has NaN; names the first one.
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


def read_onnx_metadata(path: Path) -> ModelMetadata:
    """The metadata that an exporter wrote to the file.

    Raises:
        CorruptArtifact: not an ONNX file, not written by saq, or with NaN values.
    """
    model = read_onnx(path)
    found = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in found:
        raise CorruptArtifact(f"{path} was not exported by saq: its preprocessing is unknown")
    _check_numbers(model, path)
    try:
        check_schema(from_json(found[METADATA_KEY]), str(path))
    except ValueError:
        raise CorruptArtifact(f"{path} has invalid metadata: its entry {METADATA_KEY} is not JSON") from None
    return parse_json(ModelMetadata, found[METADATA_KEY], str(path), CorruptArtifact)
