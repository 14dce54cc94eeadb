"""The run directory: everything a run leaves behind, enough to read, resume and repeat it.

manifest.json     who made it, from what, how it ended, and the SHA-256 of every artifact
config.json       the resolved configuration
policy.json       the bits of every layer
search.json       how they were found, where a search found them; policy.png, policy.svg, pareto.* are its pictures
metrics.jsonl     one object a line
checkpoints/      last.pt: model, optimizer, random state, position in the epoch; search.pt: a search under way
artifacts/        model.safetensors, model.onnx
report.md         what a person reads first
"""

import json
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict

from saqcli._version import __version__
from saqcli.config import RunConfig
from saqcli.errors import Interrupted, RunDirectoryError
from saqcli.io.files import replacing, write_text
from saqcli.io.weights import sha256_of
from saqcli.strict import parse_json, read_text


def _below_artifacts(name: str) -> str:
    """A name that a manifest from elsewhere may give a file, which is then opened."""
    if not re.fullmatch(r"artifacts(/[^/\\\0]+)+", name) or not {".", ".."}.isdisjoint(name.split("/")):
        raise ValueError("an artifact is a relative path below artifacts/, without '..'")
    return name


class RunManifest(BaseModel):
    """Who made this run directory, from what, and how it ended. This is ``manifest.json``.

    Attributes:
        command: as typed.
        verb: the command of saq.
        status: ``running`` also after a crash.
        started: UTC.
        versions: of saq and of what its numbers depend on.
        artifacts: relative path to SHA-256.
        results: the figures that ``saq quantize`` printed.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    command: list[str]
    verb: str = "quantize"
    status: Literal["running", "interrupted", "failed", "finished"]
    started: str
    versions: dict[str, str]
    artifacts: dict[Annotated[str, AfterValidator(_below_artifacts)], str] = {}
    results: dict[str, Any] = {}


class RunDirectory:
    """A run directory that exists."""

    def __init__(self, path: Path, verb: str = "quantize") -> None:
        """``verb`` is the command that made it."""
        self.path, self.verb = path, verb
        self.policy_path = path / "policy.json"
        self.checkpoint_path = path / "checkpoints" / "last.pt"
        self.safetensors_path = path / "artifacts" / "model.safetensors"
        self.onnx_path = path / "artifacts" / "model.onnx"
        self.report_path = path / "report.md"
        self.search_path = path / "search.json"
        self.search_state_path = path / "checkpoints" / "search.pt"

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run directory.

        Raises:
            RunDirectoryError: ``path`` is none.
        """
        if not (path / "manifest.json").is_file():
            raise RunDirectoryError(f"{path} is no run directory: it has no manifest.json")
        return cls(path)

    @classmethod
    def start(
        cls, path: Path, config: RunConfig, *, resume: bool, overwrite: bool, verb: str = "quantize"
    ) -> "RunDirectory":
        """Make ``path`` a run directory for ``config``, or go on with the one that is there.

        Raises:
            RunDirectoryError: it holds a run and neither ``resume`` nor ``overwrite`` was given, it holds
                other files, or it cannot be written.
        """
        run = cls(path, verb)
        if run.check_usable(resume=resume, overwrite=overwrite):
            if resume:
                run._update(status="running")
                return run
            run._clear()
        manifest = RunManifest(
            command=sys.argv,
            verb=verb,
            status="running",
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
        )
        write_text(path / "manifest.json", manifest.model_dump_json(indent=2) + "\n")
        write_text(path / "config.json", config.to_json())
        return run

    def check_usable(self, *, resume: bool, overwrite: bool) -> bool:
        """Whether there is a run already; to be asked before any time is spent.

        Raises:
            RunDirectoryError: as ``start``.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is a file: give another --run-dir")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return False
        if not (self.path / "manifest.json").is_file():
            raise RunDirectoryError(f"{self.path} holds other files and no run: give another --run-dir")
        there = self.manifest().verb
        if resume and there != self.verb:
            raise RunDirectoryError(
                f"{self.path} holds a run of `saq {there}`: give another --run-dir, or --overwrite to replace it"
            )
        if not resume and not overwrite and self._holds_work():
            raise RunDirectoryError(
                f"{self.path} already holds a {self.manifest().status} run: give --resume to go on with it, "
                "--overwrite to replace it, or another --run-dir"
            )
        return True

    def _holds_work(self) -> bool:
        """Whether starting over would lose anything."""
        there = self.checkpoint_path.exists() or self.search_state_path.exists() or self.search_path.exists()
        return there or self.manifest().status in ("finished", "running")

    def manifest(self) -> RunManifest:
        """What ``manifest.json`` says."""
        return parse_json(
            RunManifest, self._read("manifest.json"), f"{self.path}/manifest.json", RunDirectoryError
        )

    def config(self) -> RunConfig:
        """What ``config.json`` says."""
        return parse_json(RunConfig, self._read("config.json"), f"{self.path}/config.json", RunDirectoryError)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the context the run is ``running``; its end is noted in the manifest, whatever it is."""
        try:
            yield
        except Interrupted:
            self._update(status="interrupted")
            raise
        except KeyboardInterrupt:
            self._update(status="interrupted")
            raise Interrupted(f"stopped as asked: {self.how_to_resume()}") from None
        except BaseException:
            self._update(status="failed")
            raise

    def how_to_resume(self) -> str:
        """The command that goes on with this run."""
        return f"go on with `saq {self.verb} --run-dir {shlex.quote(str(self.path))} --resume`"

    def finish(self, results: dict[str, Any]) -> None:
        """Note the results and the hashes of all artifacts, and that the run is finished."""
        paths = sorted(path for path in (self.path / "artifacts").glob("*") if not path.name.startswith("."))
        hashes = {path.relative_to(self.path).as_posix(): sha256_of(path) for path in paths}
        self._update(status="finished", results=results, artifacts=hashes)

    def log(self, **values: Any) -> None:
        """Append one object to ``metrics.jsonl``."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by ``state``, tensors and plain values only."""
        with replacing(self.checkpoint_path) as temporary:
            torch.save(state, temporary)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, on the CPU, or None if there is none.

        Raises:
            RunDirectoryError: damaged.
        """
        return _load(self.checkpoint_path)

    def save_search(self, state: dict[str, Any]) -> None:
        """Replace the state of the search under way, tensors and plain values only."""
        with replacing(self.search_state_path) as temporary:
            torch.save(state, temporary)

    def load_search(self) -> dict[str, Any] | None:
        """The state of a search that was stopped, or None.

        Raises:
            RunDirectoryError: damaged.
        """
        return _load(self.search_state_path)

    def end_search(self) -> None:
        """The search is done: its state is not needed any more."""
        self.search_state_path.unlink(missing_ok=True)

    def _read(self, name: str) -> str:
        return read_text(self.path / name, f"{self.path / name}", RunDirectoryError)

    def _update(self, **changes: Any) -> None:
        manifest = self.manifest().model_copy(update=changes)
        write_text(self.path / "manifest.json", manifest.model_dump_json(indent=2) + "\n")

    def _clear(self) -> None:
        """Remove what a run wrote, and nothing else."""
        for name in ("checkpoints", "artifacts"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in ("policy.json", "metrics.jsonl", "report.md", "config.json", "search.json"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("policy.png", "policy.svg", "pareto.json", "pareto.csv", "pareto.png", "pareto.svg"):
            (self.path / name).unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own
        raise RunDirectoryError(
            f"{path} is damaged ({type(error).__name__}): start again with --overwrite"
        ) from None
    return state


def versions() -> dict[str, str]:
    """Of saq, Python and the libraries that the numbers depend on."""
    from importlib.metadata import version

    python = {"saq": __version__, "python": platform.python_version()}
    return python | library_versions() | {"onnxruntime": version("onnxruntime")}


def library_versions() -> dict[str, str]:
    """Of the libraries that networks are made of: what they are called and how they are built may change."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "timm")}
