"""The latency of every layer in ONNX Runtime on this machine, written as a table of costs, for ``saq profile``.

The whole network is exported in floating point and at each of the given widths, with levels fitted on noise, since
values do not change times. All files are run in turns, each once per round, once with the runtime's profile, which
gives the time of every layer, and once without. A layer's cost is the median over rounds. The sum over layers stands
beside the time of the whole file without a profile: if they differ much, a person should not trust the table.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.api.files import metadata_of
from saqcli.api.networks import install, observed, policy_of
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.export import STYLES, ModelMetadata
from saqcli.machine import cores, cpu_name, versions
from saqcli.pipelines.bench import WARM_UP, attention_spelled_out, random_images
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits, parse_bits
from saqcli.quant.calls import Call
from saqcli.quant.cost_tables.table import IN_FLOAT, CostTable
from saqcli.quant.network import Network
from saqcli.serialization import json_text, write_text
from saqcli.target import PAPER, TARGETS, Target
from saqcli.verify.layer_times import REST, ProfiledFile
from saqcli.verify.runtime import runner

WIDTHS = ("w8a8", "w4a8", "w4a4")  # that are measured by default
DIGITS = 6  # decimals of a millisecond in the table: nanoseconds


@dataclass(frozen=True)
class LatencySettings:
    """What is measured.

    Attributes:
        widths: of weights and inputs, such as ``w4a8``, besides floating point; None for those of ``WIDTHS`` that the
            target runs.
        style: of the files, in ``STYLES``; None for the first that the target reads, else ``qdq``.
        threads: threads per operator.
        repeats: rounds.
        batch_size: images.
    """

    widths: tuple[str, ...] | None = None
    style: str | None = None
    threads: int = 1
    repeats: int = 50
    batch_size: int = 1

    def check(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: names the invalid setting.
        """
        for width in self.widths or ():
            parse_bits(width, "widths")
        if self.style is not None:
            STYLES.find(self.style)
        if not 1 <= self.threads <= cores():
            raise ConfigError(f"`threads={self.threads}`: this machine has {cores()}, give 1 to {cores()}")
        if self.repeats < 1:
            raise ConfigError(f"`repeats={self.repeats}`: give at least 1")

    def style_for(self, target: Target) -> str:
        """The style of the files.

        Raises:
            ConfigError: the target does not read it.
        """
        if self.style is not None:
            target.check_styles((self.style,))
        return self.style or (target.styles or ("qdq",))[0]

    def widths_for(self, target: Target) -> tuple[str, ...]:
        """The widths of the files; the most bits that the target has, if it runs none of ``WIDTHS``."""
        if self.widths is not None:
            return tuple(dict.fromkeys(self.widths))
        able = [str(each) for each in map(parse_bits, WIDTHS) if _runs(target, each)]
        return tuple(able) or (f"w{max(target.weights.bits)}a{max(target.inputs.bits)}",)


def _runs(target: Target, bits: LayerBits) -> bool:
    return bits.weight in target.weights.bits and bits.activation in target.inputs.bits


