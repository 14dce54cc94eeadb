"""timm's networks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from saqcli.io import hub
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.zoos.base import Architecture, Published, last_layer


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
        return known or last_layer(model)

    def _cfg(self, name: str) -> Any:
        from timm.models import get_pretrained_cfg

        return get_pretrained_cfg(name)
