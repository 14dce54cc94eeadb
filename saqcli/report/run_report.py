"""The results of a quantization run, and ``report.md``.

A checkpoint keeps the results during the run; ``report.md`` summarizes them in the run directory.
"""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saqcli.config import RunConfig, TrainingSection
from saqcli.export import is_bit_equal
from saqcli.quant.bits import BitConfig
from saqcli.report.accuracy import accuracy_lines
from saqcli.serialization import write_text
from saqcli.target import PAPER, target_of
from saqcli.tasks.classification import Score
from saqcli.training.best import Best, advice
from saqcli.training.radii import Radius
from saqcli.units import counted, format_duration, format_quantity

# Figures of the verdict on an ONNX file, and its size.
ONNX_FIGURES = (
    *("style", "size_bytes", "size_note", "images", "images_available", "argmax_agreement", "max_abs_diff"),
    *("pytorch_max_abs_diff", "layers_error", "explanation"),
)

NOUNS = {  # of the stages
    "calibrated": "calibration",
    "compensated": "compensation",
    "reconstructed": "reconstruction",
    "fine-tuned": "fine-tuning",
}
FROM_TEACHER = "learning from the float network"  # after a method of training
SCORED_ON = {  # what the networks were scored on, in words
    "validation": "{}",
    "held out": "{} held out from calibration",
    "calibration": "{}, the same as for calibration",
}


