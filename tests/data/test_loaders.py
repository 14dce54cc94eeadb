"""Loaders: transforms, order, and unreadable images."""

import io
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saqcli.data.batches import Loader
from saqcli.data.datasets import Split, open_split
from saqcli.data.images import LEFT_OUT, ImageSet, ImageStream, decode
from saqcli.data.loaders import calibration_loader, default_workers, make_loader
from saqcli.data.transforms import image_transform
from saqcli.errors import ConfigError, DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.random_state import seed_everything

MakeClasses = Callable[[Path, Mapping[str, int]], Path]
Load = Callable[..., Loader]

CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path, make_classes: MakeClasses) -> Split:
    """Two classes of six images."""
    make_classes(tmp_path / "val", {"cat": 6, "dog": 6})
    return open_split(str(tmp_path), "val", num_classes=2)


@pytest.fixture
def load(cifar_like: Preprocessing) -> Load:
    """``make_loader`` with defaults for everything a test does not set."""

    def make(split: Split, **options: object) -> Loader:
        defaults = {"batch_size": 4, "training": False, "workers": 0, "device": CPU, "seed": 0}
        return make_loader(split, options.pop("preprocessing", cifar_like), **(defaults | options))

    return make


def batches(loader: Loader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def damage(split: Split, index: int, how: str) -> str:
    """Damage the file of one image and return its path."""
    file = split.dataset.source[index][0]
    content = Path(file).read_bytes()
    Path(file).write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello"}[how])
    return file


def test_image_of_model_size_is_only_normalized(split: Split, load: Load) -> None:
    images, labels = batches(load(split))
    for index, image in enumerate(images):
        pixels = np.asarray(Image.open(split.dataset.source[index][0])).astype(np.float32) / 255
        expected = (pixels - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.25, 0.3])
        torch.testing.assert_close(image, torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-6)
    assert labels.tolist() == [0] * 6 + [1] * 6


def test_loader_does_not_change_its_split(split: Split, load: Load, cifar_like: Preprocessing) -> None:
    evaluation = load(split)
    before = batches(evaluation)[0]
    load(split, training=True, augmentation="cifar")
    calibration_loader(split, cifar_like, batch_size=4, workers=0, device=CPU, seed=0, images=4)
    assert split.dataset.transform is None
    assert torch.equal(batches(evaluation)[0], before)


@pytest.mark.parametrize("augmentation", ["imagenet", "cifar", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_is_determined_by_seed_and_number(
    augmentation: str, workers: int, split: Split, load: Load
) -> None:
    def epoch(loader: Loader, number: int) -> torch.Tensor:
        return batches(loader, number)[0]

    options = {"training": True, "augmentation": augmentation, "workers": workers}
    straight, resumed = load(split, **options), load(split, **options)
    first, second = epoch(straight, 0), epoch(straight, 1)
    assert torch.equal(epoch(resumed, 1), second)
    assert torch.equal(epoch(resumed, 0), first)
    assert not torch.equal(first, second)
    assert not torch.equal(epoch(load(split, **options, seed=1), 0), first)


def test_order_is_independent_of_workers(split: Split, load: Load) -> None:
    alone, helped = (batches(load(split, training=True, workers=workers))[0] for workers in (0, 2))
    assert torch.equal(alone, helped)


def test_seed_reaches_every_generator() -> None:
    def draw(seed: int, epoch: int, rank: int) -> tuple[float, float, float]:
        seed_everything(seed, epoch, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(3, 1, 0) == draw(3, 1, 0)
    draws = [draw(3, 1, 0), draw(1, 3, 0), draw(3, 2, 0), draw(3, 1, 1)]
    for figures in zip(*draws, strict=True):
        assert len(set(figures)) == len(draws)


def test_cifar_augmentation_pads_four_and_flips(cifar_like: Preprocessing) -> None:
    transform = image_transform(cifar_like, augmentation="cifar", normalize=False)
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    views = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    views = [torch.from_numpy(flip.copy()) for view in views for flip in (view, view[:, ::-1])]
    seen = set()
    seed_everything(0)
    for _ in range(40):
        image = transform(Image.fromarray(pixels)).permute(1, 2, 0)
        (match,) = (number for number, view in enumerate(views) if torch.equal(view, image))
        seen.add(match)
    assert len(seen) > 20


@pytest.mark.parametrize("augmentation", ["imagenet", "cifar", "none"])
def test_deferred_normalization_is_equal(augmentation: str, cifar_like: Preprocessing) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    views = []
    for normalize in (True, False):
        seed_everything(0)
        views.append(image_transform(cifar_like, augmentation=augmentation, normalize=normalize)(image))
    now, later = views
    assert (later.dtype, later.shape) == (torch.uint8, (3, 32, 32))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (cifar_like.mean, cifar_like.std))
    torch.testing.assert_close((later / 255 - mean) / std, now, rtol=0, atol=1e-5)


def test_unknown_augmentation_is_refused(split: Split, load: Load) -> None:
    with pytest.raises(ConfigError, match="'mixup' does not exist: choose from imagenet, cifar, none"):
        load(split, training=True, augmentation="mixup")


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [5, 5]), (False, [5, 5, 2])])
def test_short_last_batch_is_kept_or_dropped(
    drop_last: bool, sizes: list[int], split: Split, load: Load
) -> None:
    loader = load(split, training=True, batch_size=5, drop_last=drop_last)
    assert [len(labels) for _, labels in loader] == sizes
    assert (len(loader), loader.images) == (len(sizes), sum(sizes))


