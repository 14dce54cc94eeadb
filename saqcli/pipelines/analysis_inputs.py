"""Inputs of ``saq analyze``: a quantized model and a fixed set of images.

A run directory gives its exported model, with the latent weights of its checkpoint if their quantized weights are
bit-identical. A ``.safetensors`` file has no latent weights. A float model is calibrated at the given bits, as
``quantize`` with ``training.epochs=0`` does.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from saqcli.analysis import AnalysisInput
from saqcli.api.sources import ANALYZED, find_source, named_builder, named_file
from saqcli.config import DataSection, ModelSection, QuantizationSection, RunConfig, resolve
from saqcli.data.loaders import calibration_loader, read_all
from saqcli.data.splits import scored_split, workers_of
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export import ModelMetadata
from saqcli.export.restore import rebuild_structure, restore
from saqcli.models.own import OwnNetwork
from saqcli.models.preprocessing import Preprocessing, has_small_images
from saqcli.pipelines.bits import check_bits, check_bits_source, given_policy
from saqcli.pipelines.calibration import calibrate, describe, install_quantizers
from saqcli.pipelines.checks import check_builds, check_model
from saqcli.pipelines.quantize import prepare
from saqcli.pipelines.setup import open_trained
from saqcli.progress import Progress
from saqcli.quant.layer import quantized_layers
from saqcli.runs.directory import RunDirectory
from saqcli.tasks.classification import Score
from saqcli.training.minimizers.base import check_score

SMALL_BATCH, LARGE_BATCH = 128, 16  # batch sizes up to 64 pixels and above, for second derivatives


@dataclass(frozen=True)
class ImageSelection:
    """The images to measure on.

    Attributes:
        data: source of the images.
        split: split of the data.
        images: number of images, drawn evenly over the classes.
        seed: random seed of the draw.
    """

    data: DataSection
    split: Literal["train", "val"]
    images: int
    seed: int

    @property
    def split_name(self) -> str:
        """The name of the split in the data: that of ``data.split`` in the place of ``val``, if it is set."""
        return scored_split(self.data, self.split)


@dataclass(frozen=True)
class OpenedModel:
    """A model opened for analysis.

    Attributes:
        source: as given.
        metadata: the model's metadata.
        subject: model, images and layers for the instruments.
        sha256: hash of all tensors of the model.
        file: that it was read from; None of a float model.
        images_sha256: hash of the images, their labels and batch sizes.
        score: loss and accuracy of the model on these images.
    """

    source: str
    metadata: ModelMetadata
    subject: AnalysisInput
    sha256: str
    file: Path | None
    images_sha256: str
    score: Score

    @property
    def side(self) -> int:
        """Pixels along the longer side of an image."""
        return max(Preprocessing.from_dict(self.metadata.preprocessing).input_size[1:])


def check_source(
    source: str,
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    builder: str | None = None,
) -> None:
    """Check the source of an analysis before anything is loaded.

    Raises:
        SaqError: unknown source, a run without a model, an ONNX file, a quantized model with bits, a float model
            without bits, or bits out of range.
    """
    problems, given = Problems(), bits is not None or policy is not None
    found = problems.attempt(find_source, source, ANALYZED)
    problems.attempt(named_builder, found, builder)
    if found is not None and found.kind != "model":
        if given:
            problems.add(
                ConfigError(f"{source} is quantized already and has its own bits: remove `bits` and `policy`")
            )
        problems.attempt(named_file, found, section)
    elif given:
        options = {"bits": bits, "policy": None if policy is None else str(policy)}
        quantization = QuantizationSection.model_validate(options)
        if found is not None:
            problems.attempt(check_model, section)
        problems.attempt(check_bits_source, quantization)
        problems.attempt(check_bits, quantization)
        check_builds(problems, section)
    elif found is not None:
        problems.add(
            ConfigError(
                f"{source} is a float model: give `bits=4` or `policy=FILE` to calibrate it, or a run directory or "
                ".safetensors file"
            )
        )
    problems.check()


def open_input(
    source: str,
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    selection: ImageSelection,
    device: torch.device,
    progress: Progress,
    builder: str | None = None,
) -> OpenedModel:
    """Open the model ``source`` and its images.

    Args:
        source: a run directory, a ``.safetensors`` file, or the name of a float model.
        section: further options of a float model.
        bits: bits of a float model.
        policy: policy of a float model.
        selection: the images.
        device: device of model and images.
        progress: reports calibration and notes.
        builder: name of the user's own network that a run or file was made from.

    Raises:
        SaqError: unknown or damaged source, or images that do not match it.
    """
    found, latent = find_source(source, ANALYZED), True
    path, own = named_file(found, section), named_builder(found, builder)
    if path is not None:
        run = found.run
        model, metadata = restore(path, own)
        trained = None if run is None else _with_latent_weights(model, metadata, run, progress, own)
        model, latent = trained or model, trained is not None
    else:
        model, metadata = _calibrated(section, bits, policy, selection, device, progress)
    model = model.to(device).eval()
    batches = _images(metadata, selection, source, device, progress)
    layers = quantized_layers(model)
    ordered = {name: layers[name] for name in metadata.policy.layers}
    subject = AnalysisInput(model, ordered, batches, metadata.scheme, latent)
    score = subject.score()
    check_score(score.loss, score.images, source)
    return OpenedModel(
        source,
        metadata,
        subject,
        sha256=_hash_model(model),
        file=path,
        images_sha256=_hash_images(batches),
        score=score,
    )


def _calibrated(
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    selection: ImageSelection,
    device: torch.device,
    progress: Progress,
) -> tuple[nn.Module, ModelMetadata]:
    """A float model quantized by calibration only."""
    options = {"quantization.bits": bits, "quantization.policy": str(policy) if policy else None}
    named = {f"model.{key}": value for key, value in section.model_dump().items()}
    base = resolve(options=named | options | {"run.seed": selection.seed})
    sections = {"data": selection.data.model_dump(), "export": {"styles": ()}}  # no trial export
    config = RunConfig.model_validate({**base.model_dump(), **sections})
    network, images = prepare(config, device, progress)
    statistics = calibrate(network, images, config, progress)
    chosen = given_policy(config.quantization, network)
    assert chosen is not None  # no budget was given
    model = install_quantizers(config, network, chosen, statistics, images, progress)
    return model, describe(model, images)


@torch.no_grad()
def _with_latent_weights(
    model: nn.Module, metadata: ModelMetadata, run: RunDirectory, progress: Progress, own: OwnNetwork | None
) -> nn.Module | None:
    """The model of the run's checkpoint; None unless its quantized weights equal those of ``model``."""
    trained = rebuild_structure(metadata, own)
    try:
        checkpoint = run.load_checkpoint() or {}
    except RunDirectoryError:
        checkpoint = {}
    last = checkpoint.get("average") or checkpoint.get("model")
    for state in (last, checkpoint.get("best", {}).get("model")):
        try:
            trained.load_state_dict(state or {})
        except RuntimeError:
            continue
        pairs = zip(quantized_layers(model).values(), quantized_layers(trained).values(), strict=True)
        if all(torch.equal(one.quantized_weight(), other.quantized_weight()) for one, other in pairs):
            return trained
    progress.note(f"{run.checkpoint_path} does not hold the latent weights of the model: ignored")
    return None


def _images(
    metadata: ModelMetadata, selection: ImageSelection, source: str, device: torch.device, progress: Progress
) -> list[tuple[Tensor, Tensor]]:
    """The selected images, preprocessed for the model and held in memory."""
    preprocessing = Preprocessing.from_dict(metadata.preprocessing)
    split = open_trained(selection.data, selection.split, metadata, source, progress)
    loader = calibration_loader(
        split,
        preprocessing,
        batch_size=selection.data.eval_batch_size
        or (SMALL_BATCH if has_small_images(preprocessing) else LARGE_BATCH),
        workers=workers_of(selection.data, preprocessing),
        device=device,
        seed=selection.seed,
        images=selection.images,
    )
    return read_all(loader, progress, "analyze on")


def _hash_model(model: nn.Module) -> str:
    tensors = sorted(model.state_dict().items())
    return _hash(part for name, value in tensors for part in (name.encode(), value))


def _hash_images(batches: Iterable[tuple[Tensor, Tensor]]) -> str:
    return _hash(part for images, labels in batches for part in (repr(images.shape).encode(), images, labels))


def _hash(parts: Iterable[bytes | Tensor]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
