"""What every library of networks is asked, and how a network without its weights is named."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from saqcli.io.preprocessing import Preprocessing


@dataclass(frozen=True)
class Architecture:
    """A network without its weights; ``name`` is the library's own, ``kwargs`` go to its builder."""

    name: str
    num_classes: int
    in_chans: int = 3
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_default(self, **kwargs: Any) -> "Architecture":
        """The same with ``kwargs`` where none of that name is set."""
        return replace(self, kwargs={**kwargs, **self.kwargs})


class Published(NamedTuple):
    """A network with the weights that its library publishes."""

    model: nn.Module
    name: str  # the library's name, with the tag of the weights
    source: str


class Zoo(Protocol):
    """A library of networks. A ``name`` is the library's own, without prefix."""

    def names(self) -> list[str]:
        """Every architecture."""

    def tags(self) -> dict[str, list[str]]:
        """Of the published weights, by architecture, the default first; ``NAME.TAG`` is a name too."""

    def knows(self, name: str) -> bool:
        """Whether ``name``, tag included, exists."""

    def default_classes(self, name: str) -> int:
        """Classes of the published network; 0 if it has no classifier."""

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """What the published weights expect; ``size`` (H, W) if the user asks for one."""

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """``arch`` for images of (H, W), where the architecture depends on that."""

    def build(self, arch: Architecture) -> nn.Module:
        """The network with random weights."""

    def fetch(self, arch: Architecture) -> Published:
        """The network with published weights; a classifier of another size stays random."""

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """``state``, written by another version of the network, under today's names; None if that fails."""

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers with one row a class; the first one decides."""


def last_layer(model: nn.Module) -> tuple[str, ...]:
    """The classifier, where nothing says which one it is."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return tuple(layers[-1:])
