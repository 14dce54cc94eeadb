"""One call of a model: its positional and keyword arguments.

Most models take one tensor of images. Modules of one's own may take several tensors, or dictionaries of them: whatever
runs a model on a batch accepts a ``Call`` in place of the tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: "Tensor | Call") -> "Call":
        """``batch`` itself, or a call with this tensor as its only argument."""
        return batch if isinstance(batch, Call) else cls((batch,))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones included."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def count(self) -> int:
        """Size of the batch: length of the first argument if that is a list of tensors, else of dimension 0 of the
        first tensor; 0 without one.
        """
        first = self._first_argument()
        if _is_list(first):
            return len(first)
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 0)

    def _first_argument(self) -> Any:
        return next(iter((*self.args, *self.kwargs.values())), None)

    @property
    def text(self) -> str:
        """The shapes of the tensors without the batch, as in ``an image of 3x32x32``."""
        shapes = ["x".join(map(str, tensor.shape[1:])) or "a number" for tensor in self.tensors]
        return f"an image of {shapes[0]}" if len(shapes) == 1 else f"inputs of {', '.join(shapes)}"

    def run(self, model: nn.Module) -> Any:
        """The output of ``model``."""
        return model(*self.args, **self.kwargs)

    def map(self, change: Any) -> "Call":
        """The call with ``change`` applied to every tensor."""

        def apply(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        return Call(tree_map(apply, tuple(self.args)), tree_map(apply, dict(self.kwargs)))

    def to(self, device: torch.device) -> "Call":
        """The call with its tensors on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def first(self) -> "Call":
        """The call with a copy of the first sample alone.

        The batch is dimension 0 of tensors, or a list of samples: whatever has its size is cut to one.
        """
        count = self.count

        def cut(value: Any) -> Any:
            return value[:1] if _is_list(value) and len(value) == count else value

        call = self
        if _is_list(self._first_argument()):
            call = Call(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})
            return call.map(torch.clone)
        return call.map(
            lambda tensor: (tensor[:1] if tensor.dim() and len(tensor) == count else tensor).clone()
        )


def _is_list(value: Any) -> bool:
    """Whether ``value`` is a list or tuple of tensors."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses."""
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, each.name) for each in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping) or (is_dataclass(leaf) and not isinstance(leaf, type)):
            found += tensors_in(leaf)
    return found
