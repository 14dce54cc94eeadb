"""Weight files: read without running code, and loaded exactly.

A ``.pth`` file is a pickle, and a pickle may run anything. It is read by torch's restricted unpickler only,
which knows tensors, plain containers and the ``Namespace`` of a script's options; there is no switch to trust a file.
Which of its tensors are the weights is decided in ``state_dicts``; they must fit the network exactly, and be numbers.

What a pickle would do is read from its opcodes first, without doing any of it. torch's restricted unpickler calls
nothing but what tensors are made of. Yet it can be kept busy for ever, or made to take all memory: by containers that
hold each other twice, level over level (``a = (b, b)``, ``b = (c, c)``, ...), by containers that hold themselves, by
``bytearray(10**12)``, by archives that unfold to more than they are. Files of weights have none of these.
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

MOST_UNFOLDED = 2**24  # values of a pickle once every shared one is written out
MOST_PICKLES = 5  # in a file: torch before 1.6 writes five, the tensors' bytes after them
SPARE_BYTES = 2**20
_REFUSED = {"builtins.bytearray", "__builtin__.bytearray", "_codecs.encode", "builtins.complex"}
_APPENDING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


# What damaged pickles and archives raise, those of a kind that torch does not write, and those with a password.
_DAMAGED = (
    *(ValueError, IndexError, EOFError, OSError, MemoryError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, lzma.LZMAError),
)


class Strange(Exception):
    """A file that no program for weights writes; the message says what is wrong, after "the file".

    Attributes:
        called: what it names up to there.
    """

    def __init__(self, message: str, called: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.called = called


@dataclass
class _Value:
    """On the stack: how many values it holds, itself included, and whether it was taken from the memo."""

    size: int = 1
    shared: bool = False


def globals_of(path: Path) -> list[str]:
    """Everything that the pickles of a file name in order to call it, as ``module.name``; what is damaged ends it.

    Raises:
        Strange: reading it could take all time or memory.
    """
    found: list[str] = []
    try:
        for file in _pickles(path):
            _walk(file, found)
    except Strange as strange:
        raise Strange(str(strange), found) from None
    except _DAMAGED:  # or bytes that are no pickle any more; torch will say so
        pass
    if refused := next((name for name in found if name in _REFUSED), None):
        raise Strange(f"asks for {refused}", found)
    return found


def _pickles(path: Path) -> Iterator[IO[bytes]]:
    """Every pickle of a file, at its beginning."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(MOST_PICKLES):
                yield file
            return
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > path.stat().st_size + SPARE_BYTES:
                raise Strange("unfolds to more than it is")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as inner:
                        yield inner


def _walk(file: IO[bytes], found: list[str]) -> None:
    """Follow one pickle to its end with sizes in the place of values; what it names goes to ``found``."""
    stack: list[_Value | None] = []  # None is a mark
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
                    raise Strange("holds a list or dictionary within itself, or fills one after its use")
                taken[0].size = size
                stack.append(taken[0])
            else:
                stack.extend(_Value(size) for _ in opcode.stack_after)
            if size > MOST_UNFOLDED:
                raise Strange("repeats itself without end")


def _take(stack: list[_Value | None], kinds: list[str]) -> list[_Value]:
    """Take from the stack what an opcode takes, from below."""
    taken: list[_Value] = []
    if "stackslice" in kinds:
        while (value := stack.pop()) is not None:
            taken.append(value)
        kinds = kinds[: kinds.index("mark")]
    for _ in kinds:
        taken.append(stack.pop() or _Value())
    return taken[::-1]


PICKLES = (".pth", ".pt", ".th", ".bin", ".tar", ".ckpt")
COLOURS = 3  # channels of the images that published weights read
MOST_NAME = 1000  # characters of a tensor's name
_NAMED = 5  # keys that a message lists before it counts
_CODE = (
    "weights {path} hold code ({code}) beside tensors: nothing was run; where you trust the file, convert it to "
    ".safetensors, or save model.state_dict() alone"
)


@dataclass(frozen=True)
class WeightFile:
    """What was read from a weight file.

    Attributes:
        tensors: by name as the file has them, on the CPU.
        key: where in the file they are, dotted; empty for the file itself.
        others: keys of other sets of tensors in the file.
        class_lists: lists of class names by index that the file carries.
        notes: what was decided for the user, one line each.
    """

    tensors: dict[str, Tensor]
    key: str = ""
    others: tuple[str, ...] = ()
    class_lists: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()


