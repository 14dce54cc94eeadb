"""Images a second of the loaders, with and without the cache of decoded images.

    python benchmarks/data.py --data DIR [--model saq/resnet20] [--batch-size 128] [--images 5000] [--rounds 5] [--json]

In every round each loader makes one pass over ``--images`` training images: without a cache, with a cache that the pass
fills (the first epoch), and with a full one. Medians of images per second of processor time are printed, for the
training view and the evaluation view, in one thread of this process (``data.workers=0``).
"""

import statistics
import time
from typing import Any

import torch
from common import parser

from saqcli.config import DataSection, ModelSection
from saqcli.data.batches import Loader
from saqcli.data.loaders import make_loader
from saqcli.data.splits import open_named
from saqcli.data.transforms import Augmentation
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.setup import load_float
from saqcli.progress import SILENT
from saqcli.serialization import json_text

VIEWS: dict[str, tuple[bool, Augmentation]] = {"training": (True, "cifar"), "evaluation": (False, "none")}


def speed(loader: Loader) -> float:
    """Images per second of processor time in one pass."""
    loader.set_epoch(0)
    start = time.process_time()
    images = sum(len(labels) for _, labels in loader)
    return images / (time.process_time() - start)


def measure(options: Any, classes: int, preprocessing: Preprocessing) -> dict[str, dict[str, float]]:
    """Images per second by view and loader."""
    found: dict[str, dict[str, float]] = {}
    for view, (training, augmentation) in VIEWS.items():
        rounds: dict[str, list[float]] = {"without cache": [], "first epoch": [], "later epochs": []}
        for _ in range(options.rounds):
            loaders = {
                kind: make_loader(
                    open_named(DataSection(path=options.data, cache=kind), "train", classes),
                    preprocessing,
                    batch_size=options.batch_size,
                    training=training,
                    augmentation=augmentation,
                    workers=0,
                    device=torch.device("cpu"),
                    seed=0,
                    limit=options.images,
                )
                for kind in ("off", "memory")
            }
            rounds["without cache"].append(speed(loaders["off"]))
            rounds["first epoch"].append(speed(loaders["memory"]))
            rounds["later epochs"].append(speed(loaders["memory"]))
        found[view] = {name: statistics.median(speeds) for name, speeds in rounds.items()}
    return found


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--images", type=int, default=5000)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    torch.set_num_threads(1)
    loaded = load_float(ModelSection(name=given.model, pretrained=False), SILENT)
    found = measure(given, loaded.num_classes, loaded.preprocessing)
    if given.json:
        print(json_text(found))
        return
    for view, speeds in found.items():
        for name, images in speeds.items():
            print(f"{view:12s} {name:14s} {images:10,.0f} images/s")


if __name__ == "__main__":
    main()
