"""The three libraries that networks come from, behind one contract.

timm and torchvision agree on little: how a name carries its weights, where preprocessing is kept, what
happens to a classifier of another size. Those differences end here. Neither is imported before it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.io import hub
from saqcli.io.networks import NETWORKS
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

    def names(self, *, tags: bool = False) -> list[str]:
        """Every architecture; with ``tags`` every name with the tag of published weights as well."""

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


class Timm:
    """timm: names like ``resnet18.a1_in1k``, architecture and tag of the weights."""

    def names(self, *, tags: bool = False) -> list[str]:
        """See ``Zoo``."""
        import timm

        return [*timm.list_models(), *(timm.list_pretrained() if tags else ())]

    def knows(self, name: str) -> bool:
        """See ``Zoo``."""
        import timm

        try:
            return bool(timm.is_model(name)) and self._cfg(name) is not None
        except RuntimeError:  # an unknown tag
            return False

    def default_classes(self, name: str) -> int:
        """See ``Zoo``."""
        return int(self._cfg(name).num_classes or 0)

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """See ``Zoo``; timm's test-time crop belongs to its test-time size, and comes with that size only."""
        from timm.data import resolve_data_config

        cfg = self._cfg(name)
        at_test_size = (
            size is not None and cfg.test_input_size is not None and size == cfg.test_input_size[-2:]
        )
        return Preprocessing(**resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=at_test_size))

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """See ``Zoo``; by the rule of timm's own scripts."""
        cfg = self._cfg(arch.name)
        if not cfg.fixed_input_size or size == tuple(cfg.input_size[-2:]):
            return arch
        return arch.with_default(img_size=size[0] if size[0] == size[1] else size)

    def build(self, arch: Architecture, **how: Any) -> nn.Module:
        """See ``Zoo``; ``how`` tells timm where weights come from."""
        import timm

        model: nn.Module = timm.create_model(
            arch.name, num_classes=arch.num_classes, in_chans=arch.in_chans, **how, **arch.kwargs
        )
        return model

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``."""
        name, cfg = f"timm/{arch.name}", self._cfg(arch.name)
        if not cfg.has_weights:
            raise hub.unpublished(name)
        with hub.fetching(name):
            if cfg.hf_hub_id:
                hub.require_repository(cfg.hf_hub_id, cfg.hf_hub_filename)
            else:
                hub.require_url(cfg.url)
            model = self.build(arch, pretrained=True)
        tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else arch.name
        return Published(model, tagged, cfg.hf_hub_id or cfg.url)

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; by the rules that timm applies to files of the hub."""
        overlay = {"state_dict": dict(state), "num_classes": arch.num_classes}
        try:
            donor = self.build(arch, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception:  # those rules presume the right file, and fail on others in any way
            return None
        converted: dict[str, Tensor] = donor.state_dict()
        return converted

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        named: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        layers = dict(model.named_modules())
        known = tuple(name for name in ([named] if isinstance(named, str) else named) if name in layers)
        return known or _last_layer(model)

    def _cfg(self, name: str) -> Any:
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(name)


class TorchVision:
    """torchvision's classification networks, with the weights it calls DEFAULT."""

    # Only these two have heads for training alone, whose outputs no plain loss can take. Their published
    # weights expect inputs normalized otherwise, which the network itself does if asked to.
    _AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}  # noqa: RUF012

    def names(self, *, tags: bool = False) -> list[str]:
        """See ``Zoo``; torchvision has no tags here."""
        import torchvision

        names: list[str] = torchvision.models.list_models(module=torchvision.models)
        return names

    def knows(self, name: str) -> bool:
        """See ``Zoo``."""
        return name in self.names()

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

        if arch.in_chans != 3:
            raise ConfigError(
                f"torchvision/{arch.name} was asked for {arch.in_chans} input channels, torchvision's "
                "networks have 3: look for it under timm/"
            )
        if arch.name in self._AUXILIARY:
            arch = arch.with_default(aux_logits=False, transform_input=True, init_weights=True)
        model: nn.Module = torchvision.models.get_model(
            arch.name, num_classes=arch.num_classes, **arch.kwargs
        )
        return model

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``."""
        import torchvision

        model, weights = self.build(arch), self._weights(arch.name)
        kwargs = {} if arch.name in self._AUXILIARY else arch.kwargs
        with hub.fetching(f"torchvision/{arch.name}"):
            hub.require_url(weights.url)
            donor = torchvision.models.get_model(arch.name, weights=weights, **kwargs)
        own, state = model.state_dict(), donor.state_dict()
        heads = () if arch.num_classes == self.default_classes(arch.name) else self.classifiers(model)
        state.update(
            {f"{head}.{part}": own[f"{head}.{part}"] for head in heads for part in ("weight", "bias")}
        )
        model.load_state_dict({key: value for key, value in state.items() if key in own})
        return Published(model, arch.name, str(weights))

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; leaves out the heads that only training uses."""
        prefixes = self._AUXILIARY.get(arch.name, ())
        return (
            {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else None
        )

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        return _last_layer(model)

    def _weights(self, name: str) -> Any:
        from torchvision.models import get_model_weights

        return get_model_weights(name).DEFAULT


class Saq:
    """The networks of the papers, ``saqcli.io.networks``."""

    def names(self, *, tags: bool = False) -> list[str]:
        """See ``Zoo``; there are no tags."""
        return list(NETWORKS)

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
        """See ``Zoo``."""
        return NETWORKS[arch.name].build(num_classes=arch.num_classes, in_chans=arch.in_chans, **arch.kwargs)

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``; nobody published any."""
        raise hub.unpublished(f"saq/{arch.name}")

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; there is one version of them."""
        return None

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        return _last_layer(model)


ZOOS: dict[str, Zoo] = {"timm": Timm(), "torchvision": TorchVision(), "saq": Saq()}  # in order of search


def _last_layer(model: nn.Module) -> tuple[str, ...]:
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return tuple(layers[-1:])
