"""The step of a peer's fake-quantized network beside the float and the QAT step of saq, in one process, in turns.

Every script of this folder turns the same float network into that of one peer and hands it to ``main``. Optimizer,
loss and loop are saq's for all of them, eager, so that only the quantizers differ. The result is one JSON object; a
peer that does not run gives its reason in the place of seconds.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import Step, add_timing, facts, in_turns, peak_megabytes, plain_parser
from step_time import WARM_UP, configuration, make_trainer, random_batch, side_of, stepper, variant_of
from torch import Tensor, nn

from saqcli.pipelines.setup import load_float
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.serialization import json_text
from saqcli.training.optimizer import in_float
from saqcli.training.trainer import Trainer

Quantize = Callable[[nn.Module, Tensor], nn.Module]


def replace_layers(model: nn.Module, build: Callable[[nn.Module, bool, bool], nn.Module]) -> nn.Module:
    """``model`` with what ``build`` returns in the place of every convolution and linear layer.

    Args:
        model: changed in place.
        build: gets the layer, whether its inputs may be negative (the first layer), and whether it keeps 8 bits
            (the first and the last).
    """
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for name in names:
        ends = name in (names[0], names[-1])
        model.set_submodule(name, build(model.get_submodule(name), name == names[0], ends))
    return model


def peer_trainer(quantize: Quantize, wanted: argparse.Namespace, device: torch.device) -> Trainer:
    """A trainer that takes plain steps with the peer's network, calibrated on the images of the batch."""
    config = configuration(wanted.model, variant_of("float_eager"), wanted.side)
    loaded = load_float(config.model, SILENT)
    shape = loaded.preprocessing.input_size
    batches = random_batch(wanted.batch_size, shape, loaded.num_classes, device)
    model = quantize(loaded.model.to(device), batches.batch[0])
    training = in_float(config.training, wanted.batch_size)
    return Trainer(model, batches, training, num_classes=loaded.num_classes, image_size=max(shape[1:]))


def measure(quantize: Quantize, wanted: argparse.Namespace) -> dict[str, Any]:
    """Fastest seconds of the float step, of saq's QAT step and of the peer's."""
    device, reason = pick_device(wanted.device), None
    steps: dict[str, Step] = {}
    for name in ("float_eager", "qat_eager"):
        variant = variant_of(name)
        config = configuration(wanted.model, variant, wanted.side)
        steps[name] = stepper(make_trainer(config, wanted.batch_size, device, variant))
    try:
        steps["peer"] = stepper(peer_trainer(quantize, wanted, device))
        steps["peer"]()
    except Exception as error:  # the reason is the result
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        steps.pop("peer", None)
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times = in_turns(steps, wanted.rounds, wanted.clock)
    return {
        "peer": None,
        **{name: min(values) for name, values in times.items()},
        "median": {name: median(values) for name, values in times.items()},
        "peak_mb": {name: round(peak_megabytes(step, device), 1) for name, step in steps.items()},
        "reason": reason,
        "clock": wanted.clock,
        "model": wanted.model,
        "batch_size": wanted.batch_size,
        "side": wanted.side or side_of(wanted.model),
        "device": str(device),
    }


def main(name: str, package: str, bits: str, quantize: Quantize) -> None:
    """Measure the peer and print the result.

    Args:
        name: of the peer.
        package: that it is installed by; its version is recorded.
        bits: that its fake quantization has, such as ``w4a4``.
        quantize: float model in training mode and images (N, C, H, W) to the peer's trainable network.
    """
    options = plain_parser(None)
    add_timing(options)
    wanted = options.parse_args()
    warnings.simplefilter("ignore")
    with redirect_stdout(sys.stderr):  # peers report their progress
        found = measure(quantize, wanted)
    about = {"name": name, "version": version(package), "bits": bits}
    print(json_text({**found, **about, **facts(f"peers/{Path(sys.argv[0]).stem}")}))


def calibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """``model`` after one forward pass in evaluation mode, which observers see; in training mode."""
    model.eval()
    with torch.no_grad():
        model(images)
    return model.train()
