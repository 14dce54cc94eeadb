"""Anything that can be evaluated, as a function from images to logits: a name, a run, a file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from saqcli.algorithms.exporters.facts import ModelFacts
from saqcli.algorithms.exporters.onnx_qdq import INPUT, read_onnx_facts
from saqcli.algorithms.exporters.safetensors import read_facts, read_tensors, rebuild
from saqcli.config import ModelSection
from saqcli.errors import ConfigError, CorruptArtifact, RunDirectoryError
from saqcli.io.models import build_architecture
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.runs import RunDirectory
from saqcli.progress import Progress
from saqcli.quant.trace import try_model
from saqcli.workflows.setup import load_float


@dataclass(frozen=True)
class Predictor:
    """Something to evaluate.

    Attributes:
        predict: normalized images (N, C, H, W) to logits (N, classes).
        name: what messages call it.
        num_classes: how many logits.
        preprocessing: of its images.
        device: where it wants its images.
        facts: what the file says about itself; None for a float model.
    """

    predict: Callable[[Tensor], Tensor]
    name: str
    num_classes: int
    preprocessing: Preprocessing
    device: torch.device
    facts: ModelFacts | None = None


def open_target(target: str, section: ModelSection, device: torch.device, progress: Progress) -> Predictor:
    """The predictor that ``target`` names.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        device: of PyTorch models; ONNX files run on the CPU.
        progress: for notes.

    Raises:
        SaqError: no such thing, or a damaged one.
    """
    path = Path(target).expanduser()
    if not target.strip():
        raise ConfigError(
            "no TARGET was named: give a model name, a run directory, a .safetensors or an .onnx file"
        )
    if path.suffix in (".onnx", ".safetensors") or path.is_dir():
        check_no_model_options(target, section)
    if path.suffix == ".onnx":
        return open_onnx(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path, device)
    if path.is_dir():
        return open_safetensors(finished_model(RunDirectory.open(path)), device)
    if path.is_file():
        raise ConfigError(
            f"{path} is no model file of saq: give MODEL --weights {path}, to evaluate float weights"
        )
    loaded = load_float(section, progress)
    try_model(loaded.model, torch.zeros(1, *loaded.preprocessing.input_size))
    return Predictor(loaded.model.to(device), loaded.name, loaded.num_classes, loaded.preprocessing, device)


def check_no_model_options(target: str, section: ModelSection) -> None:
    """A file that describes itself cannot be told otherwise."""
    plain = ModelSection(name=section.name).model_dump()
    given = [name.replace("_", "-") for name, value in section.model_dump().items() if value != plain[name]]
    if given:
        raise ConfigError(
            f"{target} brings its own network and preprocessing: leave --{', --'.join(given)} away"
        )


def finished_model(run: RunDirectory) -> Path:
    """The safetensors file of a run.

    Raises:
        RunDirectoryError: the run has not got that far.
    """
    if not run.safetensors_path.is_file():
        raise RunDirectoryError(
            f"{run.path} holds no model yet, its run is {run.manifest().status}: {run.how_to_resume()}"
        )
    return run.safetensors_path


def restore(path: Path) -> tuple[nn.Module, ModelFacts]:
    """The quantized model in a safetensors file, in eval mode on the CPU, and what the file says about it.

    Raises:
        CorruptArtifact: damaged, foreign, or of a newer version.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    facts = read_facts(path)
    return rebuild(build_architecture(facts.build), facts, read_tensors(path), str(path)), facts


def open_safetensors(path: Path, device: torch.device) -> Predictor:
    """A predictor from a file that ``saq quantize`` or ``saq export`` wrote."""
    model, facts = restore(path)
    return _described(model.to(device), str(path), facts, device)


def open_onnx(path: Path, *, optimized: bool = True) -> Predictor:
    """A predictor that runs in ONNX Runtime, at its default optimizations or at none.

    Raises:
        CorruptArtifact: ONNX Runtime does not take it.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    facts = read_onnx_facts(path)
    return _described(onnx_session(path, optimized=optimized), str(path), facts, torch.device("cpu"))


def onnx_session(path: Path, *, optimized: bool) -> Callable[[Tensor], Tensor]:
    """Images to logits by ONNX Runtime on the CPU."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for every reason, none of them public
        reason = " ".join(str(error).split())[:200]
        raise CorruptArtifact(f"ONNX Runtime does not take {path}: {reason}") from None

    def predict(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {INPUT: images.cpu().numpy()})
        return torch.from_numpy(logits)

    return predict


def _described(
    predict: Callable[[Tensor], Tensor], name: str, facts: ModelFacts, device: torch.device
) -> Predictor:
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    return Predictor(predict, name, int(facts.build["num_classes"]), preprocessing, device, facts)


def load(path: str | Path) -> nn.Module:
    """The quantized model in a safetensors file or a finished run directory, ready to be called.

    Args:
        path: ``model.safetensors``, or the directory that ``saq quantize`` left.

    Returns:
        In eval mode on the CPU; bit-equal to the model that was saved. Its input is normalized images (N, C,
        H, W).

    Raises:
        SaqError: no such thing, or a damaged one.
    """
    path = Path(path)
    model, _ = restore(finished_model(RunDirectory.open(path)) if path.is_dir() else path)
    return model
