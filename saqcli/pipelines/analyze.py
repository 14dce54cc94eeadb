"""``saq analyze``: measure a quantized model; write JSON and plots.

open       the model, a second one to compare with, the images
resume     the readings of an earlier call, with ``resume``
measure    one instrument after the other; each writes its JSON when it is finished
plot       PNG and SVG

Each instrument has a JSON file, which records model, images and settings. It is resumed only if these are the same: a
finished reading is kept, an unfinished one is continued.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saqcli._version import __version__
from saqcli.analysis import INSTRUMENTS, Reading, Session, Settings, measure
from saqcli.api.sources import QUANTIZED, find_source, named_file
from saqcli.config import ModelSection
from saqcli.errors import CannotWrite, ConfigError, Interrupted, Problems, RunDirectoryError
from saqcli.models.weights import sha256_of
from saqcli.pipelines.analysis_inputs import ImageSelection, OpenedModel, check_source, open_input
from saqcli.pipelines.checks import check_device, check_images
from saqcli.process_group import pick_device
from saqcli.progress import SILENT, Progress
from saqcli.report.analysis_file import AnalysisFile, SubjectMetadata, digest_of, images_of
from saqcli.report.canvas import model_names
from saqcli.report.page.contents import AGAINST
from saqcli.report.page.page import NAME as PAGE
from saqcli.report.page.page import page_after_analysis, try_page
from saqcli.report.readings import draw
from saqcli.runs.interrupts import Stopped, deferred_interrupts, exit_code_of
from saqcli.runs.locks import Lock
from saqcli.serialization import (
    json_text,
    make_folder,
    parse_json,
    parse_object,
    printable,
    read_text,
    remove_unfinished,
    write_text,
)
from saqcli.training.radii import published_radius

Options = Mapping[str, Mapping[str, Any]]  # settings of an instrument's own, by its name


def subject_metadata(opened: OpenedModel, selection: ImageSelection) -> SubjectMetadata:
    """The metadata that every file about ``opened`` contains."""
    return SubjectMetadata(
        target=opened.source,
        model=opened.metadata.policy.model,
        sha256=opened.sha256,
        file_sha256=None if opened.file is None else sha256_of(opened.file),
        latent_weights=opened.subject.latent,
        split=selection.split_name,
        images=opened.score.images,
        images_sha256=opened.images_sha256,
        seed=selection.seed,
        loss=opened.score.loss,
        top1=opened.score.top1,
    )


class AnalysisFolder:
    """The analysis files of one model."""

    def __init__(
        self, path: Path, metadata: SubjectMetadata, settings: Settings, options: Options | None = None
    ) -> None:
        self.path, self.metadata = path, metadata
        self._settings, self._options = settings, options or {}

    def settings_of(self, name: str) -> Settings:
        """The settings of an instrument: the shared ones and its own."""
        return INSTRUMENTS[name].settings_with(self._settings, self._options.get(name, {}), name)

    def path_of(self, name: str) -> Path:
        """The path of an instrument's reading."""
        return self.path / f"{name}.json"

    def save(self, name: str, reading: Reading) -> None:
        """Write a reading, finished or not, atomically."""
        tree = json.loads(reading.model_dump_json())
        file = AnalysisFile(
            saq_version=__version__,
            instrument=name,
            finished=reading.finished,
            subject=self.metadata,
            settings=self._depends_on(name),
            reading=tree,
            sha256=digest_of(tree),
        )
        write_text(self.path_of(name), to_text(json.loads(file.model_dump_json())))

    def load(self, name: str) -> Reading | None:
        """The reading in the folder, or None.

        Raises:
            RunDirectoryError: damaged, of another instrument, or of another version.
            ConfigError: of another model, of other images, or with other settings.
        """
        path = self.path_of(name)
        if not path.is_file():
            return None
        text = read_text(path, str(path), RunDirectoryError)
        try:
            file = parse_json(AnalysisFile, text, str(path), RunDirectoryError)
            reading = parse_object(
                INSTRUMENTS[name].reading, file.reading, f"{path}, reading", RunDirectoryError
            )
        except RunDirectoryError as error:
            raise RunDirectoryError(f"{error}: remove it to measure again, or use `overwrite=True`") from None
        if file.instrument != name:
            raise RunDirectoryError(
                f"{path} holds a reading of another instrument: use `overwrite=True` to replace it"
            )
        difference = self._difference(file)
        if difference:
            raise ConfigError(
                f"{path} was measured differently ({difference}): use the same model and settings with "
                "`resume=True`, or `overwrite=True`, or another `out`"
            )
        if digest_of(file.reading) != file.sha256 or reading.finished != file.finished:
            raise RunDirectoryError(
                f"{path} was changed after it was written: use `overwrite=True` to measure again"
            )
        return reading

    def _depends_on(self, name: str) -> dict[str, Any]:
        """The settings that a reading depends on, as JSON values."""
        instrument, settings = INSTRUMENTS[name], self.settings_of(name).model_dump(mode="json")
        return {key: settings[key] for key in dict.fromkeys((*instrument.settings, *instrument.own))}

    def _difference(self, file: AnalysisFile) -> str | None:
        """The first difference between the file and this analysis."""
        now = self._depends_on(file.instrument) if file.instrument in INSTRUMENTS else {}
        if file.subject.sha256 != self.metadata.sha256:
            return f"another model, {printable(file.subject.target, 100)}"
        if file.subject.images_sha256 != self.metadata.images_sha256:
            return "other images or another batch size"
        for key in sorted({*now, *file.settings}):
            if now.get(key) != file.settings.get(key):
                return printable(f"{key}: {file.settings.get(key)} -> {now.get(key)}", 200)
        return None


