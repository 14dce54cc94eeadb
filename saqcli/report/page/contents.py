"""The files of a run that its page is made from, read strictly; runs of earlier versions lack some of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from saqcli.analysis import INSTRUMENTS, Reading
from saqcli.config import RunConfig
from saqcli.errors import RunDirectoryError
from saqcli.quant.bits import LayerBits
from saqcli.report.analysis_file import AnalysisFile, SubjectMetadata
from saqcli.report.answers import Answers
from saqcli.report.calibrated import CalibratedNetwork
from saqcli.report.pareto import Front
from saqcli.report.search_report import AccuracyRow, SearchResults
from saqcli.report.search_scores import FILE as SCORES
from saqcli.report.search_scores import SearchScores
from saqcli.runs.directory import RunDirectory
from saqcli.runs.manifest import RunManifest
from saqcli.serialization import parse_json, parse_object, read_text

File = TypeVar("File", bound=BaseModel)
ANALYSIS, AGAINST = (
    "analysis",
    "against",
)  # folders of readings: in a run directory; in these, of a second model
Figure = float | None
Percent = Annotated[float, Field(ge=0, le=100)] | None
Count = Annotated[int, Field(ge=0)]


class _Lenient(BaseModel):
    """The figures that the page shows; the file has more."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class StageRow(_Lenient):
    """A stage of a quantization."""

    stage: str
    top1: Percent
    top5: Percent
    loss: Figure
    agreement: Percent = None
    seconds: Figure = None


class QuantizeFigures(_Lenient):
    """The results of ``saq quantize``, see ``QuantizeResult``."""

    model: str
    top1: Percent
    top5: Percent
    loss: Figure = None
    agreement: Percent = None
    images: Count
    scored_on: Literal["validation", "held out", "calibration"] = "validation"
    float_top1: Percent
    float_top5: Percent = None
    calibrated_top1: Percent = None
    stages: list[StageRow] = []
    epochs: Count = 0
    distilled: bool | None = None
    last_top1: Percent = None
    best_epoch: int | None = None
    best_top1: Percent = None
    exported_epoch: Count = 0
    advice: str | None = None
    bops: Count
    float_bops: Count
    budget_bops: int | None = None
    budget_bytes: int | None = None
    size_bytes: Count
    float_size_bytes: Count
    policy: dict[str, LayerBits]
    accuracy: AccuracyRow | None = None


class BlockRow(_Lenient):
    """The error of a block before and after reconstruction."""

    name: str
    before: float
    after: float


class Metric(_Lenient):
    """A line of ``metrics.jsonl``."""

    phase: str
    epoch: Count | None = None
    loss: Figure = None
    top1: Figure = None
    top5: Figure = None
    lr: Figure = None
    blocks: list[BlockRow] = []


class TwinFigures(_Lenient):
    """The comparison of a file with its twin."""

    equal: bool
    skipped: str | None = None


class MovedCodes(_Lenient):
    """Codes by which a deployed form differs from the trained model."""

    codes: int
    differing: int = 0


class VerdictFile(_Lenient):
    """``NAME.verdict.json``: the proof of an exported file."""

    schema_version: Literal[1]
    file: str
    sha256: str
    size_bytes: int
    style: str
    opset: int | None = None
    versions: dict[str, str] = {}
    verified: bool
    verified_on: str
    images: int
    images_available: int | None = None
    argmax_agreement: float
    max_abs_diff: Figure
    pytorch_max_abs_diff: Figure = None
    layers: int = 0
    layers_error: float = 0.0
    codes: int = 0
    flipped_codes: int = 0
    conditions: list[str] = []
    runtimes: dict[str, dict[str, Figure]] = {}
    exact_by_construction: bool | None = None
    moved_codes: MovedCodes | None = None
    twin: TwinFigures | None = None
    size_note: str | None = None


@dataclass(frozen=True)
class Analyzed:
    """The readings in a folder.

    Attributes:
        subject: the model and the images that they are of.
        readings: finished ones of known instruments, by name.
        settings: that these depend on, by the same names.
        against: the same readings of a second model on the same images; None without one.
    """

    subject: SubjectMetadata
    readings: dict[str, Reading]
    settings: dict[str, dict[str, Any]]
    against: "Analyzed | None" = None


