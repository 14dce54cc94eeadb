"""Transforms from an image to a network's input, and augmentation.

The transforms are timm's, so that accuracies are comparable with those that timm publishes; only the usual augmentation
for CIFAR is composed of torchvision's transforms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

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
    from torchvision import transforms

    to_tensor = (
        [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
        if normalize
        else [transforms.PILToTensor()]
    )
    transform: ImageTransform = transforms.Compose(
        [
            _scale(preprocessing),
            transforms.RandomCrop(preprocessing.input_size[1:], padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(),
            *to_tensor,
        ]
    )
    return transform


def _scale(preprocessing: Preprocessing) -> Any:
    """Scaling of an image to the network's size."""
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    return transforms.Resize(preprocessing.input_size[1:], str_to_interp_mode(preprocessing.interpolation))


def fixed_transform(preprocessing: Preprocessing, augmentation: Augmentation) -> ImageTransform | None:
    """The part of a transform before its first random number, to uint8 (C, H, W); None for ``imagenet``.

    The rest is ``crop_and_flip`` for ``cifar``, nothing for ``none``, and ``normalized``.
    """
    from torchvision import transforms

    if augmentation == "imagenet":
        return None  # its crops have any size
    if augmentation == "none":
        return image_transform(preprocessing, normalize=False)
    transform: ImageTransform = transforms.Compose([_scale(preprocessing), transforms.PILToTensor()])
    return transform


def normalized(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Images (N, C, H, W) of uint8 as float32, bit for bit what torchvision makes of each image on a CPU."""
    white, mean, std = (
        torch.tensor(values, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        for values in (
            (255.0,),
            preprocessing.mean,
            preprocessing.std,
        )  # CUDA multiplies by the inverse of a number
    )
    return images.to(torch.float32).div_(white).sub_(mean).div_(std)


def crop_and_flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The augmentation ``cifar`` of a batch (N, C, H, W) of any type.

    It draws the numbers that torchvision draws for one image after another: two places of the crop and the flip. So
    cached images are augmented as those of a loader without a cache.

    Args:
        images: on any device.
        generator: on the CPU; None for the global one.
    """
    height, width = images.shape[2:]
    top, left, flip = _draws(len(images), generator)
    padded = pad(images, 4 * (CIFAR_PADDING,))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    top, left, flip = (each.to(images.device) for each in (top, left, flip))
    cut = windows[torch.arange(len(images), device=images.device), :, top, left]
    return torch.where(flip[:, None, None, None], cut.flip(3), cut)


def _draws(images: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Top and left of each crop, and whether it is flipped: ``randint(9)``, ``randint(9)``, ``rand(1) < 0.5``.

    Each of the three takes one number of 32 bits from torch's generator on the CPU: its remainder, or its lowest 24
    bits. A draw of 64 bits takes two, the upper half first.
    """
    pairs = torch.empty(3 * images // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    numbers = torch.stack([pairs >> 32, pairs], dim=1).flatten() & 0xFFFFFFFF
    if images % 2:
        last = torch.rand(1, generator=generator) * 2**24
        numbers = torch.cat([numbers, last.to(torch.int64)])
    top, left, flip = numbers.view(images, 3).unbind(1)
    places = 2 * CIFAR_PADDING + 1
    return top % places, left % places, (flip & 0xFFFFFF) < 2**23
