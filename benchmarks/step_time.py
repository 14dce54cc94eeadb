"""Seconds of a training step: float, QAT and SAQ, as the product runs them by default and in every mode.

    python benchmarks/step_time.py [--model saq/resnet20] [--batch-size 128] [--quick] [--json]
    python benchmarks/step_time.py --variants qat_eager,qat_compiled

A variant is ``METHOD`` (the settings that ``saq quantize`` trains with by default) or ``METHOD_MODE``, a few settings
of the training section. The trainer of the product makes its step. All variants take turns on one batch, so that other
work on the machine disturbs all of them; the figure of a variant is its fastest round.

Peak memory is that of one step above weights, optimizer and images, as torch's allocator counts it.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from common import Step, add_json, add_timing, facts, in_turns, peak_megabytes, plain_parser, show
from torch import Tensor

from saqcli.api.networks import install
from saqcli.cli.quantize import EFFICIENT
from saqcli.config import ModelSection, RunConfig, TrainingSection, resolve
from saqcli.pipelines.calibration import scheme_of
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.process_group import pick_device
from saqcli.progress import SILENT
from saqcli.quant.bits import parse_bits
from saqcli.quant.calibration import observe
from saqcli.quant.calls import Call
from saqcli.training.optimizer import in_float
from saqcli.training.trainer import Trainer

IMAGES = 50_000  # of the training set whose fine-tuning the settings ``auto`` see: CIFAR's
WARM_UP = 2


@dataclass(frozen=True)
class Variant:
    """What is trained, and how.

    Attributes:
        settings: of the run, by their paths.
        quantized: whether the network has quantizers.
        repeats: successive steps that are one measurement.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    quantized: bool = True
    repeats: int = 1


METHODS = {
    "float": Variant(quantized=False),
    "qat": Variant({"training.method": "qat"}),
    "saq": Variant({"training.method": "saq"}),
    "efficient": Variant({"training.method": "saq", **EFFICIENT}),
    "saq_norms": Variant({"training.method": "saq", "training.minimizer": {"perturb": ["norms"]}}),
    "saq_interval_5": Variant({"training.method": "saq", "training.sam_interval": 5}, repeats=5),
    "saq_ascent_bf16": Variant({"training.method": "saq", "training.ascent_precision": "bfloat16"}),
    "lsq": Variant({"training.method": "qat", "quantization.quantizer": "lsq"}),
    "lsq_plus": Variant({"training.method": "qat", "quantization.quantizer": "lsq_plus"}),
    "pact": Variant({"training.method": "qat", "quantization.quantizer": "pact"}),
}
EAGER = {"training.compile": "off", "training.memory_format": "contiguous", "training.precision": "float32"}
COMPILED = {**EAGER, "training.compile": "on"}
CHANNELS_LAST = {"training.memory_format": "channels_last"}
BF16 = {"training.precision": "bfloat16"}
MODES: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "channels_last": EAGER | CHANNELS_LAST,
    "bf16": EAGER | BF16,
    "bf16_channels_last": EAGER | BF16 | CHANNELS_LAST,
    "compiled": COMPILED,
    "compiled_channels_last": COMPILED | CHANNELS_LAST,
    "compiled_bf16": COMPILED | BF16,
}
QUICK = """
    float qat saq efficient
    float_eager qat_eager saq_eager efficient_eager float_compiled qat_compiled saq_compiled
    float_bf16 qat_bf16 float_channels_last qat_channels_last
""".split()
FULL = """
    saq_bf16 saq_channels_last float_bf16_channels_last qat_bf16_channels_last
    efficient_compiled float_compiled_bf16 qat_compiled_bf16
    saq_norms_eager saq_interval_5_eager saq_ascent_bf16_eager lsq_eager lsq_plus_eager pact_eager
    lsq_plus_compiled saq_norms_compiled
""".split()


def variant_of(name: str) -> Variant:
    """The variant with this name.

    Raises:
        ValueError: there is none.
    """
    for method in sorted(METHODS, key=len, reverse=True):
        mode = name.removeprefix(method).removeprefix("_")
        if name in (method, f"{method}_{mode}") and mode in ("", *MODES):
            found = METHODS[method]
            return Variant(found.settings | MODES.get(mode, {}), found.quantized, found.repeats)
    raise ValueError(
        f"{name} is no variant: give METHOD or METHOD_MODE; methods are {', '.join(METHODS)}, "
        f"modes {', '.join(MODES)}"
    )


class OneBatch:
    """A training set that is one batch over and over, as long as an epoch of ``IMAGES`` images."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = (images, labels)

    def __len__(self) -> int:
        return max(1, IMAGES // len(self.batch[1]))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * len(self))


def random_batch(size: int, shape: tuple[int, ...], classes: int, device: torch.device) -> OneBatch:
    """Normal images of ``shape`` (C, H, W) and random labels, the same ones in every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, *shape, generator=generator).to(device)
    return OneBatch(images, torch.randint(classes, (size,), generator=generator).to(device))


