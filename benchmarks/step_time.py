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
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from common import (
    Step,
    add_json,
    add_timing,
    facts,
    in_turns,
    peak_megabytes,
    plain_parser,
    show,
    synchronize,
)
from torch import Tensor

from saqcli.allocator import keep_freed_memory
from saqcli.api.networks import install
from saqcli.cli.quantize import EFFICIENT
from saqcli.config import ModelSection, RunConfig, resolve
from saqcli.pipelines.bits import scheme_of
from saqcli.pipelines.setup import load_float, wrap_and_trace
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress, Task
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
WAYS = ("compile", "memory_format", "precision")
EAGER = dict(zip((f"training.{name}" for name in WAYS), ("off", "contiguous", "float32"), strict=True))
COMPILED = {**EAGER, "training.compile": "on"}
KERNELS = {**EAGER, "training.compile": "kernels"}
CHANNELS_LAST = {"training.memory_format": "channels_last"}
BF16 = {"training.precision": "bfloat16"}
MODES: dict[str, dict[str, Any]] = {
    "eager": EAGER,
    "kernels": KERNELS,
    "kernels_channels_last": KERNELS | CHANNELS_LAST,
    "kernels_bf16": KERNELS | BF16,
    "channels_last": EAGER | CHANNELS_LAST,
    "bf16": EAGER | BF16,
    "bf16_channels_last": EAGER | BF16 | CHANNELS_LAST,
    "compiled": COMPILED,
    "compiled_channels_last": COMPILED | CHANNELS_LAST,
    "compiled_bf16": COMPILED | BF16,
}
QUICK = """
    float qat saq efficient
    float_eager qat_eager qat_kernels saq_kernels efficient_kernels
    float_compiled qat_compiled saq_compiled float_bf16 qat_bf16
""".split()
FULL = """
    saq_eager efficient_eager float_channels_last qat_channels_last saq_channels_last saq_bf16
    float_bf16_channels_last qat_bf16_channels_last
    efficient_compiled float_compiled_bf16 qat_compiled_bf16
    lsq_kernels lsq_plus_kernels saq_norms_kernels qat_kernels_channels_last qat_kernels_bf16
    saq_norms_eager saq_interval_5_eager saq_ascent_bf16_eager lsq_eager lsq_plus_eager pact_eager
    lsq_plus_compiled saq_norms_compiled
""".split()


def split(name: str) -> tuple[str, str]:
    """Method and mode of a variant; no mode for the settings by default.

    Raises:
        ValueError: there is no such variant.
    """
    for method in sorted(METHODS, key=len, reverse=True):
        mode = name.removeprefix(method).removeprefix("_")
        if name in (method, f"{method}_{mode}") and mode in ("", *MODES):
            return method, mode
    raise ValueError(
        f"{name} is no variant: give METHOD or METHOD_MODE; methods are {', '.join(METHODS)}, "
        f"modes {', '.join(MODES)}"
    )


def variant_of(name: str) -> Variant:
    """The variant with this name.

    Raises:
        ValueError: there is none.
    """
    method, mode = split(name)
    found = METHODS[method]
    return Variant(found.settings | MODES.get(mode, {}), found.quantized, found.repeats)


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
    return resolve(options=options | variant.settings)


def make_trainer(
    config: RunConfig,
    batch_size: int,
    device: torch.device,
    variant: Variant,
    progress: Progress = SILENT,
) -> Trainer:
    """The trainer of a network with random weights on one batch; without quantizers it takes plain steps."""
    loaded = load_float(config.model, SILENT)
    shape = loaded.preprocessing.input_size
    batches = random_batch(batch_size, shape, loaded.num_classes, device)
    training, model = config.training, loaded.model
    if variant.quantized:
        network = wrap_and_trace(loaded)
        assert config.quantization.bits is not None
        policy = network.costs.uniform(network.name, parse_bits(config.quantization.bits))
        example = Call((batches.batch[0][:32].cpu(),))
        found = observe(model.eval(), [example.args[0]])
        install(network, example, scheme_of(config.quantization), policy, found)
    else:
        ways = {
            name: getattr(training, name) for name in WAYS
        }  # the float steps of a search are always eager
        training = in_float(training, batch_size, **ways)
    model.to(device).train()
    return Trainer(
        model,
        batches,
        training,
        num_classes=loaded.num_classes,
        image_size=max(shape[1:]),
        progress=progress,
    )


def side_of(model: str) -> int:
    """Larger side of the network's own input, in pixels."""
    return max(load_float(ModelSection(name=model, pretrained=False), SILENT).preprocessing.input_size[1:])


