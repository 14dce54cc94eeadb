"""Calibration: observe layer inputs, install and fit quantizers, correct statistics.

Before a long run, a copy of the network with provisional levels is exported in every style of the run.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.api.batches import device_of
from saqcli.api.exporting import TRIED_IMAGES, trial
from saqcli.api.files import metadata_of
from saqcli.api.networks import install, observed, random_image, reported
from saqcli.config import RunConfig
from saqcli.data.batches import Loader
from saqcli.data.splits import Images
from saqcli.export import STYLES, ModelMetadata
from saqcli.pipelines.bits import given_policy, scheme_of, space_of
from saqcli.pipelines.setup import Network
from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics, observe, reestimate_batch_norms
from saqcli.quant.calls import Call
from saqcli.quant.correction import Corrections
from saqcli.random_state import random_state, set_random_state
from saqcli.reconstruction.norms import balance_norms
from saqcli.training.minimizers.base import running_statistics


def calibrate(
    network: Network, images: Images, config: RunConfig, progress: Progress
) -> dict[str, InputStatistics]:
    """Input statistics of all layers on calibration images, computed by the first rank."""
    return distributed.from_first(
        lambda: observed(
            network.model,
            calls_of(loader := images.calibration()),
            config.run.seed,
            progress,
            len(loader),
            scheme=scheme_of(config.quantization),
        )
    )


def _folded(
    model: nn.Module, images: Images, config: RunConfig, policy: BitConfig, progress: Progress
) -> dict[str, Tensor]:
    """Balance the norms of ``model``; the parameters that this has changed, by name."""
    found = balance_norms(
        model,
        calls_of(images.calibration()),
        policy,
        scheme_of(config.quantization),
        seed=config.run.seed,
        progress=progress,
    )
    changed = tuple(f"{name}." for each in found if each.folded for name in (each.norm, *each.layers))
    return {
        name: value.detach().cpu() for name, value in model.named_parameters() if name.startswith(changed)
    }


def calls_of(loader: Loader) -> Iterator[Call]:
    """The images of a loader as calls."""
    return (Call((batch,)) for batch, _ in loader)


def quantized(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images,
    progress: Progress,
) -> nn.Module:
    """The network at the policy's bits, as the first stage of a run leaves it; changed in place.

    Args:
        config: resolved.
        network: wrapped and traced, without quantizers.
        policy: bits of every layer.
        statistics: of its inputs; taken anew if the settings have norms balanced.
        images: of the run.
        progress: reports all batches.
    """
    statistics = balanced(config, network, policy, statistics, images, progress)
    return install_quantizers(config, network, policy, statistics, images, progress)


def balanced(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images,
    progress: Progress,
) -> Mapping[str, InputStatistics]:
    """Balance the norms of ``network``, if the settings say so; the statistics of its inputs after that.

    Every rank gets the parameters that the first one finds.
    """
    if not config.quantization.balance_norms:
        return statistics
    model = network.model
    folded = distributed.from_first(lambda: _folded(model, images, config, policy, progress))
    parameters = dict(model.named_parameters())
    for name, value in folded.items():
        parameters[name].data.copy_(value)
    return calibrate(network, images, config, progress) if folded else statistics


def install_quantizers(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images,
    progress: Progress,
) -> nn.Module:
    """Install and fit the quantizers of every layer at the policy's bits, then apply the corrections."""
    example = random_image(network.loaded.preprocessing.input_size, device_of(network.model))
    install(network, example, scheme_of(config.quantization), policy, statistics)
    CalibrationCorrection(config, network.model, images, progress)()
    return network.model


def provisional_model(
    config: RunConfig, network: Network, images: Tensor, *, most_bits: bool = False
) -> tuple[nn.Module, ModelMetadata]:
    """A quantized copy of the network for a trial export, fitted to ``images`` only.

    It has the given bits; under a budget, the fewest that a search may choose, or the most with ``most_bits``.
    """
    copied = replace(network, model=copy.deepcopy(network.model).eval())
    policy = given_policy(config.quantization, network)
    if policy is None:
        space = space_of(config.quantization, network)
        policy = space.config([-1 if most_bits else 0] * len(space.decisions))
    scheme = scheme_of(config.quantization)
    if scheme.has_published_levels:
        scheme = scheme.model_copy(update={"clip_init": "paper"})  # quicker
    model = install(copied, Call((images,)), scheme, policy, observe(copied.model, [images]))
    return model, metadata_of(model)


