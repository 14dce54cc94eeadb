"""Time of one training step: float, plain QAT and SAQ on the same batches, as ratios to QAT.

    python benchmarks/step_time.py [--model saq/resnet20] [--batch-size 128] [--steps 12]

The three are interleaved, so that whatever else the machine does disturbs all of them; medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from saqcli.algorithms.minimizers import MINIMIZERS, MicroBatch
from saqcli.config import ModelSection
from saqcli.progress import SILENT
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.calibrate import fit, observe
from saqcli.quant.convert import Scheme
from saqcli.workflows.setup import load_float, pick_device, wrap_and_trace


def stepper(model: str, method: str | None, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that does one step of ``method`` (None: float) on the batch."""
    loaded = load_float(ModelSection(name=model, pretrained=False), SILENT)
    net = loaded.model
    if method is not None:
        network = wrap_and_trace(loaded)
        net.to(images.device)
        policy = network.costs.uniform(network.name, LayerBits(weight=4, activation=4))
        statistics_ = observe(net, [images[:32]])
        convert.install(net, Scheme(), policy, {name: s.signed for name, s in statistics_.items()})
        fit(net, statistics_)
    net.to(images.device).train()
    base = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    options = {"rho": 0.9} if method == "saq" else {}
    minimizer = MINIMIZERS[method or "qat"](net, base, **options)
    chunk = [MicroBatch(lambda *, ascent=False: nn.functional.cross_entropy(net(images), labels), 1.0)]

    def step() -> None:
        minimizer.step([chunk]).item()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="saq/resnet20")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="auto")
    wanted = parser.parse_args()
    device = pick_device(wanted.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(wanted.batch_size, 3, wanted.side, wanted.side, generator=generator).to(device)
    labels = torch.randint(10, (wanted.batch_size,), generator=generator).to(device)
    steps = {name or "float": stepper(wanted.model, name, images, labels) for name in (None, "qat", "saq")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(wanted.steps + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    qat = statistics.median(times["qat"])
    print(f"{wanted.model}, batch {wanted.batch_size}, {device}, {torch.get_num_threads()} threads")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:6s} {1000 * median:8.1f} ms   {median / qat:5.2f} x QAT")


if __name__ == "__main__":
    main()
