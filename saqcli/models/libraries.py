"""Model libraries behind one interface: timm, torchvision, saq.

timm and torchvision differ in how a name carries its weights, where preprocessing is stored, and what happens to a
classifier of another size. ``Zoo`` hides these differences; ``saq`` are the networks of the papers
(``saqcli.models.networks``). No library is imported before it is needed.

Missing published weights are reported within seconds, in one line. huggingface_hub tries each file six times with
growing pauses (46 s without a network, measured with version 2.4) and torch.hub waits without limit. So a file that
is not cached is first requested once, with a time limit. The settings of both (``HF_HUB_OFFLINE``, ``HF_ENDPOINT``,
proxies) apply.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saqcli.errors import ConfigError, SaqError
from saqcli.models.networks import NETWORKS
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.weights import COLOURS, adapt_channels, with_versions

_SECONDS = 5.0
_REMEDY = "use `model.weights=FILE` with a local .safetensors or .pth"
_TRANSPORTS = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3")


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Convert the exceptions of a download to a ``SaqError`` with a remedy.

    Raises:
        SaqError: the weights of ``name`` could not be fetched.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _TRANSPORTS:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0].strip().rstrip(".:")[:120]
        raise SaqError(
            f"the pretrained weights of {name} could not be fetched ({reason}): {_REMEDY}, or `model.pretrained=False`"
        ) from error


def no_published_weights(name: str) -> SaqError:
    """The error for a network without published weights."""
    return SaqError(
        f"{name} has no published weights: {_REMEDY}, or `model.pretrained=False` for random ones"
    )


def require_repository(repository: str, filename: str | None = None) -> None:
    """Raise within seconds if ``repository`` on the Hugging Face hub is neither cached nor reachable."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    repo_id, _, revision = repository.partition("@")
    names = (filename,) if filename else ("model.safetensors", "pytorch_model.bin")
    cached = (try_to_load_from_cache(repo_id, name, revision=revision or None) for name in names)
    if not any(isinstance(path, str) for path in cached):
        HfApi().model_info(repo_id, revision=revision or None, timeout=_SECONDS)


