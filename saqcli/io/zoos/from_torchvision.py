"""torchvision's classification networks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.io import hub
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.weights import COLOURS, to_channels, versioned
from saqcli.io.zoos.base import Architecture, Published, last_layer


class TorchVision:
    """torchvision's classification networks: names like ``resnet50.IMAGENET1K_V1``, without a tag its DEFAULT."""

    # Only these two have heads for training alone, whose outputs no plain loss can take. Their published
    # weights expect inputs normalized otherwise, which the network itself does if asked to.
    _AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # noqa: RUF012

    def names(self) -> list[str]:
        """See ``Zoo``."""
        import torchvision

        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names

    def tags(self) -> dict[str, list[str]]:
        """See ``Zoo``; the tags are members of torchvision's enumerations."""
        from torchvision.models import get_model_weights

        published = {name: get_model_weights(name) for name in self.names()}
        return {
            name: sorted((entry.name for entry in entries), key=lambda tag: tag != entries.DEFAULT.name)
            for name, entries in published.items()
        }

    def knows(self, name: str) -> bool:
        """See ``Zoo``."""
        from torchvision.models import get_model_weights

        architecture, dot, tag = name.partition(".")
        if architecture not in self.names():
            return False
        return not dot or tag in get_model_weights(architecture).__members__

    def default_classes(self, name: str) -> int:
        """See ``Zoo``."""
        return len(self._weights(name).meta["categories"])

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """See ``Zoo``."""
        published = self._weights(name).transforms()
        crop, resize = published.crop_size[0], published.resize_size[0]
        return Preprocessing(
            input_size=(3, crop, crop),
            mean=tuple(published.mean),
            std=tuple(published.std),
            interpolation=published.interpolation.value,
            crop_pct=crop / resize,
        )

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """See ``Zoo``; always said, because builders presume 224 where their weights may not."""
        if arch.name.startswith("vit_") and size[0] == size[1]:
            return arch.with_default(image_size=size[0])
        return arch.with_default(input_size=size) if arch.name.startswith("maxvit") else arch

    def build(self, arch: Architecture) -> nn.Module:
        """See ``Zoo``."""
        import torchvision

        name = _untagged(arch.name)
        if name in self._AUXILIARY and arch.in_chans != COLOURS:
            raise ConfigError(
                f"torchvision/{arch.name} was asked for {arch.in_chans} input channels, and it normalizes colours "
                "itself: look for it under timm/"
            )
        if name in self._AUXILIARY:
            arch = arch.with_default(aux_logits=False, transform_input=True, init_weights=True)
        model: nn.Module = torchvision.models.get_model(name, num_classes=arch.num_classes, **arch.kwargs)
        return model if arch.in_chans == COLOURS else _reading(model, arch.in_chans)

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``."""
        import torchvision

        model, weights, name = self.build(arch), self._weights(arch.name), _untagged(arch.name)
        kwargs = {} if name in self._AUXILIARY else arch.kwargs
        with hub.fetching(f"torchvision/{arch.name}"):
            hub.require_url(weights.url)
            donor = torchvision.models.get_model(name, weights=weights, **kwargs)
        own = model.state_dict()
        state = dict(to_channels(donor.state_dict(), own, arch.in_chans, name)[0])
        heads = () if arch.num_classes == self.default_classes(arch.name) else self.classifiers(model)
        state.update(
            {f"{head}.{part}": own[f"{head}.{part}"] for head in heads for part in ("weight", "bias")}
        )
        model.load_state_dict(versioned(model, {key: state[key] for key in own}))
        return Published(model, arch.name, str(weights))

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; leaves out the heads that only training uses."""
        prefixes = self._AUXILIARY.get(_untagged(arch.name), ())
        return (
            {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else None
        )

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        return last_layer(model)

    def _weights(self, name: str) -> Any:
        from torchvision.models import get_model_weights

        architecture, dot, tag = name.partition(".")
        published = get_model_weights(architecture)
        return published[tag] if dot else published.DEFAULT


def _reading(model: nn.Module, channels: int) -> nn.Module:
    """``model``, its convolutions of colour images replaced by random ones of images of ``channels``."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == COLOURS and module.groups == 1:
            module.in_channels = channels
            module.weight = nn.Parameter(
                module.weight.new_empty(module.out_channels, channels, *module.kernel_size)
            )
            module.reset_parameters()
    return model


def _untagged(name: str) -> str:
    return name.partition(".")[0]