def test_oversized_batch_is_refused(split: Split, load: Load) -> None:
    assert len(load(split, training=True, batch_size=50)) == 1
    with pytest.raises(
        DataError, match=r"has 12 images, less than one batch of 50: use `data.batch_size=12`"
    ):
        load(split, training=True, batch_size=50, drop_last=True)


def test_limit_keeps_classes_balanced(split: Split, load: Load) -> None:
    loader = load(split, limit=6)
    assert batches(loader)[1].bincount().tolist() == [3, 3]
    assert (len(loader), loader.images) == (2, 6)


def test_calibration_images_are_deterministic(split: Split, cifar_like: Preprocessing) -> None:
    loader = calibration_loader(split, cifar_like, batch_size=4, workers=0, device=CPU, seed=0, images=8)
    first, second = batches(loader, 0), batches(loader, 1)
    assert torch.equal(first[0], second[0])
    assert first[1].bincount().tolist() == [4, 4]


@pytest.mark.parametrize("how", ["empty", "truncated", "text"])
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_error_is_one_line(how: str, workers: int, split: Split, load: Load) -> None:
    file = damage(split, 7, how)
    with pytest.raises(DataError) as caught:
        batches(load(split, workers=workers))
    message = str(caught.value)
    assert message.startswith(f"cannot read {file} (")
    assert message.endswith("): replace or remove it, or use `data.bad_images=skip`")
    assert "\n" not in message


def test_evaluation_marks_skipped_images(split: Split, load: Load, tmp_path: Path) -> None:
    damage(split, 7, "truncated")
    tolerant = open_split(str(tmp_path), "val", num_classes=2, bad_images="skip")
    images, labels = batches(load(tolerant))
    assert labels.tolist() == [0] * 6 + [1, LEFT_OUT] + [1] * 4
    assert images.shape == (12, 3, 32, 32)


def test_training_replaces_skipped_images(
    split: Split, load: Load, tmp_path: Path, cifar_like: Preprocessing
) -> None:
    for index in (5, 11):
        damage(split, index, "empty")
    tolerant = open_split(str(tmp_path), "val", num_classes=2, bad_images="skip")
    assert batches(load(tolerant, training=True))[1].bincount().tolist() == [6, 6]
    calibration = calibration_loader(
        tolerant, cifar_like, batch_size=4, workers=0, device=CPU, seed=0, images=12
    )
    assert batches(calibration)[1].min() >= 0


