"""The checks of ``benchmarks/gpu_checks.py`` on the CPU, on a stand-in for a GPU, and on a GPU where there is one."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_checks import Place, checks
from saqcli import process_group
from tests.end_to_end.golden_runs import (
    ANALYZED,
    IMAGES,
    MODEL,
    SEARCHERS,
    quantize,
    saq,
    search,
    write_digits,
    write_weights,
)
from tests.end_to_end.test_goldens import differences
from tests.support.standin import DEVICE, MixedDevices, Standin, standin

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
CPU = Place(torch.device("cpu"))
GPU = Place(torch.device("cuda", 0))
AWAY = Place(DEVICE)
# Those that take seconds and say most; the stand-in compares with the CPU, and the CPU runs all in ``gpu.py``.
SOON = {
    "cpu": {"ranks", "scaler float16 qat"},
    "standin": {
        "codes",
        "files",
        "resume",
        "minimizer saq",
        "quantizer dorefa",
        "search error",
        "instrument flips",
    },
}


def params(place: Place, soon: set[str] | None = None) -> list[object]:
    return [
        pytest.param(name, marks=() if soon is None or name in soon else pytest.mark.slow)
        for name in checks(place)
    ]


@pytest.mark.parametrize("name", sorted(SOON["cpu"]))
def test_cpu_passes(name: str) -> None:
    checks(CPU)[name](CPU)


@pytest.mark.parametrize("name", params(AWAY, SOON["standin"]))
def test_devices_never_mix(name: str) -> None:
    with standin():
        checks(AWAY)[name](AWAY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("name", params(GPU))
def test_gpu_passes(name: str) -> None:
    checks(GPU)[name](GPU)


# The stand-in.


@pytest.fixture
def away() -> Iterator[Callable[[Tensor], Tensor]]:
    with standin() as device:
        yield lambda tensor: tensor.to(device)


REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "addition": lambda x, y: x + y,
    "one element": lambda x, y: x + y[:1],
    "product of matrices": lambda x, y: F.linear(x, y[None]),
    "concatenation": lambda x, y: torch.cat([x, y]),
    "stack of scalars": lambda x, y: torch.stack([x[0], y[0]]),
    "in place": lambda x, y: y.add_(x),
    "in place, a scalar": lambda x, y: y[0].add_(x[0]),
    "index into the CPU": lambda x, y: y[(x > 0).nonzero()[:, 0]],
    "mask of the CPU": lambda x, y: y[x > 0],
    "generator of the CPU": lambda x, y: torch.randn(2, device=DEVICE, generator=torch.default_generator),
}
ALLOWED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "scalar of the CPU": lambda x, y: x * y[0],
    "CPU index": lambda x, y: x[torch.tensor([1, 0])],
    "CPU mask": lambda x, y: x[y > 0],
    "copy": lambda x, y: x.copy_(y),
    "factory": lambda x, y: x + torch.arange(3.0, device=x.device),
    "constant": lambda x, y: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "like": lambda x, y: x + torch.ones_like(x) + x.new_tensor([1.0, 2.0, 3.0]),
    "own generator": lambda x, y: x + torch.randn(3, device=DEVICE, generator=torch.Generator(DEVICE)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_standin_refuses_tensors_of_the_cpu(name: str, away: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(MixedDevices):
        REFUSED[name](away(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("name", ALLOWED)
def test_standin_allows_what_cuda_allows(name: str, away: Callable[[Tensor], Tensor]) -> None:
    assert isinstance(ALLOWED[name](away(torch.ones(3)), torch.ones(3)), Standin)


def test_standin_goes_over_when_asked(away: Callable[[Tensor], Tensor]) -> None:
    x = away(torch.tensor([1.0, 2.0]))
    plain = x.cpu()
    assert (type(plain), x.tolist(), x[1].item(), float(x.sum())) == (Tensor, [1.0, 2.0], 2.0, 3.0)
    with pytest.raises((TypeError, RuntimeError), match="numpy"):
        x.numpy()


def test_standin_differentiates_as_the_cpu(away: Callable[[Tensor], Tensor]) -> None:
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 3, 3, requires_grad=True)
    F.conv2d(x, weight).square().sum().backward()
    there = away(weight.detach()).requires_grad_()
    F.conv2d(away(x), there).square().sum().backward()
    assert weight.grad is not None
    assert there.grad is not None
    assert torch.equal(there.grad.cpu(), weight.grad)


def commands() -> dict[str, Any]:
    """What a quantization, a search, an analysis and an evaluation leave and print."""
    write_digits(Path("digits"))
    write_weights(MODEL, Path("float.safetensors"))
    return {
        "quantize": quantize("saq", "--method", "saq", "--no-export"),
        "search": search("hawq", SEARCHERS["hawq"]),
        "analyze": saq("analyze", "saq", "--images", "20", "--starts", "1", "--iterations", "3", *ANALYZED),
        "eval": saq("eval", "saq", *IMAGES),
    }


@pytest.mark.slow
def test_commands_compute_on_the_standin_as_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["saq"])
    found = []
    for folder, context in (("cpu", nullcontext(torch.device("cpu"))), ("standin", standin())):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        with context as device:
            monkeypatch.setattr(process_group, "pick_device", lambda _, device=device: device)
            found.append(commands())
    assert differences(*found) == []


# The script.


@pytest.mark.slow
def test_script_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run([*command, "--part", "checks"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["items"]) == set(checks(CPU))
    assert {each["status"] for each in found["items"].values()} == {"passed"}