def read_weights(path: Path, key: str | None = None) -> WeightFile:
    """The tensors of a weight file; of several sets those under ``key``, or those that ``state_dicts`` chooses.

    Raises:
        ConfigError: no such file, not a weight file by its name, or no such key in it.
        CorruptArtifact: the file is empty, truncated, or holds something else than tensors by name.
        UnsafeWeights: the file would have to run code to be read; none was run.
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
    """Load ``state`` into ``model``, every tensor in its place; ``num_batches_tracked`` may be absent.

    Args:
        model: changed in place; half loaded if this raises.
        state: tensors by parameter name.
        source: what to call the weights in a message.
        name: what to call the network in a message.
        classifiers: names of the layers with one row a class, to tell a wrong number of classes as such.

    Raises:
        WeightsMismatch: a tensor is missing, left over or of another shape.
        CorruptArtifact: one has numbers that are none, or a negative variance.
    """
    own = model.state_dict()
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(versioned(model, {**counters, **state}), strict=True)
    except RuntimeError as error:  # torch is the judge: layers may rename old keys of their own
        raise WeightsMismatch(
            _misfit({**counters, **state}, own, source, name, classifiers, error)
        ) from error
    check_numbers(model, source, state)


def check_numbers(model: nn.Module, source: str, state: Mapping[str, Tensor] | None = None) -> None:
    """Refuse weights that nothing can be computed with.

    Args:
        model: with the weights.
        source: what messages call them.
        state: as they were before they got the types of the network.

    Raises:
        CorruptArtifact: a parameter or running statistic is NaN or infinite, or a variance negative; says which.
    """
    if found := invalid_tensor(model, state):
        raise CorruptArtifact(
            f"weights {source} cannot be used: {printable(found)}; give weights of finite numbers"
        )


def to_channels(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], channels: int, source: str
) -> tuple[Mapping[str, Tensor], str]:
    """``state`` with what reads colour images made to read images of ``channels``, as timm does it; and a note.

    Weights are summed over the colours for one channel, else repeated and scaled. The note is empty where none is.
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
    """What to say of weights that were made to read images of another number of channels."""
    how = "summed over its channels" if now == 1 else "repeated over the channels and scaled"
    return f"{source} reads images of {counted(before, 'channel')}: {how} to read {now}"


def versioned(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` as modules of today's versions would have written it; torchvision's MNASNet asks for its version."""
    known: dict[str, Tensor] = model.state_dict()  # it tells the version of every module beside its tensors
    known.clear()
    known.update(state)
    return known


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_safetensors(path: Path) -> tuple[Any, Any]:
    """Tensors, and metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return tensors, from_metadata(file.metadata() or {})
    except SafetensorError as error:
        raise CorruptArtifact(
            f"weights {path} are damaged ({printable(str(error), 200)}): fetch or write the file again"
        ) from error


def _read_pickle(path: Path) -> tuple[Any, Any]:
    """What the file holds, twice: its tensors and its description are one."""
    called: list[str] = []
    try:
        called = globals_of(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")  # about how the file was pickled, which its reader cannot change
            content = torch.load(path, weights_only=True, map_location="cpu")
        return content, content
    except OSError:
        raise
    except Strange as error:
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
    """What a pickle wanted to call, by the restricted unpickler's refusal; empty if it is merely damaged."""
    if "TorchScript" in str(error):
        return "a TorchScript program"
    if not isinstance(error, pickle.UnpicklingError):
        return ""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return printable(found[1], 100)
    return "an object that is not a tensor" if "allowlisted" in str(error) else ""


def _code_of(called: Sequence[str]) -> str:
    """What a plain pickle of protocol 3 or later would call; torch's unpickler stops before it can tell."""
    harmless = ("torch.", "collections.", "argparse.Namespace")
    strangers = [name for name in called if not name.startswith(harmless)]
    return printable("".join(strangers[:1]), 100)


def _tensors(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """``content``, once it is known to be dense tensors by name."""
    for key, value in content.items():
        if not isinstance(key, str) or len(key) > MOST_NAME:
            what = "a very long one" if isinstance(key, str) else f"a {type(key).__name__}"
            raise CorruptArtifact(f"weights {path} hold no tensors by name ({what}): save model.state_dict()")
        if not isinstance(value, Tensor):
            raise CorruptArtifact(
                f"weights {path} hold a {type(value).__name__} under {printable(key, 100)!r}, where a tensor should "
                "be: save model.state_dict()"
            )
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CorruptArtifact(
                f"weights {path} hold numbers that are sparse, quantized or elsewhere under {printable(key, 100)!r}: "
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
    """One line on how ``state`` differs from the network's ``own``."""
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [key for key in own if key in state and state[key].shape != own[key].shape]
    heads = {f"{layer}.{part}" for layer in classifiers for part in ("weight", "bias")}
    if misshapen and not missing and not unexpected and heads.issuperset(misshapen):
        theirs, asked = len(state[misshapen[0]]), len(own[misshapen[0]])
        return (
            f"{source} has {counted(theirs, 'class')}, {name} was asked for {asked}: remove `model.num_classes` "
            "and give data with the classes of the weights, or add `model.new_head=True` to train a classifier of "
            f"{asked} (saq quantize, saq search)"
        )
    read = {
        (state[key].shape[1], own[key].shape[1])
        for key in misshapen
        if _differ_in_channels(state[key], own[key])
    }
    if len(read) == 1 and len(misshapen) == 1 and not missing and not unexpected:
        theirs, asked = read.pop()
        return (
            f"{source} reads images of {counted(theirs, 'channel')} ({misshapen[0]}), {name} was asked for {asked}: "
            f"use `model.in_chans={theirs}`"
        )
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in misshapen]
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
    parts = [f"{len(keys)} {kind} ({_listed(keys)})" for kind, keys in kinds if keys]
    reason = ", ".join(parts) or printable(" ".join(str(error).split()))
    return f"{source} does not fit {name}: {reason}; give its own weights, or name the network these are of"


def _differ_in_channels(one: Tensor, other: Tensor) -> bool:
    """Whether two weights of a convolution differ in what they read alone."""
    return one.dim() == other.dim() == 4 and (one.shape[0], one.shape[2:]) == (
        other.shape[0],
        other.shape[2:],
    )


def _listed(keys: Sequence[str]) -> str:
    more = len(keys) - _NAMED
    return ", ".join(printable(key, 100) for key in keys[:_NAMED]) + (f" and {more} more" if more > 0 else "")