def stepper(trainer: Trainer) -> Step:
    """A function that takes one step of ``trainer``."""
    images, labels = trainer.batches.batch  # type: ignore[attr-defined]
    return lambda: trainer._stepper(images, labels)


class Suite:
    """Variants that are ready to be timed.

    Attributes:
        steps: by variant.
        ran_as: how every variant computes: compiled, kernels, memory format and precision.
        same_as: variants that compute as another one of ``steps``, such as the default one, and are not timed again.
        warm_up: seconds until each was ready.
        errors: why a variant does not run.
        notes: what training noted, by variant.
    """

    def __init__(self, wanted: argparse.Namespace, device: torch.device) -> None:
        self.wanted, self.device = wanted, device
        self.steps: dict[str, Step] = {}
        self.ran_as, self.same_as, self.errors = dict[str, str](), dict[str, str](), dict[str, str]()
        self.warm_up: dict[str, float] = {}
        self.notes: dict[str, list[str]] = {}
        self._ways: dict[tuple[str, Way], str] = {}

    def add(self, name: str) -> None:
        """Make and warm up a variant."""
        method, mode = split(name)
        known = self._ways.get((method, way_of(MODES[mode]))) if mode else None
        if known is not None:
            self.same_as[name], self.ran_as[name] = known, self.ran_as[known]
            return
        variant, notes, start = variant_of(name), Notes(), time.perf_counter()
        try:
            config = configuration(self.wanted.model, variant, self.wanted.side, self.wanted.bits)
            trainer = make_trainer(config, self.wanted.batch_size, self.device, variant, notes)
            step = stepper(trainer)
            for _ in range(WARM_UP * variant.repeats):
                step()
            synchronize()
        except Exception as error:  # a variant that does not run must not stop the others
            self.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        if notes.lines:
            self.notes[name] = notes.lines
        ran = trainer.execution
        self.ran_as[name] = str(ran)
        self._ways.setdefault((method, (ran.compiled, ran.kernels, ran.memory_format, ran.precision)), name)
        self.steps[name], self.warm_up[name] = step, round(time.perf_counter() - start, 2)
        print(f"{name}: {ran}, ready after {self.warm_up[name]:.1f} s", file=sys.stderr)

    def filled(self, values: dict[str, Any]) -> dict[str, Any]:
        """``values`` with those of the variants that compute as another one."""
        return values | {name: values[as_] for name, as_ in self.same_as.items() if as_ in values}


class Notes:
    """Progress of which only the notes are kept, such as why a network is not compiled."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, title: str, total: int) -> AbstractContextManager[Task]:
        """A task that ignores all reports."""
        return SILENT.task(title, total)

    def note(self, text: str) -> None:
        """Keep ``text``."""
        self.lines.append(text)


Way = tuple[bool, str, str, str]  # compiled, kernels, memory format, precision


def way_of(mode: dict[str, Any]) -> Way:
    """How a mode computes."""
    compiled, memory_format, precision = (mode[f"training.{name}"] for name in WAYS)
    kernels = "eager" if compiled == "off" else "fused"
    return compiled == "on", kernels, memory_format, precision


def measure(names: list[str], wanted: argparse.Namespace) -> dict[str, Any]:
    """Fastest seconds of every variant, None where one does not run; and what is known of each."""
    device = pick_device(wanted.device)
    suite = Suite(wanted, device)
    for name in names:
        suite.add(name)
    repeats = {name: variant_of(name).repeats for name in suite.steps}
    times = in_turns(suite.steps, wanted.rounds, wanted.clock, repeats)
    peaks = {
        name: round(peak_megabytes(step, device), 1)
        for name, step in suite.steps.items()
        if not wanted.quick or name.startswith(("float", "qat"))
    }
    return {
        **dict.fromkeys(names),
        **suite.filled({name: min(values) for name, values in times.items()}),
        "median": suite.filled({name: median(values) for name, values in times.items()}),
        "peak_mb": suite.filled(peaks),
        "ran_as": suite.ran_as,
        "warm_up": suite.warm_up,
        "errors": suite.errors,
        "notes": suite.notes,
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
    keep_freed_memory()  # as the command line does
    torch._dynamo.config.recompile_limit = 64  # of all variants together; the rest would silently run eager
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
        lines.append(f"{name:28s} {1000 * found[name]:8.1f} ms{memory:34s}   {found['ran_as'][name]}")
    show(wanted, found, "\n".join(lines))


if __name__ == "__main__":
    main()
