"""Synthetic images for verification: normalized, varied and reproducible."""

import pytest
import torch

from saqcli.models.preprocessing import Preprocessing
from saqcli.verify.verdict import BATCH, IMAGES, natural, synthetic_batches


def preprocessing(*size: int) -> Preprocessing:
    return Preprocessing(size, (0.5,) * size[0], (0.5,) * size[0], "bilinear", 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 28, 28), (3, 16, 33), (4, 1, 1), (3, 1, 7)])
def test_batches_cover_the_image_size(size: tuple[int, int, int]) -> None:
    batches = synthetic_batches(preprocessing(*size))

    assert [len(images) for images, _ in batches] == [BATCH] * (IMAGES // BATCH)
    for images, labels in batches:
        assert images.shape == (BATCH, *size)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        assert labels.dtype == torch.long
        assert (labels >= 0).all()  # below zero marks an unreadable image


def test_seed_determines_the_images() -> None:
    one, same, other = (synthetic_batches(preprocessing(3, 8, 8), seed) for seed in (0, 0, 1))

    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0][0], other[0][0])


def test_random_state_is_unchanged() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    synthetic_batches(preprocessing(3, 8, 8))

    assert torch.equal(torch.get_rng_state(), before)


def test_natural_images_are_normalized() -> None:
    images = natural(16, (3, 32, 48), torch.Generator().manual_seed(0))

    assert torch.allclose(images.mean((1, 2, 3)), torch.zeros(16), atol=1e-5)
    assert torch.allclose(images.std((1, 2, 3)), torch.ones(16), atol=1e-4)


def test_spectrum_falls_with_inverse_frequency() -> None:
    """The slope of the log spectrum is -1; that of white noise is 0."""

    def slope(images: torch.Tensor) -> float:
        power = torch.fft.rfft2(images).abs().square().mean((0, 1))
        rows, columns = torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64)[None]
        frequency = (rows.square() + columns.square()).sqrt()
        band = (frequency > 2 / 64) & (frequency < 0.5)
        x, y = frequency[band].log(), power[band].log() / 2
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / (x * x).sum())

    assert slope(natural(64, (3, 64, 64), torch.Generator().manual_seed(0))) == pytest.approx(-1, abs=0.05)
    assert slope(torch.randn(64, 3, 64, 64)) == pytest.approx(0, abs=0.05)


def test_colour_channels_correlate() -> None:
    images = natural(32, (3, 32, 32), torch.Generator().manual_seed(0))
    flat = images.transpose(0, 1).flatten(1)

    assert (torch.corrcoef(flat) > 0.5).all()
