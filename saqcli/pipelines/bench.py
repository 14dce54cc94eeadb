"""Benchmark: latency of a network, float and quantized, in PyTorch and in ONNX Runtime.

A run or a safetensors file gives all four targets. An ONNX file holds no PyTorch model, but names the float
architecture, whose speed does not depend on its weights. Images are random, since their values do not change the time.

The runs of the targets are interleaved, so that other load on the machine slows all of them alike. They are measured on
the CPU for every batch size and number of threads.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.api.sources import EVALUATED, find_source, named_builder, named_file
from saqcli.config import ModelSection
from saqcli.errors import ConfigError, RunDirectoryError, UnsupportedModel
from saqcli.export import STYLES, ModelMetadata
from saqcli.export.model_metadata import read_onnx_metadata
from saqcli.export.restore import restore
from saqcli.machine import cores, cpu_name, versions
from saqcli.models.load import build_architecture
from saqcli.models.own import OwnNetwork, check_named
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.setup import load_float
from saqcli.progress import Progress, Task
from saqcli.quant import convert
from saqcli.quant.bits import MAX_BITS, BitConfig
from saqcli.random_state import torch_threads
from saqcli.runs.directory import RunDirectory
from saqcli.verify.kernels import Operator
from saqcli.verify.runtime import Kernels, OnnxFile, open_file, runner

WARM_UP = 3  # untimed runs of each function
STYLE = "qdq"  # of the ONNX files that are timed


@dataclass(frozen=True)
class Timing:
    """Durations of one function.

    Attributes:
        median_s: median in seconds.
        spread_s: interquartile range in seconds.
        runs: number of timed runs.
    """

    median_s: float
    spread_s: float
    runs: int


def time_in_turns(
    targets: Mapping[str, Callable[[], object]],
    rounds: int,
    task: Task,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in rounds: each runs once per round, in reverse order every second round.

    Every timed run follows an untimed one, which refills the caches after the other functions.

    Args:
        targets: functions by name.
        rounds: timed runs of each, at least 1.
        task: advances with every round.
        clock: monotonic clock in seconds.
    """
    for run in targets.values():
        for _ in range(WARM_UP):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in targets}
    order = list(targets)
    for _ in range(rounds):
        for name in order:
            run = targets[name]
            run()
            start = clock()
            run()
            seconds[name].append(clock() - start)
        order.reverse()
        task.advance()
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(seconds: list[float]) -> Timing:
    """Median and interquartile range of at least one duration."""
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(median), float(high - low), len(seconds))


PYTORCH, ONNX = "PyTorch", "ONNX Runtime"
TORCH_FLOAT, TORCH_QUANTIZED = "PyTorch float", "PyTorch fake-quant"
ONNX_FLOAT, ONNX_QUANTIZED = "ONNX float", "ONNX quantized"


@dataclass(frozen=True)
class BenchTarget:
    """One way to run the network.

    Attributes:
        name: name in the table.
        runtime: ``PyTorch`` or ``ONNX Runtime``.
        size_bytes: size of the file; for a float PyTorch model, of its tensors.
        open: maps a number of threads to a function from images (N, C, H, W) to logits; the caller sets PyTorch's
            number of threads.
        kernels: matrix kernels of ONNX Runtime; None for PyTorch.
        batch: the only accepted batch size; None if any is accepted.
        operators: as ONNX Runtime runs them; empty for PyTorch.
    """

    name: str
    runtime: str
    size_bytes: int
    open: Callable[[int], Callable[[Tensor], Tensor]]
    kernels: Kernels | None = None
    batch: int | None = None
    operators: tuple[Operator, ...] = ()


@dataclass
class Lineup:
    """All ways to run one network.

    Attributes:
        model: name of the network.
        input_size: size of one image, (C, H, W).
        few_bits: whether a layer has fewer than 8 bits.
        targets: in the order of the table.
        notes: missing targets with reasons, one line each.
    """

    model: str
    input_size: tuple[int, int, int]
    few_bits: bool = False
    targets: list[BenchTarget] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_torch(self, name: str, model: nn.Module, size_bytes: int) -> None:
        """Add a PyTorch model, on the CPU."""
        model.cpu().eval().requires_grad_(False)
        self.targets.append(BenchTarget(name, PYTORCH, size_bytes, lambda threads: model))

    def add_onnx(self, name: str, file: OnnxFile) -> None:
        """Add an ONNX file."""
        path = file.path
        opener = lambda threads: runner(path, threads)  # noqa: E731 - as in add_torch
        size = path.stat().st_size
        self.targets.append(BenchTarget(name, ONNX, size, opener, file.kernels, file.batch, file.operators))

    def add_exported(self, name: str, model: nn.Module, path: Path, metadata: ModelMetadata) -> None:
        """Export a model to ``path`` and add the file, or a note if it cannot be exported."""
        try:
            STYLES[STYLE]().export(model, torch.zeros(2, *self.input_size), path, metadata)
        except UnsupportedModel as error:
            self.notes.append(f"no {name}: {error}")
        else:
            self.add_onnx(name, open_file(path))


