"""Weight files: read without running code, loaded strictly.

A ``.pth`` file is a pickle, and a pickle can run any code. It is read by torch's restricted unpickler only, which
accepts tensors, plain containers and the ``Namespace`` of a script's options; there is no switch to trust a file.
``state_dicts`` chooses the tensors that are the weights; they must match the network exactly, and be finite.

Before that, the pickle's opcodes are scanned without running them. torch's restricted unpickler calls only the
constructors of tensors, but it can still run forever or exhaust the memory: through containers that contain each other
twice, level by level (``a = (b, b)``, ``b = (c, c)``, ...), containers that contain themselves, ``bytearray(10**12)``,
or archives that decompress to more than their size. Weight files have none of these.
"""

import hashlib
import lzma
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saqcli.errors import ConfigError, CorruptArtifact, UnsafeWeights, WeightsMismatch
from saqcli.finite import invalid_tensor
from saqcli.models.state_dicts import choose, class_lists, from_metadata
from saqcli.serialization import printable
from saqcli.units import counted

MAX_UNFOLDED = 2**24  # values of a pickle, with shared values counted at every use
MAX_PICKLES = 5  # per file: torch before 1.6 writes five, followed by the tensors' bytes
SPARE_BYTES = 2**20
_REFUSED = {"builtins.bytearray", "__builtin__.bytearray", "_codecs.encode", "builtins.complex"}
_APPENDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


# Exceptions raised by damaged pickles and archives, by formats that torch does not write, and by encrypted archives.
_DAMAGED = (
    *(ValueError, IndexError, EOFError, OSError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
)


class SuspiciousFile(Exception):
    """A suspicious file, which no training program writes; the message continues "the file".

    Attributes:
        called: globals that the pickle names before this point.
    """

    def __init__(self, message: str, called: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.called = called


@dataclass
class _Value:
    """A value on the stack: the number of values in it, itself included, and whether it came from the memo."""

    size: int = 1
    shared: bool = False


def globals_of(path: Path) -> list[str]:
    """The globals that the pickles of a file name, as ``module.name``, up to the first damage.

    Raises:
        SuspiciousFile: reading the file could run forever or exhaust the memory.
    """
    found: list[str] = []
    try:
        for file in _pickles(path):
            _walk(file, found)
    except SuspiciousFile as strange:
        raise SuspiciousFile(str(strange), found) from None
    except _DAMAGED:  # damage, or bytes after the last pickle; torch reports damage
        pass
    if refused := next((name for name in found if name in _REFUSED), None):
        raise SuspiciousFile(f"calls {refused}", found)
    return found


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """A stream at the beginning of each pickle of a file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(MAX_PICKLES):
                yield file
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size + SPARE_BYTES:
                raise SuspiciousFile("decompresses to more than its size")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as inner:
                        yield inner


def _walk(file: IO[bytes], found: list[str]) -> None:
    """Scan one pickle to its end with sizes instead of values; its globals are appended to ``found``."""
    stack: list[_Value | None] = []  # None is a mark of the pickle protocol
    memo: dict[Any, _Value] = {}
    strings = ["", ""]
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            found.append(str(argument).replace(" ", ".") if argument else ".".join(strings))
        elif isinstance(argument, str):
            strings = [strings[1], argument]
        if name.endswith("GET"):
            value = memo.get(argument, _Value())
            value.shared = True
            stack.append(value)
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1] or _Value()
        elif name == "MARK":
            stack.append(None)
        else:
            taken = _take(stack, [kind.name for kind in opcode.stack_before])
            size = 1 + sum(value.size for value in taken)
            if name in _APPENDING and taken:
                if taken[0].shared:
                    raise SuspiciousFile(
                        "contains a list or dictionary that contains itself, or that is filled after its use"
                    )
                taken[0].size = size
                stack.append(taken[0])
            else:
                stack.extend(_Value(size) for _ in opcode.stack_after)
            if size > MAX_UNFOLDED:
                raise SuspiciousFile("repeats its values endlessly")


def _take(stack: list[_Value | None], kinds: list[str]) -> list[_Value]:
    """Pop an opcode's operands from the stack, the lowest first."""
    taken: list[_Value] = []
    if "stackslice" in kinds:
        while (value := stack.pop()) is not None:
            taken.append(value)
        kinds = kinds[: kinds.index("mark")]
    for _ in kinds:
        taken.append(stack.pop() or _Value())
    return taken[::-1]


PICKLES = (".pth", ".pt", ".th", ".bin", ".tar", ".ckpt")
COLOURS = 3  # image channels of published weights
MAX_NAME = 1000  # characters of a tensor's name
_NAMED = 5  # keys in a message before "and N more"
_CODE = (
    "weights {path} hold code ({code}) in addition to tensors: nothing was run; if you trust the file, convert it to "
    ".safetensors, or save only model.state_dict()"
)


@dataclass(frozen=True)
class WeightFile:
    """The content of a weight file.

    Attributes:
        tensors: tensors by their names in the file, on the CPU.
        key: their dotted key in the file; empty for the file itself.
        others: keys of other sets of tensors in the file.
        class_lists: lists of class names by index in the file.
        notes: choices made for the user, one line each.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()
    class_lists: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def read_weights(path: Path, key: str | None = None) -> WeightFile:
    """Read the tensors of a weight file; of several sets those under ``key``, or those that ``state_dicts`` chooses.

    Raises:
        ConfigError: the file does not exist, its suffix is not that of a weight file, or it has no such key.
        CorruptArtifact: the file is empty or truncated, or does not hold tensors by name.
        UnsafeWeights: reading the file would require running its code; none was run.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"weights {path} cannot be read: it {what}; give a .safetensors, .pth, .pt or .th file"
        )
    if path.suffix.lower() not in (".safetensors", *PICKLES):
        raise ConfigError(
            f"weights {path} cannot be read: {path.suffix or 'no suffix'} is not a weight format; "
            "give a .safetensors, .pth, .pt or .th file"
        )
    try:
        if path.stat().st_size == 0:
            raise CorruptArtifact(f"weights {path} are empty (0 bytes): fetch or write the file again")
        reader = _read_safetensors if path.suffix.lower() == ".safetensors" else _read_pickle
        content, described = reader(path)
    except OSError as error:
        raise ConfigError(
            f"weights {path} cannot be read ({error.strerror or error}): check the file"
        ) from error
    if not isinstance(content, Mapping) or not content:
        what = "nothing" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise CorruptArtifact(f"weights {path} hold {what}, not tensors by name: save model.state_dict()")
    chosen = choose(content, key, str(path))
    tensors = _tensors(chosen.values, path)
    notes = tuple(f"{path.name}: {note}" for note in chosen.notes)
    return WeightFile(tensors, chosen.key, chosen.others, tuple(class_lists(described)), notes)


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    name: str = "the network",
    classifiers: Sequence[str] = (),
) -> None:
    """Load ``state`` into ``model`` strictly; only ``num_batches_tracked`` may be missing.

    Args:
        model: changed in place; partly loaded if this raises.
        state: tensors by parameter name.
        source: name of the weights in messages.
        name: name of the network in messages.
        classifiers: names of the layers with one row per class, to report a wrong number of classes as such.

    Raises:
        WeightsMismatch: a tensor is missing, unexpected or of another shape.
        CorruptArtifact: a tensor is NaN or infinite, or a variance is negative.
    """
    own = model.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(with_versions(model, {**counters, **state}), strict=True)
    except RuntimeError as error:  # torch decides, since layers may rename old keys
        raise WeightsMismatch(
            _misfit({**counters, **state}, own, source, name, classifiers, error)
        ) from error
    check_finite(model, source, state)


