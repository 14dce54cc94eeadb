"""``saq export``: from a finished run to a file, proved equal to the model before it gets its name."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.algorithms.exporters import EXPORTERS, ModelFacts
from saqcli.algorithms.exporters.onnx_layerwise import check_layers
from saqcli.algorithms.exporters.onnx_qdq import OPSET, frozen_copy
from saqcli.algorithms.training import Batches
from saqcli.config import DataSection
from saqcli.errors import ConfigError, ExportMismatch
from saqcli.io.data import check_trained_on
from saqcli.io.files import replacing
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.runs import RunDirectory
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.workflows.predictors import finished_model, onnx_session, restore
from saqcli.workflows.setup import open_named, validation_loader
from saqcli.workflows.verify import PYTORCH, Verdict, compare

LAYERWISE_IMAGES = 4  # all activations of which are held in memory
RANDOM_IMAGES = 64  # that a file is verified on where no data is given
RANDOM_BATCH = 16


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
            "style": self.style,
            "opset": OPSET,
            "verified": self.verdict.verified,
            "images": self.verdict.images,
            "argmax_agreement": self.verdict.argmax_agreement,
            "pytorch_agreement": self.verdict.pytorch_agreement,
            "layers": self.verdict.layers,
            "layers_error": self.verdict.layers_error,
            "max_abs_diff": self.verdict.max_abs_diff,
            "mean_abs_diff": self.verdict.mean_abs_diff,
            "size_bytes": self.path.stat().st_size,
        }


def export(
    source: Path, path: Path, *, style: str, data: DataSection, overwrite: bool, progress: Progress
) -> Export:
    """Export the model of a run directory or safetensors file to ONNX.

    Args:
        source: run directory or ``.safetensors`` file.
        path: of the file to write.
        style: name in ``EXPORTERS``.
        data: images to verify on; random ones where no path is given.
        overwrite: replace ``path`` if it is there.
        progress: told about the verification.

    Raises:
        ExportMismatch: the file does not equal the model; nothing is left at ``path``.
    """
    if style not in EXPORTERS or style == "safetensors":
        styles = ", ".join(name for name in EXPORTERS if name != "safetensors")
        raise ConfigError(f"there is no export style {style!r}: choose from {styles}")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is already there: give --overwrite to replace it, or another --onnx")
    model, facts = restore(finished_model(RunDirectory.open(source)) if source.is_dir() else source)
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    if data.path is None:
        batches = random_batches(preprocessing)
        count = len(batches)
        verdict = export_verified(model, facts, path, style, batches, count, progress)
        return Export(path, style, verdict)
    classes = int(facts.build["num_classes"])
    split = open_named(data, "val", classes)
    check_trained_on(split, facts.class_names, classes, str(source))
    loader = validation_loader(split, preprocessing, data, torch.device("cpu"))
    return Export(path, style, export_verified(model, facts, path, style, loader, len(loader), progress))


def export_verified(
    model: nn.Module,
    facts: ModelFacts,
    path: Path,
    style: str,
    batches: Batches,
    count: int,
    progress: Progress,
) -> Verdict:
    """Write ``path`` in ``style`` and compare it with ``model`` on ``count`` batches, before it gets its
    name.

    Raises:
        ExportMismatch: they differ; nothing is left at ``path``.
    """
    exporter = EXPORTERS[style]()
    model = model.cpu().eval()
    example = torch.zeros(2, *Preprocessing.from_dict(facts.preprocessing).input_size)
    with replacing(path) as temporary:
        exporter.export(model, example, temporary, facts)
        if exporter.suffix == ".onnx":
            exact = copy.deepcopy(model)
            convert.fold(
                exact
            )  # its codes are then those of the file: a transformation would round otherwise
            exact.double()
            runs: dict[str, Callable[[Tensor], Tensor]] = {**_sessions(temporary), PYTORCH: model}
            verdict = compare(lambda images: exact(images.double()), runs, batches, count, progress)
            _prove_layers(verdict, temporary, model, batches)
        else:
            loaded, _ = restore(temporary)
            verdict = compare(model, {"loaded": loaded}, [next(iter(batches))], 1, progress)
            if verdict.max_abs_diff > 0:
                verdict.problems.append(f"logits differ by up to {verdict.max_abs_diff:.3g} where none may")
        if not verdict.verified:
            detail = "; ".join(verdict.problems) or (
                f"the best class agrees on {100 * verdict.argmax_agreement:.2f} % of {verdict.images} images "
                f"and logits differ by up to {verdict.max_abs_diff:.3g}"
            )
            raise ExportMismatch(f"{path.name} does not equal the model ({detail}): nothing was written")
    return verdict


def _prove_layers(verdict: Verdict, path: Path, model: nn.Module, batches: Batches) -> None:
    """Compare the graph with the model layer by layer, on a few images."""
    images = next(iter(batches))[0][:LAYERWISE_IMAGES]
    check = check_layers(path, frozen_copy(model), images)
    verdict.layers, verdict.layers_error = check.tensors, check.largest_error
    if not check.passed:
        reason = (
            check.problem
            or f"a layer that is fed the same input differs by {check.largest_error:.2g} of its range"
        )
        verdict.problems.append(reason)


def _sessions(path: Path) -> dict[str, Callable[[Tensor], Tensor]]:
    """An ONNX file, run without graph optimizations and with the default ones."""
    return {
        "unoptimized": onnx_session(path, optimized=False),
        "optimized": onnx_session(path, optimized=True),
    }


def random_batches(preprocessing: Preprocessing, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Normal noise in the place of normalized images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(RANDOM_IMAGES, *preprocessing.input_size, generator=generator)
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in torch.split(images, RANDOM_BATCH)]
