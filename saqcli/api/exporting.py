"""ONNX files of quantized modules, proved to compute the same, and trial exports before training."""

import copy
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saqcli.api.arguments import scheme_of
from saqcli.api.batches import BatchReader, Calls, Inputs
from saqcli.api.files import metadata_of, opened
from saqcli.api.info import bits_of, info, quantization_of, unwrapped
from saqcli.api.networks import check_signature, float_network, install, observed, policy_of, prepare
from saqcli.errors import (
    ConfigError,
    PolicyMismatch,
    SaqError,
    UnsupportedGrid,
    UnsupportedModel,
    out_of_memory,
)
from saqcli.export import ModelMetadata
from saqcli.export.tracing import CANNOT_EXPORT
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import SILENT, Progress
from saqcli.quant.calls import Call
from saqcli.quant.convert import Scheme
from saqcli.quant.grid import WeightGrid
from saqcli.quant.network import Network
from saqcli.quant.quantizers.base import Granularity
from saqcli.serialization import named_path
from saqcli.target import Target, deployment_of
from saqcli.verify.proof import check_runtime
from saqcli.verify.publish import export_verified, write_and_run
from saqcli.verify.verdict import SYNTHETIC, Verdict, synthetic_batches, verdict_path

ELSEWHERE = ": choose another `style`"  # end of exporters' messages where another style may work
TRIED_IMAGES = 3  # of a trial export; tracing uses 2, so that a fixed batch size in the graph is detected
TRIED_BITS = "w4a4"
VERIFY_IMAGES = 500  # of a caller's loader, as `data.verify_images` of the commands


def export_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    style: str = "qdq",
    *,
    verify: Iterable[Any] | None = None,
    verify_images: int | Literal["all"] = VERIFY_IMAGES,
    inputs: Inputs | None = None,
    runtimes: str | Iterable[str] = (),
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Verdict:
    """Write a quantized module to an ONNX file that provably computes the same.

    The file is run in ONNX Runtime, end to end and layer by layer, and gets its name once it matches the module. The
    verdict stands beside it, in ``NAME.verdict.json``.

    Args:
        model: from ``quantize_model`` or ``load``, from one image tensor to class scores (N, classes); or the path of a
            safetensors file or run directory. Not changed.
        path: of the file, ending with ``.onnx``.
        style: name in ``saqcli.export.STYLES``.
        verify: any iterable of batches to compare on; synthetic images by default.
        verify_images: how many of these images are used, the first ones; ``"all"`` uses every one.
        inputs: from a batch to the module's argument.
        runtimes: further runtimes to compare with: ``openvino``.
        overwrite: replace an existing file.
        progress: reports every batch.

    Raises:
        ConfigError: the module is not quantized, the file exists, or there is no such style or runtime.
        UnsupportedModel: the module takes or returns something else, or the style has no form of it.
        ExportMismatch: the file does not equal the module; nothing is written.

    Example:
        >>> import saqcli as saq, tempfile, pathlib
        >>> net = saq.load_model("saq/resnet20", pretrained=False, num_classes=10)
        >>> q = saq.quantize_model(net, "w4a4")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saq.export_onnx(q, pathlib.Path(folder) / "net.onnx").verified
        True
    """
    module, about, found = quantization_of(opened(model))
    path, named = named_path(str(path)), (runtimes,) if isinstance(runtimes, str) else tuple(runtimes)
    for runtime in named:
        check_runtime(runtime)
    check_signature(about.name, found.traced)
    if path.suffix != ".onnx":
        raise ConfigError(f"`path={path}` does not end with .onnx: give a file name like model.onnx")
    for taken in (path, verdict_path(path)):
        if taken.exists() and not overwrite:
            raise ConfigError(
                f"{taken} already exists: use `overwrite=True` to replace it, or another `path`"
            )
    metadata = metadata_of(module)
    batches = _batches(module, verify, inputs, metadata, _limit(verify_images))
    return export_verified(
        copy.deepcopy(module),
        metadata,
        path,
        style,
        batches,
        len(batches),
        progress,
        named,
        true_size=found.costs.size(metadata.policy),
        verified_on=SYNTHETIC if verify is None else "images of the caller",
    )


