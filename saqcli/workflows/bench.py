"""``saq eval --bench``: how fast a network is, float and quantized, in PyTorch and in ONNX Runtime, on this CPU.

Images are random, since their values do not change the time. All contenders take turns
(``saqcli.algorithms.timing``), once for every batch size and number of threads.
"""

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saqcli.algorithms.timing import Timing, time_in_turns
from saqcli.config import ModelSection
from saqcli.errors import ConfigError
from saqcli.io.machine import cores, cpu_name, versions
from saqcli.progress import Progress
from saqcli.workflows.contenders import ONNX_FLOAT, TORCH_FLOAT, Contender, Lineup, line_up
from saqcli.workflows.determinism import torch_threads

MOST_IMAGES = 65536  # of a batch: the bound of the dynamic dimension in exported files


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        batch_sizes: images at a time.
        threads: of every operator; None: as many as PyTorch uses.
        repeats: timed runs of every case.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] | None = None
    repeats: int = 20

    def check(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: names the option.
        """
        for size in self.batch_sizes:
            if not 1 <= size <= MOST_IMAGES:
                raise ConfigError(f"--batch-sizes {size}: give numbers of images from 1 to {MOST_IMAGES}")
        for count in self.threads or ():
            if not 1 <= count <= cores():
                raise ConfigError(f"--threads {count}: this machine has {cores()}, give 1 to {cores()}")
        if self.repeats < 1:
            raise ConfigError(f"--repeats {self.repeats}: give at least 1")


@dataclass(frozen=True)
class Row:
    """One contender in one case; the units are in the names.

    Attributes:
        name: of the contender.
        runtime: that it ran in.
        batch_size: images at a time.
        threads: of every operator.
        latency_ms: median time of a batch.
        spread_ms: interquartile range of that time.
        images_per_second: from the median.
        relative: images a second, relative to the baseline in the same case.
        integer_kernels: operators of ONNX Runtime's optimized graph that multiply in integers; None in PyTorch.
        float_kernels: those that multiply in floating point.
        size_bytes: of the file; of a float PyTorch model, of its tensors.
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
    """What ``saq eval --bench`` found.

    Attributes:
        model: name of the network.
        input_size: of one image, (C, H, W).
        settings: as given.
        threads: that were measured.
        baseline: name of the contender that ``relative`` refers to.
        few_bits: whether a layer has fewer than 8.
        rows: by threads, batch size and contender.
        notes: what is missing and why, a line each.
    """

    model: str
    input_size: tuple[int, int, int]
    settings: BenchSettings
    threads: tuple[int, ...]
    baseline: str
    few_bits: bool
    rows: list[Row]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
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
        }


def bench_target(target: str, section: ModelSection, settings: BenchSettings, progress: Progress) -> Bench:
    """Measure everything that can be made of ``target``.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        settings: what is measured.
        progress: told about every round.

    Raises:
        SaqError: the target cannot be used, or does not take batches of the sizes asked for.
    """
    settings.check()
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        lineup = line_up(target, section, Path(folder), progress)
        _check_batches(lineup, settings.batch_sizes)
        return measure(lineup, settings, progress)


def _check_batches(lineup: Lineup, batch_sizes: tuple[int, ...]) -> None:
    for contender in lineup.contenders:
        if contender.batch is not None and any(size != contender.batch for size in batch_sizes):
            raise ConfigError(
                f"{contender.name} takes batches of {contender.batch} only: give --batch-sizes {contender.batch}"
            )


def measure(lineup: Lineup, settings: BenchSettings, progress: Progress) -> Bench:
    """Measure every contender at every batch size and number of threads."""
    threads = settings.threads or (torch.get_num_threads(),)
    names = [contender.name for contender in lineup.contenders]
    baseline = ONNX_FLOAT if ONNX_FLOAT in names else TORCH_FLOAT
    rows: list[Row] = []
    cases = len(threads) * len(settings.batch_sizes)
    with progress.task("measuring", cases * settings.repeats) as task, torch.inference_mode():
        for count in threads:
            with torch_threads(count):
                functions = {contender.name: contender.open(count) for contender in lineup.contenders}
                for size in settings.batch_sizes:
                    images = random_images(size, lineup.input_size)
                    runs = {name: partial(function, images) for name, function in functions.items()}
                    timings = time_in_turns(runs, settings.repeats, task)
                    rows += [
                        _row(contender, size, count, timings[contender.name], timings[baseline])
                        for contender in lineup.contenders
                    ]
    return Bench(
        lineup.model, lineup.input_size, settings, threads, baseline, lineup.few_bits, rows, lineup.notes
    )


def random_images(count: int, size: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Normal noise in the place of normalized images, (count, C, H, W)."""
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(seed))


def _row(contender: Contender, size: int, threads: int, timing: Timing, baseline: Timing) -> Row:
    kernels = contender.kernels
    return Row(
        contender.name,
        contender.runtime,
        size,
        threads,
        1e3 * timing.median_s,
        1e3 * timing.spread_s,
        size / timing.median_s,
        baseline.median_s / timing.median_s,
        kernels.integer if kernels else None,
        kernels.floating if kernels else None,
        contender.size_bytes,
    )
