"""What ``saq quantize`` did: the figures of the report, kept in the checkpoint while the run is under way."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saqcli.algorithms.training import Score
from saqcli.config import TrainingSection
from saqcli.quant.bits import BitConfig
from saqcli.workflows.best import Best, advice

# Of the verdict on an ONNX file, and its size.
ONNX_FIGURES = (
    *("style", "size_bytes", "size_note", "images", "images_available", "argmax_agreement", "max_abs_diff"),
    *("pytorch_max_abs_diff", "layers_error", "explanation"),
)


@dataclass
class Outcome:
    """What ``saq quantize`` did; the figures of the report.

    Attributes:
        model: canonical name.
        float_score: of the float model on the validation images.
        calibrated_score: after calibration, before any training.
        score: at the end, of what is exported.
        bops: of the policy.
        float_bops: of the float model.
        budget_bops: that was asked for, or None.
        size: bytes of the quantized model.
        float_size: bytes of the float model.
        policy: bits of every layer.
        artifacts: name to path of the files written.
        onnx: figures of the first ONNX file, those of its verdict and ``size_bytes``; None where there is none.
        budget_bytes: that was asked for, or None.
        epochs: of fine-tuning.
        last_score: after the last of them; None without fine-tuning.
        best_epoch: whose state did best, 0 for the calibrated one; None where that is not known.
        best_score: of that state.
        exported_epoch: whose state is exported.
        advice: what to change, where fine-tuning ended below calibration or below its best epoch.
    """

    model: str
    float_score: Score
    calibrated_score: Score
    bops: int
    float_bops: int
    budget_bops: int | None
    size: int
    float_size: int
    policy: BitConfig
    score: Score = field(default_factory=Score)
    artifacts: dict[str, str] = field(default_factory=dict)
    onnx: dict[str, Any] | None = None
    budget_bytes: int | None = None
    epochs: int = 0
    last_score: Score | None = None
    best_epoch: int | None = None
    best_score: Score | None = None
    exported_epoch: int = 0
    advice: str | None = None

    def note_training(self, best: Best | None, training: TrainingSection) -> None:
        """Keep which states fine-tuning met, and what follows from them."""
        last = self.last_score or (self.score if best is None or training.keep == "last" else None)
        self.last_score, self.epochs, self.exported_epoch = last, training.epochs, training.epochs
        if best is not None:
            self.best_epoch, self.best_score = best.epoch, best.score
            self.exported_epoch = best.epoch if training.keep == "best" else training.epochs
        self.advice = advice(self.calibrated_score, last, best, training)

    def best_figures(self) -> dict[str, Any]:
        """Which state did best in fine-tuning, for the metrics; nothing without it."""
        if not self.epochs or self.best_score is None:
            return {}
        return {"best_epoch": self.best_epoch, "best_top1": self.best_score.top1}

    def to_dict(self, run_dir: Path) -> dict[str, Any]:
        """As ``--json`` prints it; accuracies in percent. All of ``onnx_*`` are None where no ONNX file was written."""
        onnx = self.onnx or {}
        return {
            "run_dir": str(run_dir),
            "model": self.model,
            "top1": self.score.top1,
            "top5": self.score.top5,
            "loss": self.score.loss,
            "images": self.score.images,
            "skipped": self.score.skipped,
            "float_top1": self.float_score.top1,
            "float_top5": self.float_score.top5,
            "calibrated_top1": self.calibrated_score.top1,
            "epochs": self.epochs,
            "last_top1": self.last_score and self.last_score.top1,
            "best_epoch": self.best_epoch,
            "best_top1": self.best_score and self.best_score.top1,
            "exported_epoch": self.exported_epoch,
            "advice": self.advice,
            "bops": self.bops,
            "float_bops": self.float_bops,
            "budget_bops": self.budget_bops,
            "budget_bytes": self.budget_bytes,
            "bops_reduction": self.float_bops / self.bops,
            "size_bytes": self.size,
            "float_size_bytes": self.float_size,
            **{f"onnx_{name}": onnx.get(name) for name in ONNX_FIGURES},
            "policy": self.policy.model_dump()["layers"],
            "artifacts": self.artifacts,
        }

    def pack(self) -> dict[str, Any]:
        """Plain values that a checkpoint can hold."""
        packed = asdict(self)
        del packed["onnx"]  # comes last, and is not known before
        packed["policy"] = self.policy.to_json()
        return packed

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "Outcome":
        """What ``pack`` made."""
        names = ("float_score", "calibrated_score", "score", "last_score", "best_score")
        scores = {name: Score(**packed[name]) for name in names if packed.get(name)}
        known = {name: value for name, value in packed.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, **scores, "policy": BitConfig.model_validate_json(packed["policy"])})
