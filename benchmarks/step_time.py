"""Time of a training step as a ratio to QAT: float, SAQ, cheaper SAQ.

    python benchmarks/step_time.py [--model saq/resnet20] [--batch-size 128] [--rounds 5]

All methods use the same batch. A round runs five steps of each in turn, so that other work on the machine disturbs all
of them; medians over the rounds are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from saqcli.config import ModelSection
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.calibration import fit, observe
from saqcli.quant.convert import Scheme
from saqcli.training.minimizers import MINIMIZERS
from saqcli.training.objective import Objective, as_chunks

STEPS = 5  # per round; with an interval of 5 there is one ascent per round

# Method, share of the images in the ascent, whether the ascent is in bfloat16, options of the minimizer.
VARIANTS: dict[str, tuple[str, float, bool, dict[str, Any]]] = {
    "qat": ("qat", 1.0, False, {}),
    "saq": ("saq", 1.0, False, {}),
    "saq, ascent in bfloat16": ("saq", 1.0, True, {}),
    "saq interval 5": ("saq", 1.0, False, {"interval": 5}),
    "saq interval 5, reuse 0.7": ("saq", 1.0, False, {"interval": 5, "reuse": 0.7}),
    "saq fraction 0.25": ("saq", 0.25, False, {}),
    "saq fraction 0.25, bfloat16": ("saq", 0.25, True, {}),
}


def stepper(
    model: str, name: str | None, images: torch.Tensor, labels: torch.Tensor, bits: int
) -> Callable[[], None]:
    """A function that runs one step of a variant (None: float) on the batch."""
    method, fraction, half, options = VARIANTS[name or "qat"]
    loaded = load_float(ModelSection(name=model, pretrained=False), SILENT)
    net = loaded.model
    if name is not None:
        network = wrap_and_trace(loaded)
        net.to(images.device)
        policy = network.costs.uniform(network.name, LayerBits(weight=bits, activation=bits))
        statistics_ = observe(net, [images[:32]])
        convert.install(net, Scheme(), policy, {name: s.signed for name, s in statistics_.items()})
        fit(net, statistics_)
    net.to(images.device).train()
    base = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    if method == "saq":
        options = {"rho": 0.9, **options}
    minimizer = MINIMIZERS[method](net, base, **options)
    objective = Objective(
        nn.CrossEntropyLoss(),
        ascent_fraction=fraction,
        ascent_autocast=(lambda: torch.autocast(images.device.type, torch.bfloat16)) if half else None,
    )

    def step() -> None:
        minimizer.step(as_chunks(objective.pieces(net, images, labels, chunk=len(labels)))).item()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="saq/resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    wanted = parser.parse_args()
    device = pick_device(wanted.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(wanted.batch_size, 3, wanted.side, wanted.side, generator=generator).to(device)
    labels = torch.randint(10, (wanted.batch_size,), generator=generator).to(device)
    steps = {
        name or "float": stepper(wanted.model, name, images, labels, wanted.bits)
        for name in (None, *VARIANTS)
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(wanted.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            if round_:  # the first one warms up
                times[name].append((time.perf_counter() - start) / STEPS)
    qat = statistics.median(times["qat"])
    print(f"{wanted.model}, batch {wanted.batch_size}, {device}, {torch.get_num_threads()} threads")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:30s} {1000 * median:8.1f} ms   {median / qat:5.2f} x QAT")


if __name__ == "__main__":
    main()
