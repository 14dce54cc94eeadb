"""Images a second of ``saq eval``, relative to the bare forward pass of the float network.

    python benchmarks/evaluation.py [--model timm/mobilenetv2_100] [--batch-size 32] [--rounds 7] [--json]
    python benchmarks/evaluation.py --data imagenette

The bare pass is the network as its library builds it, in inference mode, and nothing else. The others are the pass of
``saq eval`` with its accuracy, loss and progress, in the memory format that its rule chooses; ``_contiguous`` ones
stay as built. All take turns on the same images in memory, and the fastest round of each counts. With ``data``
every pass reads the validation images of a folder anew, by the same loader.
"""

import argparse
from collections.abc import Sized
from copy import deepcopy
from dataclasses import replace
from itertools import islice

import torch
from common import Step, add_json, add_timing, facts, in_turns, plain_parser, show
from torch import Tensor, nn

import saqcli
from saqcli.allocator import keep_freed_memory
from saqcli.config import DataSection, ModelSection
from saqcli.data.batches import Loader
from saqcli.data.splits import open_named, validation_loader
from saqcli.pipelines.predictors import Predictor, open_source, with_memory_format
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.training.loop import evaluate

BITS = {"float": None, "w8a8": "w8a8", "w4a4": "w4a4"}
FORMATS = {"": "auto", "_contiguous": "contiguous"}

Batches = list[tuple[Tensor, Tensor]] | Loader


def bare(network: nn.Module, batches: Batches) -> Step:
    """The forward pass alone."""

    @torch.inference_mode()
    def step() -> None:
        for images, _ in batches:
            network(images)

    return step


def evaluation(predictor: Predictor, batches: Batches) -> Step:
    """The pass of ``saq eval``."""
    assert isinstance(batches, Sized)

    def step() -> None:
        with SILENT.task("evaluating", len(batches)) as task:
            evaluate(predictor.predict, batches, task, device=predictor.device)

    return step


def variants(found: Predictor, batches: Batches, calibration: Tensor) -> dict[str, Step]:
    """All passes, by name."""
    network = found.predict
    assert isinstance(network, nn.Module)
    steps = {"bare": bare(deepcopy(network).eval(), batches)}
    for name, bits in BITS.items():
        for suffix, memory_format in FORMATS.items():
            copy = deepcopy(network)
            if bits is not None:
                copy = saqcli.quantize_model(copy, bits=bits, calibration=[calibration])
            own = replace(found, predict=copy.to(found.device).eval())
            steps[name + suffix] = evaluation(with_memory_format(own, memory_format, SILENT), batches)
    return steps


def images_of(wanted: argparse.Namespace, found: Predictor) -> tuple[Batches, int]:
    """Batches in memory or of a folder, and the number of their images."""
    if wanted.data is not None:
        section = DataSection(path=wanted.data, eval_batch_size=wanted.batch_size, workers=wanted.workers)
        split = open_named(section, "val", found.classes, SILENT)
        loader = validation_loader(split, found.preprocessing, section, found.device)
        return loader, loader.images
    generator = torch.Generator().manual_seed(0)
    shape, count = found.preprocessing.input_size, wanted.batch_size
    batches = []
    for _ in range(wanted.batches):
        images = torch.randn(count, *shape, generator=generator)
        labels = torch.randint(found.num_classes, (count,), generator=generator)
        batches.append((images.to(found.device), labels))
    return batches, count * wanted.batches


def main() -> None:
    """Measure and print."""
    options = plain_parser(__doc__)
    add_timing(options)
    add_json(options)
    options.set_defaults(model="timm/mobilenetv2_100", batch_size=32)
    options.add_argument("--batches", type=int, default=2, help="batches in memory that are one round")
    options.add_argument("--data", help="folder of images to read, in place of random ones in memory")
    options.add_argument("--workers", type=int, help="processes that read the images of --data")
    wanted = options.parse_args()
    kept = keep_freed_memory()  # as the command line does
    section = ModelSection(name=wanted.model, pretrained=False, input_size=wanted.side)
    found = open_source(wanted.model, section, pick_device(wanted.device), SILENT)
    batches, count = images_of(wanted, found)
    calibration = torch.cat([images for images, _ in islice(batches, 1)])[:32]
    steps = variants(found, batches, calibration)
    for step in steps.values():
        step()
    times = {name: min(taken) for name, taken in in_turns(steps, wanted.rounds, wanted.clock).items()}
    speed = {name: count / seconds for name, seconds in times.items()}
    relative = {name: each / speed["bare"] for name, each in speed.items()}
    result = {
        **facts("evaluation"),
        **{"model": wanted.model, "side": max(found.preprocessing.input_size[1:]), "images": count},
        **{"batch_size": wanted.batch_size, "keeps_freed_memory": kept},
        **{"images_per_second": speed, "relative": relative},
    }
    lines = [f"{name:20s} {each:8.1f} images/s   {relative[name]:5.2f}" for name, each in speed.items()]
    show(wanted, result, "\n".join([f"{wanted.model}, batches of {wanted.batch_size}", *lines]))


if __name__ == "__main__":
    main()
