"""The files of an analysis: one JSON object an instrument, with what it was measured on and how.

A file is taken up again only if model, images and settings are the same; a finished reading is then not
measured twice, and an unfinished one goes on.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from saqcli._version import __version__
from saqcli.algorithms.instruments import INSTRUMENTS, Reading, Settings
from saqcli.errors import ConfigError, RunDirectoryError
from saqcli.io.files import write_text
from saqcli.strict import json_text, parse_json, parse_object, printable, read_text
from saqcli.workflows.subjects import Opened, View

AGAINST = "against"  # folder of the second model


class SubjectFacts(BaseModel):
    """What was measured.

    Attributes:
        target: as it was named.
        model: canonical name of the network.
        sha256: of all tensors of the model.
        latent_weights: whether its float weights were there.
        split: of the data.
        images: how many.
        images_sha256: of the images, their labels and how they are batched.
        seed: of the draw of images.
        loss: mean cross-entropy on them.
        top1: percent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    model: str
    sha256: str
    latent_weights: bool
    split: Literal["train", "val"]
    images: int
    images_sha256: str
    seed: int
    loss: float
    top1: float


class AnalysisFile(BaseModel):
    """``INSTRUMENT.json``: a reading and what it was taken of.

    Attributes:
        schema_version: of the format.
        saq_version: that wrote it.
        instrument: name in ``INSTRUMENTS``.
        finished: whether nothing is left to be measured.
        subject: the model and the images.
        settings: those that the reading depends on.
        reading: of the instrument.
        sha256: of the reading; one that was changed by hand fits its schema and makes no sense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    instrument: str
    finished: bool
    subject: SubjectFacts
    settings: dict[str, Any]
    reading: dict[str, Any]
    sha256: str


def facts_of(opened: Opened, view: View) -> SubjectFacts:
    """The head of every file about ``opened``."""
    return SubjectFacts(
        target=opened.target,
        model=opened.facts.policy.model,
        sha256=opened.sha256,
        latent_weights=opened.subject.latent,
        split=view.split,
        images=opened.score.images,
        images_sha256=opened.images_sha256,
        seed=view.seed,
        loss=opened.score.loss,
        top1=opened.score.top1,
    )


class AnalysisFolder:
    """The files about one subject."""

    def __init__(self, path: Path, facts: SubjectFacts, settings: Settings) -> None:
        self.path, self.facts = path, facts
        self._settings = settings.model_dump(mode="json")

    def path_of(self, name: str) -> Path:
        """Where the reading of an instrument is kept."""
        return self.path / f"{name}.json"

    def save(self, name: str, reading: Reading) -> None:
        """Write a reading, finished or not, as one act."""
        tree = json.loads(reading.model_dump_json())
        file = AnalysisFile(
            saq_version=__version__,
            instrument=name,
            finished=reading.finished,
            subject=self.facts,
            settings=self._settings_of(name),
            reading=tree,
            sha256=_sha256(tree),
        )
        write_text(self.path_of(name), to_text(json.loads(file.model_dump_json())))

    def load(self, name: str) -> Reading | None:
        """The reading that is there, or None.

        Raises:
            RunDirectoryError: damaged, foreign, or of another version; it says what to do.
            ConfigError: taken of another model, of other images, or with other settings.
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
            raise RunDirectoryError(f"{error}: remove it to measure it again, or give --overwrite") from None
        if file.instrument != name:
            raise RunDirectoryError(
                f"{path} holds a reading of another instrument: give --overwrite to replace it"
            )
        difference = self._difference(file)
        if difference:
            raise ConfigError(
                f"{path} was measured otherwise ({difference}): give --resume the same model and settings, "
                "--overwrite, or another --out"
            )
        if _sha256(file.reading) != file.sha256 or reading.finished != file.finished:
            raise RunDirectoryError(
                f"{path} was changed after it was written: give --overwrite to measure anew"
            )
        return reading

    def _settings_of(self, name: str) -> dict[str, Any]:
        return {key: self._settings[key] for key in INSTRUMENTS[name].settings}

    def _difference(self, file: AnalysisFile) -> str | None:
        """The first thing that was not as it is now."""
        now = self._settings_of(file.instrument) if file.instrument in INSTRUMENTS else {}
        if file.subject.sha256 != self.facts.sha256:
            return f"another model, {printable(file.subject.target, 100)}"
        if file.subject.images_sha256 != self.facts.images_sha256:
            return "other images or another batch size"
        for key in sorted({*now, *file.settings}):
            if now.get(key) != file.settings.get(key):
                return printable(f"{key}: {file.settings.get(key)} -> {now.get(key)}", 200)
        return None


def to_text(tree: dict[str, Any]) -> str:
    """JSON with a line for every list of plain values."""
    text = json_text(tree, indent=2)
    return re.sub(r"\[\n[^\[\]{}]*\]", lambda found: _one_line(found[0]), text) + "\n"


def _sha256(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(tree, sort_keys=True).encode()).hexdigest()


def _one_line(text: str) -> str:
    return "[" + re.sub(r"\n\s*", " ", text[1:-1]).strip() + "]"