def open_lineup(
    source: str, section: ModelSection, folder: Path, progress: Progress, builder: str | None = None
) -> Lineup:
    """Everything that can be measured for ``source``.

    Args:
        source: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        folder: folder for temporary exports.
        progress: receives notes.
        builder: name of the user's own network that a run or file was made from.

    Raises:
        SaqError: unknown or damaged source.
    """
    found = find_source(source, EVALUATED)
    path, own = named_file(found, section), named_builder(found, builder)
    if path is None:
        return _of_name(section, folder, progress)
    if path.suffix == ".onnx":
        return _of_onnx(path, folder, own)
    return _of_safetensors(path, found.run, folder, own)


def _of_name(section: ModelSection, folder: Path, progress: Progress) -> Lineup:
    loaded = load_float(section, progress)
    lineup = Lineup(loaded.name, loaded.preprocessing.input_size)
    lineup.notes.append(f"no quantized rows: {loaded.name} is a float model")
    _add_float(lineup, loaded.model, loaded.build, folder)
    return lineup


def _of_onnx(path: Path, folder: Path, own: OwnNetwork | None) -> Lineup:
    metadata = read_onnx_metadata(path)
    lineup = _from_metadata(metadata)
    lineup.notes.append(f"no {TORCH_QUANTIZED}: an ONNX file holds no PyTorch model")
    check_named(str(metadata.build.get("name")), own, str(path))
    _add_float(lineup, build_architecture(metadata.build, own), metadata.build, folder)
    lineup.add_onnx(ONNX_QUANTIZED, open_file(path))
    return lineup


def _of_safetensors(path: Path, run: RunDirectory | None, folder: Path, own: OwnNetwork | None) -> Lineup:
    files = _onnx_files(run) if run else []
    model, metadata = restore(path, own)
    lineup = _from_metadata(metadata)
    plain = copy.deepcopy(model)
    convert.unwrap(plain)
    _add_float(lineup, plain, metadata.build, folder)
    lineup.add_torch(TORCH_QUANTIZED, model, path.stat().st_size)
    lineup.targets.sort(key=lambda one: one.runtime, reverse=True)  # PyTorch, then ONNX Runtime
    for file in files:
        lineup.add_onnx(ONNX_QUANTIZED if len(files) == 1 else f"ONNX {file.name}", open_file(file))
    if not files:
        lineup.notes.append(f"{ONNX_QUANTIZED} was exported for the measurement, in style {STYLE}")
        lineup.add_exported(ONNX_QUANTIZED, model, folder / "quantized.onnx", metadata)
    return lineup


def _from_metadata(metadata: ModelMetadata) -> Lineup:
    size = Preprocessing.from_dict(metadata.preprocessing).input_size
    widths = {width for bits in metadata.policy.layers.values() for width in (bits.weight, bits.activation)}
    return Lineup(str(metadata.build["name"]), size, any(width and width < MAX_BITS for width in widths))


def _onnx_files(run: RunDirectory) -> list[Path]:
    """The ONNX files of a run.

    Raises:
        RunDirectoryError: a file of the manifest is missing, or a link that leads out of the run.
    """
    files = [run.path / name for name in run.manifest().artifacts if name.endswith(".onnx")]
    for file in files:
        if not file.resolve().is_relative_to((run.path / "artifacts").resolve()):
            raise RunDirectoryError(f"{file} is a link that leads out of the run: put the file itself there")
        if not file.is_file():
            raise RunDirectoryError(
                f"{file} is missing, though the run's manifest lists it: use {run.safetensors_path} instead"
            )
    return files


