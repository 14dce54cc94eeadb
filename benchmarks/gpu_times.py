"""Times on a device: the fake-quantize kernels against the memory's bandwidth, and training steps.

A kernel moves what it must: forward reads and writes a tensor; forward and backward together read it twice, read the
gradient once, and write two tensors. ``share`` is these bytes over the time, relative to the bandwidth of ``clone``.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from gpu_checks import Check, CheckFailed, Figures, Place
from torch import Tensor
from torch.nn import functional as F

from saqcli.quant.kernels.use import use_kernels
from saqcli.quant.quantizers import QUANTIZERS

FORWARD, BOTH = 2, 5  # tensors that are read or written
EAGER = "float,qat,saq,efficient," + ",".join(
    f"{method}_{mode}" for mode in ("eager", "channels_last", "bf16") for method in ("float", "qat", "saq")
)
COMPILED = "float_compiled,qat_compiled,saq_compiled,float_eager,qat_kernels,saq_kernels"


def fastest(work: Callable[[], object], place: Place, rounds: int = 20) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(3 if place.quick else rounds):
        wait(place)
        start = time.perf_counter()
        work()
        wait(place)
        times.append(time.perf_counter() - start)
    return min(times)


def wait(place: Place) -> None:
    """For all kernels to end."""
    if place.cuda:
        torch.cuda.synchronize(place.device)


def measure_kernel(name: str, place: Place) -> Figures:
    """The input quantizer ``name`` at 4 bits, forward and with backward, beside ReLU and torch's own kernels."""
    count = 2**16 if place.quick else 2**26
    x = torch.rand(64, count // 64, device=place.device)
    grad = torch.randn_like(x)
    kind = QUANTIZERS[name].activation
    assert kind is not None
    quantizer = kind({4: kind.activation_grid(4, signed=False)}).to(place.device)
    quantizer.fit(x[:, :64])
    fused = copy.deepcopy(quantizer)
    ran = use_kernels(fused, "fused")
    one, zero = torch.ones(1, device=place.device), torch.zeros(1, device=place.device)
    kernels: dict[str, Callable[[Tensor], Tensor]] = {
        "saq": quantizer,
        "saq_fused": fused,
        "relu": F.relu,
        "torch_fixed": lambda x: torch.fake_quantize_per_tensor_affine(x, 1 / 15, 0, 0, 15),
        "torch_learned": lambda x: torch._fake_quantize_learnable_per_tensor_affine(
            x, one / 15, zero, 0, 15, 1.0
        ),
    }
    if place.cuda:
        kernels["saq_compiled"] = torch.compile(quantizer)
    size = x.numel() * x.element_size()
    bandwidth = FORWARD * size / fastest(lambda: x.clone(), place)
    figures: Figures = {
        "bytes": size,
        "bandwidth_of_clone": bandwidth,
        "kernels": ran.kind,
        "why": ran.reason,
    }
    for label, kernel in kernels.items():
        leaf = x.clone().requires_grad_()

        def both(kernel: Callable[[Tensor], Tensor] = kernel, leaf: Tensor = leaf) -> None:
            leaf.grad = None
            kernel(leaf).backward(grad)

        both()
        with torch.no_grad():
            forward = fastest(partial(kernel, x), place)
        whole = fastest(both, place)
        figures[label] = {
            "forward_ms": 1000 * forward,
            "forward_share": FORWARD * size / forward / bandwidth,
            "both_ms": 1000 * whole,
            "both_share": BOTH * size / whole / bandwidth,
        }
    return figures


def run_script(script: str, arguments: list[str], place: Place) -> Figures:
    """The JSON object that another benchmark prints."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run([*command, "--device", str(place.device)], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise CheckFailed(f"{script} ended with {done.returncode}: {done.stderr[-400:]}")
    found: Figures = json.loads(done.stdout)
    return found


def measure_steps(model: str, size: int, variants: str, place: Place) -> Figures:
    """Seconds of training steps, by ``step_time.py``."""
    options = ["--model", model, "--batch-size", str(8 if place.quick else size)]
    options += ["--variants", variants, "--json"]
    return run_script("step_time.py", [*options, "--rounds", "1" if place.quick else "15"], place)


def measure_brevitas(place: Place) -> Figures:
    """The step of Brevitas beside float and QAT."""
    if importlib.util.find_spec("brevitas") is None:
        return {"skipped": "Brevitas is not installed"}
    options = ["--model", "saq/resnet20", "--batch-size", "8" if place.quick else "128"]
    return run_script("peers/brevitas_w4a4.py", [*options, "--rounds", "2" if place.quick else "15"], place)


def times(place: Place) -> dict[str, tuple[Check, float]]:
    """All measurements by name, each with the seconds that it takes on a GPU."""
    found: dict[str, tuple[Check, float]] = {
        f"kernel {name}": (partial(measure_kernel, name), 12.0)
        for name, entry in QUANTIZERS.items()
        if entry.activation is not None
    }
    variants = "float_eager,qat_eager,saq_eager" if place.quick else EAGER
    found["steps saq/resnet20"] = (partial(measure_steps, "saq/resnet20", 128, variants), 35.0)
    found["steps brevitas"] = (measure_brevitas, 20.0)
    if not place.quick:
        found["steps saq/resnet20 compiled"] = (partial(measure_steps, "saq/resnet20", 128, COMPILED), 120.0)
        found["steps timm/resnet18"] = (partial(measure_steps, "timm/resnet18", 256, EAGER), 45.0)
        found["steps timm/resnet18 compiled"] = (
            partial(measure_steps, "timm/resnet18", 256, COMPILED),
            120.0,
        )
    return found