@dataclass
class QuantizeResult:
    """The results of ``saq quantize``; the figures of the report.

    Without labels, top-1, top-5 and loss of all scores are NaN, None in ``to_dict``.

    Attributes:
        model: canonical name.
        float_score: of the float model on the validation images.
        calibrated_score: after calibration, before any training.
        score: at the end, of the exported state.
        bops: of the policy.
        float_bops: of the float model.
        budget_bops: requested, or None.
        size: bytes of the quantized model.
        float_size: bytes of the float model.
        policy: bits of every layer.
        artifacts: name to path of the files written.
        onnx: figures of the first ONNX file, those of its verdict and ``size_bytes``; None without one.
        budget_bytes: requested, or None.
        epochs: of fine-tuning.
        last_score: after the last epoch; None without fine-tuning.
        best_epoch: epoch of the best state, 0 for the calibrated one; None if unknown.
        best_score: of the best state.
        exported_epoch: epoch of the exported state.
        advice: recommended changes, if fine-tuning ended below its start or below its best epoch.
        accuracy: the budget of accuracy and what became of it, as in ``search.json``; None without one.
        stages: of the ladder, those done: ``stage``, ``top1``, ``top5``, ``loss``, ``agreement``.
        scored_on: what the scores are of, see ``data.splits.Images``.
        untrained_score: before fine-tuning, after the last stage without labels.
        seconds: of each stage, over all processes.
        radius: of the perturbation, and its source; None without one.
        distilled: whether fine-tuning learned from the float network; None without fine-tuning.
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
    accuracy: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    scored_on: str = "validation"
    untrained_score: Score | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    radius: Radius | None = None
    distilled: bool | None = None

    def add_stage(self, stage: str, score: Score, agreement: float | None) -> dict[str, Any]:
        """Record the end of a stage; returns its figures.

        Args:
            stage: its name.
            score: of the model after it.
            agreement: percent of the images with the best class of the float model; None if unknown.
        """
        row = {
            "stage": stage,
            "top1": _known(score.top1),
            "top5": _known(score.top5),
            "loss": _known(score.loss),
            "agreement": agreement,
        }
        self.stages.append(row)
        if stage != "fine-tuned":
            self.untrained_score = score
        return row

    @property
    def start(self) -> Score:
        """The score that fine-tuning starts from."""
        return self.untrained_score or self.calibrated_score

    def note_training(self, best: Best | None, last: Score | None, training: TrainingSection) -> None:
        """Record the best and last state of fine-tuning, and the advice that follows."""
        last = last or (self.score if best is None or training.keep == "last" else None)
        self.last_score, self.epochs, self.exported_epoch = last, training.epochs, training.epochs
        if best is not None:
            self.best_epoch, self.best_score = best.epoch, best.score
            self.exported_epoch = best.epoch if training.keep == "best" else training.epochs
        before = NOUNS[
            ([row["stage"] for row in self.stages if row["stage"] != "fine-tuned"] or ["calibrated"])[-1]
        ]
        self.advice = advice(self.start, last, best, training, before)

    def best_figures(self) -> dict[str, Any]:
        """The best state of fine-tuning, for the metrics; empty without fine-tuning."""
        if not self.epochs or self.best_score is None:
            return {}
        return {"best_epoch": self.best_epoch, "best_top1": self.best_score.top1}

    def to_dict(self, run_dir: Path) -> dict[str, Any]:
        """Plain values, as JSON has them; accuracies in percent; ``onnx_*`` are None without an ONNX file."""
        onnx = self.onnx or {}
        return {
            "run_dir": str(run_dir),
            "model": self.model,
            "top1": _known(self.score.top1),
            "top5": _known(self.score.top5),
            "loss": _known(self.score.loss),
            "agreement": self.stages[-1]["agreement"] if self.stages else None,
            "images": self.score.images,
            "skipped": self.score.skipped,
            "scored_on": self.scored_on,
            "float_top1": _known(self.float_score.top1),
            "float_top5": _known(self.float_score.top5),
            "calibrated_top1": _known(self.calibrated_score.top1),
            "stages": [{**row, "seconds": _rounded(self.seconds.get(row["stage"]))} for row in self.stages],
            "epochs": self.epochs,
            "rho": self.radius and self.radius.rho,
            "rho_source": self.radius and self.radius.source,
            "distilled": self.distilled,
            "last_top1": self.last_score and self.last_score.top1,
            "best_epoch": self.best_epoch,
            "best_top1": self.best_score and _known(self.best_score.top1),
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
            **({} if self.accuracy is None else {"accuracy": self.accuracy | self._validated()}),
        }

    def _validated(self) -> dict[str, Any]:
        """The validation accuracy beside a budget of accuracy."""
        in_float, now = self.float_score.top1, self.score.top1
        return {"validation_float_top1": in_float, "validation_top1": now, "validation_drop": in_float - now}

    def pack(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        packed = asdict(self)
        del (
            packed["onnx"],
            packed["seconds"],
            packed["radius"],
        )  # unknown until the end of the run; in the manifest
        packed["policy"] = self.policy.to_json()
        return packed

    @classmethod
    def unpack(cls, packed: dict[str, Any]) -> "QuantizeResult":
        """Inverse of ``pack``."""
        names = (
            *("float_score", "calibrated_score", "score", "last_score", "best_score"),
            "untrained_score",
        )
        scores = {name: Score(**packed[name]) for name in names if packed.get(name)}
        known = {name: value for name, value in packed.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, **scores, "policy": BitConfig.model_validate_json(packed["policy"])})


def _known(figure: float) -> float | None:
    """``figure``, None where it is NaN because there are no labels."""
    return None if math.isnan(figure) else figure


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def write_report(path: Path, config: RunConfig, results: dict[str, Any]) -> None:
    """Write the report of a finished run.

    Args:
        path: of the Markdown file.
        config: of the run.
        results: the figures of ``QuantizeResult.to_dict``.
    """
    write_text(path, report_markdown(config, results))


def quantized_states(results: dict[str, Any]) -> dict[str, tuple[float | None, bool]]:
    """Title to figure in percent and whether it is exported: every stage, the last epoch, and the best state.

    The figure is the top-1, or without labels the agreement with the float network.
    """
    last, best, epochs = results["last_top1"], results["best_top1"], results["epochs"]
    key = "top1" if has_labels(results) else "agreement"
    rows = [row for row in results["stages"] if row["stage"] != "fine-tuned"]
    rows = rows or [{"stage": "calibrated", "top1": results["calibrated_top1"]}]
    states = {row["stage"]: (row[key], epochs == 0 and row is rows[-1]) for row in rows}
    if last is not None:
        states[f"last (epoch {epochs})"] = (last, results["exported_epoch"] == epochs)
    if epochs and best is not None:
        states[f"best (epoch {results['best_epoch']})"] = (best, results["exported_epoch"] != epochs)
    return states


def has_labels(results: dict[str, Any]) -> bool:
    """Whether a run measured accuracy; otherwise it measured agreement with the float network."""
    return results["top1"] is not None


def scored_images(results: dict[str, Any]) -> str:
    """``128 images held out from calibration``: what the figures of a run are of."""
    return SCORED_ON[results["scored_on"]].format(counted(results["images"], "image"))


def report_markdown(config: RunConfig, results: dict[str, Any]) -> str:
    """The report as Markdown."""
    budget = results["budget_bops"]
    share = f" ({100 * results['bops'] / budget:.2f} % of {format_quantity(budget)})" if budget else ""
    layers = "\n".join(
        f"| `{name}` | {bits['weight'] or 32} | {bits['activation'] or 32} |"
        for name, bits in results["policy"].items()
    )
    names, rows, exported = results_table(results)
    next(row for row in rows if row[0] == "BOPs")[exported] += share
    note = f"\nNote: {results['advice']}.\n" if results["advice"] else ""
    accuracy = (
        "".join(f"\n{line[0].upper()}{line[1:]}.\n" for line in accuracy_lines(results["accuracy"]))
        if results.get("accuracy")
        else ""
    )
    again = f"saq rerun {shlex.quote(results['run_dir'])}"
    if has_labels(results):
        on = f"Evaluated on {scored_images(results)}."
    else:
        on = (
            f"Agreement with the float network, on {scored_images(results)}: the share with the same best class. There "
            "were no labels, so accuracy was not measured."
        )
    return f"""# {results["model"]}, quantized

