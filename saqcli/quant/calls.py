"""One call of a model: its positional and keyword arguments.

Most models take one tensor of images. Modules of one's own may take several tensors, or dictionaries of them: whatever
runs a model on a batch accepts a ``Call`` in place of the tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        """Size of the batch: of the first dimension of the first tensor; 0 without one."""
        return next((len(tensor) for tensor in self.tensors if tensor.dim()), 0)

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
        """The call with the first sample alone: tensors of the size of the batch are cut to one row."""
        count = self.count
        return self.map(lambda tensor: tensor[:1] if tensor.dim() and len(tensor) == count else tensor)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dictionaries and dataclasses registered with PyTorch."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