@dataclass(frozen=True)
class Contents:
    """What is known of a run.

    Attributes:
        path: of its directory.
        manifest: command, versions, results.
        config: the settings.
        quantized: the results of a quantization; None for a search.
        searched: the results of a search, also of one within a quantization.
        network: the layers as calibrated.
        answers: beside those of the float network.
        front: of the search.
        scores: that the search kept.
        metrics: lines of the log.
        verdicts: of exported files, in the order of the styles.
        analyzed: readings of ``saq analyze`` in the run; None if they are of another state of the network.
        outdated: whether they are, since the run exported another one later.
    """

    path: Path
    manifest: RunManifest
    config: RunConfig
    quantized: QuantizeFigures | None = None
    searched: SearchResults | None = None
    network: CalibratedNetwork | None = None
    answers: Answers | None = None
    front: Front | None = None
    scores: SearchScores | None = None
    metrics: list[Metric] = field(default_factory=list)
    verdicts: list[VerdictFile] = field(default_factory=list)
    analyzed: Analyzed | None = None
    outdated: bool = False

    @property
    def model(self) -> str:
        """Canonical name of the network."""
        found = self.quantized or self.searched
        assert found is not None
        return found.model

    @property
    def policy(self) -> dict[str, LayerBits]:
        """Bits of every layer, in execution order."""
        found = self.quantized or self.searched
        assert found is not None
        return found.policy


def read_run(path: Path) -> Contents:
    """Read the directory of a finished run.

    Raises:
        RunDirectoryError: it is no run, it is not finished, or a file is damaged.
    """
    run = RunDirectory.open(path)
    manifest = run.manifest()
    if manifest.status != "finished":
        raise RunDirectoryError(
            f"{path} {run.status_text()}, so there is nothing to report: {run.next_step()}"
        )
    where = f"{path}/manifest.json, results"
    whole = manifest.verb == "quantize"
    search = _optional(run.search_path, SearchResults)
    analyzed = read_analysis(path / ANALYSIS)
    now = manifest.artifacts.get(run.safetensors_path.relative_to(path).as_posix())
    # None in files of earlier versions
    outdated = (
        analyzed is not None and None not in (then := analyzed.subject.file_sha256, now) and then != now
    )
    return Contents(
        path=path,
        manifest=manifest,
        config=run.config(),
        quantized=parse_object(QuantizeFigures, manifest.results, where, RunDirectoryError)
        if whole
        else None,
        searched=search if whole else parse_object(SearchResults, manifest.results, where, RunDirectoryError),
        network=_optional(run.network_path, CalibratedNetwork),
        answers=_optional(run.answers_path, Answers),
        front=_optional(path / "pareto.json", Front),
        scores=_optional(path / SCORES, SearchScores),
        metrics=_metrics(run.metrics_path) if whole else [],
        verdicts=_verdicts(run) if whole else [],
        analyzed=None if outdated else analyzed,
        outdated=outdated,
    )


def read_analysis(folder: Path) -> Analyzed | None:
    """The readings in a folder that ``saq analyze`` wrote, and those of the second model; None if there are none.

    Raises:
        RunDirectoryError: a file is damaged.
    """
    found = _readings(folder)
    second = None if found is None else _readings(folder / AGAINST)
    if found is None or second is None:
        return found
    same = {
        name: reading
        for name, reading in second.readings.items()
        if found.settings.get(name) == second.settings[name]
    }
    one, other = found.subject, second.subject
    if not same or any(getattr(one, key) != getattr(other, key) for key in ("split", "images", "seed")):
        return found  # of an earlier analysis
    return replace(found, against=replace(second, readings=same))


def _readings(folder: Path) -> Analyzed | None:
    """The finished readings in a folder, all of one model."""
    subject, readings, settings = None, {}, {}
    for name in INSTRUMENTS:
        file = _optional(folder / f"{name}.json", AnalysisFile)
        if file is None or not file.finished or file.instrument != name:
            continue
        if subject is not None and file.subject.sha256 != subject.sha256:
            continue  # of another model, measured before
        subject = file.subject
        where = f"{folder / name}.json, reading"
        readings[name] = parse_object(INSTRUMENTS[name].reading, file.reading, where, RunDirectoryError)
        settings[name] = file.settings
    return None if subject is None else Analyzed(subject, readings, settings)


def _optional(path: Path, schema: type[File]) -> File | None:
    """The content of a file, None if it is not there."""
    if not path.is_file():
        return None
    return parse_json(schema, read_text(path, str(path), RunDirectoryError), str(path), RunDirectoryError)


def _metrics(path: Path) -> list[Metric]:
    if not path.is_file():
        return []
    lines = read_text(path, str(path), RunDirectoryError).splitlines()
    return [
        parse_json(Metric, line, f"{path} line {number}", RunDirectoryError)
        for number, line in enumerate(lines, 1)
    ]


def _verdicts(run: RunDirectory) -> list[VerdictFile]:
    """The verdicts on a run's ONNX files, the first style first."""
    paths = sorted(run.onnx_path.parent.glob("*.verdict.json"), key=lambda path: (len(path.name), path.name))
    found = [verdict for path in paths if (verdict := _optional(path, VerdictFile))]
    styles = list(run.config().export.styles)
    return sorted(found, key=lambda each: styles.index(each.style) if each.style in styles else len(styles))
