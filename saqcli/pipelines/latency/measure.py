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
from dataclasses import dataclass, field
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
from saqcli.quant.bits import BitConfig, parse_bits
from saqcli.quant.calls import Call
from saqcli.quant.cost_tables.table import IN_FLOAT, CostTable
from saqcli.quant.network import Network
from saqcli.serialization import json_text, write_text
from saqcli.verify.layer_times import REST, ProfiledFile
from saqcli.verify.runtime import runner

DIGITS = 6  # decimals of a millisecond in the table: nanoseconds


@dataclass(frozen=True)
class LatencySettings:
    """What is measured.

    Attributes:
        widths: of weights and inputs, such as ``w4a8``, besides floating point.
        style: of the files, in ``STYLES``.
        threads: threads per operator.
        repeats: rounds.
        batch_size: images.
    """

    widths: tuple[str, ...] = ("w8a8", "w4a8", "w4a4")
    style: str = "qdq"
    threads: int = 1
    repeats: int = 50
    batch_size: int = 1

    def check(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: names the invalid setting.
        """
        for width in self.widths:
            parse_bits(width, "widths")
        STYLES.find(self.style)
        if not 1 <= self.threads <= cores():
            raise ConfigError(f"`threads={self.threads}`: this machine has {cores()}, give 1 to {cores()}")
        if self.repeats < 1:
            raise ConfigError(f"`repeats={self.repeats}`: give at least 1")


@dataclass
class Latency:
    """The result.

    Attributes:
        model: name of the network.
        settings: as given.
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
            "style": self.settings.style,
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


def measure_latency(network: Network, settings: LatencySettings, progress: Progress) -> Latency:
    """Export a network at every width and measure its layers.

    Args:
        network: wrapped and traced, on the CPU; not changed.
        settings: what is measured.
        progress: reports exports and rounds.

    Raises:
        ConfigError: invalid settings.
        UnsupportedModel: the network cannot be exported.
    """
    settings.check()
    layers = [layer.name for layer in network.costs.layers]
    images = random_images(settings.batch_size, image_size(network))
    widths = (IN_FLOAT, *dict.fromkeys(settings.widths))
    policies: dict[str, BitConfig | None] = {IN_FLOAT: None}
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        paths = {width: Path(folder) / f"{width}.onnx" for width in widths}
        with progress.task("exporting", len(widths)) as task:
            _export_float(network, settings.style, paths[IN_FLOAT])
            task.advance()
            for width in widths[1:]:
                policies[width] = _export_quantized(network, width, settings.style, paths[width])
                task.advance()
        profiled = {width: ProfiledFile(path, settings.threads, layers) for width, path in paths.items()}
        plain = {width: runner(path, settings.threads) for width, path in paths.items()}
        with progress.task("measuring", settings.repeats) as task:
            whole = _in_turns(profiled, plain, images, settings.repeats, task.advance)
        runs = {width: file.layer_seconds()[WARM_UP:] for width, file in profiled.items()}
    return _result(network, settings, widths, policies, runs, whole)


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


def _result(
    network: Network,
    settings: LatencySettings,
    widths: tuple[str, ...],
    policies: dict[str, BitConfig | None],
    runs: dict[str, list[dict[str, float]]],
    whole: dict[str, list[float]],
) -> Latency:
    found = Latency(network.name, settings, widths)

    def median(width: str, name: str) -> float:
        return 1e3 * float(np.median([run.get(name, 0.0) for run in runs[width]]))

    for width in widths:
        policy = policies[width]
        column = {layer.name: median(width, layer.name) for layer in network.costs.layers}
        for name, cost in column.items():
            own = IN_FLOAT if policy is None else str(policy.layers[name])
            found.layers.setdefault(name, {}).setdefault(own, cost)
        found.columns[width], found.rest[width] = column, median(width, REST)
        found.sums[width] = sum(column.values()) + found.rest[width]
        found.whole[width] = 1e3 * float(np.median(whole[width]))
        found.least[width] = 1e3 * min(whole[width])
    return found


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


def _export_quantized(network: Network, width: str, style: str, path: Path) -> BitConfig:
    model = copy.deepcopy(network.model).cpu().eval()
    copied = Network(model, network.name, network.traced, network.costs, network.products)
    example = Call((random_images(2, image_size(network)),))
    policy = policy_of(copied, bits=width)
    install(copied, example, convert.Scheme(), policy, observed(model, [example], 0, SILENT))
    _export(style, model, network, path, metadata_of(model))
    return policy


def _export(style: str, model: nn.Module, network: Network, path: Path, metadata: ModelMetadata) -> None:
    example = torch.zeros(2, *image_size(network))
    STYLES.find(style)().export(model, example, path, metadata)
