"""``saq export``: ONNX files, compared with the model before publication."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saqcli.api.sources import QUANTIZED, find_source, named_builder, named_file
from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.splits import validation_loader
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export import ModelMetadata
from saqcli.export.restore import restore
from saqcli.export.tracing import OPSET
from saqcli.models.load import OwnNetwork, Preprocessing
from saqcli.models.own import check_named
from saqcli.pipelines.bits import check_deployment, style_for
from saqcli.pipelines.checks import check_images, check_styles
from saqcli.pipelines.setup import open_run_images, open_trained, saved_model
from saqcli.progress import Progress
from saqcli.report.artifacts import adding_to_run
from saqcli.report.run_report import QuantizeResult
from saqcli.runs.directory import RunDirectory
from saqcli.verify.proof import check_runtime
from saqcli.verify.publish import export_verified
from saqcli.verify.shared import SharedProof
from saqcli.verify.verdict import Verdict, synthetic_batches, verdict_path


@dataclass(frozen=True)
class Export:
    """A file that was written and verified.

    Attributes:
        path: of the file.
        style: name in ``STYLES``.
        verdict: the comparison with the model.
    """

    path: Path
    style: str
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
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
    path: Path | None,
    *,
    style: str | None,
    data: DataSection,
    overwrite: bool,
    progress: Progress,
    runtimes: tuple[str, ...] = (),
    builder: str | None = None,
    target: str | None = None,
) -> Export:
    """Export the model of a run directory or safetensors file to ONNX.

    Args:
        source: run directory or ``.safetensors`` file.
        path: of the file to write; None for ``NAME-STYLE.onnx`` beside the model of a finished run or the file.
        style: name in ``STYLES``; None for the first that the target reads, else ``qdq``.
        data: images to verify on, labelled or not; synthetic ones if none are given.
        overwrite: replace an existing ``path``.
        progress: reports the verification.
        runtimes: runtimes to verify with in addition to ONNX Runtime.
        builder: name of the user's own network that the model was made from, if it was.
        target: name or file of the target; None for that of the model.

    Raises:
        UnsupportedModel: the target cannot run the model.
        ExportMismatch: the file does not equal the model; nothing is written to ``path``.
    """
    weights = check_export(source, path, style, data, runtimes, target)
    stopped = RunDirectory.open(source) if weights is None else None
    own = named_builder(find_source(str(source), QUANTIZED), builder)
    if path is not None:
        _check_free(path, overwrite=overwrite)
    run = RunDirectory.open(source) if source.is_dir() else None
    if stopped is not None:
        model, metadata, size = stopped_model(stopped, own, progress)
    else:
        assert weights is not None
        model, metadata = restore(weights, own)
        size = (run.manifest().results.get("size_bytes") if run else None) or weights.stat().st_size
    style = style_for(metadata, model, style, target, run)
    if path is None:
        path = _default_path(weights, style)
        _check_free(path, overwrite=overwrite)
    batches, count, about = _images(data, metadata, source, run, progress)
    about["true_size"] = size
    with adding_to_run(path, verdict_path(path), progress):
        _check_free(path, overwrite=overwrite)
        verdict = export_verified(model, metadata, path, style, batches, count, progress, runtimes, **about)
    return Export(path, style, verdict)


def _images(
    data: DataSection, metadata: ModelMetadata, source: Path, run: RunDirectory | None, progress: Progress
) -> tuple[Any, int, dict[str, Any]]:
    """Batches to verify on, their number, and where they come from, as ``export_verified`` takes it."""
    preprocessing, limit = Preprocessing.from_dict(metadata.preprocessing), verify_limit(data.verify_images)
    cpu = torch.device("cpu")
    if data.path is not None:
        split = open_trained(data, "val", metadata, str(source), progress)
        seed = run.config().run.seed if run else 0
        loader = validation_loader(split, preprocessing, data, cpu, seed, limit)
        return loader, len(loader), {"verified_on": data.path, "available": split.images}
    if data.calibration is not None and run is not None:
        images = open_run_images(run.config().model_copy(update={"data": data}), metadata, cpu)
        loader = images.validation(limit)
        return loader, len(loader), {"verified_on": data.calibration, "available": images.val.images}
    batches = synthetic_batches(preprocessing)
    return batches, len(batches), {}


def _check_free(path: Path, *, overwrite: bool) -> None:
    """Check that the file ``path`` and its verdict do not exist, unless they are replaced.

    Raises:
        ConfigError: one of them exists.
    """
    for taken in (path, verdict_path(path)):
        if taken.exists() and not overwrite:
            raise ConfigError(
                f"{taken} already exists: use `overwrite=True` to replace it, or another `path`"
            )


def _default_path(weights: Path | None, style: str) -> Path:
    """``model-STYLE.onnx`` beside the safetensors file ``weights`` of this name."""
    assert weights is not None  # checked
    return weights.with_name(f"{weights.stem}-{style}.onnx")


def check_export(
    source: Path,
    path: Path | None,
    style: str | None,
    data: DataSection,
    runtimes: tuple[str, ...] = (),
    target: str | None = None,
) -> Path | None:
    """Check the arguments and return the safetensors file to export; None for the checkpoint of a run that was stopped.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    found = problems.attempt(find_source, str(source), QUANTIZED, "RUN")
    stopped = found is not None and found.run is not None and is_stopped(found.run)
    file = None
    if found is not None and not stopped:
        file = problems.attempt(named_file, found, ModelSection(name=str(source)))
    if style is not None:
        problems.attempt(check_styles, (style,))
    if target is not None:
        problems.attempt(check_deployment, target)
    for runtime in runtimes:
        problems.attempt(check_runtime, runtime)
    run = None if found is None else found.run
    if path is None and run is not None and run.manifest().status != "finished":
        problems.add(
            ConfigError(
                f"{source} {run.status_text()}, and only a finished run has files in its artifacts: give `path=FILE`"
            )
        )
    if path is not None and path.suffix != ".onnx":
        problems.add(ConfigError(f"`path={path}` does not end with .onnx: give a file name like model.onnx"))
    if data.path is not None:
        problems.attempt(check_images, data, "val")
    problems.check()
    return file


