"""The programs of docs/targets.md run a file in other runtimes, and give the classes that PyTorch gives."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import saqcli
from saqcli.data.transforms import image_transform

PAGE = Path(__file__).resolve().parents[1] / "docs" / "targets.md"
PROGRAMS: dict[str, str] = dict(
    re.findall(r"^```\w+ (run_\S+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs, an exported network, an image and normalized images."""
    made = tmp_path_factory.mktemp("deployment")
    for name, text in PROGRAMS.items():
        (made / name).write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    net = saqcli.load_model("torchvision/squeezenet1_1", pretrained=False, num_classes=7, input_size=64)
    quantized = saqcli.quantize_model(net, 8, calibration=[torch.randn(8, 3, 64, 64)], weight_grid="zero")
    saqcli.export_onnx(quantized, made / "model.onnx")
    saqcli.save(quantized, made / "model.safetensors")
    numbers = np.random.default_rng(0)
    small = numbers.integers(0, 256, (9, 12, 3), dtype=np.uint8)  # smooth once enlarged
    Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC).save(made / "image.png")
    images = numbers.standard_normal((4, 3, 64, 64), dtype=np.float32)
    np.save(made / "images.npy", images)
    images.tofile(made / "images.bin")
    return made


def run(folder: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(PAGE.parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return saqcli.load(folder / "model.safetensors")


def test_onnxruntime_program_equals_saq(folder: Path, model: Any) -> None:
    view = image_transform(saqcli.info(model).preprocessing)
    with torch.inference_mode():
        logits = model(view(Image.open(folder / "image.png").convert("RGB"))[None])[0]
    best, logit = run(folder, "run_onnxruntime.py", "model.onnx", "image.png").split()
    assert int(best) == int(logits.argmax())
    assert float(logit) == pytest.approx(float(logits.max()), abs=0.2 * float(logits.std()))


def test_onnxruntime_program_is_short() -> None:
    assert len(PROGRAMS["run_onnxruntime.py"].strip().splitlines()) <= 25


def test_openvino_program_equals_saq(folder: Path, model: Any) -> None:
    pytest.importorskip("openvino")
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.load(folder / "images.npy"))).argmax(1).tolist()
    assert run(folder, "run_openvino.py", "model.onnx", "images.npy").strip() == str(expected)


def test_cpp_program_equals_saq(folder: Path, model: Any) -> None:
    """Built with the headers in ``ONNXRUNTIME_INCLUDE``, which the Python package lacks, and its library."""
    onnxruntime = pytest.importorskip("onnxruntime")
    headers, compiler = os.environ.get("ONNXRUNTIME_INCLUDE"), shutil.which("g++")
    library = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if not (headers and compiler and library):
        pytest.skip("needs g++, libonnxruntime.so and the runtime's C++ headers in ONNXRUNTIME_INCLUDE")
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-I",
        headers,
        "run_onnxruntime.cpp",
        str(library),
    ]
    command += [f"-Wl,-rpath,{folder}", "-o", "run_onnxruntime"]
    (folder / "libonnxruntime.so.1").symlink_to(library)  # the name that programs look for
    subprocess.run(command, cwd=folder, check=True, timeout=200)
    done = subprocess.run(
        ["./run_onnxruntime", "model.onnx", "images.bin"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        expected = model(torch.from_numpy(np.load(folder / "images.npy"))).argmax(1).tolist()
    assert [int(line) for line in done.stdout.split()] == expected
