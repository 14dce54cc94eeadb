"""OpenVINO: milliseconds and top-1 of files for target ``openvino`` beside NNCF's post-training quantization.

    OMP_NUM_THREADS=1 python benchmarks/openvino_files.py --weights FILE --data cifar10 --images 2000 [--json]
    OMP_NUM_THREADS=1 python benchmarks/openvino_files.py --model torchvision/resnet18 --random

NNCF is not a dependency of saq: install ``nncf`` and ``openvino`` in an environment of their own. It quantizes the
float file (``nncf.quantize``, its defaults and ``TargetDevice.CPU``) on the images that this project's files are
calibrated on. All files take turns on one thread; figures are minima and medians, relative to float.
"""

import sys
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import facts, show
from targets import CALIBRATION, Files, export_float, file_options, measure, opened

import saqcli as saq

OURS = {
    "qdq w8a8": ("w8a8", "qdq"),
    "qdq-vnni w8a8": ("w8a8", "qdq-vnni"),
    "qdq w7a8": ("w7a8", "qdq"),
    "qdq w4a8": ("w4a8", "qdq"),
}


def compiled(path: Path) -> Any:
    """The file on one thread, other operators in float32."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return openvino.Core().compile_model(path, "CPU", settings)


def by_nncf(source: Path, path: Path, images: torch.Tensor) -> None:
    """NNCF's post-training file, in OpenVINO's format."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    data = nncf.Dataset(list(images.split(1)), lambda image: {"images": image.numpy()})
    with redirect_stdout(sys.stderr):  # its progress
        found = nncf.quantize(model, data, target_device=nncf.TargetDevice.CPU, subset_size=CALIBRATION)
    openvino.save_model(found, path, compress_to_fp16=False)


def ours(net: torch.nn.Module, path: Path, images: torch.Tensor, bits: str, style: str) -> None:
    """A file for target ``openvino``, without its proof."""
    pins = None if bits == "w4a8" else {"*": bits}
    quantized = saq.quantize_model(
        net, bits, calibration=list(images.split(16)), target="openvino", pins=pins, weight_grid="zero"
    )
    saq.export_onnx(quantized, path, style, verify=[images[:2]])


def integer_layers(model: Any) -> tuple[int, int]:
    """How many convolutions and matrix products run on integers, and how many there are."""
    layers = [
        node.get_rt_info()
        for node in model.get_runtime_model().get_ops()
        if "layerType" in node.get_rt_info()
    ]
    kinds = [
        (str(info["layerType"].astype(str)), str(info["runtimePrecision"].astype(str))) for info in layers
    ]
    products = [precision for kind, precision in kinds if kind in ("Convolution", "FullyConnected", "MatMul")]
    return sum(precision in ("i8", "u8") for precision in products), len(products)


def top1(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Percent of correct classes."""
    right = sum(
        int((model(images.numpy())[0].argmax(1) == labels.numpy()).sum()) for images, labels in batches
    )
    return 100 * right / sum(len(labels) for _, labels in batches)


def table(found: dict[str, Any]) -> str:
    """Rows of Markdown."""
    batches = [str(each) for each in found["batch_sizes"]]
    lines = [
        f"| file | layers on integers | top-1 | {' | '.join(f'batch {each}: ms, times float' for each in batches)} |",
        "|--" * (3 + len(batches)) + "|",
    ]
    for name, row in found["files"].items():
        times = [
            f"{row['times'][each]['least_ms']:.2f}, {row['times'][each]['speedup_least']:.2f}"
            for each in batches
        ]
        score = "" if row["top1"] is None else f"{row['top1']:.2f}"
        lines.append(f"| {name} | {row['integer']} of {row['products']} | {score} | {' | '.join(times)} |")
    return "\n".join([*lines, *(f"no {name}: {reason}" for name, reason in found["errors"].items())])


def main() -> None:
    """Measure one network."""
    options = file_options(__doc__)
    options.add_argument("--batch-sizes", default="1,16")
    wanted = options.parse_args()
    net, size, calibration, labelled = opened(wanted)
    batch_sizes = [int(each) for each in wanted.batch_sizes.split(",")]
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        files, root = Files(), Path(folder)
        files.add("float", root / "float.onnx", lambda path: export_float(net, wanted.model, size, path))
        files.add("nncf", root / "nncf.xml", lambda path: by_nncf(root / "float.onnx", path, calibration))
        for name, kind in OURS.items():
            files.add(name, root / f"{name}.onnx", lambda path, k=kind: ours(net, path, calibration, *k))
        models = {name: compiled(path) for name, path in files.paths.items()}
        times = measure(models, size, batch_sizes, wanted.rounds)
        rows: dict[str, Any] = {}
        for name, model in models.items():
            integer, products = integer_layers(model)
            score = top1(model, labelled) if labelled else None
            rows[name] = {"integer": integer, "products": products, "top1": score, "times": times[name]}
    found = facts("openvino_files") | {
        "model": wanted.model,
        "batch_sizes": batch_sizes,
        "rounds": wanted.rounds,
        "images": sum(len(labels) for _, labels in labelled),
        "openvino": version("openvino"),
        "files": rows,
        "errors": files.errors,
    }
    show(wanted, found, table(found))


if __name__ == "__main__":
    main()
