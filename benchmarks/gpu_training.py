"""CIFAR rows of the SAQ paper in minutes: a data set in memory of the device, augmented there by whole batches.

Shards. ``prepare`` writes ``train-K.safetensors``, each with ``PER_CLASS`` images of every class, and
``test.safetensors``; the reader takes those that are there. A file holds

    strips    uint8, the bytes of lossless WebP images, one below the other: up to ``STRIP`` images of equal size each
    ends      int64 (strips,), where each one ends
    labels    int64 (images,)

and the class names in its metadata: 1.7 kB an image of CIFAR, which are 3.1 kB as pixels. The 50,000 training images of
CIFAR-100 take 81 MiB: half of them and 8,000 test images fit into 64 MiB.

Rows. All start from one float network, ``float.safetensors`` beside the results; the trainer of saq trains both.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_checks import Check, Figures, Place, batch
from safetensors import safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli.config import TrainingSection
from saqcli.progress import SILENT
from saqcli.random_state import seed_everything, seeds_of
from saqcli.training.loop import evaluate
from saqcli.training.optimizer import in_float
from saqcli.training.trainer import Trainer

STRIP = 250  # images of a strip: WebP images have up to 16,383 rows
PER_CLASS = 250  # images of each class in a shard
BATCH, PAD = 128, 4
NETWORK = "saq/preresnet20"  # of the paper
FLOAT_EPOCHS, EPOCHS = 60, 30
ROWS = [(bits, method) for bits in (4, 3, 2) for method in ("qat", "sam", "saq")]
SEEDS = (0, 1, 2)


# Shards.


def prepare(source: Path, out: Path) -> list[Path]:
    """Write the shards of a folder of ``train/CLASS/`` and ``test/CLASS/`` (or ``val/``) with images of one size."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    train = _files(source / "train")
    for shard in range(-(-max(map(len, train.values())) // PER_CLASS)):
        chosen = {name: files[shard * PER_CLASS :][:PER_CLASS] for name, files in train.items()}
        written.append(_write(chosen, out / f"train-{shard}.safetensors"))
    test = next(path for path in (source / "test", source / "val") if path.is_dir())
    written.append(_write(_files(test), out / "test.safetensors"))
    return written


def _files(folder: Path) -> dict[str, list[Path]]:
    """Files by class, both in order of their names."""
    return {each.name: sorted(each.iterdir()) for each in sorted(folder.iterdir()) if each.is_dir()}


def _write(chosen: dict[str, list[Path]], path: Path) -> Path:
    from PIL import Image

    strips: list[bytes] = []
    labels: list[int] = []
    for label, files in enumerate(chosen.values()):
        for start in range(0, len(files), STRIP):
            part = files[start : start + STRIP]
            rows = np.concatenate([np.asarray(Image.open(file).convert("RGB")) for file in part])
            packed = io.BytesIO()
            Image.fromarray(rows).save(packed, "WEBP", lossless=True, quality=80, method=4, exact=True)
            strips.append(packed.getvalue())
            labels += [label] * len(part)
    tensors = {
        "strips": np.frombuffer(b"".join(strips), np.uint8),
        "ends": np.cumsum([len(strip) for strip in strips]),
        "labels": np.asarray(labels),
    }
    save_file(tensors, path, {"classes": json.dumps(list(chosen))})
    return path


def read(folders: Sequence[Path], pattern: str) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 (N, 3, side, side), labels (N,) and class names of all shards whose names match."""
    from PIL import Image

    images, labels, classes = [], [], []
    paths = sorted({path.name: path for folder in folders for path in folder.glob(pattern)}.items())
    if not paths:
        raise FileNotFoundError(
            f"no shards {pattern} in {', '.join(map(str, folders))}: make them by --prepare"
        )
    for _, path in paths:
        with safe_open(path, "numpy") as file:
            packed, ends, found = (file.get_tensor(name) for name in ("strips", "ends", "labels"))
            classes = json.loads(file.metadata()["classes"])
        for start, end in zip([0, *ends], ends, strict=False):
            strip = np.asarray(Image.open(io.BytesIO(packed[start:end].tobytes())).convert("RGB"))
            images.append(strip.reshape(-1, strip.shape[1], strip.shape[1], 3))
        labels.append(found)
    pixels = torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(np.concatenate(labels)), classes


# Batches.


class OnDevice:
    """Batches of images that lie on the device as uint8: padded, cropped and flipped at random, normalized.

    Args:
        images: uint8 (N, C, H, W), on the device.
        labels: (N,), there too.
        normalization: mean and deviation of the pixels, 0 to 1, each (C,).
        seed: random numbers follow from it and the epoch, and are those of the CPU on every device.
        augment: whether to crop and flip; if not, order and images are as given.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalization: tuple[Sequence[float], Sequence[float]],
        seed: int = 0,
        *,
        augment: bool = True,
    ) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.deviation = (
            torch.tensor(each, device=images.device).view(-1, 1, 1) for each in normalization
        )
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        if self.augment:
            return max(1, len(self.labels) // BATCH)
        return -(-len(self.labels) // (4 * BATCH))

    def set_epoch(self, epoch: int) -> None:
        """Select the random numbers of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.augment:
            for images, labels in zip(
                self.images.split(4 * BATCH), self.labels.split(4 * BATCH), strict=True
            ):
                yield self.normalized(images), labels
            return
        seed_everything(self.seed, self.epoch)
        generator = torch.Generator().manual_seed(seeds_of(self.seed, self.epoch)[2])
        count, device = len(self.labels), self.images.device
        order = torch.randperm(count, generator=generator)
        shifts = torch.randint(0, 2 * PAD + 1, (2, count), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        order, shifts, mirrored = order.to(device), shifts.to(device), mirrored.to(device)
        for start in range(0, len(self) * BATCH, BATCH):
            part = slice(start, start + BATCH)
            images = cropped(self.images[order[part]], shifts[:, part], mirrored[part])
            yield self.normalized(images), self.labels[order[part]]

    def normalized(self, images: Tensor) -> Tensor:
        """Pixels of deviation 1 around 0."""
        return (images.float() / 255 - self.mean) / self.deviation


def cropped(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Images (N, C, H, W) padded with black, cropped at ``shifts`` (2, N), and flipped where ``mirrored`` (N,)."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PAD,) * 4)
    rows = shifts[0, :, None] + torch.arange(height, device=images.device)
    columns = shifts[1, :, None] + torch.arange(width, device=images.device)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    numbers = torch.arange(count, device=images.device)
    chosen = padded.permute(0, 2, 3, 1)[numbers[:, None, None], rows[:, :, None], columns[:, None, :]]
    return chosen.permute(0, 3, 1, 2).contiguous()


class Data:
    """Training and test images on the device; small random ones where no shards are given."""

    def __init__(self, shards: Sequence[Path], place: Place) -> None:
        if shards:
            train, test = read(shards, "train-*.safetensors"), read(shards, "test.safetensors")
        else:
            train, test = ((*_random_pixels(seed), list("0123456789")) for seed in (1, 2))
        self.classes = train[2]
        self.train, self.test = (tuple(part.to(place.device) for part in each[:2]) for each in (train, test))

    def training(self, model: nn.Module, seed: int) -> OnDevice:
        """Augmented, as ``model`` wants them."""
        return OnDevice(self.train[0], self.train[1], _normalization(model), seed)

    def testing(self, model: nn.Module) -> OnDevice:
        """As ``model`` wants them."""
        return OnDevice(self.test[0], self.test[1], _normalization(model), augment=False)


def _random_pixels(seed: int) -> tuple[Tensor, Tensor]:
    images, labels = batch(2 * BATCH, seed)
    return (40 * F.interpolate(images, 32) + 128).clamp(0, 255).to(torch.uint8), labels


def _normalization(model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
    found = saq.info(model).preprocessing
    assert found is not None
    return found.mean, found.std


# Training.


class Rows:
    """The float network and the rows that start from it.

    Args:
        shards: folders of shards.
        out: folder of ``float.safetensors``.
    """

    def __init__(self, shards: Sequence[Path], out: Path) -> None:
        self.shards, self.out = shards, out
        self._data: Data | None = None

    def data(self, place: Place) -> Data:
        """Read once a process."""
        self._data = self._data or Data(self.shards, place)
        return self._data

    def network(self, place: Place) -> nn.Module:
        """The float network with random weights."""
        torch.manual_seed(0)
        classes = len(self.data(place).classes)
        return saq.load_model(NETWORK, pretrained=False, num_classes=classes).to(place.device)

    def train_float(self, place: Place) -> Figures:
        """The float network from scratch, to ``float.safetensors``."""
        model = self.network(place)
        training = TrainingSection(
            epochs=1 if place.quick else FLOAT_EPOCHS, lr=0.1, weight_decay=5e-4, label_smoothing=0.1
        )
        figures = self._train(model, in_float(training, BATCH), 0, place)
        save_tensors(
            {name: value.cpu() for name, value in model.state_dict().items()}, self.out / "float.safetensors"
        )
        return figures

    def train_row(self, bits: int, method: str, seed: int, place: Place) -> Figures:
        """One row of the table: calibrated, fine-tuned, scored on the test images."""
        model = self.network(place)
        model.load_state_dict(load_file(self.out / "float.safetensors"))
        batches = self.data(place).training(model, seed)
        calibration = [images for images, _ in _first(batches, 4)]
        model = saq.quantize_model(model, bits, calibration=calibration, inplace=True, seed=seed)
        calibrated = self._score(model, place)
        training = TrainingSection(epochs=1 if place.quick else EPOCHS, lr=0.01, method=method)
        return {"calibrated_top1": calibrated.top1} | self._train(model, training, seed, place)

    def _train(self, model: nn.Module, training: TrainingSection, seed: int, place: Place) -> Figures:
        batches = self.data(place).training(model, seed)
        trainer = Trainer(
            model,
            batches,
            training,
            num_classes=len(self.data(place).classes),
            image_size=batches.images.shape[-1],
        )
        trainer.fit()
        score = self._score(model, place)
        return {
            "top1": score.top1,
            "loss": score.loss,
            "images": len(batches.labels),
            "epochs": training.epochs,
        }

    def _score(self, model: nn.Module, place: Place) -> Any:
        batches = self.data(place).testing(model)
        with SILENT.task("", len(batches)) as task:
            return evaluate(model.eval(), batches, task, device=place.device)


def _first(batches: OnDevice, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from (each for each, _ in zip(batches, range(count), strict=False))


def training(rows: Rows, place: Place) -> list[dict[str, tuple[Check, float]]]:
    """The float network, then all rows seed by seed, each with its seconds on a GPU beside seven others."""
    found: dict[str, tuple[Check, float]] = {}
    for seed in SEEDS[:1] if place.quick else SEEDS:
        for bits, method in ROWS[:3] if place.quick else ROWS:
            work: Callable[[Place], Figures] = partial(rows.train_row, bits, method, seed)
            found[f"row w{bits}a{bits} {method} seed {seed}"] = work, 100.0 if method == "qat" else 180.0
    return [{"float": (rows.train_float, 100.0)}, found]
