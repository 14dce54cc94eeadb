"""A stand-in for a GPU: a device whose tensors hold CPU data and refuse to meet those of the CPU.

On a CPU alone, code that forgets to move a tensor works, and fails at the first user with a GPU. Within ``standin()``
the device ``DEVICE`` has tensors of its own, ``Standin``, with the rules of CUDA:

    CPU scalar (0 dimensions) in an element-wise operation     works
    CPU index or mask                                          works; a stand-in index into a CPU tensor does not
    copy_, .to(device), .cpu(), .item(), .tolist()             go over
    any other meeting, .numpy(), a CPU generator               ``MixedDevices``, or the TypeError of torch

``FakeTensorMode`` of torch propagates devices too, but computes no values, and a training step reads its loss; torch's
"privateuse1" would register a backend for the whole process. The device's name is "lazy": every build of torch knows
it, differentiates on it, and has neither kernels nor a driver for it ("meta" is warned about and refused in places).
Autocast does not know it. Results are those of the CPU, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
DEVICE = torch.device("lazy")
CPU = torch.device("cpu")
_PLAIN = torch.Generator  # which ``standin`` replaces
_AWAY: set[int] = set()  # generators of the stand-in: below Python their class is lost

_COPIES = {aten._to_copy.default, aten.copy_.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class MixedDevices(RuntimeError):
    """Tensors of the CPU and of the stand-in met."""


class Standin(Tensor):
    """A tensor on the stand-in; ``inner`` holds its data."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Standin":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Standin({self.inner!r})"


class _Mode(TorchDispatchMode):
    """Makes tensors on the stand-in where an operation has no tensors yet."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Constants(TorchFunctionMode):
    """Moves tensors of Python numbers to the stand-in, which torch does unseen by any ``_Mode``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Standin):
            func, kwargs = torch.tensor, {"dtype": args[0].dtype, "device": DEVICE} | kwargs
            args = args[1:]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_standin(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator that may be one of the stand-in."""

    def __new__(cls, device: Any = CPU) -> "_Generator":
        made = super().__new__(cls, CPU if _is_standin(device) else device)
        made.place = torch.device(device)
        if _is_standin(device):
            _AWAY.add(made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


@contextmanager
def standin() -> Iterator[torch.device]:
    """Within the context there is the device, which is returned."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``.data`` of a stand-in cannot be set
    torch.Generator = _Generator  # type: ignore[misc]
    try:
        with _Constants(), _Mode():
            yield DEVICE
    finally:
        _AWAY.clear()
        torch.Generator = _PLAIN  # type: ignore[misc]
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _is_standin(device: Any) -> bool:
    return device is not None and torch.device(device) == DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the data behind stand-ins; the results are where CUDA would have them."""
    flat = _leaves(args) + _leaves(tuple(kwargs.values()))
    ours = [x for x in flat if isinstance(x, Standin)]
    device = kwargs.get("device")
    if func is aten.copy_.default:
        on_device = isinstance(args[0], Standin)
    else:
        on_device = bool(ours) if device is None else torch.device(device) == DEVICE
    if not ours and not on_device:
        return func(*args, **kwargs)
    if theirs := [x for x in flat if isinstance(x, Tensor) and not isinstance(x, Standin)]:
        _check(func, args, theirs)
    if on_device and any(isinstance(x, _PLAIN) and x._cdata not in _AWAY for x in flat):
        raise MixedDevices(f"{func} draws numbers for the device from a generator of the CPU")
    inner_kwargs = {name: _inner(x) for name, x in kwargs.items()}
    if on_device and device is not None:
        inner_kwargs["device"] = CPU
    result = func(*map(_inner, args), **inner_kwargs)
    if (
        torch.Tag.inplace_view in func.tags
    ):  # squeeze_ and others, of which the stand-in's own shape must know
        with no_dispatch():
            args[0].data = Standin(args[0].inner)
    return _placed(result, {id(x.inner): x for x in ours}, on_device)


def _leaves(x: Any) -> list[Any]:
    """What stands in nested lists and tuples."""
    if not isinstance(x, list | tuple):
        return [x]
    return [leaf for each in x for leaf in _leaves(each)]


def _inner(x: Any) -> Any:
    """The data behind stand-ins."""
    if isinstance(x, Standin):
        return x.inner
    return type(x)(map(_inner, x)) if isinstance(x, list | tuple) else x


def _placed(x: Any, known: dict[int, Standin], on_device: bool) -> Any:
    """Results as stand-ins: those that were given, or new ones."""
    if isinstance(x, list | tuple):
        return type(x)(_placed(each, known, on_device) for each in x)
    if not isinstance(x, Tensor) or isinstance(x, Standin):
        return x
    if id(x) in known:
        return known[id(x)]
    return Standin(x) if on_device else x


def _check(func: Any, args: Any, theirs: list[Tensor]) -> None:
    """Refuse a meeting that CUDA would refuse.

    Raises:
        MixedDevices: names the operation and the shapes of the CPU's tensors.
    """
    if func in _COPIES:
        return
    if func in _INDEXED:
        if isinstance(args[0], Standin):
            indices = [x for x in args[1] if x is not None]
            theirs = [x for x in theirs if not any(x is index for index in indices)]
        elif all(not isinstance(x, Standin) for x in args[2:3]):
            raise MixedDevices(f"{func} indexes a tensor of the CPU with one of the device")
    pointwise = torch.Tag.pointwise in func.tags or func in _INDEXED or "_foreach_" in str(func)
    wrong = [tuple(x.shape) for x in theirs if x.dim() or not pointwise]
    if wrong or (func in _INDEXED and not isinstance(args[0], Standin)):
        shapes = ", ".join(map(str, wrong))
        raise MixedDevices(f"{func} got tensors of the device and of the CPU, these of shapes {shapes}")
    if func._schema.is_mutable and not isinstance(args[0], Standin):
        raise MixedDevices(f"{func} writes numbers of the device into a tensor of the CPU")