{markdown_table(["", *names], rows)}
{note}
{on} BOPs are reduced {results["bops_reduction"]:.1f} times.
{_target(config)}{accuracy}
## Stages

{markdown_table(*stages_table(results, seconds=False))}

{_onnx_summary(results)}

{_training_summary(config, results)}, seed {config.run.seed}, recipe {config.recipe}. Run it again, and compare, with
`{again}`.

## Bits

| layer | weights | activations |
|--|--|--|
{layers}
"""


def _target(config: RunConfig) -> str:
    """Where the network will run, if that is said."""
    target = target_of(config.quantization)
    if target.name == PAPER:
        return ""
    styles = ", ".join(config.export.styles) or "none"
    also = f"; also quantized: {target.adds}" if target.adds else ""
    return f"\nTarget {target.name}, files of style {styles}{also}.\n"


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = (names, ["--"] * len(names), *rows)
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def stages_table(results: dict[str, Any], *, seconds: bool = True) -> tuple[list[str], list[list[str]]]:
    """The ladder: a row for every stage that ran.

    Args:
        results: as for ``report_markdown``.
        seconds: whether to show the time of each, which differs from run to run.

    Returns:
        Names of the columns, and the rows.
    """
    names = ["stage", *(["top-1"] if has_labels(results) else []), "agrees with float"]
    rows = []
    for stage in results["stages"]:
        row = [stage["stage"]]
        if has_labels(results):
            row.append(percent(stage["top1"]))
        row.append(percent(stage["agreement"]))
        if seconds:
            row.append("" if stage["seconds"] is None else format_duration(stage["seconds"]))
        rows.append(row)
    return [*names, *(["time"] if seconds else [])], rows


def percent(figure: float | None) -> str:
    """With two digits; empty where it is unknown."""
    return "" if figure is None else f"{figure:.2f} %"


def results_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]], int]:
    """The figures of a run side by side.

    Args:
        results: as for ``report_markdown``.

    Returns:
        Names of the columns after the first, the rows (top-1 and top-5, or without labels the agreement with the float
        network; BOPs, size, ONNX file), and the index in a row of the exported state, the only quantized state with all
        figures.
    """
    states = quantized_states(results)
    exported = 2 + [taken for _, taken in states.values()].index(True)
    figures = [percent(figure) for figure, _ in states.values()]
    pairs = [
        ("BOPs", format_quantity(results["float_bops"]), format_quantity(results["bops"])),
        ("size", *(format_quantity(results[f"{key}size_bytes"], "B") for key in ("float_", ""))),
    ]
    if has_labels(results):
        rows = [["top-1", percent(results["float_top1"]), *figures]]
        pairs.insert(0, ("top-5", percent(results["float_top5"]), percent(results["top5"])))
    else:
        rows = [["agrees with float", "", *figures]]
    for title, before, after in pairs:
        rows.append([title, before, *(after if taken else "" for _, taken in states.values())])
    if results["onnx_size_bytes"] is not None:
        rows.append(["ONNX file", *("" for _ in range(1 + len(states)))])
        rows[-1][exported] = format_quantity(results["onnx_size_bytes"], "B")
    return ["float", *states], rows, exported


def _training_summary(config: RunConfig, results: dict[str, Any]) -> str:
    """The method and settings of training."""
    training = config.training
    stages = [row["stage"] for row in results["stages"] if row["stage"] != "fine-tuned"] or ["calibrated"]
    if not training.epochs:
        return f"{', '.join(stages).capitalize()}, not fine-tuned"
    rho = results.get("rho")  # unknown in runs of earlier versions
    radius = "" if rho is None else f", radius {rho:g} ({results['rho_source']})"
    teacher = f", {FROM_TEACHER}" if results.get("distilled") else ""
    epochs = counted(training.epochs, "epoch")
    return f"Method {training.method}{teacher}, {epochs}, learning rate {training.lr:g}{radius}"


def _onnx_summary(results: dict[str, Any]) -> str:
    """The agreement of the ONNX file with the model, and the reason for a larger size."""
    if results["onnx_style"] is None:
        return "No ONNX file was written (`export.styles=()`)."
    count, available = results["onnx_images"], results["onnx_images_available"]
    images = counted(count, "image") + (f" (of {available})" if available and available > count else "")
    agreement = f"{100 * results['onnx_argmax_agreement']:.2f} % of {images}"
    if is_bit_equal(results["onnx_style"]):
        lines = [
            f"The ONNX file equals the model's exact form bit for bit, and has its best class on {agreement}."
        ]
    else:
        lines = [
            "Every layer of the ONNX file, fed what PyTorch feeds it, returns what PyTorch returns to "
            f"{results['onnx_layers_error']:.1e} of its range;",
            f"end to end it has the best class of the model in float64 on {agreement}.",
        ]
    notes = [results[name] for name in ("onnx_explanation", "onnx_size_note") if results[name]]
    return "\n".join([*lines, *(f"\n{note[0].upper()}{note[1:]}." for note in notes)])