def _add_float(lineup: Lineup, model: nn.Module, build: dict[str, object], folder: Path) -> None:
    tensors = {id(tensor): tensor for tensor in model.state_dict().values()}.values()
    lineup.add_torch(TORCH_FLOAT, model, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    metadata = ModelMetadata(
        saq_version=__version__,
        build=build,
        preprocessing={},
        policy=BitConfig(model=lineup.model, layers={}),
        scheme=convert.Scheme(),
        signed={},
        routed={},
    )
    with attention_spelled_out():
        lineup.add_exported(ONNX_FLOAT, model, folder / "float.onnx", metadata)


@contextmanager
def attention_spelled_out() -> Iterator[None]:
    """Disable PyTorch's fused attention, which has no counterpart in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


MOST_IMAGES = 65536  # largest batch: the bound of the dynamic dimension in exported files


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark.

    Attributes:
        batch_sizes: batch sizes.
        threads: numbers of threads per operator; None is the number that PyTorch uses.
        repeats: timed runs of every case.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] | None = None
    repeats: int = 20

    def check(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: names the invalid setting.
        """
        for size in self.batch_sizes:
            if not 1 <= size <= MOST_IMAGES:
                raise ConfigError(f"`batch_sizes={size}`: give numbers of images from 1 to {MOST_IMAGES}")
        for count in self.threads or ():
            if not 1 <= count <= cores():
                raise ConfigError(f"`threads={count}`: this machine has {cores()}, give 1 to {cores()}")
        if self.repeats < 1:
            raise ConfigError(f"`repeats={self.repeats}`: give at least 1")


@dataclass(frozen=True)
class Row:
    """The timing of one target in one case.

    Attributes:
        name: name of the target.
        runtime: its runtime.
        batch_size: images per batch.
        threads: threads per operator.
        latency_ms: median time of a batch.
        spread_ms: interquartile range of that time.
        images_per_second: throughput at the median.
        relative: throughput relative to the baseline in the same case.
        integer_kernels: operators of ONNX Runtime's optimized graph that multiply integers; None for PyTorch.
        float_kernels: operators that multiply in floating point; None for PyTorch.
        size_bytes: size of the file; for a float PyTorch model, of its tensors.
    """

    name: str
    runtime: str
    batch_size: int
    threads: int
    latency_ms: float
    spread_ms: float
    images_per_second: float
    relative: float
    integer_kernels: int | None
    float_kernels: int | None
    size_bytes: int


@dataclass(frozen=True)
class Bench:
    """The result of a benchmark.

    Attributes:
        model: name of the network.
        input_size: size of one image, (C, H, W).
        settings: as given.
        threads: measured numbers of threads.
        baseline: name of the target that ``relative`` refers to.
        few_bits: whether a layer has fewer than 8 bits.
        rows: by threads, batch size and target.
        notes: missing targets with reasons, one line each.
        operators: of every quantized ONNX file, as ONNX Runtime runs them, by target.
    """

    model: str
    input_size: tuple[int, int, int]
    settings: BenchSettings
    threads: tuple[int, ...]
    baseline: str
    few_bits: bool
    rows: list[Row]
    notes: list[str]
    operators: dict[str, tuple[Operator, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "cpu": {"name": cpu_name(), "cores": cores()},
            "versions": versions(),
            "batch_sizes": list(self.settings.batch_sizes),
            "threads": list(self.threads),
            "repeats": self.settings.repeats,
            "baseline": self.baseline,
            "few_bits": self.few_bits,
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
            "operators": {name: [asdict(each) for each in found] for name, found in self.operators.items()},
        }


def bench_source(
    source: str,
    section: ModelSection,
    settings: BenchSettings,
    progress: Progress,
    builder: str | None = None,
) -> Bench:
    """Measure everything available for ``source``.

    Args:
        source: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        settings: batch sizes, threads and repeats.
        progress: reports every round.
        builder: name of the user's own network that a run or file was made from.

    Raises:
        SaqError: the source cannot be used, or does not accept the requested batch sizes.
    """
    settings.check()
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        lineup = open_lineup(source, section, Path(folder), progress, builder)
        _check_batches(lineup, settings.batch_sizes)
        return measure(lineup, settings, progress)


def _check_batches(lineup: Lineup, batch_sizes: tuple[int, ...]) -> None:
    for target in lineup.targets:
        if target.batch is not None and any(size != target.batch for size in batch_sizes):
            raise ConfigError(
                f"{target.name} takes batches of {target.batch} only: use `batch_sizes={target.batch}`"
            )


def measure(lineup: Lineup, settings: BenchSettings, progress: Progress) -> Bench:
    """Measure every target at every batch size and number of threads."""
    threads = settings.threads or (torch.get_num_threads(),)
    names = [target.name for target in lineup.targets]
    baseline = ONNX_FLOAT if ONNX_FLOAT in names else TORCH_FLOAT
    rows: list[Row] = []
    cases = len(threads) * len(settings.batch_sizes)
    with progress.task("measuring", cases * settings.repeats) as task, torch.inference_mode():
        for count in threads:
            with torch_threads(count):
                functions = {target.name: target.open(count) for target in lineup.targets}
                for size in settings.batch_sizes:
                    images = random_images(size, lineup.input_size)
                    runs = {name: partial(function, images) for name, function in functions.items()}
                    timings = time_in_turns(runs, settings.repeats, task)
                    rows += [
                        _row(target, size, count, timings[target.name], timings[baseline])
                        for target in lineup.targets
                    ]
    operators = {
        each.name: each.operators for each in lineup.targets if each.operators and each.name != ONNX_FLOAT
    }
    return Bench(
        *(lineup.model, lineup.input_size, settings, threads, baseline, lineup.few_bits, rows, lineup.notes),
        operators,
    )


def random_images(count: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Normal noise in place of normalized images, (count, C, H, W)."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def _row(target: BenchTarget, size: int, threads: int, timing: Timing, baseline: Timing) -> Row:
    kernels = target.kernels
    return Row(
        target.name,
        target.runtime,
        size,
        threads,
        1e3 * timing.median_s,
        1e3 * timing.spread_s,
        size / timing.median_s,
        baseline.median_s / timing.median_s,
        kernels.integer if kernels else None,
        kernels.floating if kernels else None,
        target.size_bytes,
    )
