"""What ``saq analyze`` looks at: a quantized model with its latent weights, where they are there, and a fixed
set of images.

A run directory brings the model that it exported, with the latent weights of its checkpoint if they give the very
same quantized weights. A ``.safetensors`` file has none. A float model is calibrated at the bits that are asked
for, just as ``quantize`` with ``training.epochs=0`` does.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from saqcli.analysis import AnalysisInput
from saqcli.config import DataSection, ModelSection, QuantizationSection, RunConfig, resolve
from saqcli.data.loaders import calibration_loader, read_all
from saqcli.data.splits import workers_of
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export import ModelMetadata
from saqcli.export.restore import rebuild_structure, restore
from saqcli.models.preprocessing import Preprocessing, has_small_images
from saqcli.pipelines.bits import check_bits, check_way, given_policy
from saqcli.pipelines.calibration import calibrate, describe, install_quantizers
from saqcli.pipelines.checks import check_builds, check_model
from saqcli.pipelines.quantize import prepare
from saqcli.pipelines.setup import open_trained
from saqcli.pipelines.targets import ANALYZED, find_target, named_file
from saqcli.progress import Progress
from saqcli.quant.layer import quantized_layers
from saqcli.runs.directory import RunDirectory
from saqcli.training.loop import Score
from saqcli.training.minimizers.base import check_score

SMALL_BATCH, LARGE_BATCH = 128, 16  # images at a time, up to 64 pixels and above: differentiated twice


@dataclass(frozen=True)
class View:
    """Which images, and how many.

    Attributes:
        data: which images, and how they are read.
        split: of the data.
        images: drawn evenly over the classes.
        seed: of the draw.
    """

    data: DataSection
    split: Literal["train", "val"]
    images: int
    seed: int


def images_of(count: int, split: str) -> str:
    """``500 training images``."""
    kind = {"train": "training", "val": "validation"}[split]
    return f"{count:,} {kind} image{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Opened:
    """A subject and where it came from.

    Attributes:
        target: as it was named.
        facts: of its model.
        subject: ready to be measured.
        sha256: of all tensors of the model.
        images_sha256: of the images, their labels and how they are batched.
        score: of the model on these images.
    """

    target: str
    facts: ModelMetadata
    subject: AnalysisInput
    sha256: str
    images_sha256: str
    score: Score

    @property
    def side(self) -> int:
        """Pixels along the longer side of an image."""
        return max(Preprocessing.from_dict(self.facts.preprocessing).input_size[1:])


def check_target(target: str, section: ModelSection, bits: str | None, policy: Path | None) -> None:
    """Refuse what can be seen to be no subject before anything is loaded.

    Raises:
        SaqError: nothing of that name, a run without a model, an ONNX file, a quantized model with bits, a float
            one without, or bits out of range.
    """
    problems, given = Problems(), bits is not None or policy is not None
    found = problems.attempt(find_target, target, ANALYZED)
    if found is not None and found.kind != "model":
        if given:
            problems.add(
                ConfigError(f"{target} is quantized already and has its own bits: remove `bits` and `policy`")
            )
        problems.attempt(named_file, found, section)
    elif given:
        options = {"bits": bits, "policy": None if policy is None else str(policy)}
        quantization = QuantizationSection.model_validate(options)
        if found is not None:
            problems.attempt(check_model, section)
        problems.attempt(check_way, quantization)
        problems.attempt(check_bits, quantization)
        check_builds(problems, section)
    elif found is not None:
        problems.add(
            ConfigError(
                f"{target} is a float model: give `bits=4` or `policy=FILE`, at which it is calibrated, "
                "or a run directory or .safetensors file"
            )
        )
    problems.check()


def open_subject(
    target: str,
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    view: View,
    device: torch.device,
    progress: Progress,
) -> Opened:
    """The subject that ``target`` names.

    Args:
        target: a run directory, a ``.safetensors`` file, or the name of a float model.
        section: further options of a model name.
        bits: of a float model.
        policy: likewise.
        view: the images.
        device: of model and images.
        progress: for calibration and notes.

    Raises:
        SaqError: no such thing, a damaged one, or images that do not fit it.
    """
    found, latent = find_target(target, ANALYZED), True
    path = named_file(found, section)
    if path is not None:
        run = found.run
        model, facts = restore(path)
        trained = None if run is None else _with_latent_weights(model, facts, run, progress)
        model, latent = trained or model, trained is not None
    else:
        model, facts = _calibrated(section, bits, policy, view, device, progress)
    model = model.to(device).eval()
    batches = _images(facts, view, target, device, progress)
    layers = quantized_layers(model)
    ordered = {name: layers[name] for name in facts.policy.layers}
    subject = AnalysisInput(model, ordered, batches, facts.scheme, latent)
    score = subject.score()
    check_score(score.loss, score.images, target)
    return Opened(target, facts, subject, _hash_model(model), _hash_images(batches), score)


def _calibrated(
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    view: View,
    device: torch.device,
    progress: Progress,
) -> tuple[nn.Module, ModelMetadata]:
    """A float model, quantized and calibrated without training."""
    options = {"quantization.bits": bits, "quantization.policy": str(policy) if policy else None}
    named = {f"model.{key}": value for key, value in section.model_dump().items()}
    base = resolve(options=named | options | {"run.seed": view.seed})
    sections = {"data": view.data.model_dump(), "export": {"styles": ()}}  # nothing is exported
    config = RunConfig.model_validate({**base.model_dump(), **sections})
    network, images = prepare(config, device, progress)
    statistics = calibrate(network, images, config, progress)
    chosen = given_policy(config.quantization, network)
    assert chosen is not None  # no budget was given
    model = install_quantizers(config, network, chosen, statistics, images, progress)
    return model, describe(config, network, chosen, statistics, images)


@torch.no_grad()
def _with_latent_weights(
    model: nn.Module, facts: ModelMetadata, run: RunDirectory, progress: Progress
) -> nn.Module | None:
    """The model as training left it in the run's checkpoint; None where that is not the exported ``model``."""
    trained = rebuild_structure(facts)
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
    facts: ModelMetadata, view: View, target: str, device: torch.device, progress: Progress
) -> list[tuple[Tensor, Tensor]]:
    """The images of ``view`` as the model wants them, held in memory."""
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    split = open_trained(view.data, view.split, facts, target, progress)
    loader = calibration_loader(
        split,
        preprocessing,
        batch_size=view.data.eval_batch_size
        or (SMALL_BATCH if has_small_images(preprocessing) else LARGE_BATCH),
        workers=workers_of(view.data, preprocessing),
        device=device,
        seed=view.seed,
        images=view.images,
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
