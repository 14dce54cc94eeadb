"""Proof that a file, an ONNX graph or a file of tensors, equals the model."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.errors import ConfigError, DataError
from saqcli.export import STYLES
from saqcli.export.style import OnnxStyle
from saqcli.progress import Progress
from saqcli.quant.layer import quantized_layers
from saqcli.training.loop import Batches
from saqcli.verify.exactness import Inexact, inexact_places
from saqcli.verify.hazards import hazards, partition
from saqcli.verify.layerwise import check_layers, moved_codes
from saqcli.verify.runtime import onnx_session
from saqcli.verify.shared import SharedProof
from saqcli.verify.twin.check import check_twin, knows_runtime
from saqcli.verify.verdict import Verdict, compare, worst

PYTORCH = "pytorch"
LAYERWISE_IMAGES = 4  # all their activations are held in memory


def prove_graph(
    path: Path,
    model: nn.Module,
    style: str,
    batches: Batches,
    count: int,
    progress: Progress,
    runtimes: tuple[str, ...] = (),
    shared: SharedProof | None = None,
) -> Verdict:
    """The verdict on an ONNX file of ``model``.

    Args:
        path: path of the file.
        model: quantized, on the CPU, in eval mode.
        style: name in ``STYLES``.
        batches: images for the end-to-end comparison; the first few are used for the layerwise comparison.
        count: number of batches.
        progress: reports every batch.
        runtimes: names in ``RUNTIMES`` of further runtimes for the end-to-end comparison.
        shared: of ``model``, where several of its files are proved on the same images.
    """
    shared = shared or SharedProof(model)
    exporter = STYLES.find(style)()
    fatal, conditions = partition(hazards(onnx.load(str(path))), exporter.conditions)
    if fatal:  # ONNX Runtime cannot run files with some of them
        return Verdict(0, 1.0, 0.0, 0.0, hazards=fatal)
    first = _first_images(batches)
    others = {name: RUNTIMES[name](path) for name in runtimes}
    inexact = _inexact_places(path, model, exporter)
    exact = inexact is not None and not inexact
    deployed = shared.form(exporter, first[:2]) if exporter.deployed else None
    compared = shared if deployed is None else SharedProof(deployed)
    runs = _sessions(path, one_by_one=exporter.one_by_one or exact) | {PYTORCH: compared.pytorch}
    form = shared.form(exporter, first[:2]) if exporter.bit_equal else None
    exactly = form if form is not None else compared.pytorch if inexact is not None else None
    reference = compared.reference(first[:1]) if exactly is None else exactly
    verdicts = compare(reference, runs | others, batches, count, progress)
    if inexact and form is None and any(verdicts[name].max_abs_diff for name in runs):  # not equal after all
        verdicts = compare(compared.reference(first[:1]), runs | others, batches, count, progress)
    pytorch = verdicts.pop(PYTORCH)
    for each in verdicts.values():
        each.pytorch_agreement, each.pytorch_difference = pytorch.argmax_agreement, pytorch.mean_abs_diff
        each.pytorch_max_abs_diff = pytorch.max_abs_diff
    verdict = worst([verdicts[name] for name in runs if name != PYTORCH])
    verdict.others, verdict.conditions = {name: verdicts[name] for name in others}, conditions
    if form is not None:
        verdict.bit_equal, verdict.accumulators = True, getattr(form, "accumulators", ())
    verdict.inexact, verdict.bit_equal = inexact, verdict.bit_equal or exact
    few = first[:LAYERWISE_IMAGES]
    verdict.layerwise = check_layers(path, compared.frozen, few, exporter.quantizers)
    if deployed is not None:
        verdict.moved = moved_codes(shared.frozen, deployed, few)
    if not exporter.bit_equal:
        verdict.twin = check_twin(path, compared.frozen, few, exporter)
        verdict.equals_twin = exporter.equals_twin and knows_runtime()
    return verdict


def _inexact_places(path: Path, model: nn.Module, style: OnnxStyle) -> tuple[Inexact, ...] | None:
    """Where a file with short steps is not exact by construction; None for files that do not claim to be."""
    if not style.exact_sums or all(layer.short_steps is None for layer in quantized_layers(model).values()):
        return None
    return tuple(inexact_places(onnx.load(str(path))))


def _first_images(batches: Batches) -> Tensor:
    """The first readable images.

    Raises:
        DataError: no image is readable.
    """
    for images, labels in batches:
        if bool((labels >= 0).any()):
            return images[labels >= 0]
    raise DataError("no image to verify the file on can be read: use another `data.path`")


def prove_tensors(loaded: nn.Module, model: nn.Module, batches: Batches, progress: Progress) -> Verdict:
    """The verdict on a file of tensors, ``loaded`` as a model: logits must be equal bit for bit."""
    verdict = compare(model, {"loaded": loaded}, [next(iter(batches))], 1, progress)["loaded"]
    verdict.bit_equal = True
    return verdict


def versions(runtimes: tuple[str, ...] = ()) -> dict[str, str]:
    """Versions of the packages that a proof depends on."""
    return {"saq": __version__} | {
        name: version(name) for name in ("torch", "onnx", "onnxruntime", *runtimes)
    }


def _sessions(path: Path, *, one_by_one: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Sessions of an ONNX file: without and with default graph optimizations, and optionally image by image."""
    runs = {
        "unoptimized": onnx_session(path, optimized=False),
        "optimized": onnx_session(path, optimized=True),
    }
    if one_by_one:
        single = onnx_session(path, optimized=True, threads=1)
        runs["one by one"] = lambda images: torch.cat([single(image) for image in torch.split(images, 1)])
    return runs


def _openvino(path: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file, run by OpenVINO on the CPU in float32.

    Raises:
        ConfigError: OpenVINO is not installed, or does not read the file.
    """
    try:
        import openvino
    except ImportError:
        raise ConfigError('`runtimes=openvino` needs OpenVINO: pip install "saq[openvino]"') from None
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise ConfigError(
            f"OpenVINO does not read this style, remove `runtimes=openvino`: ... {reason}"
        ) from None
    return lambda images: torch.from_numpy(compiled([images.numpy()])[compiled.output(0)].copy())


def check_runtime(name: str) -> None:
    """Refuse an unknown runtime.

    Raises:
        ConfigError: names the others.
    """
    if name not in RUNTIMES:
        raise ConfigError(f"`runtimes={name}` is not a known runtime: choose {', '.join(RUNTIMES)}")


RUNTIMES: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {"openvino": _openvino}