def configuration(model: str, variant: Variant, side: int | None = None, bits: str = "4") -> RunConfig:
    """The settings of a run of ``saq quantize``, on images of ``side`` pixels (None: the network's own)."""
    options = {
        "model.name": model,
        "model.pretrained": False,
        "model.input_size": side,
        "quantization.bits": bits,
    }
    return resolve(options=options | _known(variant.settings))


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that this version has."""
    return {k: v for k, v in settings.items() if k.rpartition(".")[2] not in OUTSIDE}


OUTSIDE = {"compile", "memory_format"} - set(TrainingSection.model_fields)


def make_trainer(config: RunConfig, batch_size: int, device: torch.device, variant: Variant) -> Trainer:
    """The trainer of a network with random weights on one batch; without quantizers it takes plain steps."""
    quantized = variant.quantized
    loaded = load_float(config.model, SILENT)
    shape = loaded.preprocessing.input_size
    batches = random_batch(batch_size, shape, loaded.num_classes, device)
    training, model = config.training, loaded.model
    if quantized:
        network = wrap_and_trace(loaded)
        assert config.quantization.bits is not None
        policy = network.costs.uniform(network.name, parse_bits(config.quantization.bits))
        example = Call((batches.batch[0][:32].cpu(),))
        found = observe(model.eval(), [example.args[0]])
        install(network, example, scheme_of(config), policy, found)
    else:
        training = in_float(training, batch_size)
    model.to(device).train()
    if "memory_format" in OUTSIDE and variant.settings.get("training.memory_format") == "channels_last":
        for p in model.parameters():
            if p.dim() == 4:
                p.data = p.data.to(memory_format=torch.channels_last)
        batches.batch = (batches.batch[0].to(memory_format=torch.channels_last), batches.batch[1])
    if "compile" in OUTSIDE and variant.settings.get("training.compile") == "on":
        model.compile()
    return Trainer(model, batches, training, num_classes=loaded.num_classes, image_size=max(shape[1:]))


def side_of(model: str) -> int:
    """Larger side of the network's own input, in pixels."""
    return max(load_float(ModelSection(name=model, pretrained=False), SILENT).preprocessing.input_size[1:])


def stepper(trainer: Trainer) -> Step:
    """A function that takes one step of ``trainer``."""
    images, labels = trainer.batches.batch  # type: ignore[attr-defined]
    return lambda: trainer._stepper(images, labels)


def measure(names: list[str], wanted: argparse.Namespace) -> dict[str, Any]:
    """Fastest seconds of every variant, None where one does not run; and what is known of each."""
    device = pick_device(wanted.device)
    steps: dict[str, Step] = {}
    result: dict[str, Any] = dict.fromkeys(names)
    warm_up, errors = dict[str, float](), dict[str, str]()
    for name in names:
        variant = variant_of(name)
        start = time.perf_counter()
        try:
            config = configuration(wanted.model, variant, wanted.side, wanted.bits)
            trainer = make_trainer(config, wanted.batch_size, device, variant)
            step = stepper(trainer)
            for _ in range(WARM_UP * variant.repeats):
                step()
        except Exception as error:  # a variant that does not run must not stop the others
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        steps[name], warm_up[name] = step, round(time.perf_counter() - start, 2)
        print(f"{name}: ready after {warm_up[name]:.1f} s", file=sys.stderr)
    repeats = {name: variant_of(name).repeats for name in steps}
    times = in_turns(steps, wanted.rounds, wanted.clock, repeats)
    result |= {name: min(values) for name, values in times.items()}
    return {
        **result,
        "median": {name: median(values) for name, values in times.items()},
        "peak_mb": {
            name: round(peak_megabytes(step, device), 1)
            for name, step in steps.items()
            if not wanted.quick or name.startswith(("float", "qat"))
        },
        "warm_up": warm_up,
        "errors": errors,
        "variants": names,
        "model": wanted.model,
        "batch_size": wanted.batch_size,
        "side": wanted.side or side_of(wanted.model),
        "bits": wanted.bits,
        "device": str(device),
        "clock": wanted.clock,
        **facts("step_time"),
    }


def arguments() -> argparse.Namespace:
    """The options."""
    options = plain_parser(__doc__)
    add_timing(options)
    options.add_argument("--bits", default="4")
    options.add_argument("--variants", help="separated by commas; a set by default")
    options.add_argument("--quick", action="store_true", help="the main variants, in about three minutes")
    add_json(options)
    return options.parse_args()


def main() -> None:
    """Measure and print."""
    wanted = arguments()
    names = wanted.variants.split(",") if wanted.variants else QUICK if wanted.quick else [*QUICK, *FULL]
    warnings.simplefilter("ignore")
    found = measure(names, wanted)
    lines = [f"{wanted.model}, batch {wanted.batch_size}, {found['device']}, {found['threads']} threads"]
    for name in names:
        if name in found["errors"]:
            lines.append(f"{name:28s} {found['errors'][name]}")
            continue
        peak = found["peak_mb"].get(name)
        memory = "" if peak is None else f" {peak:8.1f} MB above the weights"
        lines.append(f"{name:28s} {1000 * found[name]:8.1f} ms{memory}")
    show(wanted, found, "\n".join(lines))


if __name__ == "__main__":
    main()
