"""What stands around the description in a safetensors file: which format, which version, and the hash of it all.

One metadata entry, ``saq``, holds it as JSON: the library writes several entries in any order, and the same model
shall give the same bytes. It is read from the outside in, so that a message names the first thing that is true of
the file: no file of saq, of a newer saq, changed since it was written, or not to be understood.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from torch import Tensor

from saqcli._version import __version__
from saqcli.algorithms.exporters.damage import AGAIN, MODEL
from saqcli.algorithms.exporters.digest import BLANK, DTYPES, content_digest
from saqcli.algorithms.exporters.facts import ModelFacts, check_schema
from saqcli.errors import CorruptArtifact
from saqcli.strict import parse_json

KEY = "saq"  # of the metadata
FORMAT: Literal["saq.model"] = "saq.model"
VERSION: Literal[1] = (
    1  # of names and meaning of the tensors, of packing and hash; what ``facts`` mean has a version of its own
)


class Envelope(BaseModel):
    """The metadata entry.

    Attributes:
        format: of the file.
        version: of the format.
        sha256: of ``digest.content_digest``.
        facts: the description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["saq.model"]
    version: Literal[1]
    sha256: str
    facts: ModelFacts


def seal(facts: ModelFacts, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file with these tensors, which are on the CPU."""
    blank = Envelope(format=FORMAT, version=VERSION, sha256=BLANK, facts=facts).model_dump_json()
    return {KEY: blank.replace(BLANK, content_digest(blank, tensors), 1)}


def check_ours(metadata: Mapping[str, str], source: str) -> str:
    """The text of the entry, where it is of this format and of a version that can be read.

    Raises:
        CorruptArtifact: of another program, or of another version of this one.
    """
    if metadata.get("format") == FORMAT:
        raise CorruptArtifact(
            f"{source} was written before saq had released a format: write it again with `saq quantize`"
        )
    text = metadata.get(KEY)
    if text is None:
        raise CorruptArtifact(f"{source} holds no quantized model of saq: {MODEL}")
    try:
        entry: Any = from_json(text)
    except ValueError as error:
        raise CorruptArtifact(f"{source} is damaged, its description is no JSON ({error}): {AGAIN}") from None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise CorruptArtifact(f"{source} holds no quantized model of saq: {MODEL}")
    version, facts = entry.get("version"), entry.get("facts")
    if type(version) is not int or version < 1:
        raise CorruptArtifact(f"{source} is damaged, its format version is {version!r}: {AGAIN}")
    if version > VERSION:
        writer = facts.get("saq_version") if isinstance(facts, dict) else None
        raise CorruptArtifact(
            f"{source} was written by saq {writer or 'of a later time'}, format version {version}; this saq "
            f"{__version__} reads up to {VERSION}: upgrade saq"
        )
    return text


def unseal(text: str, tensors: Mapping[str, Tensor], source: str) -> ModelFacts:
    """The description in an entry that ``check_ours`` gave, after the hash has been compared.

    Raises:
        CorruptArtifact: the content is not what was written, or the description does not fit its schema.
    """
    strange = next((name for name, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if strange is not None:
        raise CorruptArtifact(f"{source} is damaged, {strange} is of an unknown type: {AGAIN}")
    entry = from_json(text)
    claimed = entry.get("sha256")
    if not isinstance(claimed, str) or not re.fullmatch("[0-9a-f]{64}", claimed):
        raise CorruptArtifact(f"{source} is damaged, it has no SHA-256 of its content: {AGAIN}")
    if content_digest(text.replace(claimed, BLANK, 1), tensors) != claimed:
        raise CorruptArtifact(
            f"{source} was changed after it was written, its content does not have the SHA-256 that it says: {AGAIN}"
        )
    check_schema(entry.get("facts"), source)
    return parse_json(Envelope, text, source, CorruptArtifact).facts
