"""``saq export``: from a finished run to a file, proved equal to the model before it gets its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saqcli.algorithms.exporters import EXPORTERS, STYLES, ModelFacts
from saqcli.algorithms.graphs.tracing import OPSET
from saqcli.algorithms.training import Batches
from saqcli.config import DataSection, ModelSection
from saqcli.errors import ConfigError, CorruptArtifact, ExportMismatch, Problems
from saqcli.io.files import make_folder, replacing, write_text
from saqcli.io.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.workflows.checks import check_images
from saqcli.workflows.predictors import named_file, restore
from saqcli.workflows.proofs import RUNTIMES, prove_graph, prove_tensors, versions
from saqcli.workflows.setup import open_trained, validation_loader
from saqcli.workflows.synthetic import synthetic_batches
from saqcli.workflows.targets import QUANTIZED, find_target
from saqcli.workflows.verdict import Verdict, verdict_path, verdict_text


@dataclass(frozen=True)
class Export:
    """A file that was written and verified.

    Attributes:
        path: of the file.
        style: name in ``EXPORTERS``.
        verdict: how it compares with the model.
    """

    path: Path
    style: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {
            "onnx": str(self.path),
            "verdict": str(verdict_path(self.path)),
            "style": self.style,
            "opset": OPSET,
            **self.verdict.figures(),
            "size_bytes": self.path.stat().st_size,
        }


def export(
    source: Path,
    path: Path,
    *,
    style: str,
    data: DataSection,
    overwrite: bool,
    progress: Progress,
    runtimes: tuple[str, ...] = (),
) -> Export:
    """Export the model of a run directory or safetensors file to ONNX.

    Args:
        source: run directory or ``.safetensors`` file.
        path: of the file to write.
        style: name in ``EXPORTERS``.
        data: images to verify on; made ones where no path is given.
        overwrite: replace ``path`` if it is there.
        progress: told about the verification.
        runtimes: to verify with, beside ONNX Runtime.

    Raises:
        ExportMismatch: the file does not equal the model; nothing is left at ``path``.
    """
    file = check_export(source, path, style, data, runtimes)
    for taken in (path, verdict_path(path)):
        if taken.exists() and not overwrite:
            raise ConfigError(f"{taken} is already there: give --overwrite to replace it, or another --onnx")
    make_folder(path.parent)
    model, facts = restore(file)
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    if data.path is None:
        made = synthetic_batches(preprocessing)
        batches: Batches = made
        count = len(made)
    else:
        split = open_trained(data, "val", facts, str(source), progress)
        batches = loader = validation_loader(split, preprocessing, data, torch.device("cpu"))
        count = len(loader)
    verdict = export_verified(model, facts, path, style, batches, count, progress, runtimes)
    return Export(path, style, verdict)


def check_export(
    source: Path, path: Path, style: str, data: DataSection, runtimes: tuple[str, ...] = ()
) -> Path:
    """The file of tensors to export; refuses what can be seen to be wrong before it is read.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    problems = Problems()
    target = problems.attempt(find_target, str(source), QUANTIZED, "RUN")
    file = problems.attempt(named_file, target, ModelSection(name=str(source))) if target else None
    if style not in STYLES:
        problems.add(ConfigError(f"there is no export style {style!r}: choose from {', '.join(STYLES)}"))
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            problems.add(
                ConfigError(f"--verify {runtime} is no runtime that saq knows: choose {', '.join(RUNTIMES)}")
            )
    if path.suffix != ".onnx":
        problems.add(ConfigError(f"--onnx {path} has no ending .onnx: give a file name like model.onnx"))
    if data.path is not None:
        problems.attempt(check_images, data, "val")
    problems.check()
    assert file is not None
    return file


def export_verified(
    model: nn.Module,
    facts: ModelFacts,
    path: Path,
    style: str,
    batches: Batches,
    count: int,
    progress: Progress,
    runtimes: tuple[str, ...] = (),
) -> Verdict:
    """Write ``path`` in ``style`` and compare it with ``model`` on ``count`` batches, before it gets its
    name; the verdict is written beside it.

    Raises:
        ExportMismatch: they differ; nothing is left at ``path``.
    """
    exporter = EXPORTERS[style]()
    model = model.cpu().eval()
    example = torch.zeros(2, *Preprocessing.from_dict(facts.preprocessing).input_size)
    with replacing(path) as temporary:
        exporter.export(model, example, temporary, facts)
        try:
            if exporter.suffix == ".onnx":
                verdict = prove_graph(temporary, model, style, batches, count, progress, runtimes)
            else:
                loaded, _ = restore(temporary)
                verdict = prove_tensors(loaded, model, batches, progress)
        except CorruptArtifact as error:
            reason = str(error).replace(str(temporary), path.name)
            raise ExportMismatch(f"{reason}: nothing was written") from None
        reasons = verdict.reasons()
        if reasons:
            raise ExportMismatch(
                f"{path.name} does not equal the model ({'; '.join(reasons)}): nothing was written"
            )
    if exporter.suffix == ".onnx":
        about = {"style": style, "opset": OPSET, "versions": versions(runtimes)}
        write_text(verdict_path(path), verdict_text(verdict, path, about))
    return verdict
