"""``saq export``: from a finished run to a file, which is checked against the model before it gets its name.

``check_exports`` finds out with random images, before hours are spent on training, whether there can be such a file.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.splits import validation_loader
from saqcli.errors import ConfigError, PolicyMismatch, Problems, SaqError, UnsupportedModel, out_of_memory
from saqcli.export import ModelMetadata
from saqcli.export.restore import restore
from saqcli.export.tracing import CANNOT_EXPORT, OPSET
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.calibration import provisional_model
from saqcli.pipelines.checks import check_images, check_styles
from saqcli.pipelines.setup import Network, open_run_images, open_trained
from saqcli.pipelines.targets import QUANTIZED, find_target, named_file
from saqcli.progress import SILENT, Progress
from saqcli.random_state import random_state, set_random_state
from saqcli.report.run_report import QuantizeResult
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import make_folder
from saqcli.training.loop import Batches
from saqcli.verify.proof import RUNTIMES
from saqcli.verify.publish import export_verified, write_and_run
from saqcli.verify.verdict import Verdict, synthetic_batches, verdict_path

ELSEWHERE = ": choose another `style`"  # how exporters end that refuse what another style can write
TRIED_IMAGES = (
    3  # by a trial export; it is traced with two, so that a number of images left in the graph shows
)


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
        """Plain values, as JSON has them."""
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
    weights = check_export(source, path, style, data, runtimes)
    for taken in (path, verdict_path(path)):
        if taken.exists() and not overwrite:
            raise ConfigError(
                f"{taken} already exists: use `overwrite=True` to replace it, or another `path`"
            )
    make_folder(path.parent)
    run = RunDirectory.open(source) if source.is_dir() else None
    model, metadata = restore(weights)
    preprocessing = Preprocessing.from_dict(metadata.preprocessing)
    about: dict[str, Any] = {
        "true_size": (run.manifest().results.get("size_bytes") if run else None) or weights.stat().st_size
    }
    if data.path is None:
        made = synthetic_batches(preprocessing)
        batches: Batches = made
        count = len(made)
    else:
        split = open_trained(data, "val", metadata, str(source), progress)
        seed = run.config().run.seed if run else 0
        limit = verify_limit(data.verify_images)
        batches = loader = validation_loader(split, preprocessing, data, torch.device("cpu"), seed, limit)
        count = len(loader)
        about |= {"verified_on": data.path, "available": split.images}
    verdict = export_verified(model, metadata, path, style, batches, count, progress, runtimes, **about)
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
    problems.attempt(check_styles, (style,))
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            problems.add(
                ConfigError(
                    f"`runtimes={runtime}` is not a runtime that saq knows: choose {', '.join(RUNTIMES)}"
                )
            )
    if path.suffix != ".onnx":
        problems.add(ConfigError(f"`path={path}` does not end with .onnx: give a file name like model.onnx"))
    if data.path is not None:
        problems.attempt(check_images, data, "val")
    problems.check()
    assert file is not None
    return file


def verify_limit(wanted: int | Literal["all"]) -> int | None:
    """``data.verify_images`` as a largest number, None for no limit."""
    return None if wanted == "all" else wanted


def write_files(
    model: nn.Module,
    metadata: ModelMetadata,
    config: RunConfig,
    run: RunDirectory,
    result: QuantizeResult,
    progress: Progress,
    best: Mapping[str, Tensor] | None,
) -> None:
    """The safetensors file and an ONNX file a style, each compared with ``model``; noted in ``result``.

    ``best`` is the best state of fine-tuning; it gets a file of its own if it is clearly better than the exported one.
    """
    images = open_run_images(config, metadata, torch.device("cpu"))
    batches = images.validation(verify_limit(config.data.verify_images))
    about: dict[str, Any] = {
        "verified_on": str(config.data.path),
        "available": images.val.images,
        "true_size": result.size,
    }
    export_verified(
        model, metadata, run.safetensors_path, "safetensors", batches, len(batches), progress, **about
    )
    result.artifacts["safetensors"] = str(run.safetensors_path)
    for style, name in onnx_names(config.export.styles).items():
        path = run.onnx_path.with_name(f"{name}.onnx")
        verdict = export_verified(model, metadata, path, style, batches, len(batches), progress, **about)
        result.artifacts[style] = str(path)
        result.artifacts[name.replace("model", "verdict", 1)] = str(verdict_path(path))
        if result.onnx is None:
            result.onnx = {**verdict.figures(), "style": style, "size_bytes": path.stat().st_size}
    if best is not None and result.advice and result.best_epoch != result.exported_epoch:
        model.load_state_dict(best)
        export_verified(
            model, metadata, run.best_path, "safetensors", batches, len(batches), progress, **about
        )
        result.artifacts["best"] = str(run.best_path)
    else:
        run.best_path.unlink(missing_ok=True)  # of an attempt in which another epoch was best
    result.artifacts |= {"policy": str(run.policy_path), "report": str(run.report_path)}


def onnx_names(styles: Sequence[str]) -> dict[str, str]:
    """Style to the name of a run's ONNX file without its ending: that of the first is ``model``."""
    return {style: f"model-{style}" if index else "model" for index, style in enumerate(styles)}


def check_exports(config: RunConfig, network: Network, progress: Progress = SILENT) -> None:
    """Export a copy of ``network`` in every style that the run is to end with, and run it in ONNX Runtime.

    Bits are those given, under a budget the fewest that a search may choose; levels are provisional. The files are
    temporary, and nothing is compared: whether they compute what the model computes is proved at the end of the run.

    Args:
        config: resolved.
        network: wrapped and traced, on the CPU, without quantizers; left as it is.
        progress: told about every style.

    Raises:
        UnsupportedModel: a style has no form of it; the message says why, and what to do.
    """
    styles = config.export.styles
    if not styles:
        return
    before = random_state()
    try:
        with progress.task("trying the export", len(styles)) as task:
            for style in styles:
                _try_export(style, config, network)
                task.advance()
    except OSError as error:  # of the temporary files, which the run itself does not need
        progress.note(f"the export could not be tried before training: {error}")
    finally:
        set_random_state(before)


def _try_export(style: str, config: RunConfig, network: Network) -> None:
    size = network.loaded.preprocessing.input_size
    images = torch.randn(TRIED_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            most_bits = style == "trt"  # whose containers may be too small for the most bits
            model, metadata = provisional_model(config, network, images, most_bits=most_bits)
            write_and_run(style, model, metadata, path, images)
        except (OSError, ConfigError, PolicyMismatch):
            raise
        except Exception as error:  # a forward pass and a graph of somebody else's may fail in any way
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            reason = str(error).replace(str(path), "the file")
            traced = not reason.startswith(CANNOT_EXPORT)  # what cannot be traced has no form in any style
            reason = reason.removeprefix(CANNOT_EXPORT).removesuffix(ELSEWHERE)
            if not isinstance(error, SaqError):
                reason = f"{type(error).__name__}: {' '.join(reason.split())[:200]}"
            raise UnsupportedModel(
                f"{network.name} cannot be exported to ONNX in style {style}: {reason}; use `export.styles=()` to "
                f"end with model.safetensors alone, or another {'`style`' if traced else 'network'}"
            ) from error
