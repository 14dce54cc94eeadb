"""ONNX Runtime on integers: milliseconds, top-1 and kernels of this project's files and of the runtime's own.

    OMP_NUM_THREADS=1 python benchmarks/targets.py --model saq/resnet20 --weights FILE --data cifar10 --images 2000
    OMP_NUM_THREADS=1 python benchmarks/targets.py --model torchvision/resnet18 --random [--json]

Of one network: float; `onnxruntime.quantization.quantize_static` as its documentation recommends (Q/DQ, UINT8
activations, INT8 weights per channel, after `quant_pre_process`), also with `reduce_range`, which is what it recommends
without VNNI; and this project's styles, calibrated on the same images without training. Files of styles `ort` and
`ort-vnni` have quantizers on junctions. All files take turns, so that other work on the machine disturbs all of them;
figures are medians and minima of the rounds, relative to float.
"""

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from common import add_json, facts, in_turns, plain_parser, show
from torch import nn

import saqcli as saq
from saqcli._version import __version__
from saqcli.cli.options import parse_assignments, parse_numbers
from saqcli.export import STYLES, ModelMetadata
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.verify.runtime import open_file

JUNCTIONS = ("add", "mul", "concat_shared", "pool", "sigmoid", "hardsigmoid", "hardswish", "silu")
CALIBRATION = 64  # images
LabelledImages = list[tuple[torch.Tensor, torch.Tensor]]
# Name: style, bits, grid of the weights, whether junctions are quantized.
OURS: dict[str, tuple[str, str, str, bool]] = {
    "qdq w8a8": ("qdq", "w8a8", "zero", False),
    "exact w8a8": ("exact", "w8a8", "zero", False),
    "ort w8a8": ("ort", "w8a8", "zero", True),
    "ort-vnni w8a8": ("ort-vnni", "w8a8", "zero", True),
    "ort w7a8": ("ort", "w7a8", "zero", True),
    "ort w4a8": ("ort", "w4a8", "zero", True),
    "ort w4a4": ("ort", "w4a4", "zero", True),
}
STATIC = {"quantize_static": False, "quantize_static reduce_range": True}


@dataclass
class Files:
    """The files of one network.

    Attributes:
        paths: by name.
        errors: why a file is missing, by name.
    """

    paths: dict[str, Path] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, path: Path, make: Callable[[Path], object]) -> None:
        """Make a file, or note why it cannot be made."""
        try:
            make(path)
            self.paths[name] = path
        except Exception as error:  # of other packages too; the rest is still measured
            self.errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]


class Reader:
    """Batches for ``quantize_static``, one image each."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        self._batches: Iterator[dict[str, Any]] = iter([{name: image[None].numpy()} for image in images])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, or None."""
        return next(self._batches, None)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Not used without strides."""


def export_float(net: nn.Module, name: str, size: tuple[int, ...], path: Path) -> None:
    """The float network in the exporter of style ``qdq``, which changes nothing of it."""
    about = ModelMetadata(
        saq_version=__version__,
        build={"name": name},
        preprocessing={},
        policy=BitConfig(model=name, layers={}),
        scheme=convert.Scheme(),
        signed={},
        routed={},
    )
    STYLES["qdq"]().export(net, torch.zeros(2, *size), path, about)


def static(source: Path, path: Path, images: torch.Tensor, *, reduce_range: bool) -> None:
    """ONNX Runtime's own post-training file."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(path),
        Reader("images", images),  # type: ignore[arg-type]
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def ours(net: nn.Module, path: Path, images: torch.Tensor, kind: tuple[str, str, str, bool]) -> None:
    """A file of this project, without its proof."""
    style, bits, grid, junctions = kind
    quantized = saq.quantize_model(
        net,
        bits,
        calibration=list(images.split(16)),
        weight_grid=grid,  # type: ignore[arg-type]
        junctions=JUNCTIONS if junctions else (),
        pins=None if bits == "w4a4" or bits == "w4a8" else {"*": bits},
    )
    saq.export_onnx(quantized, path, style, verify=[images[:2]])


def session(path: Path) -> Any:
    """A session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def measure(
    runs: Mapping[str, Callable[[Any], object]], size: tuple[int, ...], batch_sizes: list[int], rounds: int
) -> dict[str, Any]:
    """Milliseconds of every file by batch size; a run takes images (N, C, H, W), and one is called float."""
    found: dict[str, Any] = {name: {} for name in runs}
    for batch in batch_sizes:
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)).numpy()
        steps = {name: partial(run, images) for name, run in runs.items()}
        for step in steps.values():
            for _ in range(2):
                step()
        times = in_turns(steps, rounds)
        for name, seconds in times.items():
            found[name][str(batch)] = {
                "median_ms": round(1e3 * statistics.median(seconds), 3),
                "least_ms": round(1e3 * min(seconds), 3),
                "speedup": round(statistics.median(times["float"]) / statistics.median(seconds), 3),
                "speedup_least": round(min(times["float"]) / min(seconds), 3),
            }
    return found


def feeding(each: Any) -> Callable[[Any], object]:
    """Runs a session of ONNX Runtime on images."""
    return lambda images: each.run(None, {"images": images})


def top1(path: Path, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Percent of correct classes."""
    run, right, total = session(path), 0, 0
    for images, labels in batches:
        logits = run.run(None, {"images": images.numpy()})[0]
        right += int((np.argmax(logits, 1) == labels.numpy()).sum())
        total += len(labels)
    return 100 * right / total


