"""The cache of decoded images gives the bits of a loader without one, on every way to fill, limit and damage it."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from saqcli import distributed
from saqcli.config import resolve
from saqcli.data import cache as caches
from saqcli.data import images as reading
from saqcli.data.batches import Loader
from saqcli.data.cache import HEADER, ImageCache, Limit
from saqcli.data.cached_batches import CachedBatches
from saqcli.data.datasets import Split, class_subset, divide, fingerprint, open_split, subset
from saqcli.data.images import LEFT_OUT
from saqcli.data.loaders import calibration_loader, make_loader
from saqcli.data.splits import Images
from saqcli.data.transforms import crop_and_flip, normalized
from saqcli.errors import DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.runs.resume import first_difference, with_free_settings

MakeClasses = Callable[[Path, Mapping[str, int]], Path]

CPU = torch.device("cpu")
PLAIN = Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bicubic", 0.875)
GREY = Preprocessing((1, 24, 20), (0.4,), (0.3,), "bilinear", 0.9, "border")
BYTES = 3 * 32 * 32  # of an image for PLAIN


@pytest.fixture
def split(tmp_path: Path, make_classes: MakeClasses) -> Split:
    """Three classes of six images, the last of them of other sizes."""
    folder = make_classes(tmp_path / "val", {"cat": 6, "dog": 6, "fox": 6})
    generator = np.random.default_rng(0)
    for number, file in enumerate(sorted((folder / "fox").iterdir())):
        shape = (30 + 3 * number, 41, 3)
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(file)
    return open_split(str(tmp_path), "val", num_classes=3)


def with_cache(split: Split, folder: Path | None = None, limit: int = 2**30, note: object = None) -> Split:
    """``split`` with an empty cache: in memory, or in a file in ``folder``."""
    cache = ImageCache(
        "val",
        split.dataset,
        "auto" if folder is None else "disk",
        Limit(limit),
        partial(fingerprint, split),
        note or (lambda text: None),
    )
    cache.folder = folder
    return replace(split, cache=cache)


def load(split: Split, preprocessing: Preprocessing = PLAIN, **options: object) -> Loader:
    defaults = {"batch_size": 5, "training": False, "workers": 0, "device": CPU, "seed": 3}
    return make_loader(split, preprocessing, **(defaults | options))


def is_cached(loader: Loader) -> bool:
    return isinstance(loader._batches, CachedBatches)


def epoch(loader: Loader, number: int) -> list[torch.Tensor]:
    """Images and labels of all batches, and the random state after them."""
    loader.set_epoch(number)
    return [*(each for batch in loader for each in batch), torch.get_rng_state()]


def check_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    """Equal in values and in strides, on which the order of sums in a convolution depends."""
    assert [each.stride() for each in one] == [each.stride() for each in other]
    assert all(map(torch.equal, one, other))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file that is decoded in this process."""
    files = []
    original = reading.decode

    def count(item: str, *arguments: object, **options: object) -> Image.Image:
        files.append(item)
        return original(item, *arguments, **options)

    monkeypatch.setattr(reading, "decode", count)
    return files


TRAINING = ({"training": True, "augmentation": augmentation} for augmentation in ("cifar", "none"))


