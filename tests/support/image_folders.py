"""Small data sets on disk, made of noise."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saqcli.models.preprocessing import Preprocessing

MakeClasses = Callable[[Path, Mapping[str, int]], Path]


def noise(seed: int, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture
def make_classes() -> MakeClasses:
    """Writes a folder per class with that many 32 x 32 PNG files, no two alike."""

    def make(root: Path, classes: Mapping[str, int]) -> Path:
        for number, (name, count) in enumerate(classes.items()):
            (root / name).mkdir(parents=True)
            for index in range(count):
                noise(1000 * number + index).save(root / name / f"{index}.png")
        return root

    return make


@pytest.fixture
def cifar_like() -> Preprocessing:
    return Preprocessing((3, 32, 32), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), "bilinear", 1.0)
