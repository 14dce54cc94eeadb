"""Trial exports before training: a copy of the network in every style of the run, on random images."""

import torch

from saqcli.api.exporting import TRIED_IMAGES, trial
from saqcli.config import RunConfig
from saqcli.export import STYLES
from saqcli.pipelines.calibration import provisional_model
from saqcli.pipelines.setup import Network
from saqcli.progress import SILENT, Progress
from saqcli.random_state import random_state, set_random_state


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
