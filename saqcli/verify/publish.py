"""Export with proof: a file gets its name once it was compared with the model that it was written from."""

from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from saqcli.errors import CorruptArtifact, ExportMismatch, SaqError, UnsupportedModel, out_of_memory
from saqcli.export import STYLES, Exporter, ModelMetadata, OnnxStyle, exporter_of
from saqcli.export.containers import weight_storage
from saqcli.export.restore import restore
from saqcli.export.tracing import OPSET
from saqcli.models.own import OwnNetwork
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.serialization import replacing, write_text
from saqcli.training.loop import Batches
from saqcli.verify.hazards import hazards, partition
from saqcli.verify.proof import prove_graph, prove_tensors, versions
from saqcli.verify.runtime import onnx_session
from saqcli.verify.shared import SharedProof
from saqcli.verify.verdict import SYNTHETIC, Verdict, verdict_path, verdict_text


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
    own: OwnNetwork | None = None,
    shared: SharedProof | None = None,
) -> Verdict:
    """Write ``path`` in ``style``; it is renamed into place once it matches ``model``, with its verdict.

    Args:
        model: quantized; on the CPU and in eval mode afterwards.
        facts: of the model.
        path: of the file.
        style: name in ``STYLES``, or ``safetensors``.
        batches: images to compare on.
        count: of batches.
        progress: reports every batch.
        runtimes: further runtimes to verify with, in addition to ONNX Runtime.
        verified_on: where the images are from, as a person named it.
        available: how many there are, of which ``batches`` may be a part; None where they are synthetic.
        true_size: of the model at its true bits, in bytes.
        own: the user's own network that it was made from, if it was.
        shared: of ``model``, where several of its files are written and proved on the same images.

    Raises:
        ConfigError: there is no such style.
        UnsupportedModel: the style has no form of the model.
        ExportMismatch: they differ; nothing is left at ``path``.
    """
    exporter = exporter_of(style)
    model = model.cpu().eval()
    shared = shared or SharedProof(model)
    example = torch.zeros(2, *Preprocessing.from_dict(facts.preprocessing).input_size)
    with replacing(path) as temporary:
        _write(exporter, style, shared, example, temporary, facts)
        try:
            if isinstance(exporter, OnnxStyle):
                verdict = prove_graph(temporary, model, style, batches, count, progress, runtimes, shared)
                storage = weight_storage(temporary)
                verdict.size_note = storage.explain_size(true_size, style) if true_size else None
            else:
                loaded, _ = restore(temporary, own)
                verdict = prove_tensors(loaded, model, batches, progress)
        except CorruptArtifact as error:
            reason = str(error).replace(str(temporary), path.name)
            raise ExportMismatch(f"{reason}; no file was written") from None
        verdict.verified_on, verdict.images_available = verified_on, available
        reasons = verdict.reasons()
        if reasons:
            remedy = f"; {verdict.remedy}" if verdict.remedy else ""
            raise ExportMismatch(
                f"{path.name} does not match the model ({'; '.join(reasons)}); no file was written{remedy}"
            )
    if isinstance(exporter, OnnxStyle):
        about = {"style": style, "opset": OPSET, "versions": versions(runtimes)}
        write_text(verdict_path(path), verdict_text(verdict, path, about))
    return verdict


def _write(
    exporter: Exporter, style: str, shared: SharedProof, example: Tensor, path: Path, facts: ModelMetadata
) -> None:
    """Write ``path``; a style of another package may raise anything.

    Raises:
        UnsupportedModel: the style cannot write the model.
    """
    try:
        if isinstance(exporter, OnnxStyle) and type(exporter).export is OnnxStyle.export:
            exporter.write(shared.graph(exporter, example), path, facts)
        else:
            exporter.export(shared.model, example, path, facts)
    except (SaqError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error) or not isinstance(exporter, OnnxStyle):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedModel(
            f"style {style} cannot write the model ({reason}): choose another `style`"
        ) from error


def write_and_run(style: str, model: nn.Module, facts: ModelMetadata, path: Path, images: Tensor) -> None:
    """Write ``path`` in one of ``STYLES`` and run it in ONNX Runtime on ``images`` (N, C, H, W).

    Nothing is compared but shapes.

    Raises:
        UnsupportedModel: the runtime would change the graph, or answers in another shape.
    """
    exporter = STYLES.find(style)()
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
