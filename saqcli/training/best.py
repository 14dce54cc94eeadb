"""The best state of fine-tuning by validation score, and advice if the last one is worse.

The calibrated state counts as epoch 0. The last state is exported, as in published protocols, unless
``training.keep`` is ``best``: that one is chosen by the images that it is then evaluated on.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from saqcli.config import TrainingSection
from saqcli.tasks.classification import Score, noise

_STATES = {
    "calibration": "calibrated",
    "compensation": "compensated",
    "reconstruction": "reconstructed",
}


@dataclass
class Best:
    """The best state so far.

    Attributes:
        epoch: after which it was reached, 0 for the calibrated state.
        score: on the validation images.
        model: tensors by name, on the CPU.
    """

    epoch: int
    score: Score
    model: Mapping[str, Tensor]

    def beaten_by(self, score: Score) -> bool:
        """Whether the later state with ``score`` is at least as good: of equals the later one is kept."""
        return score.rank >= self.score.rank

    @classmethod
    def of(cls, epoch: int, score: Score, model: Mapping[str, Tensor]) -> "Best":
        """With a copy of ``model``, the tensors of a model that is trained further."""
        copies = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in model.items()
        }
        return cls(epoch, score, copies)

    def pack(self) -> dict[str, Any]:
        """Plain values and tensors that a checkpoint can hold."""
        return {"epoch": self.epoch, "score": asdict(self.score), "model": dict(self.model)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> "Best":
        """The inverse of ``pack``."""
        return cls(packed["epoch"], Score(**packed["score"]), packed["model"])


def advice(
    calibrated: Score,
    last: Score | None,
    best: Best | None,
    training: TrainingSection,
    before: str = "calibration",
) -> str | None:
    """What to change if fine-tuning ended below its start, or below its best epoch, by more than noise.

    Args:
        calibrated: before fine-tuning.
        last: after the last epoch; None without fine-tuning.
        best: of all states.
        training: the settings.
        before: what preceded fine-tuning: ``calibration``, ``compensation`` or ``reconstruction``.
    """
    if last is None:
        return None
    keep_best = training.keep == "best"
    if calibrated.top1 - last.top1 > noise(calibrated, last):
        lower = f"a lower `training.lr` than {training.lr:g}, more training images, more `training.epochs`"
        state = _STATES[before]
        text = (
            f"fine-tuning ended below {before} (top-1 {last.top1:.2f} % after epoch {training.epochs}, "
            f"{calibrated.top1:.2f} % {state}): try {lower}, or `training.epochs=0` for the {state} model"
        )
    elif best is not None and best.score.top1 - last.top1 > noise(best.score, last):
        text = (
            f"epoch {best.epoch} was better than the last one (top-1 {best.score.top1:.2f} %, then "
            f"{last.top1:.2f} %): try a lower `training.lr` than {training.lr:g} or other `training.epochs`"
        )
    else:
        return None
    if best is None or best.epoch == training.epochs:
        return text
    what = f"the state of epoch {best.epoch}" if best.epoch else f"the {_STATES[before]} state"
    if keep_best:
        return f"{text}; {what} is exported"
    return f"{text}; `resume=True` `training.keep=best` exports {what}, kept as checkpoints/best.safetensors"
