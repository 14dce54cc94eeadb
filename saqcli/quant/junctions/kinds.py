"""Kinds of junctions: which operators there are, what their operands are, and how they run on others.

An operator is recognised by its name, as a ``TorchFunctionMode`` sees it, in its functional, method and in-place forms.
Only operands that depend on the image are quantized: a bias that is added, or a number that is multiplied, makes no
junction.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli.errors import ConfigError


class Kind(NamedTuple):
    """A kind of junctions.

    Attributes:
        description: in one line.
        operators: their names.
        least: operands that depend on the image; with fewer it is no junction.
    """

    description: str
    operators: frozenset[str]
    least: int = 1


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SHARED = "concat_shared"
KINDS: dict[str, Kind] = {
    "add": Kind(
        "additions and subtractions",
        _names(
            "add add_ __add__ __radd__ __iadd__ sub sub_ subtract subtract_ rsub __sub__ __rsub__ __isub__"
        ),
        2,
    ),
    "mul": Kind(
        "multiplications, such as those of gates",
        _names("mul mul_ multiply multiply_ __mul__ __rmul__ __imul__"),
        2,
    ),
    "concat": Kind("concatenations, a step for each operand", _names("cat concat concatenate hstack"), 2),
    SHARED: Kind("concatenations, one step for operands and result", frozenset(), 2),
    "pool": Kind(
        "average pools, and means over positions",
        _names(
            "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean"
        ),
    ),
    "sigmoid": Kind("sigmoid", _names("sigmoid sigmoid_")),
    "hardsigmoid": Kind("hardsigmoid", _names("hardsigmoid hardsigmoid_")),
    "silu": Kind("SiLU, or swish", _names("silu silu_")),
    "hardswish": Kind("hardswish", _names("hardswish hardswish_")),
    "gelu": Kind("GELU", _names("gelu")),
    "tanh": Kind("tanh", _names("tanh tanh_")),
    "leaky_relu": Kind("leaky ReLU", _names("leaky_relu leaky_relu_")),
}
_KIND_OF = {name: kind for kind, entry in KINDS.items() for name in entry.operators}

# In the place of those that write to their first operand.
_OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    **{"add_": torch.add, "__iadd__": torch.add},
    **{"sub_": torch.sub, "subtract_": torch.sub, "__isub__": torch.sub},
    **{"mul_": torch.mul, "multiply_": torch.mul, "__imul__": torch.mul},
    **{"sigmoid_": torch.sigmoid, "tanh_": torch.tanh, "silu_": F.silu},
    **{"hardsigmoid_": F.hardsigmoid, "hardswish_": F.hardswish, "leaky_relu_": F.leaky_relu},
}


def kind_of(func: Any) -> str | None:
    """The kind of an operator, or None if it is no junction."""
    return _KIND_OF.get(getattr(func, "__name__", ""))


def check_kinds(kinds: Iterable[str]) -> frozenset[str]:
    """``kinds`` as a set, if there are such.

    Raises:
        ConfigError: an unknown kind, or both kinds of concatenations.
    """
    found = frozenset([kinds] if isinstance(kinds, str) else kinds)
    unknown = sorted(found - set(KINDS))
    if unknown:
        raise ConfigError(f"`junctions` has no kind {unknown[0]!r}: choose from {', '.join(KINDS)}")
    if {"concat", SHARED} <= found:
        raise ConfigError(f"`junctions` names both concat and {SHARED}: choose one of them")
    return found


def chosen_kind(kind: str, kinds: frozenset[str]) -> str | None:
    """``kind`` as one of ``kinds``, or None if it is not among them."""
    if kind == "concat" and SHARED in kinds:
        return SHARED
    return kind if kind in kinds else None


class Joined(NamedTuple):
    """A call of an operator, taken apart.

    Attributes:
        name: of the operator.
        operands: the tensors, and numbers, that it joins.
        run: the same out of place on other operands.
        target: the operand that it writes its result to, or None.
    """

    name: str
    operands: tuple[Any, ...]
    run: Callable[[Sequence[Any]], Any]
    target: Tensor | None


def taken_apart(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Joined:
    """A call of an operator that has a kind."""
    name, kwargs = func.__name__, dict(kwargs)
    kind, found = _KIND_OF[name], list(args)
    if not found:
        found.append(kwargs.pop("tensors" if kind == "concat" else "input"))
    in_place = bool(kwargs.pop("inplace", False)) or name in _OUT_OF_PLACE
    plain = _OUT_OF_PLACE.get(name, func)
    if kind == "concat":
        return Joined(name, tuple(found[0]), lambda given: plain(list(given), *found[1:], **kwargs), None)
    count = KINDS[kind].least
    if count == 2 and len(found) == 1:
        found.append(kwargs.pop("other"))
    rest = found[count:]
    if rest and isinstance(rest[-1], bool) and kind in _INPLACE_LAST:  # given by position
        in_place |= rest.pop()
    target = found[0] if in_place else None
    return Joined(name, tuple(found[:count]), lambda given: plain(*given, *rest, **kwargs), target)


_INPLACE_LAST = ("hardsigmoid", "silu", "hardswish", "leaky_relu")  # their last positional argument


def dependent(kind: str, joined: Joined, output: Any, depends: Callable[[Tensor], bool]) -> tuple[int, ...]:
    """The positions of the operands to be quantized; empty if the call is no junction.

    Args:
        kind: of the operator.
        joined: the call.
        output: its result.
        depends: whether a tensor depends on the image.
    """
    found = tuple(
        position
        for position, operand in enumerate(joined.operands)
        if isinstance(operand, Tensor) and operand.is_floating_point() and depends(operand)
    )
    if len(found) < KINDS[kind].least or not isinstance(output, Tensor):
        return ()
    return found if joined.name != "mean" or _is_pool(joined.operands[0], output) else ()


def _is_pool(x: Tensor, output: Tensor) -> bool:
    """Whether a mean is one over positions: two or more dimensions of an image, one of tokens, never the batch.

    Norms that are written out take means over channels, a single dimension that they keep.
    """
    if output.dim() == 0 or output.shape[0] != x.shape[0]:
        return False
    reduced = x.dim() - output.dim()
    if reduced == 0:
        reduced = sum(one != other for one, other in zip(x.shape, output.shape, strict=True))
        return reduced >= (2 if x.dim() > 3 else 1) and not (
            x.dim() == 3 and output.shape[-1] == 1 != x.shape[-1]
        )
    return reduced >= (2 if x.dim() > 3 else 1)
