"""A float network trained on scikit-learn's handwritten digits, for tests that need real images and real weights."""

import shutil
from pathlib import Path

from saqcli.pipelines import demo
from saqcli.progress import SILENT

MODEL = demo.MODEL


def make(folder: Path) -> None:
    """Write the digits to ``folder/images`` and a network trained on them for a few epochs to ``folder``.

    Every sixth image is also in ``folder/few``.
    """
    demo.write_digits(folder / "images")
    for path in sorted((folder / "images").rglob("*.png"))[::6]:
        copy = folder / "few" / path.relative_to(folder / "images")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    weights = folder / "float.safetensors"
    config = demo.demo_config(folder / "images", weights, bops="w4a4", epochs=1, seed=0)
    demo.train_float(config, weights, SILENT, epochs=3)


def float_options(folder: Path, data: Path | None = None) -> list[str]:
    """Command-line options that name the network, its weights and its images."""
    return [
        *("--weights", str(folder / "float.safetensors")),
        *("--data", str(data or folder / "images")),
        *("--num-classes", "10", "--in-chans", "1", "--input-size", str(demo.SIDE)),
        *("--mean", str(demo.PIXEL_MEAN), "--std", str(demo.PIXEL_STD)),
    ]
