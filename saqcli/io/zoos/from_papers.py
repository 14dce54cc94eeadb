"""The networks of the papers, ``saqcli.io.networks``, as a library like the others."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saqcli.io import hub
from saqcli.io.networks import NETWORKS
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.zoos.base import Architecture, Published, last_layer


class Saq:
    """The networks of the papers, ``saqcli.io.networks``."""

    def names(self) -> list[str]:
        """See ``Zoo``."""
        return list(NETWORKS)

    def tags(self) -> dict[str, list[str]]:
        """See ``Zoo``; nobody published any."""
        return {name: [] for name in NETWORKS}

    def knows(self, name: str) -> bool:
        """See ``Zoo``."""
        return name in NETWORKS

    def default_classes(self, name: str) -> int:
        """See ``Zoo``."""
        return NETWORKS[name].num_classes

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """See ``Zoo``."""
        entry = NETWORKS[name]
        return Preprocessing(entry.input_size, entry.mean, entry.std, "bilinear", entry.crop_pct)

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """See ``Zoo``; all of them take any size."""
        return arch

    def build(self, arch: Architecture) -> nn.Module:
        """See ``Zoo``; lazy layers get their shapes from an empty image, other types become float32."""
        entry = NETWORKS[arch.name]
        model = entry.build(num_classes=arch.num_classes, in_chans=arch.in_chans, **arch.kwargs)
        if all(parameter.dtype != torch.float32 for parameter in model.parameters()):
            model.float()
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            with torch.no_grad():
                model.eval()(torch.zeros(1, arch.in_chans, *entry.input_size[1:]))
        return model

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``; nobody published any."""
        raise hub.unpublished(f"saq/{arch.name}")

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; there is one version of them."""
        return None

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        return last_layer(model)
