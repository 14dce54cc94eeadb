"""``saq analyze``: from a quantized model and images to readings, as JSON and as pictures.

open       the model, a second one to compare with, the images
take up    readings that are there already, with ``--resume``
measure    one instrument after the other; each writes its JSON as soon as it is done
draw       PNG and SVG
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saqcli.algorithms.instruments import INSTRUMENTS, Reading, Session, Settings
from saqcli.config import ModelSection
from saqcli.errors import CannotWrite, ConfigError, Interrupted, Problems, RunDirectoryError
from saqcli.io.distributed import pick_device
from saqcli.io.files import make_folder, remove_unfinished
from saqcli.io.interrupts import Stopped, deferred_interrupts, exit_code_of
from saqcli.io.locks import Lock
from saqcli.progress import SILENT, Progress
from saqcli.workflows.analysis_files import AGAINST, AnalysisFolder, SubjectFacts, facts_of
from saqcli.workflows.checks import check_device, check_images
from saqcli.workflows.optimization import default_rho
from saqcli.workflows.pictures import draw
from saqcli.workflows.pictures.canvas import model_names
from saqcli.workflows.predictors import named_file
from saqcli.workflows.subjects import Opened, View, check_target, images_of, open_subject
from saqcli.workflows.targets import QUANTIZED, find_target

SECONDS_BETWEEN_SAVES = 5.0


@dataclass(frozen=True)
class Request:
    """What ``saq analyze`` is asked for.

    Attributes:
        target: run directory, ``.safetensors`` file or model name.
        view: which images.
        instruments: names in ``INSTRUMENTS``.
        out: folder of the results.
        settings: of the instruments.
        rho: radius; None for the one that training would take.
        against: a second quantized model, measured likewise.
        section: options of a model name.
        bits: of a float model.
        policy: likewise.
        device: ``auto``, ``cpu``, ``cuda``.
        resume: take up what is in ``out``.
        overwrite: replace it.
    """

    target: str
    view: View
    instruments: tuple[str, ...]
    out: Path
    settings: Settings = field(default_factory=Settings)
    rho: float | None = None
    against: str | None = None
    section: ModelSection | None = None
    bits: str | None = None
    policy: Path | None = None
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False

    @property
    def named(self) -> ModelSection:
        """The model's name and its options."""
        return self.section or ModelSection(name=self.target)

    @property
    def folders(self) -> list[Path]:
        """Of the model, and of the second one."""
        return [self.out] if self.against is None else [self.out, self.out / AGAINST]


@dataclass(frozen=True)
class Measured:
    """The readings of one model."""

    facts: SubjectFacts
    readings: dict[str, Reading]

    def to_dict(self) -> dict[str, Any]:
        """Accuracies in percent."""
        return {
            "target": self.facts.target,
            "model": self.facts.model,
            "split": self.facts.split,
            "images": self.facts.images,
            "loss": self.facts.loss,
            "top1": self.facts.top1,
            "instruments": {name: reading.to_dict() for name, reading in self.readings.items()},
        }


@dataclass(frozen=True)
class Analysis:
    """What ``saq analyze`` found.

    Attributes:
        out: folder of the files.
        first: the model.
        second: the one it was compared with.
        files: written or taken up, JSON first.
    """

    out: Path
    first: Measured
    second: Measured | None
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        against = None if self.second is None else self.second.to_dict()
        return {
            "out": str(self.out),
            **self.first.to_dict(),
            "against": against,
            "files": [str(path) for path in self.files],
        }


def analyze(request: Request, progress: Progress = SILENT) -> Analysis:
    """Measure, write and draw what ``request`` asks for.

    Raises:
        SaqError: anything the user can act on; readings finished so far stay in the folder.
    """
    check_request(request)
    _check_free(request)
    device = pick_device(request.device)
    wanted = [(request.target, request.named, request.bits, request.policy)]
    if request.against is not None:
        wanted.append((request.against, ModelSection(name=request.against), None, None))
    opened = [open_subject(*one, request.view, device, progress) for one in wanted]
    settings = _with_radius(request, opened[0])
    with _alone_in(request, progress):
        return _measure(request, opened, settings, progress)