def is_stopped(run: RunDirectory) -> bool:
    """Whether a quantization ended before its files were written, and left a checkpoint with a model."""
    return (
        run.verb == "quantize"
        and not run.safetensors_path.is_file()
        and run.checkpoint_path.is_file()
        and run.manifest().status in ("interrupted", "failed")
    )


def stopped_model(
    run: RunDirectory, own: OwnNetwork | None, progress: Progress
) -> tuple[nn.Module, ModelMetadata, int]:
    """The model in the checkpoint of a run that was stopped, its metadata, and its size in bytes; notes its stage.

    Raises:
        SaqError: no checkpoint is valid, or its model cannot be built.
    """
    state = run.load_checkpoint(progress.note)
    if state is None:
        raise RunDirectoryError(f"{run.path} holds no model: {run.next_step()}")
    if own is None:
        check_named(run.config().model.name, own, str(run.path))
    model, metadata, _ = saved_model(state, own)
    outcome = QuantizeResult.unpack(state["outcome"])
    stage = outcome.stages[-1]["stage"] if outcome.stages else "calibrated"
    trained = ", partly fine-tuned," if "position" in state else ""
    progress.note(f"{run.path} {run.status_text()}: its {stage}{trained} model is exported")
    return model.eval(), metadata, outcome.size


def verify_limit(wanted: int | Literal["all"]) -> int | None:
    """``data.verify_images`` as a limit; None for ``all``."""
    return None if wanted == "all" else wanted


def write_files(
    model: nn.Module,
    metadata: ModelMetadata,
    config: RunConfig,
    run: RunDirectory,
    result: QuantizeResult,
    progress: Progress,
    best: Mapping[str, Tensor] | None,
    own: OwnNetwork | None,
) -> None:
    """Write the safetensors file and one ONNX file per style, each compared with ``model``; recorded in ``result``.

    ``best`` is the best state of fine-tuning; it is saved too if it is clearly better than the exported one. ``own`` is
    the user's own network, if ``model`` was made from one.
    """
    images = open_run_images(config, metadata, torch.device("cpu"))
    batches = images.validation(verify_limit(config.data.verify_images))
    about: dict[str, Any] = {
        "verified_on": images.data_of_scores,
        "available": images.val.images,
        "true_size": result.size,
        "own": own,
    }
    export_verified(
        model, metadata, run.safetensors_path, "safetensors", batches, len(batches), progress, **about
    )
    result.artifacts["safetensors"] = str(run.safetensors_path)
    about["shared"] = SharedProof(model)
    for style, name in onnx_names(config.export.styles).items():
        path = run.onnx_path.with_name(f"{name}.onnx")
        verdict = export_verified(model, metadata, path, style, batches, len(batches), progress, **about)
        result.artifacts[style] = str(path)
        result.artifacts[name.replace("model", "verdict", 1)] = str(verdict_path(path))
        if result.onnx is None:
            result.onnx = {**verdict.figures(), "style": style, "size_bytes": path.stat().st_size}
    del about["shared"]  # the model changes
    if best is not None and result.advice and result.best_epoch != result.exported_epoch:
        model.load_state_dict(best)
        export_verified(
            model, metadata, run.best_path, "safetensors", batches, len(batches), progress, **about
        )
        result.artifacts["best"] = str(run.best_path)
    else:
        run.best_path.unlink(missing_ok=True)  # of an earlier attempt with another best epoch
    result.artifacts |= {
        "policy": str(run.policy_path),
        "report": str(run.report_path),
        "page": str(run.page_path),
    }


def onnx_names(styles: Sequence[str]) -> dict[str, str]:
    """Style to the stem of a run's ONNX file: ``model`` for the first, ``model-STYLE`` for the others."""
    return {style: f"model-{style}" if index else "model" for index, style in enumerate(styles)}
