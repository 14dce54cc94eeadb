"""Whether a network can be trained, found out with two images before hours are spent on what comes before.

A network may answer otherwise in training than in evaluation: with auxiliary heads beside the class scores, or not at
all. Costs, calibration and export only need its evaluation.
"""

from typing import NoReturn

import torch
from torch import Tensor, nn

from saqcli.algorithms.random_state import random_state, set_random_state
from saqcli.config import RunConfig
from saqcli.errors import UnsupportedModel
from saqcli.io.preprocessing import Preprocessing
from saqcli.quant.layers import frozen_batch_stats
from saqcli.units import counted


def check_trains(model: nn.Module, name: str, preprocessing: Preprocessing, config: RunConfig) -> None:
    """Run ``model`` in training on random images, as few as a step may have; nothing of it changes.

    Raises:
        UnsupportedModel: it fails, or returns something else than class scores.
    """
    training = config.training
    limits = (config.data.batch_size, training.sharpness_batch, training.micro_batch)
    count = min(2, *(limit for limit in limits if limit))
    device = next(model.parameters()).device
    images = torch.randn(count, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    before, mode = random_state(), model.training
    try:
        with torch.no_grad(), frozen_batch_stats(model.train()):
            answer = model(images.to(device))
    except Exception as error:  # whatever a forward pass of somebody else's may raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _refuse(name, f"fails in training on {counted(count, 'image')}: {lines[0][:200]}", error)
    finally:
        model.train(mode)
        set_random_state(before)
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != count:
        what = f"tensor of {tuple(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        _refuse(name, f"returns a {what} in training, where class scores, ({count}, classes), are expected")


def _refuse(name: str, problem: str, cause: Exception | None = None) -> NoReturn:
    raise UnsupportedModel(
        f"{name} {problem}; change --model-kwargs, --input-size or --batch-size, or do without training: quantize "
        "with --epochs 0, search with --searcher error"
    ) from cause
