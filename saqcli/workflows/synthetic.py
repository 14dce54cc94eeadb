"""Images to verify a file on where none are given: white noise, and noise with the statistics of natural images.

White noise reaches every code of the first layers; but its neighbouring pixels have nothing to do with each
other, and most filters average it away. The amplitude of natural images falls with the inverse of the spatial
frequency (Field, 1987, "Relations between the statistics of natural images and the response properties of
cortical cells"), and such images drive deeper layers.
"""

import torch
from torch import Tensor

from saqcli.io.preprocessing import Preprocessing

SYNTHETIC = "synthetic images"  # what a verdict calls them
IMAGES = 64
BATCH = 16
COMMON = 0.8  # share of colour channels in their common part; natural images are nearly grey


def synthetic_batches(preprocessing: Preprocessing, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Normalized images in the place of a data set, with labels that mean nothing; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    size = preprocessing.input_size
    half = IMAGES // 2
    images = torch.cat([torch.randn(half, *size, generator=generator), natural(half, size, generator)])
    images = images[torch.randperm(IMAGES, generator=generator)]
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in torch.split(images, BATCH)]


def natural(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Noise with amplitudes 1 / frequency, (count, *size), of mean 0 and deviation 1 an image."""
    channels, height, width = size
    own = torch.randn(count, channels, height, width, generator=generator)
    common = torch.randn(count, 1, height, width, generator=generator)
    spectrum = torch.fft.rfft2(COMMON * common + (1 - COMMON**2) ** 0.5 * own)
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    frequency = (rows.square() + columns.square()).sqrt().clamp_min(1 / max(height, width))
    images: Tensor = torch.fft.irfft2(spectrum / frequency, s=(height, width))
    mean, deviation = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
    return (images - mean) / deviation.clamp_min(1e-6)