def to_text(tree: dict[str, Any]) -> str:
    """JSON with every list of plain values on one line."""
    text = json_text(tree, indent=2)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda found: _one_line(found[0]), text) + "\n"


def _one_line(text: str) -> str:
    return "[" + re.sub(r"\n\s*", " ", text[1:-1]).strip() + "]"


SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Request:
    """The arguments of ``saq analyze``.

    Attributes:
        source: run directory, ``.safetensors`` file or model name.
        selection: the images.
        instruments: names in ``INSTRUMENTS``.
        out: folder of the results.
        settings: settings that instruments share.
        options: settings of an instrument's own, by its name.
        rho: radius; None for the default of training.
        against: a second quantized model to compare with.
        section: options of a float model.
        bits: bits of a float model.
        policy: policy of a float model.
        device: ``auto``, ``cpu``, ``cuda``.
        resume: resume the analysis in ``out``.
        overwrite: replace the analysis in ``out``.
        builder: name of the user's own network that runs or files were made from.
    """

    source: str
    selection: ImageSelection
    instruments: tuple[str, ...]
    out: Path
    settings: Settings = field(default_factory=Settings)
    options: Options = field(default_factory=dict)
    rho: float | None = None
    against: str | None = None
    section: ModelSection | None = None
    bits: str | None = None
    policy: Path | None = None
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    builder: str | None = None

    @property
    def named(self) -> ModelSection:
        """The model's name and its options."""
        return self.section or ModelSection(name=self.source)

    @property
    def folders(self) -> list[Path]:
        """The folders of the model and of the second one."""
        return [self.out] if self.against is None else [self.out, self.out / AGAINST]


@dataclass(frozen=True)
class Measured:
    """The readings of one model."""

    metadata: SubjectMetadata
    readings: dict[str, Reading]

    def to_dict(self) -> dict[str, Any]:
        """Accuracies in percent."""
        return {
            "target": self.metadata.target,
            "model": self.metadata.model,
            "split": self.metadata.split,
            "images": self.metadata.images,
            "loss": self.metadata.loss,
            "top1": self.metadata.top1,
            "instruments": {name: reading.to_dict() for name, reading in self.readings.items()},
        }