def check_exports(config: RunConfig, network: Network, progress: Progress = SILENT) -> None:
    """Export a copy of ``network`` in every style of the run, and run it in ONNX Runtime.

    Bits are the given ones, or under a budget the fewest that a search may choose (the most, where these are the
    style's ``tightest``); levels are provisional. The files are temporary; the comparison with the model follows at
    the end of the run.

    Args:
        config: resolved.
        network: wrapped and traced, on the CPU, without quantizers; not changed.
        progress: reports every style.

    Raises:
        UnsupportedModel: a style cannot express the network; the message gives reason and remedy.
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
    except OSError as error:  # about the temporary files, which the run does not need
        progress.note(f"no trial export before training: {error}")
    finally:
        set_random_state(before)


def _try_export(style: str, config: RunConfig, network: Network) -> None:
    size = network.loaded.preprocessing.input_size
    images = torch.randn(TRIED_IMAGES, *size, generator=torch.Generator().manual_seed(0))
    most_bits = STYLES.find(style).tightest == "most"
    trial(
        network.name, style, images, lambda: provisional_model(config, network, images, most_bits=most_bits)
    )


def describe(model: nn.Module, images: Images) -> ModelMetadata:
    """The metadata of exported files of a quantized model, with the classes of its training images."""
    classes = {
        "class_names": images.train.class_names,
        "folders": dict(images.train.folders),
        "class_order": images.train.class_order,
        "exif_transpose": bool(images.section.exif_transpose),
    }
    return metadata_of(model).model_copy(update=classes)


class CalibrationCorrection:
    """Correction of a fitted model: biases and batch-norm statistics, according to the settings.

    It may be called again after the bits of the model change, and starts from the uncorrected model each time.

    Args:
        config: resolved.
        model: the fitted, uncorrected model.
        images: its images; the calibration images are used.
        progress: reports all batches.
        keep: whether to keep the images in memory for further calls.
    """

    def __init__(
        self, config: RunConfig, model: nn.Module, images: Images, progress: Progress, *, keep: bool = False
    ) -> None:
        self.model, self._images, self._progress, self._keep = model, images, progress, keep
        wanted, self._count = config.quantization, config.data.calibration_images
        self._settles = wanted.weight_normalization and not wanted.recalibrate_bn
        self._correct: Corrections | None = None
        if wanted.correct_bias or wanted.recalibrate_bn:
            self._correct = Corrections(model, biases=wanted.correct_bias, norms=wanted.recalibrate_bn)
        self._kept: dict[str, list[Call]] = {}

    def __call__(self) -> None:
        """Correct the model at its current bits."""
        if self._correct is not None:
            self._correct(self._batches("correcting means", self._images.calibration))
        if self._settles:
            settled = distributed.from_first(self._settled)
            for tensor, value in zip(running_statistics(self.model), settled, strict=True):
                tensor.copy_(value)

    def _settled(self) -> list[Tensor]:
        """Re-estimated running statistics; on one rank, since every rank draws other augmentations."""
        reestimate_batch_norms(self.model, self._batches("settling batch norms", self._augmented))
        return [tensor.cpu() for tensor in running_statistics(self.model)]

    def _augmented(self) -> Loader:
        """Images with the augmentation of training; without it the statistics differ and accuracy is lower."""
        loader = self._images.training(limit=self._count, shared=False)
        loader.set_epoch(0)
        return loader

    def _batches(self, title: str, make: Callable[[], Loader]) -> Iterable[Call]:
        """The images of a loader, or the kept ones."""
        if title in self._kept:
            return self._kept[title]
        loader = make()
        batches = reported(title, calls_of(loader), self._progress, len(loader))
        if not self._keep:
            return batches
        return self._kept.setdefault(title, list(batches))
