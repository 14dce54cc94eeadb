"""What ``saq eval --bench`` sets side by side: a network in PyTorch and in ONNX Runtime, float and quantized.

From a run or a safetensors file all four can be made; an ONNX file holds no PyTorch model, but names the float
architecture, whose speed does not depend on its weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.algorithms.exporters import EXPORTERS, ModelFacts
from saqcli.algorithms.exporters.onnx_metadata import read_onnx_facts
from saqcli.config import ModelSection
from saqcli.errors import RunDirectoryError, UnsupportedModel
from saqcli.io.models import build_architecture
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.runs import RunDirectory
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.quant.bits import MAX_BITS, BitConfig
from saqcli.workflows.onnx_runs import Kernels, OnnxFile, open_file, runner
from saqcli.workflows.predictors import named_file, restore
from saqcli.workflows.setup import load_float
from saqcli.workflows.targets import EVALUATED, find_target

PYTORCH, ONNX = "PyTorch", "ONNX Runtime"
TORCH_FLOAT, TORCH_QUANTIZED = "PyTorch float", "PyTorch fake-quant"
ONNX_FLOAT, ONNX_QUANTIZED = "ONNX float", "ONNX quantized"


@dataclass(frozen=True)
class Contender:
    """One way to run the network.

    Attributes:
        name: in the table.
        runtime: ``PyTorch`` or ``ONNX Runtime``.
        size_bytes: of the file; of a float PyTorch model, of its tensors.
        open: from a number of threads to a function from images (N, C, H, W) to logits; PyTorch's number is set
            by who calls.
        kernels: that ONNX Runtime multiplies with; None in PyTorch.
        batch: the only number of images it takes; None where any will do.
    """

    name: str
    runtime: str
    size_bytes: int
    open: Callable[[int], Callable[[Tensor], Tensor]]
    kernels: Kernels | None = None
    batch: int | None = None


@dataclass
class Lineup:
    """All ways to run one network.

    Attributes:
        model: name of the network.
        input_size: of one image, (C, H, W).
        few_bits: whether a layer has fewer than 8.
        contenders: in the order of the table.
        notes: what is missing and why, a line each.
    """

    model: str
    input_size: tuple[int, int, int]
    few_bits: bool = False
    contenders: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_torch(self, name: str, model: nn.Module, size_bytes: int) -> None:
        """A PyTorch model, on the CPU."""
        model.cpu().eval().requires_grad_(False)
        self.contenders.append(Contender(name, PYTORCH, size_bytes, lambda threads: model))

    def add_onnx(self, name: str, file: OnnxFile) -> None:
        """A file that ONNX Runtime takes."""
        path = file.path
        opener = lambda threads: runner(path, threads)  # noqa: E731 - as in add_torch
        size = path.stat().st_size
        self.contenders.append(Contender(name, ONNX, size, opener, file.kernels, file.batch))

    def add_exported(self, name: str, model: nn.Module, path: Path, facts: ModelFacts) -> None:
        """A model as ONNX, written to ``path``; a note where that cannot be done."""
        try:
            EXPORTERS["qdq"]().export(model, torch.zeros(2, *self.input_size), path, facts)
        except UnsupportedModel as error:
            self.notes.append(f"no {name}: {error}")
        else:
            self.add_onnx(name, open_file(path))


def line_up(target: str, section: ModelSection, folder: Path, progress: Progress) -> Lineup:
    """Everything that can be measured of ``target``.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        folder: for files that are made only to be measured.
        progress: for notes.

    Raises:
        SaqError: no such thing, or a damaged one.
    """
    found = find_target(target, EVALUATED)
    path = named_file(found, section)
    if path is None:
        return _of_name(section, folder, progress)
    if path.suffix == ".onnx":
        return _of_onnx(path, folder)
    return _of_safetensors(path, found.run, folder)


def _of_name(section: ModelSection, folder: Path, progress: Progress) -> Lineup:
    loaded = load_float(section, progress)
    lineup = Lineup(loaded.name, loaded.preprocessing.input_size)
    lineup.notes.append(f"no quantized rows: {loaded.name} is a float model")
    _add_float(lineup, loaded.model, loaded.build, folder)
    return lineup


def _of_onnx(path: Path, folder: Path) -> Lineup:
    facts = read_onnx_facts(path)
    lineup = _described(facts)
    lineup.notes.append(f"no {TORCH_QUANTIZED}: an ONNX file holds no PyTorch model")
    _add_float(lineup, build_architecture(facts.build), facts.build, folder)
    lineup.add_onnx(ONNX_QUANTIZED, open_file(path))
    return lineup


def _of_safetensors(path: Path, run: RunDirectory | None, folder: Path) -> Lineup:
    files = _onnx_files(run) if run else []
    model, facts = restore(path)
    lineup = _described(facts)
    plain = copy.deepcopy(model)
    convert.unwrap(plain)
    _add_float(lineup, plain, facts.build, folder)
    lineup.add_torch(TORCH_QUANTIZED, model, path.stat().st_size)
    lineup.contenders.sort(key=lambda one: one.runtime, reverse=True)  # PyTorch, then ONNX Runtime
    for file in files:
        lineup.add_onnx(ONNX_QUANTIZED if len(files) == 1 else f"ONNX {file.name}", open_file(file))
    if not files:
        lineup.notes.append(f"{ONNX_QUANTIZED} was exported for the measurement, in style qdq")
        lineup.add_exported(ONNX_QUANTIZED, model, folder / "quantized.onnx", facts)
    return lineup


def _described(facts: ModelFacts) -> Lineup:
    size = Preprocessing.from_dict(facts.preprocessing).input_size
    widths = {width for bits in facts.policy.layers.values() for width in (bits.weight, bits.activation)}
    return Lineup(str(facts.build["name"]), size, any(width and width < MAX_BITS for width in widths))


def _onnx_files(run: RunDirectory) -> list[Path]:
    """The ONNX files that a run left.

    Raises:
        RunDirectoryError: one that the manifest names is gone, or leads elsewhere.
    """
    files = [run.path / name for name in run.manifest().artifacts if name.endswith(".onnx")]
    for file in files:
        if not file.resolve().is_relative_to((run.path / "artifacts").resolve()):
            raise RunDirectoryError(f"{file} is a link that leads out of the run: put the file itself there")
        if not file.is_file():
            raise RunDirectoryError(
                f"{file} is gone, though the run's manifest names it: name {run.safetensors_path} instead"
            )
    return files


def _add_float(lineup: Lineup, model: nn.Module, build: dict[str, object], folder: Path) -> None:
    tensors = {id(tensor): tensor for tensor in model.state_dict().values()}.values()
    lineup.add_torch(TORCH_FLOAT, model, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    facts = ModelFacts(
        saq_version=__version__,
        build=build,
        preprocessing={},
        policy=BitConfig(model=lineup.model, layers={}),
        scheme=convert.Scheme(),
        signed={},
        routed={},
    )
    with _attention_spelled_out():
        lineup.add_exported(ONNX_FLOAT, model, folder / "float.onnx", facts)


@contextmanager
def _attention_spelled_out() -> Iterator[None]:
    """PyTorch's fused attention has no counterpart in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
