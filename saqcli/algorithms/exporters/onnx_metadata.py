"""What an ONNX file of ours says about itself, in its metadata: everything for ``saq``, the main things for others."""

import json
from pathlib import Path

import onnx
from pydantic_core import from_json

from saqcli.algorithms.exporters.facts import ModelFacts, check_schema
from saqcli.errors import CorruptArtifact
from saqcli.strict import parse_json

FACTS = "saq.facts"


def properties(facts: ModelFacts) -> dict[str, str]:
    """The metadata: ``saq.facts`` as JSON, and beside it preprocessing and class names for readers that know no saq."""
    return {
        FACTS: facts.model_dump_json(),
        "preprocessing": json.dumps(facts.preprocessing),
        "class_names": json.dumps(list(facts.class_names), ensure_ascii=False),
    }


def read_onnx_facts(path: Path) -> ModelFacts:
    """The description that an exporter left in the file.

    Raises:
        CorruptArtifact: no ONNX file, or not one of saq's.
    """
    try:
        found = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    except Exception as error:  # protobuf, onnx and the file system each have their own
        reason = " ".join(str(error).split())[:200]
        raise CorruptArtifact(f"{path} cannot be read as ONNX: {reason}") from None
    if FACTS not in found:
        raise CorruptArtifact(f"{path} was not exported by saq: its preprocessing is unknown")
    try:
        check_schema(from_json(found[FACTS]), str(path))
    except ValueError:
        raise CorruptArtifact(f"{path} does not say what it is: its {FACTS} are no JSON") from None
    return parse_json(ModelFacts, found[FACTS], str(path), CorruptArtifact)
