"""Check with two images, before the long phases, that a network can be trained.

In training mode a network may return auxiliary heads in addition to the class scores, or fail. A single image can be
too few, since a batch norm over features of 1 x 1 finds no variance in it. Costs, calibration and export need
evaluation mode only.
"""

from collections.abc import Mapping
from typing import NamedTuple, NoReturn

import torch
from torch import nn

from saqcli import distributed
from saqcli.config import RunConfig
from saqcli.errors import UnsupportedModel, first_line
from saqcli.models.preprocessing import Preprocessing
from saqcli.quant.layer import frozen_batch_stats
from saqcli.random_state import random_state, set_random_state
from saqcli.tasks import classification
from saqcli.training.objective import sizes
from saqcli.units import counted

Limits = Mapping[str, int | None]  # setting to the largest number of images in a forward pass, widest first


class Least(NamedTuple):
    """The fewest images in a forward pass of training, and why."""

    images: int
    reason: str
    remedy: str


def check_trains(
    model: nn.Module,
    name: str,
    preprocessing: Preprocessing,
    config: RunConfig,
    *,
    images: int | None = None,
    limits: Limits | None = None,
) -> None:
    """Run ``model`` in training mode on the fewest random images that a step may have; the model stays unchanged.

    Args:
        model: as it will be trained.
        name: its name in messages.
        preprocessing: of its images.
        config: of the run.
        images: number of training images, if known.
        limits: of the images in a forward pass, below the batch; None for those of fine-tuning.

    Raises:
        UnsupportedModel: it fails, or does not return class scores.
    """
    training = config.training
    if limits is None:
        limits = {f"training.{name}": getattr(training, name) for name in ("sharpness_batch", "micro_batch")}
    mixes = bool(training.mixup or training.cutmix)
    least = _least(config.data.batch_size, images, limits, pairs=mixes)
    count = min(2, least.images)
    answer = _answer(model, name, preprocessing, count, least)
    if what := classification.unfit(answer, count):
        expected = f"{classification.OUTPUT}, ({count}, classes)"
        _refuse(name, f"returns a {what} in training, where {expected}, are expected")


def _least(batch: int, images: int | None, limits: Limits, *, pairs: bool) -> Least:
    """The smallest forward pass over batches of ``batch`` of ``images`` images; with ``pairs`` they are mixed."""
    whole = min(batch, images or batch)
    found = max(whole // distributed.count(), 1)
    reason, remedy = f"`data.batch_size={batch}`", f"`data.batch_size={2 * distributed.count()}` or more"
    if whole < batch:
        reason, remedy = f"a training set of {counted(whole, 'image')}", "more images"
    parts = [found - found % 2 if pairs and found > 1 else found]
    for setting, limit in limits.items():
        if limit is not None and min(parts) > 1:
            batches, parts = parts, [size for part in parts for size in sizes(part, limit)]
            reason = f"`{setting}={limit}`" + (f" with batches of {batches[0]}" if limit > 1 else "")
            remedy = f"`{setting}={limit + 1}` or more"
    return Least(min(parts), reason, remedy)


def _answer(model: nn.Module, name: str, preprocessing: Preprocessing, count: int, least: Least) -> object:
    """The output of ``model`` in training mode for ``count`` images."""
    try:
        return _tried(model, preprocessing, count)
    except Exception as error:  # any error of a foreign forward pass
        problem = f"fails in training on {counted(count, 'image')}: {first_line(error)[:200]}"
        if count == 1 and _works(model, preprocessing, 2):
            _refuse(
                name,
                f"{problem}. {least.reason} leaves a single image in a forward pass, in which a norm finds no "
                "variance",
                error,
                remedy=f"give {least.remedy}",
            )
        _refuse(name, problem, error)


def _works(model: nn.Module, preprocessing: Preprocessing, count: int) -> bool:
    try:
        _tried(model, preprocessing, count)
    except Exception:
        return False
    return True


def _tried(model: nn.Module, preprocessing: Preprocessing, count: int) -> object:
    """The output of ``model`` in training mode for ``count`` random images; the model stays unchanged."""
    device = next(model.parameters()).device
    images = torch.randn(count, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    before, mode = random_state(), model.training
    try:
        with torch.no_grad(), frozen_batch_stats(model.train()):
            return model(images.to(device))
    finally:
        model.train(mode)
        set_random_state(before)


def _refuse(
    name: str,
    problem: str,
    cause: Exception | None = None,
    remedy: str = "change `model.kwargs` or `model.input_size`",
) -> NoReturn:
    raise UnsupportedModel(
        f"{name} {problem}; {remedy}, or omit training: quantize with `training.epochs=0`, search with "
        "`quantization.searcher=error`"
    ) from cause
