"""Parts of a training step, and hours of ImageNet-1k on many processes.

    python benchmarks/scaling.py --out DIR [--models resnet18,resnet50] [--batch-size 16] [--images FOLDER]
    torchrun --nproc-per-node 2 benchmarks/scaling.py --out DIR ...

Measured for every model and method, on this process's device: the seconds of a step on ``--batch-size`` images per
process (passes, all-reduce and update), the seconds of the all-reduce of its gradients alone, and, on a GPU, the peak
memory. With ``--images``, also the images per second that a process reads and augments. Each record is written to
``DIR/records.jsonl`` immediately; existing records are not measured again. Then, from the records,

    hours = epochs * ceil(images / batch) * max(step + (all-reduce over the network), loading) / 3600

is printed for ``--processes``, where the all-reduce of n processes takes 2 (n - 1) / n * bytes / bandwidth (a ring; see
docs/scaling.md). These hours are computed, not measured.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import add_json, append, plain_parser, read
from step_time import configuration, make_trainer, stepper, variant_of

from saqcli import distributed
from saqcli.config import ModelSection
from saqcli.data.datasets import open_split
from saqcli.data.loaders import make_loader
from saqcli.pipelines.setup import load_float
from saqcli.process_group import process_group
from saqcli.progress import SILENT
from saqcli.serialization import json_text, make_folder

IMAGENET = 1_281_167  # images of its training split
METHODS = ("qat", "saq")


def measured_step(model: str, method: str, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step of this process together with the others, and its peak memory."""
    variant = variant_of(method)
    step = stepper(make_trainer(configuration(model, variant), batch, device, variant))
    step()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()  # ends by reading the loss, which synchronizes with the device
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"seconds": statistics.median(seconds), "memory": memory}


def measured_reduce(model: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Median seconds of averaging tensors with the shapes of the model's parameters, and their bytes."""
    network = load_float(ModelSection(name=model, pretrained=False), SILENT).model
    tensors = [torch.zeros_like(parameter, device=device) for parameter in network.parameters()]
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        distributed.average(tensors)
        distributed.any_of(False)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "bytes": sum(4 * t.numel() for t in tensors)}


def measured_loading(folder: str, model: str, most: int) -> dict[str, Any]:
    """Images of ``folder`` per second that this process reads, decodes and augments without worker processes."""
    preprocessing = load_float(ModelSection(name=model, pretrained=False), SILENT).preprocessing
    split = open_split(folder, "train", num_classes=len(list((Path(folder) / "train").iterdir())))
    loader = make_loader(
        split,
        preprocessing,
        batch_size=32,
        training=True,
        augmentation="imagenet",
        workers=0,
        device=torch.device("cpu"),
        seed=0,
        limit=min(most, split.images),
        shared=False,
    )
    loader.set_epoch(0)
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in loader)
    return {"images_per_second": count / (time.perf_counter() - start)}


class Records:
    """Measured records, one per line; only the first process writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = read(path)

    def get(self, measure: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The record of ``key``, measured by ``measure`` if there is none."""
        key["processes"] = distributed.count()
        found = distributed.from_first(lambda: [r for r in self.known if key.items() <= r.items()])
        if found:
            return found[0]
        record = {**key, **measure()}
        if distributed.first():
            append(self.path, record)
        self.known.append(record)
        return record


@dataclass
class Plan:
    """Training on ImageNet-1k with a hypothetical number of processes.

    Attributes:
        batch: images per process and step.
        epochs: epochs of the recipe.
        bandwidth: bandwidth of the slowest link of the ring, in bytes per second.
        loading: images per second that are loaded for a process.
    """

    batch: int
    epochs: int
    bandwidth: float
    loading: float

    def hours(self, step: float, size: int, processes: int) -> float:
        """Hours, from the seconds of a step without all-reduce and the bytes of the all-reduce."""
        reduce = 2 * (processes - 1) / processes * size / self.bandwidth
        steps = math.ceil(IMAGENET / (self.batch * processes))
        return self.epochs * steps * max(step + reduce, self.batch / self.loading) / 3600


def main() -> None:
    """Measure, then compute."""
    parser = plain_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="resnet18,resnet50,mobilenetv2_100,vit_base_patch16_224")
    parser.add_argument("--batch-size", type=int, default=16, help="images per process and step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", help="folder with train/, to measure loading")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--processes", default="8,16,32,64")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--bandwidth", type=float, default=10.0, help="GB/s of the slowest link of the ring")
    parser.add_argument(
        "--loading", type=float, default=math.inf, help="images/s that are loaded for a process"
    )
    parser.add_argument("--quick", action="store_true", help="ResNet-18 alone, one round")
    add_json(parser)
    wanted = parser.parse_args()
    if wanted.quick:
        wanted.models, wanted.rounds = "resnet18", 1
    make_folder(wanted.out)
    records = Records(wanted.out / "records.jsonl")
    plan = Plan(wanted.batch_size, wanted.epochs, wanted.bandwidth * 1e9, wanted.loading)
    counts = [int(count) for count in wanted.processes.split(",")]
    with process_group(wanted.device) as device:
        for model in wanted.models.split(","):
            reduced = records.get(
                partial(measured_reduce, model, wanted.rounds, device), what="reduce", model=model
            )
            if wanted.images:
                records.get(partial(measured_loading, wanted.images, model, 256), what="loading", model=model)
            for method in METHODS:
                key = {"what": "step", "model": model, "method": method, "batch": wanted.batch_size}
                measure = partial(measured_step, model, method, wanted.batch_size, wanted.rounds, device)
                found = records.get(measure, **key, device=device.type)
                step = found["seconds"] - (reduced["seconds"] if distributed.count() > 1 else 0.0)
                hours = [f"{count}: {plan.hours(step, reduced['bytes'], count):.1f}" for count in counts]
                if distributed.first() and not wanted.json:
                    print(f"{model} {method}, {plan.epochs} epochs, hours by processes: {', '.join(hours)}")
        if wanted.json and distributed.first():
            print(json_text({"records": records.known}))


if __name__ == "__main__":
    main()