def test_split_without_images_is_refused(split: Split, load: Load, tmp_path: Path) -> None:
    for index in range(split.images):
        damage(split, index, "empty")
    tolerant = open_split(str(tmp_path), "val", num_classes=2, bad_images="skip")
    with pytest.raises(DataError, match="none of the 12 images"):
        batches(load(tolerant, training=True))


class Fatal:
    """A data source that kills the reading process, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@pytest.mark.slow  # torch polls every five seconds
def test_dead_workers_are_reported_with_advice(load: Load) -> None:
    with pytest.raises(DataError, match=r"the worker processes that read fatal died.* `data.workers=0`"):
        batches(load(Split("fatal", ImageSet(Fatal(), None, 2, "fatal"), ()), workers=1))


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


def test_every_image_mode_becomes_rgb() -> None:
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    colour = Image.fromarray(np.stack([grey, grey.T, grey[::-1]], axis=-1))
    palette = colour.quantize(16)
    files = [
        encoded(colour.convert("CMYK"), "jpeg"),
        encoded(colour.convert("RGBA"), "png"),
        encoded(palette, "png", transparency=bytes(16)),
        encoded(colour.convert("L"), "png"),
        encoded(colour.convert("1"), "png"),
        encoded(colour, "png", save_all=True, append_images=[colour.rotate(90)]),
    ]
    assert all((image.mode, image.size) == ("RGB", (8, 8)) for image in map(decode, files))
    assert np.array_equal(np.asarray(decode(files[-1])), np.asarray(colour))


def test_uint16_keeps_the_high_byte() -> None:
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = np.asarray(decode(encoded(Image.fromarray(deep), "png")))
    assert np.array_equal(image, np.stack([deep >> 8] * 3, axis=-1))


def test_grey_model_gets_grey_images(split: Split, load: Load) -> None:
    images, _ = batches(
        load(split, preprocessing=Preprocessing((1, 32, 32), (0.5,), (0.5,), "bilinear", 1.0))
    )
    assert images.shape == (12, 1, 32, 32)
    with pytest.raises(DataError, match="reads 4 channels"):
        load(split, preprocessing=Preprocessing((4, 32, 32), (0.5,) * 4, (0.5,) * 4, "bilinear", 1.0))


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_refused(label: int, load: Load) -> None:
    source = [(Image.new("RGB", (32, 32)), label)]
    with pytest.raises(DataError, match=f"set has the label {label}, the model has classes 0 to 1"):
        batches(load(Split("set", ImageSet(source, None, 2, "set"), (), "skip")))


class Reader(list[tuple[Image.Image, int]]):
    """The interface of a timm stream reader."""

    epoch = -1

    def set_epoch(self, count: int) -> None:
        self.epoch = count


@pytest.fixture
def stream() -> Iterator[ImageStream]:
    from timm.data import IterableImageDataset

    reader = Reader((Image.new("L", (32, 32), 10 * label), label) for label in range(10))
    return ImageStream(IterableImageDataset("", reader=reader), 10, "wds/ten")


def test_stream_is_read_from_the_start(stream: ImageStream, load: Load) -> None:
    loader = load(Split("wds/ten", stream, ()), limit=6)
    images, labels = batches(loader, epoch=3)
    assert (len(loader), loader.images, images.shape) == (2, 6, (6, 3, 32, 32))
    assert labels.tolist() == list(range(6))
    assert stream.source.reader.epoch == 3
    assert stream.transform is None


def test_stream_labels_are_checked(stream: ImageStream, load: Load) -> None:
    stream.num_classes = 9
    with pytest.raises(DataError, match="wds/ten has the label 9"):
        batches(load(Split("wds/ten", stream, ())))


def test_small_data_uses_no_workers(cifar_like: Preprocessing) -> None:
    assert default_workers(cifar_like) == 0
    large = Preprocessing((3, 224, 224), cifar_like.mean, cifar_like.std, "bicubic", 0.875)
    assert 1 <= default_workers(large) <= 8
