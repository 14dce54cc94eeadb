"""The model as a safetensors file: packed codes, steps, metadata.

    NAME.codes       weight codes, packed into exactly their bits (see ``quant.grid``)
    NAME.step        step per output channel, or a single one; value = step * code
    other tensors    under their names in the model's state: biases, norms, clipping levels, unquantized weights;
                     those of a quantizer that several readers of a tensor share are there once

Weight quantizers are saved and loaded in their plain form (``convert.fold``). Loading builds the float architecture,
wraps it, and sets the float weights to ``step * code``. Quantizing these gives the same codes, so the loaded model
equals the saved one bit for bit. No code is executed from the file.

One metadata entry, ``saq``, holds format, version, hash and ``ModelMetadata`` as JSON: the library writes several
entries in any order, but the same model must give the same bytes. A file is checked in this order, so that the message
names the most general cause: header, format and version, hash, metadata, and finally whether the tensors are exactly
those of the described network. Reasons for an unreadable file are determined only after the library has refused it; it
reports "header too large" for a picture and a zip archive alike, while the remedies differ: fetch a truncated file
again, use another file instead of a foreign one.

The hash covers the JSON entry and every tensor, independent of the order of bytes in the file:

    sha256( text, then for every tensor by name: a line [name, dtype, shape, bytes] as JSON, and its bytes )

``text`` is the entry with zeros in place of the hash. The hash detects accidents such as bit errors or a tensor
rewritten by another program. It is no protection against manipulation, so nothing is trusted because the hash matches;
the requested architecture is checked separately (``saqcli.models.rebuild``).
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
from saqcli.export.model_metadata import ModelMetadata, check_schema
from saqcli.finite import invalid_tensor
from saqcli.quant import convert
from saqcli.quant.attention import supports_junctions, supports_products
from saqcli.quant.grid import pack, packed_bytes, unpack
from saqcli.quant.junctions.quantized import split_name as split_junction
from saqcli.quant.junctions.sharing import Junctions
from saqcli.quant.layer import QuantizedLayer, quantized_layers, stores_codes
from saqcli.quant.products import OPERANDS, operand_name, split_name
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.short_steps.absorb import replace_norms
from saqcli.serialization import json_text, parse_json, printable
from saqcli.units import counted

BLANK = "0" * 64  # in place of the hash during its computation
DTYPES = {  # supported tensor types, with their names in the safetensors format
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
        text: the JSON entry, with ``BLANK`` in place of the hash.
        tensors: by name, on the CPU, of types in ``DTYPES``.
    """
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        line = [name, DTYPES[tensor.dtype], list(tensor.shape), tensor.numel() * tensor.element_size()]
        digest.update(f"\n{json_text(line)}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


MAX_HEADER = 100_000_000  # bytes; the limit of the library
AGAIN = "fetch or write the file again"
MODEL = (
    "give the model.safetensors of a run directory, or, for float weights, `model.name` `model.weights=FILE`"
)

_KINDS = {  # first bytes of other formats
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
    """Why safetensors refused ``path``, with its own ``reason``, and what to do; on one line."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            header = file.read(min(length, MAX_HEADER))
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}): check the file"
    if size == 0:
        return f"{path} is empty (0 bytes): {AGAIN}"
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return f"{path} is {kind}, not a safetensors file; nothing in it was run: {MODEL}"
    if size < 8:
        return f"{path} is truncated to {counted(size, 'byte')}: {AGAIN}"
    if length > MAX_HEADER or head[8:9] not in (b"{", b""):
        return f"{path} is not a safetensors file: {MODEL}"
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
    """End of the last tensor according to the header; None if it cannot be read."""
    try:
        entries = from_json(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return max(map(int, ends), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
        return None


KEY = "saq"  # of the metadata
FORMAT: Literal["saq.model"] = "saq.model"
VERSION: Literal[1] = 1  # of tensor names, packing and hash; ``facts`` have a separate version


class Envelope(BaseModel):
    """The metadata entry of a file.

    Attributes:
        format: name of the format.
        version: version of the format.
        sha256: result of ``content_digest``.
        facts: metadata of the model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["saq.model"]
    version: Literal[1]
    sha256: str
    facts: ModelMetadata


def seal(metadata: ModelMetadata, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata entry for a file with these tensors, which are on the CPU."""
    blank = Envelope(format=FORMAT, version=VERSION, sha256=BLANK, facts=metadata).model_dump_json()
    return {KEY: blank.replace(BLANK, content_digest(blank, tensors), 1)}


def check_format(entries: Mapping[str, str], source: str) -> str:
    """The text of the entry ``saq``, if its format and version are supported.

    Raises:
        CorruptArtifact: written by another program, or by an unsupported version of saq.
    """
    if entries.get("format") == FORMAT:
        raise CorruptArtifact(
            f"{source} was written before the first released format of saq: write it again with `saq quantize`"
        )
    text = entries.get(KEY)
    if text is None:
        raise CorruptArtifact(f"{source} contains no quantized model of saq: {MODEL}")
    try:
        entry: Any = from_json(text)
    except ValueError as error:
        raise CorruptArtifact(
            f"{source} is damaged, its description is not JSON ({error}): {AGAIN}"
        ) from None
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        raise CorruptArtifact(f"{source} contains no quantized model of saq: {MODEL}")
    version, metadata = entry.get("version"), entry.get("facts")
    if type(version) is not int or version < 1:
        raise CorruptArtifact(f"{source} is damaged, its format version is {version!r}: {AGAIN}")
    if version > VERSION:
        writer = metadata.get("saq_version") if isinstance(metadata, dict) else None
        raise CorruptArtifact(
            f"{source} was written by saq {writer or 'of a newer version'}, format version {version}; this saq "
            f"{__version__} reads up to {VERSION}: upgrade saq"
        )
    return text


def unseal(text: str, tensors: Mapping[str, Tensor], source: str) -> ModelMetadata:
    """The metadata in an entry returned by ``check_format``, after a check of the hash.

    Raises:
        CorruptArtifact: the content was changed after it was written, or the metadata violates its schema.
    """
    unknown = next((name for name, tensor in tensors.items() if tensor.dtype not in DTYPES), None)
    if unknown is not None:
        raise CorruptArtifact(f"{source} is damaged, {unknown} is of an unknown type: {AGAIN}")
    entry = from_json(text)
    claimed = entry.get("sha256")
    if not isinstance(claimed, str) or not re.fullmatch("[0-9a-f]{64}", claimed):
        raise CorruptArtifact(f"{source} is damaged, it has no SHA-256 of its content: {AGAIN}")
    if content_digest(text.replace(claimed, BLANK, 1), tensors) != claimed:
        raise CorruptArtifact(
            f"{source} was changed after it was written, its content does not match its SHA-256: {AGAIN}"
        )
    check_schema(entry.get("facts"), source)
    return parse_json(Envelope, text, source, CorruptArtifact).facts


_NAMED = 3  # most tensors that a message names


class SafetensorsExporter:
    """Writes the whole model, for evaluation and export by ``saq``; the same model gives the same bytes."""

    suffix = ".safetensors"
    conditions: tuple[str, ...] = ()

    def export(self, model: nn.Module, example: Tensor, path: Path, metadata: ModelMetadata) -> None:
        """Write ``path``; ``example`` is not used."""
        model = copy.deepcopy(model)
        convert.fold(model)
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        for name, (layer, quantizer) in _coded_layers(model).items():
            del state[_key(name, layer.weight_name)]
            codes = quantizer.codes(layer.latent_weight())
            state[_key(name, "codes")] = pack(codes, quantizer.grid(), quantizer.bits)
            state[_key(name, "step")] = quantizer.step().detach().cpu().flatten()
        for repeated in (*_tied_weights(model), *_shared_levels(model)):
            del state[repeated]
        tensors = {name: value.clone() for name, value in state.items()}  # the library refuses shared memory
        # not ``save_file``: a full disk must raise OSError
        path.write_bytes(save(tensors, metadata=seal(metadata, tensors)))


class Content(NamedTuple):
    """The content of a file: its metadata, and all tensors by name."""

    metadata: ModelMetadata
    tensors: dict[str, Tensor]


def read_content(path: Path) -> Content:
    """The content of a file written by ``SafetensorsExporter``.

    Raises:
        CorruptArtifact: the file is truncated, damaged, foreign, of a newer version, or changed since it was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = check_format(file.metadata() or {}, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, safetensors.SafetensorError) as error:
        raise CorruptArtifact(describe_damage(path, str(error))) from None
    return Content(unseal(text, tensors, str(path)), tensors)


def rebuild(
    model: nn.Module, metadata: ModelMetadata, tensors: Mapping[str, Tensor], source: str
) -> nn.Module:
    """Turn the float architecture ``model`` into the quantized model that was saved, in place.

    Raises:
        CorruptArtifact: the metadata contradicts itself or the architecture, or tensors are missing, unexpected, of
            another shape or type, or have invalid values for a quantizer.
    """
    try:
        restore_structure(model, metadata)
        convert.fold(model)
        _check_fit(_expected(model), tensors, metadata.policy.model)
        state = dict(tensors)
        for name, (layer, quantizer) in _coded_layers(model).items():
            state[_key(name, layer.weight_name)] = _weight(state, name, layer, quantizer)
        for repeated, kept in (_tied_weights(model) | _shared_levels(model)).items():
            state[repeated] = state[kept]
        complete = model.state_dict()  # keeps the versions of modules, which some of them check
        complete.update(state)
        model.load_state_dict(complete)
        _check_inputs(model)
        if wrong := invalid_tensor(model):
            raise CorruptArtifact(f"{wrong}, which is never in a file of saq")
    except SaqError as error:
        raise CorruptArtifact(
            f"{source} describes a model that cannot be built: {printable(str(error))}"
        ) from None
    except RuntimeError as error:
        raise CorruptArtifact(
            f"{source} does not fit {metadata.policy.model}: {printable(str(error))}"
        ) from None
    return model.eval()


def _tied_weights(model: nn.Module) -> dict[str, str]:
    """Names of weights shared with another layer, with the name under which the weight is stored."""
    coded = {layer: name for name, (layer, _) in _coded_layers(model).items()}
    return {
        _key(name, layer.weight_name): _key(coded[layer.tied_to[0]], layer.tied_to[0].weight_name)
        for name, layer in quantized_layers(model).items()
        if layer.tied_to and layer.tied_to[0] in coded
    }


def _shared_levels(model: nn.Module) -> dict[str, str]:
    """Names of tensors of a quantizer at its second and later places, with the name under which each is stored."""
    first: dict[Quantizer, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer) and (kept := first.setdefault(module, name)) != name:
            found |= {f"{name}.{key}": f"{kept}.{key}" for key in module.state_dict()}
    return found


def _key(layer: str, name: str) -> str:
    """The key of a layer's tensor; a network may itself be a layer, without a name."""
    return f"{layer}.{name}" if layer else name


def _coded_layers(model: nn.Module) -> dict[str, tuple[QuantizedLayer, Quantizer]]:
    """The layers whose weights are stored as codes, with their weight quantizers."""
    return {
        name: (layer, layer.weight_quantizer)
        for name, layer in quantized_layers(model).items()
        if stores_codes(layer) and isinstance(layer.weight_quantizer, Quantizer)
    }


def _expected(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a file of ``model``."""
    expected = {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
    for name, (layer, quantizer) in _coded_layers(model).items():
        shape, _ = expected.pop(_key(name, layer.weight_name))
        expected[_key(name, "codes")] = (packed_bytes(shape, quantizer.bits),), torch.uint8
        expected[_key(name, "step")] = (quantizer.step().numel(),), torch.float32
    for repeated in (*_tied_weights(model), *_shared_levels(model)):
        del expected[repeated]
    return expected


def _check_fit(
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tensors: Mapping[str, Tensor], name: str
) -> None:
    """Refuse tensors that differ from those expected; torch would convert or accept some of them."""
    missing = [key for key in expected if key not in tensors]
    unknown = [key for key in tensors if key not in expected]
    other = [
        f"{key} is {_kind(tuple(tensors[key].shape), tensors[key].dtype)} instead of {_kind(*expected[key])}"
        for key in expected
        if key in tensors and (tuple(tensors[key].shape), tensors[key].dtype) != expected[key]
    ]
    problems = [
        f"{title}{', '.join(some[:_NAMED])}{f' and {len(some) - _NAMED} more' if len(some) > _NAMED else ''}"
        for title, some in (("missing ", missing), ("unexpected ", unknown), ("", other))
        if some
    ]
    if problems:
        raise CorruptArtifact(f"its tensors are not those of {name}: {'; '.join(problems)}")


def _kind(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _weight(state: dict[str, Tensor], name: str, layer: QuantizedLayer, quantizer: Quantizer) -> Tensor:
    """``step * code`` of one layer; both are removed from ``state``."""
    prefix = _key(name, "weight_quantizer.")
    packed, step = state.pop(_key(name, "codes")), state.pop(_key(name, "step"))
    quantizer.load_state_dict(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    )
    expected = quantizer.step().detach()
    if not expected.isfinite().all():
        raise CorruptArtifact(f"the clipping level of layer {name} is NaN or infinite")
    if not torch.equal(step, expected.flatten()):
        raise CorruptArtifact(f"the steps of layer {name} do not match its grid and clipping level")
    try:
        codes = unpack(packed, quantizer.grid(), quantizer.bits, tuple(layer.latent_weight().shape))
    except CorruptArtifact as error:
        raise CorruptArtifact(f"layer {name}: {error}") from None
    return codes * expected


def _check_inputs(model: nn.Module) -> None:
    """Refuse quantizers with NaN or infinite parameters; zero and negative levels or steps are valid."""
    for name, module in model.named_modules():
        if isinstance(module, Quantizer) and not all(
            x.isfinite().all() for x in module.state_dict().values()
        ):
            raise CorruptArtifact(f"{name} has a NaN or infinite level, step or offset")


def restore_structure(model: nn.Module, metadata: ModelMetadata) -> None:
    """Wrap the float architecture and install quantizers, not fitted, according to ``metadata``, in place.

    Raises:
        SaqError: the metadata names layers that the architecture does not have.
    """
    for quantizer in metadata.scheme.names:
        if quantizer not in QUANTIZERS and quantizer not in QUANTIZERS.broken:
            raise CorruptArtifact(
                f"no installed package has its quantizer {quantizer!r}: install the one that has"
            )
    modules = dict(model.named_modules())
    layers = convert.wrap(model)
    replace_norms(model, metadata.absorbed)
    quantized = set(layers) & set(metadata.policy.layers)
    for parent, children in metadata.routed.items():
        if parent not in modules or not set(children) <= quantized:
            raise CorruptArtifact(f"it has no {parent} that multiplies with {', '.join(children)}")
    convert.leave_float(model, [name for name in layers if name not in metadata.policy.layers])
    for parent, children in metadata.routed.items():
        convert.route(model, [parent], children)
    for product, followed in metadata.products.items():
        owner, index = split_name(product)
        known_signs = all(operand_name(product, operand) in metadata.signed for operand in OPERANDS)
        supported = owner in modules and supports_products(modules[owner])
        if not supported or index is None or followed not in quantized or not known_signs:
            raise CorruptArtifact(f"it has no product {product} that could follow {followed}")
    convert.add_products(model, metadata.products)
    if metadata.junctions is not None:
        _check_junctions(metadata.junctions, metadata.signed, modules, quantized)
        convert.add_junctions(model, metadata.junctions)
    convert.install(model, metadata.scheme, metadata.policy, metadata.signed)


def _check_junctions(
    junctions: Junctions, signed: Mapping[str, bool], modules: Mapping[str, nn.Module], layers: set[str]
) -> None:
    """Refuse junctions that the architecture, whose ``modules`` and quantized ``layers`` these are, cannot have."""
    readers = set(layers)
    for name, operands in junctions.operators.items():
        owner, index = split_junction(name)
        names = [f"{name}.{k}" for k in range(len(operands.positions))]
        known = index is not None and owner in modules and supports_junctions(modules[owner])
        ascending = list(operands.positions) == sorted({k for k in operands.positions if k >= 0})
        if not known or not names or not ascending or not set(names) <= set(signed):
            raise CorruptArtifact(f"it has no junction {name}")
        readers.update(names)
    unknown = [name for name in (*junctions.tensors, *junctions.tensors.values()) if name not in readers]
    if unknown:
        raise CorruptArtifact(f"it has no {unknown[0]} that reads a tensor")
