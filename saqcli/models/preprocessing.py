"""Preprocessing of images: size, crop and normalization.

Preprocessing belongs to the weights, not to the data: another scale or normalization costs points of accuracy that no
quantizer can recover. It is stored with the model in the run directory and in exported files.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from saqcli.errors import ConfigError
from saqcli.units import counted

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """Scale, crop and normalization of an evaluation image.

    Attributes:
        input_size: (C, H, W) that the network receives.
        mean: per channel, subtracted from pixels scaled to 0..1.
        std: per channel, divides the result.
        interpolation: Pillow's name of the filter.
        crop_pct: side of the crop divided by the side of the scaled image; 1 crops nothing, and a few of timm's
            networks pad the image (1.15).
        crop_mode: as in ``timm.data.create_transform``.

    Raises:
        ConfigError: the values contradict each other or lie out of range.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ConfigError(
                f"input size {self.input_size} is not channels, height, width: give three sizes above 0"
            )
        if not len(self.mean) == len(self.std) == self.input_size[0]:
            raise ConfigError(
                f"mean has {counted(len(self.mean), 'number')} and std {len(self.std)}, the image has "
                f"{counted(self.input_size[0], 'channel')}: give one number per channel"
            )
        if not all(map(math.isfinite, self.mean)) or not all(0 < s < math.inf for s in self.std):
            raise ConfigError(
                f"mean {self.mean} and std {self.std} cannot normalize: give numbers, std above 0"
            )
        if not 0 < self.crop_pct < math.inf:
            raise ConfigError(f"crop_pct {self.crop_pct} is not above 0: give 1 to crop nothing")
        for what, value, known in (
            ("interpolation", self.interpolation, _INTERPOLATIONS),
            ("crop_mode", self.crop_mode, _CROP_MODES),
        ):
            if value not in known:
                raise ConfigError(f"{what} {value!r} is not known: choose from {', '.join(known)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the result of ``to_dict``.

        Raises:
            ConfigError: a key is missing or unknown, or a value has the wrong type.
        """
        known = {field.name for field in fields(cls)}
        if wrong := known ^ set(values):
            kinds = [f"{key} is {'missing' if key in known else 'unknown'}" for key in sorted(wrong)]
            raise ConfigError(f"preprocessing: {', '.join(kinds)}; its keys are {', '.join(sorted(known))}")
        try:
            channels, height, width = map(int, values["input_size"])
            return cls(
                input_size=(channels, height, width),
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values["crop_pct"]),
                crop_mode=str(values["crop_mode"]),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"preprocessing {dict(values)} cannot be read ({error}): correct the value"
            ) from error


SMALL_IMAGES = 64  # pixels; training uses whole images up to this side, random crops above


def has_small_images(preprocessing: Preprocessing) -> bool:
    """Whether images are at most ``SMALL_IMAGES`` pixels wide and high, which allows large batches of whole images."""
    return max(preprocessing.input_size[1:]) <= SMALL_IMAGES
