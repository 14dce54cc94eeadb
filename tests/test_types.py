"""The package is typed: mypy in strict mode accepts a user's program, and finds its mistakes."""

import subprocess
import sys
from pathlib import Path

import pytest

import saqcli

ROOT = Path(saqcli.__file__).parents[1]
PROGRAM = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq

net: nn.Module = saq.load_model("timm/resnet18", pretrained=False, num_classes=10)
loader: list[tuple[Tensor, Tensor]] = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
q = saq.quantize_model(net, "w4a4", calibration=loader)
minimizer = saq.SAQ(q, torch.optim.SGD(q.parameters(), 0.01), rho=0.3)
for images, labels in loader:
    loss: Tensor = minimizer.step(lambda: F.cross_entropy(q(images), labels))
error: float = max(block.after for block in saq.reconstruct(q, loader, iterations=1))
places: tuple[str, ...] = saq.compensate(q, loader, float_model=net).places
cost: int = saq.bops(q)
text: str = saq.summary(q)
score = saq.evaluate(q, loader)
top1: float = score.top1
found = saq.search(net, saq.Budget(bops=10**9), loader, searcher="error")
policy: saq.BitConfig = found.policy
policy = saq.bits(q)
verified: bool = saq.export_onnx(q, "net.onnx", style="qdq", verify=loader).verified
saq.save(q, "net.safetensors")
loaded: nn.Module = saq.load("net.safetensors")
try:
    saq.calibrate(loaded, loader)
except saq.SaqError as error:
    print(error)
"""
MISTAKES = {
    "saq.bops(3)": 'incompatible type "int"',
    "saq.quantize_model(net, bit=4)": 'Unexpected keyword argument "bit"',
    "x: str = saq.bops(q)": "Incompatible types in assignment",
    "saq.bits(q).x": '"BitConfig" has no attribute "x"',
    "saq.quantise_model(net)": 'has no attribute "quantise_model"',
}


def check(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With the package's own settings, which skip the libraries that no signature names."""
    pytest.importorskip("mypy", reason="mypy is in the dev extra")
    (folder / "program.py").write_text(program, encoding="utf-8")
    given = (
        "--strict",
        "--follow-imports",
        "silent",
        "--no-incremental",
        "--config-file",
        ROOT / "pyproject.toml",
    )
    command = [sys.executable, "-m", "mypy", *map(str, given), "program.py"]
    environment = {"MYPYPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.timeout(900)
def test_strict_mypy_accepts_a_program(tmp_path: Path) -> None:
    lines = [*PROGRAM.splitlines(), *MISTAKES]
    done = check("\n".join(lines), tmp_path)

    reports = [line for line in done.stdout.splitlines() if ": error: " in line]
    places = {int(line.split(":")[1]): line for line in reports}
    first = len(PROGRAM.splitlines()) + 1
    assert set(places) == {first + index for index in range(len(MISTAKES))}, done.stdout
    for index, expected in enumerate(MISTAKES.values()):
        assert expected in places[first + index]


def test_stub_names_what_the_package_exports() -> None:
    text = (Path(saqcli.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    names = {line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("from ")}
    assert names == set(saqcli.__all__)


def test_package_carries_its_types() -> None:
    assert (Path(saqcli.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", saqcli.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(saqcli, name)
    assert name.startswith("__") or len((value.__doc__ or "").split()) > 4