@contextmanager
def _alone_in(request: Request, progress: Progress) -> Iterator[None]:
    """Within the context no other process works in the folders, and there is nothing unfinished of an earlier one.

    Raises:
        RunDirectoryError: another process is at work there, or was in the meantime.
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
    except KeyboardInterrupt as asked:
        raise _interrupted(request, exit_code_of(asked)) from None
    except CannotWrite as error:
        raise CannotWrite(f"{error}, then give the same command and --resume") from None
    finally:
        lock.release()


def _measure(request: Request, opened: list[Opened], settings: Settings, progress: Progress) -> Analysis:
    """Once the folders are ours."""
    folders = [
        AnalysisFolder(path, facts_of(one, request.view), settings)
        for path, one in zip(request.folders, opened, strict=True)
    ]
    there = [
        {name: folder.load(name) if request.resume else None for name in request.instruments}
        for folder in folders
    ]
    measured = [
        Measured(folder.facts, _measure_all(one, folder, settings, earlier, progress))
        for one, folder, earlier in zip(opened, folders, there, strict=True)
    ]
    files = [folder.path_of(name) for folder in folders for name in request.instruments]
    names = model_names([(one.facts.model, one.facts.target) for one in measured])
    images = images_of(opened[0].score.images, request.view.split)
    with progress.task("drawing", len(request.instruments)) as task:
        for name in request.instruments:
            subjects = [(model, one.readings[name]) for model, one in zip(names, measured, strict=True)]
            files += draw(name, subjects, request.out, images)
            task.advance()
    return Analysis(request.out, measured[0], measured[1] if len(measured) > 1 else None, files)


def check_request(request: Request) -> None:
    """Refuse what can be seen to be wrong before anything is loaded.

    Raises:
        SaqError: all that is wrong, in one message.
    """
    problems = Problems()
    unknown = [name for name in request.instruments if name not in INSTRUMENTS]
    if unknown or not request.instruments:
        asked = unknown[0] if unknown else "none"
        problems.add(ConfigError(f"there is no instrument {asked!r}: choose from {', '.join(INSTRUMENTS)}"))
    problems.attempt(check_target, request.target, request.named, request.bits, request.policy)
    if request.against is not None:
        problems.attempt(_check_against, request.against)
    problems.attempt(check_images, request.view.data, request.view.split)
    grid = request.settings.grid
    if grid % 2 == 0:
        problems.add(
            ConfigError(f"--grid {grid} has no point in the middle: give an odd number, such as {grid + 1}")
        )
    if request.resume and request.overwrite:
        problems.add(
            ConfigError("--resume continues what is there and --overwrite replaces it: give one of them")
        )
    problems.attempt(check_device, request.device)
    problems.check()


def _check_against(against: str) -> None:
    named_file(find_target(against, QUANTIZED, "--against"), ModelSection(name=against))


def _check_free(request: Request) -> None:
    """Refuse to replace what was not said to be replaced."""
    if request.out.exists() and not request.out.is_dir():
        raise RunDirectoryError(f"{request.out} is a file: give another --out")
    there = [
        path
        for folder in request.folders
        for name in request.instruments
        if (path := folder / f"{name}.json").exists()
    ]
    if there and not request.resume and not request.overwrite:
        raise RunDirectoryError(
            f"{there[0]} is already there: give --resume to go on with it, --overwrite to replace it, "
            "or another --out"
        )


def _with_radius(request: Request, first: Opened) -> Settings:
    """The settings with the radius that was asked for, or that training would take for the first model."""
    rho = default_rho(first.subject.model, first.side) if request.rho is None else request.rho
    return request.settings.model_copy(update={"rho": rho})


def _measure_all(
    opened: Opened,
    folder: AnalysisFolder,
    settings: Settings,
    earlier: dict[str, Reading | None],
    progress: Progress,
) -> dict[str, Reading]:
    """Every instrument that ``earlier`` names; each is saved as soon as it is done."""
    readings: dict[str, Reading] = {}
    for name, before in earlier.items():
        if before is not None and before.finished:
            readings[name] = before
            continue
        session = Session(progress, before)
        if INSTRUMENTS[name].resumable:
            readings[name] = _measure_resumable(name, opened, folder, settings, session)
        else:
            readings[name] = INSTRUMENTS[name].measure(opened.subject, settings, session)
        _check_finite(name, readings[name], opened.target)
        folder.save(name, readings[name])
    return readings


def _check_finite(name: str, reading: Reading, target: str) -> None:
    """Refuse a reading that JSON cannot hold; points that may be NaN or infinite are None in it.

    Raises:
        ConfigError: some figure is NaN or infinite.
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
            f"{name} of {target}: {', '.join(found)} NaN or infinite on these images; "
            f"check its weights, or choose other instruments than {name}"
        )


def _measure_resumable(
    name: str, opened: Opened, folder: AnalysisFolder, settings: Settings, session: Session
) -> Reading:
    """Save what there is now and then, and when a signal asks to stop."""
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
        return INSTRUMENTS[name].measure(opened.subject, settings, session)


def _interrupted(request: Request, exit_code: int) -> Interrupted:
    saved = any(
        (folder / f"{name}.json").exists() for folder in request.folders for name in request.instruments
    )
    return Interrupted(f"the same command{' and --resume' if saved else ''}", exit_code, saved=saved)