def kernels(path: Path) -> dict[str, int]:
    """How many operators run on integers and in floating point, and how often codes pass through values."""
    operators = open_file(path).operators
    return {
        "integer": sum(each.integer for each in operators),
        "floating": sum(not each.integer for each in operators),
        "between_codes": sum(each.round_trip for each in operators),
    }


def file_options(description: str | None, rounds: int = 15) -> argparse.ArgumentParser:
    """The options of scripts that compare files of one network."""
    options = plain_parser(description)
    options.add_argument("--model", default="saq/resnet20")
    options.add_argument("--weights")
    options.add_argument("--random", action="store_true", help="random weights, for times only")
    options.add_argument("--data")
    options.add_argument("--model-kwargs")
    options.add_argument("--mean")
    options.add_argument("--std")
    options.add_argument("--images", type=int, default=1000, help="labelled images that top-1 is measured on")
    options.add_argument("--rounds", type=int, default=rounds)
    add_json(options)
    return options


def opened(wanted: argparse.Namespace) -> tuple[nn.Module, tuple[int, ...], torch.Tensor, LabelledImages]:
    """The network of ``file_options``, its input size, images to calibrate on, and labelled ones."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net = saq.load_model(
        wanted.model,
        weights=wanted.weights,
        pretrained=not wanted.random,
        mean=parse_numbers(wanted.mean, "--mean") if wanted.mean else None,
        std=parse_numbers(wanted.std, "--std") if wanted.std else None,
        **(parse_assignments(wanted.model_kwargs, "--model-kwargs") if wanted.model_kwargs else {}),
    )
    preprocessing = saq.info(net).preprocessing
    assert preprocessing is not None  # of networks by name
    size = tuple(preprocessing.input_size)
    return net, size, *images_of(net, wanted.data, wanted.images, size)


def images_of(
    net: nn.Module, data: str | None, count: int, size: tuple[int, ...]
) -> tuple[torch.Tensor, LabelledImages]:
    """Images to calibrate on, and labelled ones; noise and none of these without data."""
    if data is None:
        return torch.randn(CALIBRATION, *size, generator=torch.Generator().manual_seed(1)), []
    drawn = torch.cat([x for x, _ in saq.load_images(net, data, "train", images=CALIBRATION, workers=0)])
    return drawn, list(saq.load_images(net, data, "val", batch_size=50, images=count, workers=0))


def table(found: dict[str, Any]) -> str:
    """Rows of Markdown."""
    batches = [str(each) for each in found["batch_sizes"]]
    heads = [f"batch {each}: ms, times float" for each in batches]
    lines = [
        f"| file | size | integer, float operators | top-1 | {' | '.join(heads)} |",
        "|--" * (4 + len(heads)) + "|",
    ]
    for name, row in found["files"].items():
        cells = [
            f"{row['times'][each]['median_ms']:.2f}, {row['times'][each]['speedup']:.2f}" for each in batches
        ]
        score = "" if row["top1"] is None else f"{row['top1']:.2f}"
        counts = f"{row['kernels']['integer']}, {row['kernels']['floating']}"
        lines.append(
            f"| {name} | {row['size_bytes'] / 1e6:.2f} MB | {counts} | {score} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, *(f"no {name}: {reason}" for name, reason in found["errors"].items())])


def main() -> None:
    """Measure one network."""
    options = file_options(__doc__)
    options.add_argument("--batch-sizes", default="1,16")
    options.add_argument("--only", help="names of files besides float, with commas")
    wanted = options.parse_args()
    net, size, calibration, labelled = opened(wanted)
    names = set(wanted.only.split(",")) if wanted.only else {*STATIC, *OURS}
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        files, root = Files(), Path(folder)
        files.add("float", root / "float.onnx", lambda path: export_float(net, wanted.model, size, path))
        for name, reduced in STATIC.items():
            if name in names:
                path = root / f"{len(files.paths)}.onnx"
                files.add(
                    name,
                    path,
                    lambda path, r=reduced: static(root / "float.onnx", path, calibration, reduce_range=r),
                )
        for name, kind in OURS.items():
            if name in names:
                path = root / f"ours-{len(files.paths)}.onnx"
                files.add(name, path, lambda path, k=kind: ours(net, path, calibration, k))
        runs = {name: feeding(session(path)) for name, path in files.paths.items()}
        times = measure(runs, size, [int(each) for each in wanted.batch_sizes.split(",")], wanted.rounds)
        rows = {
            name: {
                "size_bytes": path.stat().st_size,
                "kernels": kernels(path),
                "top1": top1(path, labelled) if labelled else None,
                "times": times[name],
            }
            for name, path in files.paths.items()
        }
    found = facts("targets") | {
        "model": wanted.model,
        "batch_sizes": [int(each) for each in wanted.batch_sizes.split(",")],
        "rounds": wanted.rounds,
        "images": sum(len(labels) for _, labels in labelled),
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "files": rows,
        "errors": files.errors,
    }
    show(wanted, found, table(found))


if __name__ == "__main__":
    main()