@pytest.mark.parametrize("preprocessing", [PLAIN, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("options", [{}, *TRAINING], ids=["evaluation", "cifar", "none"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_epochs_are_bit_identical(
    preprocessing: Preprocessing, options: dict[str, object], on_disk: bool, split: Split, tmp_path: Path
) -> None:
    kept = with_cache(split, tmp_path / "cache" if on_disk else None)
    straight, cached = load(split, preprocessing, **options), load(kept, preprocessing, **options)
    assert is_cached(cached)
    assert not is_cached(straight)
    for number in (0, 1, 1, 4):
        check_equal(epoch(cached, number), epoch(straight, number))


def test_cache_draws_like_worker_processes(split: Split) -> None:
    options = {"training": True, "augmentation": "cifar", "workers": 2}
    straight, cached = load(split, **options), load(with_cache(split), **options)
    first = epoch(cached, 1)
    check_equal(first, epoch(straight, 1))
    check_equal(epoch(cached, 1), first)


def test_cached_ranks_are_bit_identical(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "count", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(distributed, "index", lambda rank=rank: rank)
        for options in ({"training": True, "augmentation": "cifar", "batch_size": 6}, {}):
            straight, cached = load(split, **options), load(with_cache(split), **options)
            check_equal(epoch(cached, 2), epoch(straight, 2))
        check_equal(
            *([each for batch in loader.part(rank, 3) for each in batch] for loader in (cached, straight))
        )


@pytest.mark.parametrize("images", [1, 2, 5, 128])
def test_batch_augmentation_draws_like_torchvision(images: int) -> None:
    one = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()])
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(7)
    singly = [torch.stack([one(image) for image in pixels]), torch.get_rng_state()]
    torch.manual_seed(7)
    check_equal([crop_and_flip(pixels), torch.get_rng_state()], singly)


def test_batch_normalization_equals_torchvision() -> None:
    one = transforms.Compose([transforms.ToTensor(), transforms.Normalize(PLAIN.mean, PLAIN.std)])
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    together = normalized(torch.from_numpy(pixels).permute(0, 3, 1, 2), PLAIN)
    assert torch.equal(together[0], one(Image.fromarray(pixels[0])))


@pytest.mark.parametrize("on_disk", [False, True])
def test_files_are_decoded_once(on_disk: bool, split: Split, decoded: list[str], tmp_path: Path) -> None:
    """An image of the network's size serves both views; one of another size is read for each."""
    kept = with_cache(split, tmp_path / "cache" if on_disk else None)
    calibration = calibration_loader(
        kept, PLAIN, batch_size=4, workers=0, device=CPU, seed=0, images=18 if on_disk else 6
    )
    parts = divide(kept, 0.5, seed=1)
    loaders = [calibration, load(kept), load(subset(kept, 12, seed=2)), load(class_subset(kept, 2, seed=0))]
    loaders += [load(part, training=True) for part in parts]
    for number in range(2):
        for loader in loaders:
            epoch(loader, number)
    assert all(map(is_cached, loaders))
    assert len(decoded) == len(set(decoded)) == 18
    if not on_disk:
        epoch(load(kept, training=True, augmentation="cifar"), 0)
        assert len(decoded) == 18 + 6


@pytest.mark.parametrize("preprocessing", [PLAIN, GREY], ids=["colour", "grey"])
def test_subsets_share_the_cache_bit_identically(preprocessing: Preprocessing, split: Split) -> None:
    kept = with_cache(split)
    for cut in (partial(subset, count=7, seed=1), partial(class_subset, count=2, seed=0)):
        straight, cached = load(cut(split), preprocessing), load(cut(kept), preprocessing)
        for number in range(2):
            check_equal(epoch(cached, number), epoch(straight, number))
    for mine, plain in zip(divide(kept, 0.3, 5), divide(split, 0.3, 5), strict=True):
        options = {"training": True, "augmentation": "cifar"}
        straight, cached = load(plain, preprocessing, **options), load(mine, preprocessing, **options)
        check_equal(epoch(cached, 0), epoch(straight, 0))


def test_memory_limit_is_kept(split: Split) -> None:
    kept = with_cache(split, limit=18 * BYTES - 1)
    assert not is_cached(load(kept))
    assert is_cached(load(kept, limit=17))
    assert is_cached(load(kept, limit=17))  # the same images again
    assert kept.cache is not None
    assert kept.cache._limit.taken == 17 * BYTES
    assert not is_cached(load(kept, training=True, augmentation="cifar"))
    assert is_cached(load(with_cache(split, limit=18 * BYTES)))


def test_random_resized_crops_are_not_cached(split: Split) -> None:
    assert not is_cached(load(with_cache(split), training=True, augmentation="imagenet"))


def test_interrupted_pass_leaves_a_valid_cache(split: Split) -> None:
    options = {"training": True, "augmentation": "cifar"}
    straight, cached = load(split, **options), load(with_cache(split), **options)
    cached.set_epoch(0)
    next(iter(cached))
    check_equal(epoch(cached, 0), epoch(straight, 0))


@pytest.mark.parametrize("on_disk", [False, True])
def test_broken_images_are_treated_as_without_cache(on_disk: bool, split: Split, tmp_path: Path) -> None:
    for index in (4, 5, 17):
        Path(split.dataset.source[index][0]).write_bytes(b"hello")
    folder = tmp_path / "cache" if on_disk else None
    tolerant = replace(split, bad_images="skip")
    kept = with_cache(tolerant, folder)
    for options in ({}, {"training": True, "augmentation": "cifar"}, {"training": True}):
        straight, cached = load(tolerant, **options), load(kept, **options)
        for number in range(2):
            check_equal(epoch(cached, number), epoch(straight, number))
    labels = torch.cat([labels for _, labels in load(kept)])
    assert (labels == LEFT_OUT).nonzero().flatten().tolist() == [4, 5, 17]
    messages = []
    for strict in (split, with_cache(split, folder)):
        with pytest.raises(DataError) as caught:
            epoch(load(strict), 0)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_cache_without_readable_images_is_refused(split: Split) -> None:
    for file, _ in split.dataset.source:
        Path(file).write_bytes(b"")
    with pytest.raises(DataError, match="none of the 18 images"):
        epoch(load(with_cache(replace(split, bad_images="skip")), training=True), 0)


def test_wrong_labels_are_refused_when_read(split: Split) -> None:
    narrow = replace(split, dataset=replace(split.dataset, num_classes=2))
    with pytest.raises(DataError, match="has the label 2, the model has classes 0 to 1"):
        epoch(load(with_cache(narrow)), 0)


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def other_version(content: bytes) -> bytes:
    header = json.loads(content[:HEADER]) | {"version": caches.VERSION + 1}
    return json.dumps(header).encode().ljust(HEADER) + content[HEADER:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "pixel": lambda content: flip(content, HEADER + 100),
    "label": lambda content: flip(content, len(content) - 30),
    "header": lambda content: flip(content, 3),
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"x",
    "empty": lambda content: b"",
    "no object": lambda content: b"[]".ljust(len(content)),
    "version": other_version,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_made_again(damage: str, split: Split, decoded: list[str], tmp_path: Path) -> None:
    folder, notes = tmp_path / "cache", []
    expected = epoch(load(with_cache(split, folder)), 0)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    decoded.clear()
    check_equal(epoch(load(with_cache(split, folder, note=notes.append)), 0), expected)
    assert (decoded, notes) == ([], [])
    file.write_bytes(DAMAGES[damage](content))
    check_equal(epoch(load(with_cache(split, folder, note=notes.append)), 0), expected)
    assert notes == [f"{file} is damaged or of other images: it is made again"]
    assert (file.read_bytes(), list(folder.iterdir()), len(decoded)) == (content, [file], 18)


def test_file_of_other_images_is_made_again(split: Split, tmp_path: Path) -> None:
    folder, notes = tmp_path / "cache", []
    epoch(load(with_cache(split, folder)), 0)
    fewer = replace(split, dataset=replace(split.dataset, source=split.dataset.source[1:]))
    other = replace(PLAIN, crop_pct=1.0)
    for changed, preprocessing in ((fewer, PLAIN), (fewer, other)):
        cached = load(with_cache(changed, folder, note=notes.append), preprocessing)
        check_equal(epoch(cached, 0), epoch(load(changed, preprocessing), 0))
    assert len(notes) == 2


def test_file_of_many_relabelled_classes(split: Split, tmp_path: Path) -> None:
    """Their numbers would not fit into the header."""
    dataset = replace(split.dataset, num_classes=1000, relabel={label: 999 - label for label in range(1000)})
    many, notes = replace(split, dataset=dataset), []
    for _ in range(2):
        cached = with_cache(many, tmp_path / "cache", note=notes.append)
        check_equal(epoch(load(cached), 0), epoch(load(many), 0))
    assert notes == []


def test_no_free_memory_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "free_memory", lambda: 0)
    assert not Limit.for_kind("auto", 1).take(1)
    monkeypatch.setattr(caches, "free_memory", lambda: None)
    assert Limit.for_kind("auto", 1).most == caches.UNKNOWN_MEMORY // 4


def test_failed_file_leaves_nothing(split: Split, tmp_path: Path) -> None:
    Path(split.dataset.source[9][0]).write_bytes(b"")
    with pytest.raises(DataError, match="cannot read"):
        epoch(load(with_cache(split, tmp_path / "cache")), 0)
    assert list((tmp_path / "cache").iterdir()) == []


class Notes:
    """A progress that keeps its notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)

    def task(self, title: str, total: int) -> Iterator[None]:
        raise AssertionError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["24 images stay in memory once they are read, 73.73 KB"]),
        ({"data.augmentation": "imagenet"}, ["6 images stay in memory once they are read, 18.43 KB"]),
        ({"data.cache": "off"}, []),
    ],
)
def test_kept_images_are_noted_once(
    settings: dict[str, object], expected: list[str], tmp_path: Path, make_classes: MakeClasses
) -> None:
    make_classes(tmp_path / "train", {"cat": 9, "dog": 9})
    make_classes(tmp_path / "val", {"cat": 3, "dog": 3})
    fixed = {"data.path": str(tmp_path), "model.name": "x", "data.batch_size": 4}
    progress: Progress = Notes()  # type: ignore[assignment]
    Images.open(resolve(options=fixed | settings), 2, PLAIN, CPU, progress)
    assert [line for line in progress.lines if "memory" in line] == expected  # type: ignore[attr-defined]


def test_resumed_run_may_change_the_cache() -> None:
    one, other = (resolve(options={"model.name": "x", "data.cache": kind}) for kind in ("auto", "off"))
    assert first_difference(one, other) == "data.cache: auto -> off"
    assert first_difference(with_free_settings(one, other), other) is None
