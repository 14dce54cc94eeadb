"""From a traced float network to a calibrated quantized one: look at inputs, fit quantizers."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from saqcli import ranks
from saqcli.config import RunConfig
from saqcli.io.batches import Loader
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibrate import InputStatistics, fit, observe, settle_batch_norms
from saqcli.quant.convert import Scheme
from saqcli.quant.corrections import correct
from saqcli.workflows.setup import Images, Network


def calibrate(
    network: Network, images: Images, config: RunConfig, progress: Progress
) -> dict[str, InputStatistics]:
    """What the inputs of all layers look like on a few training images; the first rank looks for all."""
    return ranks.from_first(
        lambda: observe(network.model, _told("calibrating", images.calibration(), progress), config.run.seed)
    )


def _told(title: str, loader: Loader, progress: Progress) -> Iterator[Tensor]:
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
    """Give every layer its quantizers at the policy's bits, with fitted levels."""
    signed = {name: facts.signed for name, facts in statistics.items()}
    convert.install(network.model, scheme_of(config), policy, signed)
    fit(network.model, statistics, config.quantization.clip_init)
    wanted = config.quantization
    if wanted.correct_bias or wanted.recalibrate_bn:
        batches = _told("correcting means", images.calibration(), progress)
        correct(network.model, batches, biases=wanted.correct_bias, norms=wanted.recalibrate_bn)
    if wanted.weight_normalization and not wanted.recalibrate_bn:
        # As training sees them: without its augmentation running statistics are others, and accuracy is lower.
        loader = images.training(limit=config.data.calibration_images, shared=False)
        loader.set_epoch(0)
        settle_batch_norms(network.model, _told("settling batch norms", loader, progress))
    return network.model
