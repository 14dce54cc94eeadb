"""What an ONNX file of ours says about itself, in its metadata: everything for ``saq``, the main things for others."""

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from pydantic_core import from_json

from saqcli.algorithms.exporters.facts import ModelFacts, check_schema
from saqcli.errors import CorruptArtifact
from saqcli.strict import json_text, parse_json, printable

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
        raise CorruptArtifact(f"{path} does not say what it is: its {FACTS} are no JSON") from None
    return parse_json(ModelFacts, found[FACTS], str(path), CorruptArtifact)
