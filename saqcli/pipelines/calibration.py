"""From a traced float network to a calibrated quantized one: look at inputs, fit quantizers, correct means."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from saqcli import distributed
from saqcli._version import __version__
from saqcli.config import RunConfig
from saqcli.data.batches import Loader
from saqcli.data.splits import Images
from saqcli.export import ModelMetadata
from saqcli.machine import library_versions
from saqcli.pipelines.bits import given_policy, space_of
from saqcli.pipelines.setup import Network
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics, fit, observe, reestimate_batch_norms
from saqcli.quant.convert import Scheme
from saqcli.quant.correction import Corrections
from saqcli.training.minimizers.base import running_statistics


def calibrate(
    network: Network, images: Images, config: RunConfig, progress: Progress
) -> dict[str, InputStatistics]:
    """What the inputs of all layers look like on a few training images; the first rank looks for all."""
    return distributed.from_first(
        lambda: observe(
            network.model, _reported("calibrating", images.calibration(), progress), config.run.seed
        )
    )


def _reported(title: str, loader: Loader, progress: Progress) -> Iterator[Tensor]:
    """The images of ``loader``, batch by batch, with their progress."""
    with progress.task(title, len(loader)) as task:
        for batch, _ in loader:
            yield batch
            task.advance(images=len(batch))


def scheme_of(config: RunConfig) -> Scheme:
    """Which quantizers the configuration asks for."""
    wanted = config.quantization
    return Scheme(
        quantizer=wanted.quantizer,
        weight_grid=wanted.weight_grid,
        granularity=wanted.granularity,
        weight_normalization=wanted.weight_normalization,
        clip_init=wanted.clip_init,
    )


def install_quantizers(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images,
    progress: Progress,
) -> nn.Module:
    """Give every layer its quantizers at the policy's bits, with fitted levels, and correct what they moved."""
    convert.install(network.model, scheme_of(config), policy, signs_of(statistics))
    fit(network.model, statistics, config.quantization.clip_init)
    CalibrationCorrection(config, network.model, images, progress)()
    return network.model


def provisional_model(
    config: RunConfig, network: Network, images: Tensor, *, most_bits: bool = False
) -> tuple[nn.Module, ModelMetadata]:
    """A quantized copy of the network, its levels fitted to ``images`` and not to be used.

    Its bits are those given; under a budget the fewest that a search may choose, or the most (``most_bits``).
    """
    model = copy.deepcopy(network.model).eval()
    policy = given_policy(config.quantization, network)
    if policy is None:
        space = space_of(config.quantization, network)
        policy = space.config([-1 if most_bits else 0] * len(space.decisions))
    statistics = observe(model, [images])
    scheme = scheme_of(config)
    convert.install(model, scheme, policy, signs_of(statistics))
    fit(model, statistics, "paper" if scheme.quantizer == "clip" else "error")  # the former is quicker
    return model, describe(config, network, policy, statistics)


def signs_of(statistics: Mapping[str, InputStatistics]) -> dict[str, bool]:
    """Whether the input of a layer is signed, by its name."""
    return {name: of_layer.signed for name, of_layer in statistics.items()}


def describe(
    config: RunConfig,
    network: Network,
    policy: BitConfig,
    statistics: Mapping[str, InputStatistics],
    images: Images | None = None,
) -> ModelMetadata:
    """The metadata of the exported files; without ``images`` nothing about classes."""
    loaded = network.loaded
    metadata = ModelMetadata(
        saq_version=__version__,
        versions=library_versions(),
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=scheme_of(config),
        signed=signs_of(statistics),
        routed=network.traced.routed,
        products=network.products,
        source=loaded.weights_source,
        source_sha256=loaded.weights_sha256,
    )
    if images is None:
        return metadata
    classes = {
        "class_names": images.train.class_names,
        "folders": dict(images.train.folders),
        "class_order": images.train.class_order,
        "exif_transpose": bool(images.section.exif_transpose),
    }
    return metadata.model_copy(update=classes)


class CalibrationCorrection:
    """What calibration does to a model with fitted levels: correct what quantization moved, as the settings ask.

    It can be called again whenever the model's bits have changed. It starts from the uncorrected model each time.

    Args:
        config: resolved.
        model: not corrected yet.
        images: of the model; a few of them are looked at.
        progress: told about everything.
        keep: whether to keep these images in memory, for more than one call.
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
        self._kept: dict[str, list[Tensor]] = {}

    def __call__(self) -> None:
        """Correct the model at its present bits."""
        if self._correct is not None:
            self._correct(self._batches("correcting means", self._images.calibration))
        if self._settles:
            settled = distributed.from_first(self._settled)
            for tensor, value in zip(running_statistics(self.model), settled, strict=True):
                tensor.copy_(value)

    def _settled(self) -> list[Tensor]:
        """Running statistics that are estimated anew; on one rank, since each would draw other augmentations."""
        reestimate_batch_norms(self.model, self._batches("settling batch norms", self._augmented))
        return [tensor.cpu() for tensor in running_statistics(self.model)]

    def _augmented(self) -> Loader:
        """As training sees them: without its augmentation running statistics are others, and accuracy is lower."""
        loader = self._images.training(limit=self._count, shared=False)
        loader.set_epoch(0)
        return loader

    def _batches(self, title: str, loader: Callable[[], Loader]) -> Iterable[Tensor]:
        """The images of a loader, or what was kept of them."""
        if title in self._kept:
            return self._kept[title]
        batches = _reported(title, loader(), self._progress)
        if not self._keep:
            return batches
        return self._kept.setdefault(title, list(batches))
