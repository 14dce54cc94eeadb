"""Which readers read the same tensor: layers and junctions, in the traced pass.

A tensor that several of them read is quantized once. It is the same tensor as long as only operators lie in between
that rearrange or select its values, or insert zeros: Q(max pool of x) = max pool of Q(x), and so for reshapes, slices,
paddings. ReLU makes another tensor, since its grid is another one; so do norms, sums and scalings. A concatenation
makes another one too, except for kind ``concat_shared``, where its operands and its result are one.

A reader that is called several times, on different tensors, has a quantizer of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from saqcli.quant.junctions.kinds import SHARED, chosen_kind

_SAME = set(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "flatten reshape view view_as permute transpose swapaxes movedim contiguous squeeze unsqueeze expand "
    "dropout dropout1d dropout2d dropout3d identity clone detach requires_grad_ __getitem__ chunk split tensor_split "
    "unbind select narrow unflatten flip roll repeat pixel_shuffle pixel_unshuffle channel_shuffle "
    "native_channel_shuffle".split()
)
_MAX_POOLS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d}


class Tensors:
    """The tensor, by number, that every value of a pass consists of."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Tensor] = []  # ids of dead tensors would be reused
        self._count = 0

    def number(self, x: Tensor) -> int:
        """The number of ``x``."""
        if id(x) not in self._numbers:
            self._set(x, self._new())
        return self._numbers[id(x)]

    def follow(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
    ) -> None:
        """Number the outputs of an operator; to be called after it has run.

        Args:
            func: the operator.
            args: its arguments.
            kwargs: the same by keyword.
            inputs: all tensors among them.
            outputs: all tensors of its result.
        """
        if inputs and _keeps_values(func, args, kwargs):
            source = self.number(inputs[0])
            for output in outputs:
                self._set(output, source)
            return
        name = getattr(func, "__name__", "")
        written = [x for x in inputs if any(x is output for output in outputs)]
        if inputs and not written and (name == "__setitem__" or (name.endswith("_") and name[:2] != "__")):
            written = [inputs[0]]
        for x in written:  # and all views of it are other tensors from now on
            memory = x.untyped_storage().data_ptr()
            for each in self._alive:
                if each.untyped_storage().data_ptr() == memory:
                    self._numbers[id(each)] = self._new()
            self._set(x, self._new())
        for output in outputs:
            if not any(output is x for x in written):
                self._set(output, self._new())

    def _set(self, x: Tensor, number: int) -> None:
        if id(x) not in self._numbers:
            self._alive.append(x)
        self._numbers[id(x)] = number

    def _new(self) -> int:
        self._count += 1
        return self._count


def _keeps_values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the results of an operator are values of its first operand, or zeros."""
    name = getattr(func, "__name__", "")
    if name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or not value
    if name == "interpolate":
        return bool(
            kwargs.get("mode", args[3] if len(args) > 3 else "nearest") in ("nearest", "nearest-exact")
        )
    return name in _SAME or func in _MAX_POOLS


@dataclass
class JunctionTrace:
    """A call of an operator that joins tensors.

    Attributes:
        owner: name of the module whose forward calls it.
        index: index of the call in one forward of its owner.
        kind: of the operator, in ``kinds.KINDS``.
        positions: of the operands that depend on the image.
        numbers: elements of the result for one image, summed over calls.
        results: the tensors that it makes.
    """

    owner: str
    index: int
    kind: str
    positions: tuple[int, ...]
    numbers: int = 0
    results: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Name of the module that quantizes it."""
        return f"{self.owner}.junctions.{self.index}".lstrip(".")

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return [f"{self.name}.{k}" for k in range(len(self.positions))]


def first_readers(
    junctions: Iterable[JunctionTrace], reads: Mapping[str, set[int]], kinds: frozenset[str]
) -> dict[str, str]:
    """For every reader of a tensor that others read too, the first of them.

    Args:
        junctions: of the pass.
        reads: the tensors that layers, and operands of junctions, read, in order of execution.
        kinds: of junctions that are quantized.
    """
    one_of: dict[int, int] = {}  # towards the smallest number of tensors with one step

    def root(number: int) -> int:
        while number in one_of:
            number = one_of[number]
        return number

    skipped: set[str] = set()
    for junction in junctions:
        kind = chosen_kind(junction.kind, kinds)
        if kind is None:
            skipped.update(junction.operands)
        if kind == SHARED:
            together = set(junction.results).union(*(reads[operand] for operand in junction.operands))
            least, *others = sorted({root(number) for number in together})
            one_of.update(dict.fromkeys(others, least))
    readers: dict[int, list[str]] = {}
    for name, numbers in reads.items():
        roots = {root(number) for number in numbers}
        if name not in skipped and len(roots) == 1:
            readers.setdefault(roots.pop(), []).append(name)
    return {name: names[0] for names in readers.values() for name in names if len(names) > 1}