@dataclass(frozen=True)
class Analysis:
    """The result of ``saq analyze``.

    Attributes:
        out: folder of the files.
        first: the model.
        second: the model it was compared with.
        files: written or kept files, JSON first.
        page: that shows the readings; None if a file that it shows is damaged.
    """

    out: Path
    first: Measured
    second: Measured | None
    files: list[Path]
    page: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        against = None if self.second is None else self.second.to_dict()
        return {
            "out": str(self.out),
            **self.first.to_dict(),
            "against": against,
            "files": [str(path) for path in self.files],
            "page": self.page and str(self.page),
        }


def analyze(request: Request, progress: Progress = SILENT) -> Analysis:
    """Run the analysis ``request``.

    Raises:
        SaqError: anything the user can act on; finished readings stay in the folder.
    """
    check_request(request)
    _check_free(request)
    device = pick_device(request.device)
    wanted = [(request.source, request.named, request.bits, request.policy)]
    if request.against is not None:
        wanted.append((request.against, ModelSection(name=request.against), None, None))
    opened = [open_input(*one, request.selection, device, progress, request.builder) for one in wanted]
    settings = _with_radius(request, opened[0])
    with _alone_in(request, progress):
        return _measure(request, opened, settings, progress)


@contextmanager
def _alone_in(request: Request, progress: Progress) -> Iterator[None]:
    """Lock the folders within the context, and remove temporary files of earlier processes.

    Raises:
        RunDirectoryError: another process is using the folders, or used them in the meantime.
    """
    for folder in request.folders:
        make_folder(folder)
    lock = Lock(request.out)
    killed = lock.take()
    if killed and request.resume:
        progress.note(f"resuming (process {killed.pid} was killed)")
    try:
        _check_free(request)
        for folder in request.folders:
            remove_unfinished(folder)
        yield
    except KeyboardInterrupt as interrupt:
        raise _interrupted(request, exit_code_of(interrupt)) from None
    except CannotWrite as error:
        raise CannotWrite(f"{error}, then repeat this with `resume=True`") from None
    finally:
        lock.release()


def _measure(request: Request, opened: list[OpenedModel], settings: Settings, progress: Progress) -> Analysis:
    """The part of ``analyze`` that needs the lock."""
    folders = [
        AnalysisFolder(path, subject_metadata(one, request.selection), settings, request.options)
        for path, one in zip(request.folders, opened, strict=True)
    ]
    there = [
        {name: folder.load(name) if request.resume else None for name in request.instruments}
        for folder in folders
    ]
    measured = [
        Measured(folder.metadata, _measure_all(one, folder, earlier, progress))
        for one, folder, earlier in zip(opened, folders, there, strict=True)
    ]
    files = [folder.path_of(name) for folder in folders for name in request.instruments]
    names = model_names([(one.metadata.model, one.metadata.target) for one in measured])
    images = images_of(opened[0].score.images, request.selection.split_name)
    with progress.task("drawing", len(request.instruments)) as task:
        for name in request.instruments:
            subjects = [(model, one.readings[name]) for model, one in zip(names, measured, strict=True)]
            files += draw(name, subjects, request.out, images)
            task.advance()
    page = page_after_analysis(Path(request.source), request.out)
    written = page / PAGE if try_page(page, progress) else None
    return Analysis(request.out, measured[0], measured[1] if len(measured) > 1 else None, files, written)


def check_request(request: Request) -> None:
    """Check the arguments before anything is loaded.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    for name in request.instruments or ("none",):
        problems.attempt(INSTRUMENTS.find, name)
    for name, options in request.options.items():
        problems.attempt(_check_options, request, name, options)
    problems.attempt(
        check_source, request.source, request.named, request.bits, request.policy, request.builder
    )
    if request.against is not None:
        problems.attempt(_check_against, request.against)
    problems.attempt(check_images, request.selection.data, request.selection.split)
    grid = request.settings.grid
    if grid % 2 == 0:
        problems.add(
            ConfigError(f"`grid={grid}` has no point in the middle: give an odd number, such as {grid + 1}")
        )
    if request.resume and request.overwrite:
        problems.add(
            ConfigError(
                "`resume=True` continues what is there and `overwrite=True` replaces it: give one of them"
            )
        )
    problems.attempt(check_device, request.device)
    problems.check()


def _check_options(request: Request, name: str, options: Mapping[str, Any]) -> None:
    """Check the settings of an instrument's own."""
    instrument = INSTRUMENTS.find(name)
    if name not in request.instruments:
        given = ", ".join(f"`assignments={name}.{key}={value}`" for key, value in options.items())
        raise ConfigError(f"{given}: {name} is not measured: choose it too, or remove this")
    instrument.settings_with(request.settings, options, name)


