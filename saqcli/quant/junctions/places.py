"""Where quantizers of activations are: inputs of layers, operands of products and of junctions.

Whatever observes, fits, freezes, trains or saves these quantizers goes through the places of a model. Places of the
same tensor may hold the same module (``sharing``).
"""

from typing import Any, NamedTuple

from torch import nn


class Place(NamedTuple):
    """An attribute that holds a quantizer.

    Attributes:
        holder: the module with that attribute.
        attribute: its name.
    """

    holder: nn.Module
    attribute: str

    @property
    def quantizer(self) -> Any:
        """The module there: a quantizer, or an identity."""
        return getattr(self.holder, self.attribute)

    def put(self, quantizer: nn.Module) -> None:
        """Put another module there."""
        setattr(self.holder, self.attribute, quantizer)