def require_url(url: str) -> None:
    """Raise within seconds if ``url`` is neither in torch.hub's cache nor reachable."""
    from torch.hub import get_dir

    if not (Path(get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file():
        urlopen(Request(url, method="HEAD"), timeout=_SECONDS).close()


@dataclass(frozen=True)
class Architecture:
    """A network without its weights; ``name`` is the library's name, ``kwargs`` are passed to its builder."""

    name: str
    num_classes: int
    in_chans: int = 3
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def with_default(self, **kwargs: Any) -> "Architecture":
        """A copy with ``kwargs`` added, except those that are already set."""
        return replace(self, kwargs={**kwargs, **self.kwargs})


class Published(NamedTuple):
    """A network with published weights."""

    model: nn.Module
    name: str  # the library's name, with the tag of the weights
    source: str


class Zoo(Protocol):
    """A library of networks; every ``name`` is the library's name, without prefix."""

    def names(self) -> list[str]:
        """Every architecture."""

    def tags(self) -> dict[str, list[str]]:
        """Tags of the published weights by architecture, the default first; ``NAME.TAG`` is also a name."""

    def has_model(self, name: str) -> bool:
        """Whether ``name``, tag included, exists."""

    def default_classes(self, name: str) -> int:
        """Classes of the published network; 0 if it has no classifier."""

    def preprocessing(self, name: str, size: tuple[int, int] | None) -> Preprocessing:
        """The preprocessing of the published weights; ``size`` is (H, W) if the user sets it."""

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """``arch`` for images of (H, W), if the architecture depends on their size."""

    def build(self, arch: Architecture) -> nn.Module:
        """The network with random weights."""

    def require(self, name: str) -> None:
        """Check within seconds that there are published weights of ``name``, cached or reachable."""

    def fetch(self, arch: Architecture) -> Published:
        """The network with published weights; a classifier of another size is random."""

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """``state`` of another version of the network under the current names; None if that fails."""

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the layers with one row per class; the first one determines the number of classes."""


def last_layer(model: nn.Module) -> tuple[str, ...]:
    """The last linear or convolutional layer: the classifier, if the library does not name it."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return tuple(layers[-1:])


class Timm:
    """timm: names like ``resnet18.a1_in1k``, architecture and tag of the weights."""

    def names(self) -> list[str]:
        """See ``Zoo``."""
        import timm

        names: list[str] = timm.list_models()
        return names

    def tags(self) -> dict[str, list[str]]:
        """See ``Zoo``."""
        import timm

        found: dict[str, list[str]] = {name: [] for name in self.names()}
        for tagged in timm.list_pretrained():
            name, _, tag = tagged.partition(".")
            found.setdefault(name, []).append(tag)
        for name, tags in found.items():
            default = self._cfg(name).tag
            tags.sort(key=lambda tag: tag != default)
        return found

    def has_model(self, name: str) -> bool:
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
        """See ``Zoo``; timm's test-time crop is used only with its test-time size."""
        from timm.data import resolve_data_config

        cfg = self._cfg(name)
        at_test_size = (
            size is not None and cfg.test_input_size is not None and size == cfg.test_input_size[-2:]
        )
        return Preprocessing(**resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=at_test_size))

    def sized(self, arch: Architecture, size: tuple[int, int]) -> Architecture:
        """See ``Zoo``; follows the rule of timm's scripts."""
        cfg = self._cfg(arch.name)
        if not cfg.fixed_input_size or size == tuple(cfg.input_size[-2:]):
            return arch
        return arch.with_default(img_size=size[0] if size[0] == size[1] else size)

    def build(self, arch: Architecture, **how: Any) -> nn.Module:
        """See ``Zoo``; ``how`` sets timm's source of weights."""
        import timm

        model: nn.Module = timm.create_model(
            arch.name, num_classes=arch.num_classes, in_chans=arch.in_chans, **how, **arch.kwargs
        )
        return model

    def require(self, name: str) -> None:
        """See ``Zoo``."""
        cfg = self._cfg(name)
        if not cfg.has_weights:
            raise no_published_weights(f"timm/{name}")
        with fetching(f"timm/{name}"):
            if cfg.hf_hub_id:
                require_repository(cfg.hf_hub_id, cfg.hf_hub_filename)
            else:
                require_url(cfg.url)

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``."""
        self.require(arch.name)
        cfg = self._cfg(arch.name)
        with fetching(f"timm/{arch.name}"):
            model = self.build(arch, pretrained=True)
        tagged = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else arch.name
        return Published(model, tagged, cfg.hf_hub_id or cfg.url)

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; applies timm's conversion of files from the hub."""
        overlay = {"state_dict": dict(state), "num_classes": arch.num_classes}
        try:
            donor = self.build(arch, pretrained=True, pretrained_cfg_overlay=overlay)
        except Exception:  # the conversion assumes a file of this network and fails on others in any way
            return None
        converted: dict[str, Tensor] = donor.state_dict()
        return converted

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        named: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
        layers = dict(model.named_modules())
        known = tuple(name for name in ([named] if isinstance(named, str) else named) if name in layers)
        return known or last_layer(model)

    def _cfg(self, name: str) -> Any:
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(name)


class TorchVision:
    """torchvision's classification networks: names like ``resnet50.IMAGENET1K_V1``, without a tag its DEFAULT."""

    # Only these two have auxiliary heads for training, whose outputs no plain loss accepts. Their published weights
    # expect another normalization of the inputs, which the network applies itself (transform_input).
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

    def has_model(self, name: str) -> bool:
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
        """See ``Zoo``; the size is always passed, since builders assume 224 pixels and their weights may not."""
        if arch.name.startswith("vit_") and size[0] == size[1]:
            return arch.with_default(image_size=size[0])
        return arch.with_default(input_size=size) if arch.name.startswith("maxvit") else arch

    def build(self, arch: Architecture) -> nn.Module:
        """See ``Zoo``."""
        import torchvision

        name = _untagged(arch.name)
        if name in self._AUXILIARY and arch.in_chans != COLOURS:
            raise ConfigError(
                f"torchvision/{arch.name} cannot have {arch.in_chans} input channels, since it normalizes colours "
                "itself: use the network of timm/"
            )
        if name in self._AUXILIARY:
            arch = arch.with_default(aux_logits=False, transform_input=True, init_weights=True)
        model: nn.Module = torchvision.models.get_model(name, num_classes=arch.num_classes, **arch.kwargs)
        return model if arch.in_chans == COLOURS else _reading(model, arch.in_chans)

    def require(self, name: str) -> None:
        """See ``Zoo``."""
        with fetching(f"torchvision/{name}"):
            require_url(self._weights(name).url)

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``."""
        import torchvision

        model, weights, name = self.build(arch), self._weights(arch.name), _untagged(arch.name)
        kwargs = {} if name in self._AUXILIARY else arch.kwargs
        self.require(arch.name)
        with fetching(f"torchvision/{arch.name}"):
            donor = torchvision.models.get_model(name, weights=weights, **kwargs)
        own = model.state_dict()
        state = dict(adapt_channels(donor.state_dict(), own, arch.in_chans, name)[0])
        heads = () if arch.num_classes == self.default_classes(arch.name) else self.classifiers(model)
        state.update(
            {f"{head}.{part}": own[f"{head}.{part}"] for head in heads for part in ("weight", "bias")}
        )
        model.load_state_dict(with_versions(model, {key: state[key] for key in own}))
        return Published(model, arch.name, str(weights))

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; drops the auxiliary heads."""
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
    """``model`` with new random weights, for ``channels``, in the convolutions that read colour images."""
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


class Saq:
    """The networks of the papers, ``saqcli.models.networks``."""

    def names(self) -> list[str]:
        """See ``Zoo``."""
        return list(NETWORKS)

    def tags(self) -> dict[str, list[str]]:
        """See ``Zoo``; there are no published weights."""
        return {name: [] for name in NETWORKS}

    def has_model(self, name: str) -> bool:
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
        """See ``Zoo``; no architecture depends on the size."""
        return arch

    def build(self, arch: Architecture) -> nn.Module:
        """See ``Zoo``; lazy layers get their shapes from a zero image, other data types become float32."""
        entry = NETWORKS[arch.name]
        model = entry.build(num_classes=arch.num_classes, in_chans=arch.in_chans, **arch.kwargs)
        if all(parameter.dtype != torch.float32 for parameter in model.parameters()):
            model.float()
        if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
            with torch.no_grad():
                model.eval()(torch.zeros(1, arch.in_chans, *entry.input_size[1:]))
        return model

    def require(self, name: str) -> None:
        """See ``Zoo``; there are no published weights."""
        raise no_published_weights(f"saq/{name}")

    def fetch(self, arch: Architecture) -> Published:
        """See ``Zoo``; there are no published weights."""
        raise no_published_weights(f"saq/{arch.name}")

    def convert(self, arch: Architecture, state: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        """See ``Zoo``; there is only one version of these networks."""
        return None

    def classifiers(self, model: nn.Module) -> tuple[str, ...]:
        """See ``Zoo``."""
        return last_layer(model)


ZOOS: dict[str, Zoo] = {"timm": Timm(), "torchvision": TorchVision(), "saq": Saq()}  # in search order
