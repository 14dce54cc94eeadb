"""Transforms from an image to a network's input, and augmentation.

The transforms are timm's, so that accuracies are comparable with those that timm publishes; only the usual augmentation
for CIFAR is composed of torchvision's transforms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image
from torch import Tensor

from saqcli.errors import ConfigError
from saqcli.models.preprocessing import Preprocessing

Augmentation = Literal["imagenet", "cifar", "none"]
ImageTransform = Callable[[Image.Image], Tensor]

CIFAR_PADDING = 4  # pixels on each side, at 32 x 32; He et al., arXiv:1512.03385, section 4.2
CROP_SCALE = (0.08, 1.0)  # share of the area that a training crop keeps; Szegedy et al., arXiv:1409.4842


def image_transform(
    preprocessing: Preprocessing,
    *,
    augmentation: Augmentation = "none",
    normalize: bool = True,
    crop_scale: tuple[float, float] = CROP_SCALE,
) -> ImageTransform:
    """The transform from an image to the network's input (C, H, W).

    Args:
        preprocessing: preprocessing of the network.
        augmentation: ``none`` is the evaluation view (timm's resize and crop; an image of exactly the network's size
            was cropped before and is used whole); ``imagenet`` is timm's random resized crop and flip, without
            colour jitter; ``cifar`` pads by four pixels, crops at random and flips.
        normalize: return normalized float32; otherwise uint8, for a loader that normalizes on the device.
        crop_scale: for ``imagenet``, the smallest and largest share of the area in a crop.

    Raises:
        ConfigError: there is no such augmentation.
    """
    from timm.data import create_transform

    if augmentation not in get_args(Augmentation):
        raise ConfigError(
            f"augmentation {augmentation!r} does not exist: choose from {', '.join(get_args(Augmentation))}"
        )
    if augmentation == "cifar":
        return _cifar_transform(preprocessing, normalize=normalize)

    def timm_transform(crop_pct: float) -> ImageTransform:
        transform: ImageTransform = create_transform(
            preprocessing.input_size,
            is_training=augmentation == "imagenet",
            scale=crop_scale,
            color_jitter=None,
            interpolation=preprocessing.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            crop_pct=crop_pct,
            crop_mode=preprocessing.crop_mode,
            use_prefetcher=not normalize,
        )
        return transform

    if augmentation == "imagenet":
        return timm_transform(preprocessing.crop_pct)
    _, height, width = preprocessing.input_size
    return _EvaluationView(
        (width, height), whole=timm_transform(1.0), cropped=timm_transform(preprocessing.crop_pct)
    )


@dataclass(frozen=True)
class _EvaluationView:
    """Uses images of exactly the network's size whole; resizes and crops all others.

    Cropping seven eighths of an image that was already cropped to 224 pixels would crop it twice: on such a copy of
    Imagenette this costs SqueezeNet 6.5 points.
    """

    size: tuple[int, int]
    whole: ImageTransform
    cropped: ImageTransform

    def __call__(self, image: Image.Image) -> Tensor:
        return (self.whole if image.size == self.size else self.cropped)(image)


def _cifar_transform(preprocessing: Preprocessing, *, normalize: bool) -> ImageTransform:
    """Pad, crop at random, flip; images of another size are first scaled to the network's."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    size = preprocessing.input_size[1:]
    to_tensor = (
        [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
        if normalize
        else [transforms.PILToTensor()]
    )
    transform: ImageTransform = transforms.Compose(
        [
            transforms.Resize(size, str_to_interp_mode(preprocessing.interpolation)),
            transforms.RandomCrop(size, padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(),
            *to_tensor,
        ]
    )
    return transform
