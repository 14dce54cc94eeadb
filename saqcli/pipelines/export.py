"""``saq export``: from a finished run to a file, which is checked against the model before it gets its name.

``check_exports`` finds out with random images, before hours are spent on training, whether there can be such a file.
"""

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.splits import validation_loader
from saqcli.errors import (
    ConfigError,
    CorruptArtifact,
    ExportMismatch,
    PolicyMismatch,
    Problems,
    SaqError,
    UnsupportedModel,
    out_of_memory,
)
from saqcli.export import EXPORTERS, STYLES, ModelMetadata
from saqcli.export.containers import weight_storage
from saqcli.export.restore import restore
from saqcli.export.tracing import CANNOT_EXPORT, OPSET
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.bits import given_policy, space_of
from saqcli.pipelines.calibration import scheme_of
from saqcli.pipelines.checks import check_images
from saqcli.pipelines.predictors import named_file
from saqcli.pipelines.setup import Network, open_trained
from saqcli.pipelines.targets import QUANTIZED, find_target
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.calibration import fit, observe
from saqcli.random_state import random_state, set_random_state
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import make_folder, replacing, write_text
from saqcli.training.loop import Batches
from saqcli.verify.hazards import hazards, partition
from saqcli.verify.proof import RUNTIMES, prove_graph, prove_tensors, versions
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import SYNTHETIC, Verdict, synthetic_batches, verdict_path, verdict_text

ELSEWHERE = ": choose another --style"  # how exporters end that refuse what another style can write
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
    weights = check_export(source, path, style, data, runtimes)
    for taken in (path, verdict_path(path)):
        if taken.exists() and not overwrite:
            raise ConfigError(f"{taken} is already there: give --overwrite to replace it, or another --onnx")
    make_folder(path.parent)
    run = RunDirectory.open(source) if source.is_dir() else None
    model, facts = restore(weights)
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    about: dict[str, Any] = {
        "true_size": (run.manifest().results.get("size_bytes") if run else None) or weights.stat().st_size
    }
    if data.path is None:
        made = synthetic_batches(preprocessing)
        batches: Batches = made
        count = len(made)
    else:
        split = open_trained(data, "val", facts, str(source), progress)
        seed = run.config().run.seed if run else 0
        limit = verify_limit(data.verify_images)
        batches = loader = validation_loader(split, preprocessing, data, torch.device("cpu"), seed, limit)
        count = len(loader)
        about |= {"verified_on": data.path, "available": split.images}
    verdict = export_verified(model, facts, path, style, batches, count, progress, runtimes, **about)
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
                ConfigError(f"--verify {runtime} is no runtime that saq knows: choose {', '.join(RUNTIMES)}")
            )
    if path.suffix != ".onnx":
        problems.add(ConfigError(f"--onnx {path} has no ending .onnx: give a file name like model.onnx"))
    if data.path is not None:
        problems.attempt(check_images, data, "val")
    problems.check()
    assert file is not None
    return file


def verify_limit(wanted: int | Literal["all"]) -> int | None:
    """``data.verify_images`` as a largest number, None for no limit."""
    return None if wanted == "all" else wanted


def export_verified(
    model: nn.Module,
    facts: ModelMetadata,
    path: Path,
    style: str,
    batches: Batches,
    count: int,
    progress: Progress,
    runtimes: tuple[str, ...] = (),
    *,
    verified_on: str = SYNTHETIC,
    available: int | None = None,
    true_size: int | None = None,
) -> Verdict:
    """Write ``path`` in ``style`` and compare it with ``model``, before it gets its name; the verdict is written beside
    it.

    Args:
        model: quantized; on the CPU and in eval mode afterwards.
        facts: of the model.
        path: of the file.
        style: name in ``EXPORTERS``.
        batches: images to compare on.
        count: of batches.
        progress: told about every batch.
        runtimes: to verify with, beside ONNX Runtime.
        verified_on: where the images are from, as a person named it.
        available: how many there are, of which ``batches`` may be a part; None where they are synthetic.
        true_size: of the model at its true bits, in bytes.

    Raises:
        UnsupportedModel: the style has no form of the model.
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
                storage = weight_storage(temporary)
                verdict.size_note = storage.explain_size(true_size, style) if true_size else None
            else:
                loaded, _ = restore(temporary)
                verdict = prove_tensors(loaded, model, batches, progress)
        except CorruptArtifact as error:
            reason = str(error).replace(str(temporary), path.name)
            raise ExportMismatch(f"{reason}: nothing was written") from None
        verdict.verified_on, verdict.images_available = verified_on, available
        reasons = verdict.reasons()
        if reasons:
            raise ExportMismatch(
                f"{path.name} does not equal the model ({'; '.join(reasons)}): nothing was written"
            )
    if exporter.suffix == ".onnx":
        about = {"style": style, "opset": OPSET, "versions": versions(runtimes)}
        write_text(verdict_path(path), verdict_text(verdict, path, about))
    return verdict


def check_styles(styles: Sequence[str]) -> None:
    """Refuse styles that there are not.

    Raises:
        ConfigError: an unknown style, or one named twice.
    """
    for style in styles:
        if style not in STYLES:
            raise ConfigError(f"there is no export style {style!r}: choose from {', '.join(STYLES)}")
        if styles.count(style) > 1:
            raise ConfigError(f"--style {style} is given twice: one file a style is written")


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
            _write_and_run(style, *_provisional(config, network, images, style), path, images)
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
                f"{network.name} cannot be exported to ONNX in style {style}: {reason}; give --no-export to end with "
                f"model.safetensors alone, or another {'--style' if traced else 'network'}"
            ) from error


def _provisional(
    config: RunConfig, network: Network, images: Tensor, style: str
) -> tuple[nn.Module, ModelMetadata]:
    """A quantized copy of the network, its levels fitted to ``images`` and not to be used."""
    model = copy.deepcopy(network.model).eval()
    policy = given_policy(config.quantization, network)
    if policy is None:
        space = space_of(config.quantization, network)
        dearest = style == "trt"  # whose containers may be too small for the most bits
        policy = space.config([-1 if dearest else 0] * len(space.decisions))
    statistics = observe(model, [images])
    signed = {name: facts.signed for name, facts in statistics.items()}
    scheme = scheme_of(config)
    convert.install(model, scheme, policy, signed)
    fit(model, statistics, "paper" if scheme.quantizer == "clip" else "error")  # the former is quicker
    facts = ModelMetadata(
        saq_version=__version__,
        build=network.loaded.build,
        preprocessing=network.loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=scheme,
        signed=signed,
        routed=network.traced.routed,
        products=network.products,
    )
    return model, facts


def _write_and_run(style: str, model: nn.Module, facts: ModelMetadata, path: Path, images: Tensor) -> None:
    exporter = EXPORTERS[style]()
    exporter.export(model, images[:2], path, facts)
    found, _ = partition(hazards(onnx.load(str(path))), exporter.conditions)
    if found:
        raise UnsupportedModel(f"ONNX Runtime would change the graph, hazard {found[0]}")
    with torch.inference_mode():
        expected = tuple(model(images).shape)
    for optimized in (False, True):
        answer = onnx_session(path, optimized=optimized)(images)
        if tuple(answer.shape) != expected:
            raise UnsupportedModel(
                f"the file answers {tuple(answer.shape)} where the model answers {expected}"
            )