def check_export(
    model: nn.Module,
    style: str = "qdq",
    *,
    example: Any = None,
    inputs: Inputs | None = None,
    quantizer: str = "clip",
    weight_quantizer: str | None = None,
    activation_quantizer: str | None = None,
    weight_grid: WeightGrid = "auto",
    granularity: Granularity = "channel",
    weight_normalization: bool = False,
    restore_deviation: bool = True,
    short_steps: int | None = None,
    target: str | Path | Target | None = None,
    junctions: Iterable[str] = (),
) -> None:
    """Check, before any training, that a module can be exported: write a trial file and run it.

    Args:
        model: a float module, tried at 4 bits, or a quantized one; not changed.
        style: as in ``export_onnx``.
        example: inputs of a float module, as in ``quantize_model``.
        inputs: as in ``quantize_model``.
        quantizer: of a float module, as in ``quantize_model``, like the next eight.
        weight_quantizer: of weights.
        activation_quantizer: of inputs.
        weight_grid: levels of weights.
        granularity: of clipping levels.
        weight_normalization: of the weights of convolutions.
        restore_deviation: multiply normalized weights by their deviation again; False as in the SAQ paper.
        short_steps: most significant bits of every step.
        target: where the module will run, which may be asked of a quantized module, too.
        junctions: kinds of further operators whose operands are quantized.

    Raises:
        ConfigError: an unknown name or value, or a style or quantizers that the target does not read or run.
        UnsupportedModel: it cannot be exported; the message gives reason and remedy.
    """
    model = unwrapped(model)
    about, place = info(model), deployment_of(target, junctions)
    place.check_styles((style,))
    if about.quantization is None:
        scheme = scheme_of(
            quantizer,
            weight_quantizer,
            activation_quantizer,
            weight_grid,
            granularity,
            weight_normalization,
            restore_deviation,
            target=place,
            short_steps=short_steps,
        )
        ready = prepare(model, None, example, inputs, None)
        network = float_network(ready.model, ready.example, target=place, fold_norms=short_steps is not None)
        try_export(network, ready.example, scheme, style)
        return
    found, policy = about.quantization, bits_of(model)
    quantized = found.junctions.operators if found.junctions else {}
    unquantized = frozenset(each.kind for each in found.traced.junctions if each.name not in quantized)
    place.check_quantized(about.name, found.scheme, policy.layers, unquantized)
    check_signature(about.name, found.traced)
    images = _random_images(found.traced.inputs[0])
    trial(about.name, style, images, lambda: (copy.deepcopy(model).cpu().eval(), metadata_of(model)))


def try_export(network: Network, example: Call, scheme: Scheme, style: str) -> None:
    """Export a copy of a network, traced and not yet quantized, at 4 bits with provisional levels.

    Raises:
        UnsupportedModel: it cannot be exported.
    """
    check_signature(network.name, network.traced)
    images = _random_images(network.traced.inputs[0])

    def provisional() -> tuple[nn.Module, ModelMetadata]:
        model = copy.deepcopy(network.model).cpu().eval()
        copied = Network(
            model, network.name, network.traced, network.costs, network.products, network.junctions
        )
        statistics = observed(model, [Call((images,))], 0, SILENT)
        install(copied, example, scheme, policy_of(copied, bits=TRIED_BITS), statistics)
        return model, metadata_of(model)

    trial(network.name, style, images, provisional)


def trial(name: str, style: str, images: Tensor, make: Callable[[], tuple[nn.Module, ModelMetadata]]) -> None:
    """Write a temporary file of a quantized model in ``style`` and run it in ONNX Runtime; nothing is compared.

    Args:
        name: of the network, for messages.
        style: the style.
        images: (N, C, H, W) to run on.
        make: returns the model, on the CPU and in eval mode, and its metadata.

    Raises:
        UnsupportedModel: the style cannot express the network; the message gives reason and remedy.
    """
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            model, metadata = make()
            write_and_run(style, model, metadata, path, images)
        except (OSError, ConfigError, PolicyMismatch):
            raise
        except Exception as error:  # a foreign forward pass or graph may raise any exception
            if out_of_memory(error):
                raise MemoryError(str(error)) from error
            reason = str(error).replace(str(path), "the file")
            other = "another `style`"
            if reason.startswith(CANNOT_EXPORT):  # without a trace, no style can work
                other = "another network"
            elif isinstance(error, UnsupportedGrid):
                reason, other = error.reason, "another quantizer"
            reason = reason.removeprefix(CANNOT_EXPORT).removesuffix(ELSEWHERE)
            if not isinstance(error, SaqError):
                reason = f"{type(error).__name__}: {' '.join(reason.split())[:200]}"
            raise UnsupportedModel(
                f"{name} cannot be exported to ONNX in style {style}: {reason}; use `export.styles=()` to "
                f"write model.safetensors only, or {other}"
            ) from error


def _random_images(size: tuple[int, ...]) -> Tensor:
    return torch.randn(TRIED_IMAGES, *size, generator=torch.Generator().manual_seed(0))


def _limit(images: int | Literal["all"]) -> int | None:
    """``verify_images`` as a limit; None for ``all``.

    Raises:
        ConfigError: it is neither.
    """
    if images == "all":
        return None
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ConfigError(f'`verify_images={images!r}`: give a number of at least 1, or "all"')
    return images


def _batches(
    model: nn.Module,
    loader: Iterable[Any] | None,
    inputs: Inputs | None,
    metadata: ModelMetadata,
    limit: int | None,
) -> list[tuple[Tensor, Tensor]]:
    """At most ``limit`` images on the CPU, with labels of 0 where they have none."""
    if loader is None:
        return synthetic_batches(Preprocessing.from_dict(metadata.preprocessing))
    images: list[Tensor] = []
    left = limit
    for call in Calls(loader, BatchReader(model, inputs)):
        batch = call.tensors[0].cpu()[:left]
        images.append(batch)
        if left is not None:
            left -= len(batch)
            if left == 0:
                break
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images]
