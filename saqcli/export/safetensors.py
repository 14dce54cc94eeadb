"""The model in one safetensors file: packed codes, steps, the float remainder and its metadata.

The hash of what a safetensors file holds: its description and every tensor, whatever order the bytes lie in.

    sha256( text, then for every tensor by name: a line [name, dtype, shape, bytes] as JSON, and its bytes )

``text`` is the description with zeros where the hash itself stands. A hash finds accidents: a bit that fell over, a
tensor that another program rewrote. Whoever means harm can compute it anew, so that nothing may be trusted because
the hash is right; what a file asks for is checked on its own (``saqcli.models.rebuild``).

Why a file cannot be read as safetensors: empty, truncated, damaged, or something else altogether.

The library says "header too large" of a picture and of a zip archive alike. What a person can do differs: fetch a
truncated file again, look for another file where this one is foreign. Only read once the library has refused.

What stands around the description in a safetensors file: which format, which version, and the hash of it all.

One metadata entry, ``saq``, holds it as JSON: the library writes several entries in any order, and the same model
shall give the same bytes. It is read from the outside in, so that a message names the first thing that is true of
the file: no file of saq, of a newer saq, changed since it was written, or not to be understood.

The model in one safetensors file: packed integer codes, steps, the float remainder, and ``ModelFacts``.

    NAME.codes       weight codes, packed into exactly their bits (see ``quant.packing``)
    NAME.step        what a code is worth, per output channel or one; value = step * code
    everything else  under its own name in the model's state: biases, norms, clipping levels, unquantized
    weights

Weight quantizers are saved, and loaded, in their plain form (``convert.fold``). Loading builds the float
architecture, wraps it, and puts ``step * code`` where the float weight was. Quantizing that again gives the same
codes, so the loaded model equals the saved one bit for bit. No code is ever read from the file.

What is read is judged in this order: header (``damage``), format and version, hash (``envelope``), description
(``facts``), and here whether the tensors are exactly those of the network that it describes.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from pydantic import BaseModel, ConfigDict
from pydantic_core import from_json
from safetensors.torch import save
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.errors import CorruptArtifact, SaqError
from saqcli.export.model_metadata import ModelFacts, check_schema
from saqcli.finite import invalid_tensor
from saqcli.quant import convert
from saqcli.quant.attention import keeps_products
from saqcli.quant.grid import pack, packed_bytes, unpack
from saqcli.quant.layer import QuantizedLayer, quantized_layers, stores_codes
from saqcli.quant.products import OPERANDS, operand_name, split_name
from saqcli.quant.quantizers import Quantizer
from saqcli.serialization import json_text, parse_json, printable
from saqcli.units import counted

BLANK = "0" * 64  # stands where the hash goes, while it is computed
DTYPES = {  # what a quantized model may be made of, by the names of the safetensors format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


def content_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """The hash, in hexadecimal.

    Args:
        text: the description, ``BLANK`` in the place of the hash.
        tensors: by name, on the CPU, of ``DTYPES``.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        line = [name, DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size()]
        digest.update(f"\n{json_text(line)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


MOST_HEADER = 100_000_000  # bytes; the library's own limit
AGAIN = "fetch or write the file again"
MODEL = "give the model.safetensors of a run directory, or, for float weights, MODEL --weights FILE"

_KINDS = {  # how files of other formats begin
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x89HDF": "an HDF5 file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x1f\x8b": "a compressed file",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a pointer to a file that Git LFS has not fetched",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
}


def describe_damage(path: Path, reason: str) -> str:
    """What is wrong with ``path``, which safetensors refused for ``reason``, and what to do; on one line."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            header = file.read(min(length, MOST_HEADER))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}): check the file"
    if size == 0:
        return f"{path} is empty (0 bytes): {AGAIN}"
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return f"{path} is {kind}, no safetensors file; nothing in it was run: {MODEL}"
    if size < 8:
        return f"{path} is truncated to {counted(size, 'byte')}: {AGAIN}"
    if length > MOST_HEADER or head[8:9] not in (b"{", b""):
        return f"{path} is no safetensors file: {MODEL}"
    if 8 + length > size:
        return f"{path} is truncated: it has {counted(size, 'byte')}, its header alone {8 + length}: {AGAIN}"
    promised = _end_of_tensors(header)
    if promised is None:
        return f"{path} is damaged, its header cannot be read ({reason}): {AGAIN}"
    there = size - 8 - length
    if there < promised:
        return f"{path} is truncated: of {promised} bytes of tensors it has {there}: {AGAIN}"
    return f"{path} is damaged ({reason}): {AGAIN}"


def _end_of_tensors(header: bytes) -> int | None:
    """Where the header says that the last tensor ends; None if it cannot be read."""
    try:
        entries = from_json(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(map(int, ends), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None


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


_NAMED = 3  # tensors that a message lists before it counts


class SafetensorsExporter:
    """Writes the whole model, to be evaluated or exported further by ``saq``; the same model as the same bytes."""

    suffix = ".safetensors"
    conditions: tuple[str, ...] = ()

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``; ``example`` is not needed."""
        model = copy.deepcopy(model)
        convert.fold(model)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        for name, (layer, quantizer) in _coded_layers(model).items():
            del state[f"{name}.{layer.weight_name}"]
            codes = quantizer.codes(layer.latent_weight())
            state[f"{name}.codes"] = pack(codes, quantizer.grid(), quantizer.bits)
            state[f"{name}.step"] = quantizer.step().detach().cpu().flatten()
        for copy_of in _copies(model):
            del state[copy_of]
        tensors = {name: value.clone() for name, value in state.items()}  # the library refuses shared memory
        path.write_bytes(
            save(tensors, metadata=seal(facts, tensors))
        )  # a full disk is an OSError, as elsewhere


class Content(NamedTuple):
    """What a file holds: its description, and all tensors by name."""

    facts: ModelFacts
    tensors: dict[str, Tensor]


def read_content(path: Path) -> Content:
    """What is in a file written by ``SafetensorsExporter``.

    Raises:
        CorruptArtifact: truncated, damaged, foreign, of a newer version, or changed since it was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = check_ours(file.metadata() or {}, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptArtifact(describe_damage(path, str(error))) from None
    return Content(unseal(text, tensors, str(path)), tensors)


def read_facts(path: Path) -> ModelFacts:
    """The description alone; reads and checks the whole file all the same."""
    return read_content(path).facts


def rebuild(model: nn.Module, facts: ModelFacts, tensors: Mapping[str, Tensor], source: str) -> nn.Module:
    """Turn the float architecture ``model`` into the quantized model that was saved, in place.

    Raises:
        CorruptArtifact: the description contradicts itself or the architecture, or tensors are missing, left over, of
            another shape or type, or hold numbers that no quantizer can have.
    """
    try:
        restore_structure(model, facts)
        convert.fold(model)
        _check_fit(_expected(model), tensors, facts.policy.model)
        state = dict(tensors)
        for name, (layer, quantizer) in _coded_layers(model).items():
            state[f"{name}.{layer.weight_name}"] = _weight(state, name, layer, quantizer)
        for copy_of, weight in _copies(model).items():
            state[copy_of] = state[weight]
        own = model.state_dict()  # keeps the versions of modules, which some ask for
        own.update(state)
        model.load_state_dict(own)
        _check_inputs(model)
        if wrong := invalid_tensor(model):
            raise CorruptArtifact(f"{wrong}, which no file of saq has")
    except SaqError as error:
        raise CorruptArtifact(
            f"{source} describes a model that cannot be built: {printable(str(error))}"
        ) from None
    except RuntimeError as error:
        raise CorruptArtifact(
            f"{source} does not fit {facts.policy.model}: {printable(str(error))}"
        ) from None
    return model.eval()


def _copies(model: nn.Module) -> dict[str, str]:
    """Weights that are those of another layer, and that layer's, by name; they are stored once."""
    coded = {layer: name for name, (layer, _) in _coded_layers(model).items()}
    return {
        f"{name}.{layer.weight_name}": f"{coded[layer.tied_to[0]]}.{layer.tied_to[0].weight_name}"
        for name, layer in quantized_layers(model).items()
        if layer.tied_to and layer.tied_to[0] in coded
    }


def _coded_layers(model: nn.Module) -> dict[str, tuple[QuantizedLayer, Quantizer]]:
    """The layers whose weights are stored as codes, with their weight quantizers."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
        if stores_codes(layer) and isinstance(layer.weight_quantizer, Quantizer)
    }


def _expected(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor that a file of ``model`` holds."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    for name, (layer, quantizer) in _coded_layers(model).items():
        shape, _ = expected.pop(f"{name}.{layer.weight_name}")
        expected[f"{name}.codes"] = (packed_bytes(shape, quantizer.bits),), torch.uint8
        expected[f"{name}.step"] = (quantizer.step().numel(),), torch.float32
    for copy_of in _copies(model):
        del expected[copy_of]
    return expected


def _check_fit(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Refuse tensors that are not exactly those expected: torch itself would convert some and let others pass."""
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    other = [
        f"{key} is {_kind(tuple(tensors[key].shape), tensors[key].dtype)} instead of {_kind(*expected[key])}"
        for key in expected
        if key in tensors and (tuple(tensors[key].shape), tensors[key].dtype) != expected[key]
    ]
    problems = [
        f"{title}{', '.join(some[:_NAMED])}{f' and {len(some) - _NAMED} more' if len(some) > _NAMED else ''}"
        for title, some in (("it lacks ", missing), ("nothing takes ", unknown), ("", other))
        if some
    ]
    if problems:
        raise CorruptArtifact(f"its tensors are not those of {name}: {'; '.join(problems)}")


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _weight(state: dict[str, Tensor], name: str, layer: QuantizedLayer, quantizer: Quantizer) -> Tensor:
    """``step * code`` of one layer, both taken out of ``state``."""
    prefix = f"{name}.weight_quantizer."
    packed, step = state.pop(f"{name}.codes"), state.pop(f"{name}.step")
    quantizer.load_state_dict(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )
    expected = quantizer.step().detach()
    if not expected.isfinite().all():
        raise CorruptArtifact(f"the clipping level of layer {name} is no finite number")
    if not torch.equal(step, expected.flatten()):
        raise CorruptArtifact(f"the steps of layer {name} do not belong to its grid and clipping level")
    try:
        codes = unpack(packed, quantizer.grid(), quantizer.bits, tuple(layer.latent_weight().shape))
    except CorruptArtifact as error:
        raise CorruptArtifact(f"layer {name}: {error}") from None
    return codes * expected


def _check_inputs(model: nn.Module) -> None:
    """Refuse quantizers with numbers that are none; the sign of a level or step has no meaning, zero is the least."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not all(
            x.isfinite().all() for x in module.state_dict().values()
        ):
            raise CorruptArtifact(f"{name} has a level, step or offset that is no finite number")


def restore_structure(model: nn.Module, facts: ModelFacts) -> None:
    """Wrap the float architecture and install quantizers as ``facts`` tell, levels unset, in place.

    Raises:
        SaqError: they tell of layers that the architecture does not have.
    """
    modules = dict(model.named_modules())
    layers = convert.wrap(model)
    quantized = set(layers) & set(facts.policy.layers)
    for parent, children in facts.routed.items():
        if parent not in modules or not set(children) <= quantized:
            raise CorruptArtifact(f"it has no {parent} that multiplies with {', '.join(children)}")
    convert.leave_float(model, [name for name in layers if name not in facts.policy.layers])
    for parent, children in facts.routed.items():
        convert.route(model, [parent], children)
    for product, followed in facts.products.items():
        owner, index = split_name(product)
        told = all(operand_name(product, operand) in facts.signed for operand in OPERANDS)
        able = owner in modules and keeps_products(modules[owner])
        if not able or index is None or followed not in quantized or not told:
            raise CorruptArtifact(f"it has no product {product} that could follow {followed}")
    convert.follow(model, facts.products)
    convert.install(model, facts.scheme, facts.policy, facts.signed)