def check_finite(model: nn.Module, source: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Refuse weights with invalid values.

    Args:
        model: network with the weights.
        source: name of the weights in messages.
        state: the weights before their conversion to the network's data types.

    Raises:
        CorruptArtifact: a parameter or running statistic is NaN or infinite, or a variance is negative.
    """
    if found := invalid_tensor(model, state):
        raise CorruptArtifact(
            f"weights {source} cannot be used: {printable(found)}; give weights with finite values"
        )


def adapt_channels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], channels: int, source: str
) -> tuple[Mapping[str, Tensor], str]:
    """Adapt the first convolution of ``state`` from colour images to images of ``channels``, as timm does.

    For one channel the weights are summed over the colours, otherwise repeated and scaled.

    Returns:
        The state, and a note for the user; the note is empty if nothing was changed.
    """
    if channels == COLOURS:
        return state, ""
    from timm.models import adapt_input_conv

    reading = {}
    for name, value in state.items():
        wanted = own[name].shape if name in own else ()
        if value.dim() == len(wanted) == 4 and value.shape != wanted and value.shape[1] % COLOURS == 0:
            theirs = list(value.shape)
            theirs[1] = theirs[1] // COLOURS * channels
            if theirs == list(wanted):
                reading[name] = adapt_input_conv(channels, value)
    return {**state, **reading}, channels_note(source, COLOURS, channels) if reading else ""


def channels_note(source: str, before: int, now: int) -> str:
    """The note on weights that were adapted to another number of image channels."""
    how = "summed over its channels" if now == 1 else "repeated over the channels and scaled"
    return f"{source} reads images of {counted(before, 'channel')}: {how} to read {now}"


def with_versions(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with the current version numbers of all modules, which torchvision's MNASNet requires."""
    known: dict[str, Tensor] = model.state_dict()  # its _metadata holds the version of every module
    known.clear()
    known.update(state)
    return known


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    """The tensors and the metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return tensors, from_metadata(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptArtifact(
            f"weights {path} are damaged ({printable(str(error), 200)}): fetch or write the file again"
        ) from error


def _read_pickle(path: Path) -> tuple[Any, Any]:
    """The content of a pickle, twice: as tensors and as metadata."""
    called: list[str] = []
    try:
        called = globals_of(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # about the way the file was pickled
            content = torch.load(path, weights_only=True, map_location="cpu")
        return content, content
    except OSError:
        raise
    except SuspiciousFile as error:
        if code := _code_of(error.called):
            raise UnsafeWeights(_CODE.format(path=path, code=code)) from None
        raise UnsafeWeights(
            f"weights {path} are refused: the file {error}; nothing was run. Save model.state_dict() alone"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything, from EOFError to KeyError
        if code := _code_in(error) or _code_of(called):
            raise UnsafeWeights(_CODE.format(path=path, code=code)) from error
        raise CorruptArtifact(
            f"weights {path} are damaged or foreign: fetch or write the file again"
        ) from error


def _code_in(error: Exception) -> str:
    """The global that the restricted unpickler refused to call; empty if the file is only damaged."""
    if "TorchScript" in str(error):
        return "a TorchScript program"
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return printable(found[1], 100)
    return "an object that is not a tensor" if "allowlisted" in str(error) else ""


def _code_of(called: Sequence[str]) -> str:
    """The first unknown global of a pickle of protocol 3 or later, where torch's unpickler stops without naming it."""
    harmless = ("torch.", "collections.", "argparse.Namespace")
    strangers = [name for name in called if not name.startswith(harmless)]
    return printable("".join(strangers[:1]), 100)


def _tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Check that ``content`` consists of dense tensors by name, and detach them."""
    for key, value in content.items():
        if not isinstance(key, str) or len(key) > MAX_NAME:
            what = "a very long one" if isinstance(key, str) else f"a {type(key).__name__}"
            raise CorruptArtifact(f"weights {path} hold no tensors by name ({what}): save model.state_dict()")
        if not isinstance(value, Tensor):
            raise CorruptArtifact(
                f"weights {path} hold a {type(value).__name__} instead of a tensor under {printable(key, 100)!r}: "
                "save model.state_dict()"
            )
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CorruptArtifact(
                f"weights {path} hold a sparse, quantized or meta tensor under {printable(key, 100)!r}: "
                "save the state_dict() of the dense float model"
            )
    return {key: value.detach() for key, value in content.items()}


def _misfit(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    source: str,
    name: str,
    classifiers: Sequence[str],
    error: RuntimeError,
) -> str:
    """One line on the differences between ``state`` and the network's state, ``own``."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]
    heads = {f"{layer}.{part}" for layer in classifiers for part in ("weight", "bias")}
    if misshapen and not missing and not unexpected and heads.issuperset(misshapen):
        theirs, wanted = len(state[misshapen[0]]), len(own[misshapen[0]])
        return (
            f"{source} has {counted(theirs, 'class')}, {name} was built for {wanted}: remove `model.num_classes` "
            "and give data with the classes of the weights, or add `model.new_head=True` to train a classifier of "
            f"{wanted} (saq quantize, saq search)"
        )
    read = {
        (state[key].shape[1], own[key].shape[1])
        for key in misshapen
        if _differ_in_channels(state[key], own[key])
    }
    if len(read) == 1 and len(misshapen) == 1 and not missing and not unexpected:
        theirs, wanted = read.pop()
        return (
            f"{source} reads images of {counted(theirs, 'channel')} ({misshapen[0]}), {name} was built for {wanted}: "
            f"use `model.in_chans={theirs}`"
        )
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in misshapen]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
    parts = [f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in kinds if keys]
    reason = ", ".join(parts) or printable(" ".join(str(error).split()))
    return f"{source} does not fit {name}: {reason}; give weights of this network, or name the network of the weights"


def _differ_in_channels(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of a convolution differ only in their input channels."""
    if not one.dim() == other.dim() == 4:
        return False
    return (one.shape[0], one.shape[2:]) == (other.shape[0], other.shape[2:])


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMED
    return ", ".join(printable(key, 100) for key in keys[:_NAMED]) + (f" and {more} more" if more > 0 else "")