@dataclass
class Latency:
    """The result.

    Attributes:
        model: name of the network.
        settings: as given.
        style: of the files.
        target: name of the target.
        widths: of the files, in the order of columns; ``float`` first.
        layers: milliseconds of every layer by name and its own widths in the file, medians.
        columns: the same by file; layers with fixed bits have these in all of them.
        rest: milliseconds of what belongs to no layer, by file.
        sums: of the medians of all layers and the rest, by file.
        whole: milliseconds of the whole file without a profile, by file.
        least: the least of them, which other load on the machine hardly changes.
    """

    model: str
    settings: LatencySettings
    style: str
    target: str
    widths: tuple[str, ...]
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    least: dict[str, float] = field(default_factory=dict)

    @property
    def table(self) -> CostTable:
        """The table of costs; what is no layer costs its mean over the quantized files."""
        quantized = [self.rest[width] for width in self.widths if width != IN_FLOAT]
        return CostTable(
            unit="ms",
            layers={
                name: {width: round(cost, DIGITS) for width, cost in costs.items()}
                for name, costs in self.layers.items()
            },
            other=round(float(np.mean(quantized)), DIGITS),
            about=self.about,
        )

    @property
    def about(self) -> dict[str, Any]:
        """Where the costs come from."""
        return {
            "model": self.model,
            "cpu": cpu_name(),
            "cores": cores(),
            "threads": self.settings.threads,
            "batch_size": self.settings.batch_size,
            "style": self.style,
            **({} if self.target == PAPER else {"target": self.target}),
            "rounds": self.settings.repeats,
            "versions": versions() | {"saq": __version__},
            "sum_ms": {width: round(value, DIGITS) for width, value in self.sums.items()},
            "whole_file_ms": {width: round(value, DIGITS) for width, value in self.whole.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        return {
            "model": self.model,
            "widths": list(self.widths),
            "columns": self.columns,
            "rest_ms": self.rest,
            "sum_ms": self.sums,
            "whole_file_ms": self.whole,
            "least_whole_file_ms": self.least,
            "about": self.about,
        }

    def write(self, path: Path) -> None:
        """Write the table of costs to ``path``."""
        write_text(path, json_text(self.table.model_dump(), indent=1) + "\n")


def measure_latency(
    network: Network,
    settings: LatencySettings,
    progress: Progress,
    scheme: convert.Scheme | None = None,
    target: Target | None = None,
) -> Latency:
    """Export a network at every width and measure its layers.

    Args:
        network: wrapped and traced, with the junctions of the target, on the CPU; not changed.
        settings: what is measured.
        progress: reports exports and rounds.
        scheme: the quantizers of the files; None for the defaults.
        target: which chooses style and widths that ``settings`` leave open; None for ``paper``.

    Raises:
        ConfigError: invalid settings, or a style that the target does not read.
        UnsupportedModel: the network cannot be exported, or the target does not run a width.
    """
    settings.check()
    target, scheme = target or TARGETS[PAPER], scheme or convert.Scheme()
    found = Latency(network.name, settings, settings.style_for(target), target.name, (IN_FLOAT,))
    found.widths += settings.widths_for(target)
    policies: dict[str, BitConfig | None] = {IN_FLOAT: None}
    for width in found.widths[1:]:
        wanted = policy_of(network, bits=width)
        target.check_policy(wanted.layers)
        policies[width] = wanted
    layers = [layer.name for layer in network.costs.layers]
    images = random_images(settings.batch_size, image_size(network))
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        paths = {width: Path(folder) / f"{width}.onnx" for width in found.widths}
        with progress.task("exporting", len(paths)) as task:
            for width, policy in policies.items():
                if policy is None:
                    _export_float(network, found.style, paths[width])
                else:
                    _export_quantized(network, scheme, policy, found.style, paths[width])
                task.advance()
        profiled = {width: ProfiledFile(path, settings.threads, layers) for width, path in paths.items()}
        plain = {width: runner(path, settings.threads) for width, path in paths.items()}
        with progress.task("measuring", settings.repeats) as task:
            whole = _in_turns(profiled, plain, images, settings.repeats, task.advance)
        runs = {width: file.layer_seconds()[WARM_UP:] for width, file in profiled.items()}
    _fill(found, network, policies, runs, whole)
    return found


def image_size(network: Network) -> tuple[int, int, int]:
    """The size of an image (C, H, W).

    Raises:
        UnsupportedModel: the network does not take one batch of images.
    """
    shapes = network.traced.inputs
    if len(shapes) != 1 or len(shapes[0]) != 3:
        raise UnsupportedModel(f"{network.name} does not take one batch of images, and cannot be exported")
    channels, height, width = shapes[0]
    return channels, height, width


def _in_turns(
    profiled: dict[str, ProfiledFile],
    plain: dict[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    rounds: int,
    advance: Callable[[], object],
) -> dict[str, list[float]]:
    """Run all files in rounds, in reverse order every second round; seconds of the runs without a profile."""
    seconds: dict[str, list[float]] = {width: [] for width in plain}
    order = list(plain)
    for number in range(WARM_UP + rounds):
        for width in order:
            plain[width](images)  # refills the caches
            start = time.perf_counter()
            plain[width](images)
            if number >= WARM_UP:
                seconds[width].append(time.perf_counter() - start)
            profiled[width].run(images)
        order.reverse()
        if number >= WARM_UP:
            advance()
    return seconds


def _fill(
    found: Latency,
    network: Network,
    policies: dict[str, BitConfig | None],
    runs: dict[str, list[dict[str, float]]],
    whole: dict[str, list[float]],
) -> None:
    """Add the figures of all files to ``found``."""

    def median(width: str, name: str) -> float:
        return 1e3 * float(np.median([run.get(name, 0.0) for run in runs[width]]))

    for width, policy in policies.items():
        column = {layer.name: median(width, layer.name) for layer in network.costs.layers}
        for name, cost in column.items():
            own = IN_FLOAT if policy is None else str(policy.layers[name])
            found.layers.setdefault(name, {}).setdefault(own, cost)
        found.columns[width], found.rest[width] = column, median(width, REST)
        found.sums[width] = sum(column.values()) + found.rest[width]
        found.whole[width] = 1e3 * float(np.median(whole[width]))
        found.least[width] = 1e3 * min(whole[width])


def _export_float(network: Network, style: str, path: Path) -> None:
    model = copy.deepcopy(network.model).cpu().eval()
    convert.unwrap(model)
    metadata = ModelMetadata(
        saq_version=__version__,
        build={"name": network.name},
        preprocessing={},
        policy=BitConfig(model=network.name, layers={}),
        scheme=convert.Scheme(),
        signed={},
        routed={},
    )
    with attention_spelled_out():
        _export(style, model, network, path, metadata)


def _export_quantized(
    network: Network, scheme: convert.Scheme, policy: BitConfig, style: str, path: Path
) -> None:
    model = copy.deepcopy(network.model).cpu().eval()
    copied = replace(network, model=model)
    example = Call((random_images(2, image_size(network)),))
    install(copied, example, scheme, policy, observed(model, [example], 0, SILENT, scheme=scheme))
    _export(style, model, network, path, metadata_of(model))


def _export(style: str, model: nn.Module, network: Network, path: Path, metadata: ModelMetadata) -> None:
    example = torch.zeros(2, *image_size(network))
    STYLES.find(style)().export(model, example, path, metadata)