def _check_against(against: str) -> None:
    named_file(find_source(against, QUANTIZED, "`against`"), ModelSection(name=against))


def _check_free(request: Request) -> None:
    """Check that no reading would be replaced without ``overwrite`` or ``resume``."""
    if request.out.exists() and not request.out.is_dir():
        raise RunDirectoryError(f"{request.out} is a file: use another `out`")
    there = [
        path
        for folder in request.folders
        for name in request.instruments
        if (path := folder / f"{name}.json").exists()
    ]
    if there and not request.resume and not request.overwrite:
        raise RunDirectoryError(
            f"{there[0]} already exists: use `resume=True` to continue it, `overwrite=True` to replace it, "
            "or another `out`"
        )


def _with_radius(request: Request, first: OpenedModel) -> Settings:
    """The settings with the given radius, or with the default of training for the first model."""
    rho = request.rho
    if rho is None:
        rho = published_radius(first.subject.model, first.side, first.metadata.policy.model).rho
    return request.settings.model_copy(update={"rho": rho})


def _measure_all(
    opened: OpenedModel,
    folder: AnalysisFolder,
    earlier: dict[str, Reading | None],
    progress: Progress,
) -> dict[str, Reading]:
    """Run every instrument in ``earlier``; each reading is saved when it is finished."""
    readings: dict[str, Reading] = {}
    for name, before in earlier.items():
        if before is not None and before.finished:
            readings[name] = before
            continue
        session = Session(progress, before)
        if INSTRUMENTS[name].resumable:
            readings[name] = _measure_resumable(name, opened, folder, session)
        else:
            readings[name] = measure(name, opened.subject, folder.settings_of(name), session)
        _check_finite(name, readings[name], opened.source)
        folder.save(name, readings[name])
    return readings


def _check_finite(name: str, reading: Reading, source: str) -> None:
    """Check that a reading can be stored as JSON; figures that may be NaN or infinite are None in it.

    Raises:
        ConfigError: a figure is NaN or infinite.
    """

    def broken(value: Any) -> bool:
        if isinstance(value, dict):
            return any(broken(one) for one in value.values())
        if isinstance(value, list | tuple):
            return any(broken(one) for one in value)
        return isinstance(value, float) and not math.isfinite(value)

    found = [key for key, value in reading.to_dict().items() if broken(value)]
    if found:
        raise ConfigError(
            f"{name} of {source}: {', '.join(found)} NaN or infinite on these images; "
            f"check its weights, or choose other instruments than {name}"
        )


def _measure_resumable(name: str, opened: OpenedModel, folder: AnalysisFolder, session: Session) -> Reading:
    """Run an instrument that saves periodically, and on a signal."""
    saved_at = time.monotonic()
    with deferred_interrupts() as stop:

        def keep(reading: Reading) -> None:
            nonlocal saved_at
            if stop.signal or time.monotonic() - saved_at > SECONDS_BETWEEN_SAVES:
                folder.save(name, reading)
                saved_at = time.monotonic()
            if stop.signal:
                raise Stopped(stop.signal)

        session = Session(session.progress, session.earlier, keep)
        return measure(name, opened.subject, folder.settings_of(name), session)


def _interrupted(request: Request, exit_code: int) -> Interrupted:
    saved = any(
        (folder / f"{name}.json").exists() for folder in request.folders for name in request.instruments
    )
    return Interrupted(f"the same command{' and `resume=True`' if saved else ''}", exit_code, saved=saved)
