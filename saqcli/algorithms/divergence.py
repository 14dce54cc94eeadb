"""A loss or gradient that is no number stops training before it touches the weights.

Fake quantization hides an overflow from later layers, since it clamps: what is not caught in the step that
made it is not seen until the network is spoiled.
"""

import math

from torch import Tensor

from saqcli import ranks
from saqcli.errors import TrainingDiverged, UnsupportedModel

LARGEST_LOSS = 100.0  # times ln(classes), the loss of guessing; no network that learns is near it


def check_step(loss: Tensor, *norms: Tensor) -> None:
    """To be asked before the optimizer's step.

    Raises:
        TrainingDiverged: the loss, or a norm of its gradients, is not finite.
    """
    values = [loss.item(), *(norm.item() for norm in norms)]
    if not all(map(math.isfinite, values)):
        what = f"the loss is {values[0]:g}"
        if math.isfinite(values[0]):
            what += " but its gradient is not finite"
        raise TrainingDiverged(f"{what} and cannot be descended: {_advice()}")


def check_epoch(loss: float, classes: int) -> None:
    """To be asked after an epoch, of the validation loss.

    Raises:
        TrainingDiverged: it is not finite, or absurd.
    """
    if not loss <= LARGEST_LOSS * math.log(max(classes, 2)):
        raise ranks.agreed(TrainingDiverged(f"the validation loss has become {loss:g}: {_advice()}"))


def check_score(loss: float, images: int, name: str) -> None:
    """To be asked of the loss of a network that is not in training.

    Raises:
        UnsupportedModel: it is not finite.
    """
    if not math.isfinite(loss):
        raise UnsupportedModel(
            f"the loss of {name} is {'NaN' if math.isnan(loss) else 'infinite'} on {images} images: its numbers "
            "overflow; check its weights, --mean, --std and --input-size"
        )


def _advice() -> str:
    return "start again with a lower --lr, or --rho, and --overwrite; checkpoints/ holds the last good state"
